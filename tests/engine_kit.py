"""Small engines for the tests: checkpoints, an engine on them, and what it says."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from stackrace.backends import checkpoint
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla.scheduler import Work
from stackrace.backends.mla.sequence import Sampling, Sequence

CONF = Path(checkpoint.__file__).parents[1] / "conf" / "model"
SMALL = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512, "num_attention_heads": 4}
SMALL |= {"num_hidden_layers": 3, "num_key_value_heads": 4, "n_routed_experts": 8, "moe_intermediate_size": 64}
GREEDY = Sampling(temperature=0, seed=0)
ROPE = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64}
YARN = ROPE | {"type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707}


def published(name: str) -> dict[str, Any]:
    """config.json's content as conf/model/<name>.yaml has it."""
    config: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())["config"]
    return config


def make(folder: Path, changes: Mapping[str, Any], base: str = "tiny") -> Path:
    """A small checkpoint with the architecture of conf/model/<base>.yaml."""
    config = published(base) | SMALL | {"initializer_range": 0.1} | changes
    checkpoint.make(config, folder / "model", 3, 10_000_000, "cpu")
    return folder / "model"


def build(
    path: Path, attention: str, budget: int = 64, dtype: str = "float32", **changes: int | bool
) -> engines.Engine:
    settings = engines.Settings(
        checkpoint=path,
        attention=attention,
        dtype=dtype,
        device="cpu",
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        max_model_len=512,
        kv_cache_memory_bytes=60_000_000,
        enable_prefix_caching=False,
    )
    return engines.build(settings._replace(**changes), checkpoint.check(path))


def generate(engine: engines.Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    for index, tokens in enumerate(prompts):
        engine.submit(Sequence(str(index), tokens, count, GREEDY, frozenset()))
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    while not engine.idle:
        for event in engine.step():
            outputs[event.id].append(event.token)
    return list(outputs.values())


def logits(engine: engines.Engine, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits after each chunk of one sequence."""
    sequence = Sequence("x", tokens, 1, GREEDY, frozenset())
    sequence.pages = engine.scheduler.pool.take(len(tokens) // 64 + 1)
    rows = []
    for count in chunks:
        sequence.tokens = tokens[: sequence.num_computed + count]
        rows.append(engine.runner.logits([Work(sequence, count)])[-1])
        sequence.num_computed += count
    engine.scheduler.pool.give_back(sequence.pages)
    return torch.stack(rows)


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(512) for _ in range(length)]

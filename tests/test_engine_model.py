"""The engine's numbers: against transformers, and against itself whatever the batch, the chunks or the cache."""

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import DeepseekV2ForCausalLM

from stackrace.backends import checkpoint
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla.sampler import sample
from stackrace.backends.mla.scheduler import Sequence, Work
from stackrace.harness.types import Sampling

CONF = Path(engines.__file__).parents[2] / "conf" / "model" / "tiny.yaml"
SMALL = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512, "num_attention_heads": 4}
SMALL |= {"num_hidden_layers": 3, "num_key_value_heads": 4, "n_routed_experts": 8, "moe_intermediate_size": 64}
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
ROPE = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64}
YARN = ROPE | {"type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707}
VARIANTS: dict[str, dict[str, Any]] = {
    "lite": {"rope_scaling": YARN},
    "mscale": {"rope_scaling": YARN | {"mscale": 1.0}},
    "plain": {"rope_scaling": None, "max_position_embeddings": 1024},
    "routing": {"rope_scaling": YARN, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3},
    "q_lora": {"rope_scaling": YARN, "q_lora_rank": 96},
    "dense": {"rope_scaling": YARN, "first_k_dense_replace": 2, "n_shared_experts": 1},
}


def make(folder: Path, changes: Mapping[str, Any]) -> Path:
    config = yaml.safe_load(CONF.read_text())["config"] | SMALL | {"initializer_range": 0.1} | changes
    checkpoint.make(config, folder / "model", 3, 10_000_000, "cpu")
    return folder / "model"


def build(path: Path, attention: str, budget: int = 64, dtype: str = "float32") -> engines.Engine:
    settings = engines.Settings(
        checkpoint=path,
        attention=attention,
        dtype=dtype,
        device="cpu",
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        max_model_len=512,
        kv_cache_memory_bytes=60_000_000,
    )
    return engines.build(settings, checkpoint.check(path))


def generate(engine: engines.Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    for index, prompt in enumerate(prompts):
        engine.submit(Sequence(str(index), prompt, count, GREEDY, frozenset()))
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    while not engine.idle:
        for event in engine.step():
            outputs[event.id].append(event.token)
    return list(outputs.values())


def logits(engine: engines.Engine, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits after each chunk of one sequence."""
    sequence = Sequence("x", tokens, 1, GREEDY, frozenset())
    sequence.pages = engine.scheduler.pool.take(sequence.pages_needed)
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


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("lite"), VARIANTS["lite"])


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    path = make(tmp_path, VARIANTS[name])
    theirs = DeepseekV2ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    tokens = prompt(150, seed=1)  # past the 64 positions before YaRN stretches
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    for attention in ("mla", "mha"):
        engine = build(path, attention)
        steps = logits(engine, tokens, [70, *[1] * 10, 60, *[1] * 10])
        rows = [69, *range(70, 80), 139, *range(140, 150)]
        assert (steps - expected[rows]).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_chunks_and_steps_give_the_same_logits(lite: Path, attention: str) -> None:
    engine = build(lite, attention, dtype="float64")
    tokens = prompt(200, seed=2)
    whole = logits(engine, tokens, [200])[-1]
    for chunks in ([64, 64, 64, 8], [1] * 200, [199, 1], [2, 127, 1, 70]):
        assert (logits(engine, tokens, chunks)[-1] - whole).abs().max() <= 1e-9 * whole.abs().max()


def test_both_caches_give_the_same_logits(lite: Path) -> None:
    tokens = prompt(200, seed=3)
    chunks = [100, *[1] * 20, 70, *[1] * 10]
    mla, mha = (logits(build(lite, attention, dtype="float64"), tokens, chunks) for attention in ("mla", "mha"))
    assert (mla - mha).abs().max() <= 1e-9 * mla.abs().max()


def test_greedy_tokens_depend_on_nothing_but_the_prompt(lite: Path) -> None:
    prompts = [prompt(length, seed=length) for length in (1, 3, 64, 65, 130, 200, 17, 33, 90, 128)]
    alone = [generate(build(lite, "mla", budget=512), [p], 12)[0] for p in prompts]
    assert len({tuple(tokens) for tokens in alone}) == len(prompts)
    for attention in ("mla", "mha"):
        for budget in (8, 50, 512):
            assert generate(build(lite, attention, budget), prompts, 12) == alone


def test_bfloat16_stays_close(lite: Path) -> None:
    tokens = prompt(100, seed=4)
    exact = torch.log_softmax(logits(build(lite, "mla"), tokens, [90, *[1] * 10]), -1)
    for attention in ("mla", "mha"):
        rounded = torch.log_softmax(logits(build(lite, attention, dtype="bfloat16"), tokens, [90, *[1] * 10]), -1)
        assert (exact - rounded).abs().mean() < 0.06


def test_sampling_follows_the_seed_whatever_the_batch(lite: Path) -> None:
    def run(budget: int, company: int) -> list[int]:
        engine = build(lite, "mla", budget)
        hot = Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=7)
        engine.submit(Sequence("hot", prompt(20, seed=5), 16, hot, frozenset()))
        for index in range(company):
            engine.submit(Sequence(str(index), prompt(30 + index, seed=index), 10, GREEDY, frozenset()))
        tokens = []
        while not engine.idle:
            tokens += [event.token for event in engine.step() if event.id == "hot"]
        return tokens

    assert run(64, 0) == run(64, 0) == run(9, 5)


def test_abort_frees_pages_mid_flight(lite: Path) -> None:
    engine = build(lite, "mla")
    pool = engine.scheduler.pool
    for index in range(10):  # more than may run at once
        engine.submit(Sequence(str(index), prompt(40, seed=index), 100, GREEDY, frozenset()))
    for _ in range(3):
        engine.step()
    assert pool.num_free < pool.num_pages
    for index in range(10):
        engine.abort(str(index))
    assert engine.idle
    assert pool.num_free == pool.num_pages
    assert engine.step() == []


def frequencies(settings: Sampling, logits: list[float]) -> list[float]:
    """How often each token is drawn by 10,000 evenly spread draws."""
    count = 10_000
    row = torch.tensor([logits]).expand(count, -1)
    tokens = sample(row, [settings] * count, [(index + 0.5) / count for index in range(count)])
    return [tokens.count(token) / count for token in range(len(logits))]


def test_sampling_draws_from_the_distribution() -> None:
    chances = [0.1, 0.4, 0.05, 0.25, 0.2]
    logits = [math.log(chance) + 3 for chance in chances]
    plain = Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=0)
    cases = {
        plain: chances,
        replace(plain, temperature=0.5): [chance**2 / sum(c**2 for c in chances) for chance in chances],
        replace(plain, top_k=2): [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0],
        replace(plain, top_p=0.6): [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0],  # the token that reaches 0.6 is kept
        replace(plain, top_p=0.01): [0, 1, 0, 0, 0],
        replace(plain, top_k=3, top_p=0.5): [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0],
        replace(plain, temperature=0): [0, 1, 0, 0, 0],
    }
    for settings, expected in cases.items():
        assert frequencies(settings, logits) == pytest.approx(expected, abs=2e-4)


def test_each_row_is_sampled_by_its_own_settings() -> None:
    greedy, hot = GREEDY, Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=0)
    logits = torch.tensor([[0.0, 1.0, 0.0]]).expand(3, -1)
    assert sample(logits, [hot, greedy, hot], [0.999999, 0.0, 0.0]) == [2, 1, 1]

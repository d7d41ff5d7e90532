"""Every architecture's logits against transformers, after prompt chunks and decode steps, for each cache."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_kit import ROPE, YARN, build, logits, make, prompt, published

from stackrace.backends import architectures, checkpoint
from stackrace.backends.mla import cache
from stackrace.backends.mla.config import parse
from stackrace.backends.mla.model import Model
from stackrace.backends.mla.weights import load
from stackrace.harness import models
from stackrace.harness.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
V3_YARN = {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}
PLAIN = {"rope_scaling": None, "max_position_embeddings": 1024}
GQA = {"head_dim": 48, "num_key_value_heads": 2}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "head_dim": 32}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2 lite": ("tiny", {"rope_scaling": YARN}),
    "v2 mscale": ("tiny", {"rope_scaling": YARN | {"mscale": 1.0}}),
    "v2 plain": ("tiny", PLAIN),
    "v2 scale": ("tiny", {"rope_scaling": YARN, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3}),
    "v2 groups": ("tiny", GROUPS | PLAIN | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}),
    "v2 q_lora": ("tiny", {"rope_scaling": YARN, "q_lora_rank": 96}),
    "v2 dense": ("tiny", {"rope_scaling": YARN, "first_k_dense_replace": 2, "n_shared_experts": 1}),
    "v3": ("tiny_v3", V3_YARN),
    "v3 no q_lora": (
        "tiny_v3",
        PLAIN | {"q_lora_rank": None, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "v3 no dense": ("tiny_v3", V3_YARN | {"first_k_dense_replace": 0, "norm_topk_prob": False}),
    "v3 half-split": ("tiny_v3", V3_YARN | {"rope_interleave": False, "tie_word_embeddings": True}),
    "gqa": ("tiny_gqa", GQA),
    "mqa": ("tiny_gqa", {"num_key_value_heads": 1, "head_dim": None, "tie_word_embeddings": True}),
    "mha": ("tiny_mha", {"head_dim": 144, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("tiny_gqa", GQA | {"rope_scaling": LLAMA3}),
    "linear": ("tiny_gqa", GQA | {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "yarn": ("tiny_gqa", GQA | {"rope_scaling": ROPE | {"rope_type": "yarn"}}),
    "attention_factor": ("tiny_gqa", GQA | {"rope_scaling": ROPE | {"rope_type": "yarn", "attention_factor": 0.7}}),
    "qwen2": ("tiny_gqa", QWEN | {"rope_theta": 1000000.0}),
    "qwen2 tied": ("tiny_gqa", QWEN | {"tie_word_embeddings": True, "rope_scaling": ROPE | {"type": "yarn"}}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    base, changes = VARIANTS[name]
    path = make(tmp_path, changes, base)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    tokens = prompt(150, seed=1)  # past the 64 positions before stretching
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    for attention in architectures.kv_widths(published(base)):
        steps = logits(build(path, attention), tokens, [70, *[1] * 10, 60, *[1] * 10])
        rows = [69, *range(70, 80), 139, *range(140, 150)]
        assert (steps - expected[rows]).abs().max() <= 1e-4 * expected.abs().max()


PUBLISHED = {  # parameters, as the checkpoints on Hugging Face count them; cache bytes a token in bf16
    "dsv2_lite": (15_706_484_224, {"mla": 31_104, "mha": 276_480}),
    "dsv2": (235_741_434_880, {"mla": 69_120, "mha": 4_915_200}),
    "dsv3": (671_026_419_200, {"mla": 70_272, "mha": 4_997_120}),
    # its checkpoint counts 64 more a layer
    "moonlight": (15_960_110_208, {"mla": 31_104, "mha": 276_480}),
    "llama3_8b": (8_030_261_248, {"gqa": 131_072}),
    "qwen2_7b": (7_615_616_512, {"gqa": 57_344}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_as_published(name: str) -> None:
    config, (count, kv_bytes) = published(name), PUBLISHED[name]
    shapes = architectures.tensor_shapes(config)
    biases = [key for key in shapes if key.endswith("e_score_correction_bias")]  # transformers' are buffers
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    their_biases = [b for key, b in theirs.named_buffers() if key.endswith("e_score_correction_bias")]
    assert [tuple(bias.shape) for bias in their_biases] == [shapes[key] for key in biases]
    assert sum(p.numel() for p in [*theirs.parameters(), *their_biases]) == count
    for attention, expected in kv_bytes.items():
        model = Model(parse(config), attention, 16, torch.bfloat16, torch.device("meta"))
        assert {key: tuple(place.shape) for key, place in model.destinations().items()} == shapes
        assert cache.token_bytes(parse(config), attention, torch.bfloat16) == expected
    widths = architectures.kv_widths(config)
    assert {kind: 2 * width * config["num_hidden_layers"] for kind, width in widths.items()} == kv_bytes


def work(name: str) -> int:
    """Multiplications for a token outside of the attention itself and the lookup, routing included."""
    config = published(name)
    shapes = architectures.tensor_shapes(config)
    hit = config.get("num_experts_per_tok", 0)
    idle = [f".experts.{expert}." for expert in range(hit, config.get("n_routed_experts", 0))]
    ran = [shape for key, shape in shapes.items() if len(shape) == 2 and not any(part in key for part in idle)]
    return sum(rows * columns for rows, columns in ran) - config["vocab_size"] * config["hidden_size"]


@pytest.mark.parametrize("name", ["tiny_gqa", "tiny_mha"])
def test_the_small_llamas_match_tiny_in_cache_and_work(name: str) -> None:
    assert architectures.kv_widths(published(name))["gqa"] == architectures.kv_widths(published("tiny"))["mla"] == 576
    assert work(name) == pytest.approx(work("tiny"), rel=0.005)


def test_inspect_tells_what_each_kind_of_attention_caches(tmp_path: Path) -> None:
    told = models.inspect(make(tmp_path, {"head_dim": 48, "num_key_value_heads": 2}, "tiny_gqa"), False, "cpu")
    assert told.endswith("KV cache as gqa: 192 values a token and layer, 1,152 bytes a token in bf16")


def test_each_model_takes_its_own_kinds_of_attention() -> None:
    for base, attention, kinds in (("tiny", "gqa", "mla or mha"), ("tiny_gqa", "mla", "gqa")):
        with pytest.raises(UsageError, match=f"attention '{attention}' .* takes {kinds}"):
            cache.token_bytes(parse(published(base)), attention, torch.float32)


UNSUPPORTED: list[tuple[str, str, object, str]] = [
    ("tiny", "hidden_act", "gelu", "only 'silu' is"),
    ("tiny", "topk_method", "noaux_tc", "only 'greedy' or 'group_limited_greedy' is"),
    ("tiny", "attention_bias", True, "only False is"),
    ("tiny", "norm_topk_prob", True, "only False is"),
    ("tiny", "rope_interleave", False, "only True is"),
    ("tiny", "quantization_config", {"fmt": "e4m3"}, "use a bf16 checkpoint"),
    ("tiny_v3", "scoring_func", "softmax", "only 'sigmoid' is"),
    ("tiny_v3", "n_group", 3, "is no choice among n_routed_experts 16"),
    ("tiny_v3", "n_group", 16, "is no choice"),
    ("tiny_v3", "topk_group", 5, "is no choice"),
    ("tiny_v3", "num_experts_per_tok", 9, "is no choice"),
    ("tiny_gqa", "sliding_window", 4096, "only None is"),
    ("tiny_gqa", "num_key_value_heads", 3, "num_attention_heads 8 is no multiple of"),
    ("qwen2_7b", "use_sliding_window", True, "only False is"),
]


@pytest.mark.parametrize(("base", "key", "value", "told"), UNSUPPORTED)
def test_what_cannot_be_computed_is_named(base: str, key: str, value: object, told: str) -> None:
    with pytest.raises(UsageError, match=key) as caught:
        parse(published(base) | {key: value})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_kinds_of_rope_are_named() -> None:
    with pytest.raises(UsageError, match="rope_type 'dynamic' is not supported; only 'default' or 'linear'"):
        parse(published("tiny") | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})


def test_both_rope_spellings() -> None:
    for name in ("tiny", "llama3_8b"):
        old = published(name)
        new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
        scaling = dict(old["rope_scaling"])
        kind = scaling.pop("type", None) or scaling.pop("rope_type")
        new["rope_parameters"] = scaling | {"rope_type": kind, "rope_theta": old["rope_theta"]}
        assert parse(old) == parse(new)


def test_a_published_checkpoint_may_hold_more_and_other_types(tmp_path: Path) -> None:
    """A layer that predicts a second token is passed over, and the correction stays float32 in a bf16 model."""
    path = make(tmp_path, {"num_hidden_layers": 4})
    whole = checkpoint.check(path)
    config = dict(whole.config) | {"num_hidden_layers": 3}
    with pytest.raises(UsageError, match=r"knows no tensor model\.layers\.3"):
        checkpoint.check(rewritten(path, config))
    found = checkpoint.check(rewritten(path, config | {"num_nextn_predict_layers": 1}))
    assert found.tensors.keys() == architectures.tensor_shapes(config).keys()
    model = Model(parse(found.config), "mla", 16, torch.bfloat16, torch.device("cpu"))
    load(found, model.destinations())
    v3 = Model(parse(published("tiny_v3")), "mla", 16, torch.bfloat16, torch.device("meta"))
    assert v3.destinations()["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert replace(parse(config), num_layers=4) == parse(whole.config)


def rewritten(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path

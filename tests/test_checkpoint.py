"""Seeded checkpoints: the same bits anywhere, whole or absent, and readable by every stack."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_kit import published
from safetensors import safe_open

from stackrace.backends import checkpoint, seeded
from stackrace.backends.mla.config import parse
from stackrace.backends.mla.model import Model
from stackrace.backends.mla.weights import load
from stackrace.harness.errors import UsageError

SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "n_routed_experts": 4, "moe_intermediate_size": 32}


def make(out: Path, seed: int = 0, shard_bytes: int = 300_000) -> checkpoint.Checkpoint:
    return checkpoint.make(published("tiny") | SMALL, out, seed, shard_bytes, "cpu")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small") / "model").path


def test_bits_are_those_of_this_generator() -> None:
    """Changing them must change `seeded.GENERATOR` too: results on disk are keyed by it."""
    table = seeded.quantile_table(0.02, "cpu")
    values = seeded.seeded_normal(0, "lm_head.weight", 0, 100_000, table)
    digest = hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()
    assert (seeded.GENERATOR, digest[:16]) == ("stackrace-1", "7a49b88cdd7135ac")
    assert values[:4].tolist() == [-0.0150146484375, -0.005584716796875, -0.00830078125, -0.0174560546875]


def test_bits_follow_the_documented_hash() -> None:
    def word(counter: int) -> int:
        digest = hashlib.sha256(b"5:some.weight").digest()
        z = (counter * 0x9E3779B97F4A7C15 + int.from_bytes(digest[:8], "little")) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    table = torch.arange(65536, dtype=torch.float64)
    values = seeded.seeded_normal(5, "some.weight", 4000, 403, table).tolist()
    for offset, value in enumerate(values):
        counter, lane = divmod(4000 + offset, 4)
        signed = ((word(counter) >> (16 * lane)) & 0xFFFF) ^ 0x8000
        assert value == signed


def test_bits_depend_on_no_chunk_shard_or_order(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeded, "CHUNK", 1 << 10)
    other = make(tmp_path / "one", shard_bytes=1 << 40)
    assert len(list(other.path.glob("*.safetensors"))) == 1 < len(list(small.glob("*.safetensors")))
    expected, found = tensors(small), tensors(other.path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert other.identity == checkpoint.check(small).identity


def test_seeds_and_names_give_other_bits(small: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", seed=1)
    assert other.identity != checkpoint.check(small).identity
    first, second = tensors(small), tensors(other.path)
    matrices = [name for name, tensor in first.items() if tensor.dim() == 2]
    assert not any(torch.equal(first[name], second[name]) for name in matrices)
    same_shape = first["model.embed_tokens.weight"], first["lm_head.weight"]
    assert same_shape[0].shape == same_shape[1].shape
    assert abs(torch.corrcoef(torch.stack([t.flatten().float() for t in same_shape]))[0, 1]) < 0.03


def test_values_are_normal() -> None:
    values = seeded.seeded_normal(0, "x", 0, 1 << 20, seeded.quantile_table(0.02, "cpu")).double() / 0.02
    assert abs(values.mean()) < 0.005
    assert abs(values.var() - 1) < 0.01
    assert abs(values.pow(4).mean() - 3) < 0.05
    assert values.abs().max() < 4.5
    for lag in (1, 4, 64):
        assert abs((values[:-lag] * values[lag:]).mean()) < 0.005
    within = [(values.abs() < bound).double().mean().item() for bound in (1, 2, 3)]
    assert within == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.003)


def test_norms_are_one(small: Path) -> None:
    vectors = [tensor for tensor in tensors(small).values() if tensor.dim() == 1]
    assert len(vectors) == 2 * 3 + 1
    assert all(tensor.eq(1).all() and tensor.dtype == torch.bfloat16 for tensor in vectors)


def test_biases_are_normal_too(tmp_path: Path) -> None:
    config = published("tiny_mha") | {"attention_bias": True, "num_hidden_layers": 1}
    made = checkpoint.make(config, tmp_path / "model", 0, 1 << 40, "cpu")
    biases = {name: tensor.double() for name, tensor in tensors(made.path).items() if name.endswith("bias")}
    assert sorted(name.split(".")[-2] for name in biases) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    for name, bias in biases.items():
        expected = seeded.seeded_normal(0, name, 0, len(bias), seeded.quantile_table(0.02, "cpu"))
        assert torch.equal(bias, expected.double())
        assert bias.std() == pytest.approx(0.02, rel=0.15)


def test_identity_and_bits_of_earlier_checkpoints_are_kept(small: Path) -> None:
    """Results on disk name this identity."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors(small).items()):
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    assert (checkpoint.check(small).identity, digest.hexdigest()[:16]) == ("bed1f0c97ca67b73", "162415d0399dc1b7")


def test_transformers_loads_model_and_tokenizer(small: Path) -> None:
    model, report = transformers.DeepseekV2ForCausalLM.from_pretrained(small, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(model.lm_head.weight, tensors(small)["lm_head.weight"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    assert tokenizer("t5 t11 t299").input_ids == [5, 11, 299]
    assert tokenizer.decode([5, 11, 299]) == "t5 t11 t299"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_facts(small: Path) -> None:
    found = checkpoint.check(small)
    assert found.num_parameters == sum(tensor.numel() for tensor in tensors(small).values())
    assert found.num_bytes == sum(path.stat().st_size for path in small.glob("*.safetensors"))
    assert found.kv_bytes_per_token("mla", 2) == 2 * 576 * 2
    assert found.kv_bytes_per_token("mha", 2) == 2 * 2 * 320 * 2


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def drop_last_tensor(folder: Path) -> None:
    """Rewrite the last shard without its last tensor."""
    shard = max(folder.glob("*.safetensors"))
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    _, entry = header.popitem()
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :][: entry["data_offsets"][0]])


def truncate(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(size)


SHARD = "model-00002-of-*.safetensors"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "other model": (
        lambda folder: edit(folder / "config.json", lambda c: c.update(model_type="mamba")),
        "model_type 'mamba' is not supported",
    ),
    "key": (lambda folder: edit(folder / "config.json", lambda c: c.pop("kv_lora_rank")), "'kv_lora_rank'"),
    "other width": (
        lambda folder: edit(folder / "config.json", lambda c: c.update(vocab_size=301)),
        "model.embed_tokens.weight is [300, 64] where config.json wants [301, 64]",
    ),
    "fewer layers": (
        lambda folder: edit(folder / "config.json", lambda c: c.update(num_hidden_layers=1)),
        "config.json knows no tensor model.layers.1.",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no shard": (lambda folder: next(folder.glob(SHARD)).unlink(), "the shard model-00002-of-"),
    "truncated": (lambda folder: truncate(next(folder.glob(SHARD)), 2000), "2000 bytes where its header says"),
    "empty": (lambda folder: truncate(next(folder.glob(SHARD)), 0), "no safetensors header"),
    "no tensor": (drop_last_tensor, "the tensor lm_head.weight is missing"),
    "no index": (lambda folder: (folder / seeded.INDEX).unlink(), "the shard model.safetensors is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_in_one_line(fault: str, tmp_path: Path) -> None:
    make(tmp_path / "model")
    spoil, expected = FAULTS[fault]
    spoil(tmp_path / "model")
    with pytest.raises(UsageError) as caught:
        checkpoint.check(tmp_path / "model")
    assert expected in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        checkpoint.check(tmp_path / "none")


def test_checking_needs_no_torch(small: Path) -> None:
    code = f"""
import sys; from pathlib import Path; from stackrace.backends import checkpoint
checkpoint.check(Path({str(small)!r})); assert 'torch' not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_load_strictly(small: Path) -> None:
    found = checkpoint.check(small)
    model = Model(parse(found.config), "mla", 16, torch.float32, torch.device("cpu"))
    load(found, model.destinations())
    expected = tensors(small)
    assert all(torch.equal(place, expected[name].float()) for name, place in model.destinations().items())
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    places = model.destinations()
    with pytest.raises(UsageError, match=r"extra\.weight is missing"):
        load(found, places | {"extra.weight": torch.empty(1)})
    with pytest.raises(UsageError, match=r"lm_head\.weight is not part"):
        load(found, {name: place for name, place in places.items() if name != "lm_head.weight"})
    with pytest.raises(UsageError, match=r"lm_head\.weight is \[300, 64\] where the model wants \[1\]"):
        load(found, places | {"lm_head.weight": torch.empty(1)})


def test_a_killed_make_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(seeded, "_write_tensor", die)
        with pytest.raises(KeyboardInterrupt):
            make(out)
    assert not out.exists()
    (tmp_path / "model.partial" / "stale").write_text("of another make")
    make(out)
    assert not (out / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UsageError, match="exists already"):
        make(out)


def test_two_makes_do_not_mix(tmp_path: Path) -> None:
    partial = tmp_path / "model.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="being made by another process"):
        make(tmp_path / "model")
    os.close(lock)

"""Checkpoints every stack can load: making seeded random ones, and checking any before an engine starts."""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackrace.backends import seeded
from stackrace.backends.seeded import INDEX, Shape
from stackrace.harness.errors import UsageError

MODEL_TYPES = ("deepseek_v2",)
SINGLE = "model.safetensors"
AGAIN = "make or copy the checkpoint again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is; `dtype` is safetensors' name for it (BF16)."""

    shard: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that was found whole."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    num_bytes: int  # of all shards
    num_parameters: int
    identity: str  # names the weights: equal for equal bits, whatever the shard size

    def kv_bytes_per_token(self, attention: str, element_bytes: int) -> int:
        """Cache bytes one token takes in all layers; `attention` is mla (latents) or mha (expanded)."""
        return int(self.config["num_hidden_layers"]) * kv_width(self.config, attention) * element_bytes


def kv_width(config: Mapping[str, Any], attention: str) -> int:
    """Numbers cached for one token in one layer."""
    if attention == "mla":
        return int(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
    return int(config["num_attention_heads"] * head)


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every tensor a checkpoint with this config holds, in forward order. KeyError: a key lacks."""
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in _attention_shapes(config)}
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        moe = layer >= config["first_k_dense_replace"]
        mlp = _moe_shapes(config) if moe else _mlp_shapes("", hidden, config["intermediate_size"])
        shapes |= {f"{prefix}mlp.{name}.weight": shape for name, shape in mlp}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _attention_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_rank = config["q_lora_rank"]
    if q_rank is None:
        yield "q_proj", (heads * (nope + rope), hidden)
    else:
        yield "q_a_proj", (q_rank, hidden)
        yield "q_a_layernorm", (q_rank,)
        yield "q_b_proj", (heads * (nope + rope), q_rank)
    yield "kv_a_proj_with_mqa", (rank + rope, hidden)
    yield "kv_a_layernorm", (rank,)
    yield "kv_b_proj", (heads * (nope + value), rank)
    yield "o_proj", (hidden, heads * value)


def _moe_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    yield "gate", (config["n_routed_experts"], hidden)
    for expert in range(config["n_routed_experts"]):
        yield from _mlp_shapes(f"experts.{expert}.", hidden, width)
    yield from _mlp_shapes("shared_experts.", hidden, width * config["n_shared_experts"])


def _mlp_shapes(prefix: str, hidden: int, width: int) -> list[tuple[str, Shape]]:
    wide, narrow = (width, hidden), (hidden, width)
    return [(prefix + "gate_proj", wide), (prefix + "up_proj", wide), (prefix + "down_proj", narrow)]


def check(path: Path) -> Checkpoint:
    """What `path` holds, read from its headers alone (no weights, no torch).

    UsageError, one line with the remedy, where a folder, file or tensor lacks or is not what the config says.
    """
    if not path.is_dir():
        raise UsageError(f"no checkpoint at {path}: no such folder; make it first, or correct the path")
    config = _read_json(path / "config.json")
    shapes = _expected_shapes(config, path / "config.json")
    _read_json(path / "tokenizer.json")
    index = _read_json(path / INDEX) if (path / INDEX).exists() else {}
    shards = sorted(set(index["weight_map"].values())) if index else [SINGLE]
    headers = {shard: _read_header(path / shard) for shard in shards}
    tensors = {
        name: TensorInfo(shard, entry["dtype"], tuple(entry["shape"]))
        for shard, header in headers.items()
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _compare(path, shapes, tensors)
    sizes = {shard: (path / shard).stat().st_size for shard in shards}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    identity = _identity(config, index.get("metadata", {}), {"headers": headers, "sizes": sizes})
    return Checkpoint(path, config, tensors, sum(sizes.values()), parameters, identity)


def _expected_shapes(config: Mapping[str, Any], where: Path) -> dict[str, Shape]:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        supported = " or ".join(MODEL_TYPES)
        raise UsageError(f"{where}: model_type {model_type!r} is not supported; {supported} is")
    try:
        return tensor_shapes(config)
    except KeyError as error:
        raise UsageError(f"{where}: the key {error} lacks; add it") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path.parent}: {path.name} is missing; {AGAIN}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}); {AGAIN}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object; {AGAIN}")
    return content


def _read_header(shard: Path) -> dict[str, Any]:
    """A safetensors file's header, once its size agrees: 8 bytes of length, the header, the tensors."""
    if not shard.is_file():
        raise UsageError(f"{shard.parent}: the shard {shard.name} is missing; {AGAIN}")
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if length < size else b"")
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{shard}: no safetensors header; {AGAIN}") from None
    wanted = 8 + length + end
    if size != wanted:
        raise UsageError(f"{shard}: {size} bytes where its header says {wanted}; {AGAIN}")
    return dict(header)


def _compare(path: Path, shapes: Mapping[str, Shape], tensors: Mapping[str, TensorInfo]) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise UsageError(f"{path}: the tensor {name} is missing; {AGAIN}")
        if tensors[name].shape != shape:
            found, wanted = list(tensors[name].shape), list(shape)
            raise UsageError(f"{path}: {name} is {found} where config.json wants {wanted}; correct either")
    for name in tensors.keys() - shapes.keys():
        raise UsageError(f"{path}: config.json knows no tensor {name}; remove it or correct config.json")


def _identity(config: Mapping[str, Any], metadata: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Sixteen hex digits. Seeded weights follow from config and seed; headers and sizes tell others."""
    seeded = {key: metadata[key] for key in ("generator", "seed") if key in metadata}
    source = {"config": config, "weights": seeded if len(seeded) == 2 else manifest}
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def make(config: Mapping[str, Any], out: Path, seed: int, shard_bytes: int, device: str) -> Checkpoint:
    """Write a seeded random checkpoint in bf16 to the new folder `out`, and check it.

    `config` is config.json's content as a plain mapping; matrices are N(0, initializer_range), norms 1.
    `device` computes the bits, which are the same on any. Everything is written to `out`.partial and renamed
    at the end, so that a killed make leaves nothing that looks whole. UsageError: `out` exists, or another
    process is making it.
    """
    shapes = _expected_shapes(config, out / "config.json")
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        _claim(lock, out, partial)
        _write_small_files(partial, config)
        seeded.write(partial, shapes, config["initializer_range"], seed, shard_bytes, device)
        partial.rename(out)
    finally:
        os.close(lock)
    return check(out)


def _claim(lock: int, out: Path, partial: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{out} is being made by another process; wait for it") from None
    if out.exists():
        raise UsageError(f"{out} exists already; remove it, or use it as it is")
    for leftover in partial.iterdir():  # of a make that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _write_small_files(folder: Path, config: Mapping[str, Any]) -> None:
    bos, eos = config["bos_token_id"], config["eos_token_id"]
    contents = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos},
        "tokenizer.json": _tokenizer(config["vocab_size"], {0: "<unk>", bos: "<s>", eos: "</s>"}),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=None if name == "tokenizer.json" else 2) + "\n")


def _tokenizer(vocab_size: int, special: Mapping[int, str]) -> dict[str, Any]:
    """tokenizer.json in which token i is the word `t{i}`: a prompt of n words has exactly n tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = {special.get(token, f"t{token}"): token for token in range(vocab_size)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": word} | flags for token, word in sorted(special.items())],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }

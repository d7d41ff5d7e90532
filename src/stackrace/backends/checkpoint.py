"""Checkpoints every stack can load: making seeded random ones, and checking any before an engine starts."""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackrace.backends import seeded
from stackrace.backends.architectures import MODEL_TYPES, is_spare, kv_widths, tensor_shapes
from stackrace.backends.seeded import INDEX, Shape
from stackrace.harness.errors import UsageError

SINGLE = "model.safetensors"
AGAIN = "make or copy the checkpoint again"
CHAT_TEMPLATE = (  # bos, then two tokens a message beside its words: its role's and eos
    "{% set roles = {'system': 't4', 'user': 't5', 'assistant': 't6'} %}{{ bos_token }}"
    "{% for message in messages %}{{ roles.get(message.role, 't7') }} {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}t6{% endif %}"
)


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
        """Cache bytes one token takes in all layers; `attention` is one of kv_widths' kinds."""
        return int(self.config["num_hidden_layers"]) * kv_widths(self.config)[attention] * element_bytes


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
        if name in shapes or not (name == "__metadata__" or is_spare(config, name))
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
    end = eos[0] if isinstance(eos, list) else eos
    words = {min({0, 1, 2} - {bos, end}): "<unk>", bos: "<s>", end: "</s>"}  # bos may be the end
    contents = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos},
        "tokenizer.json": _tokenizer(config["vocab_size"], words),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "unk_token": "<unk>",
            "bos_token": words[bos],
            "eos_token": words[end],
            "chat_template": CHAT_TEMPLATE,
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

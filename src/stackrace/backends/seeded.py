"""Seeded random weights: their bits depend on seed, tensor name and element index alone."""

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

GENERATOR = "stackrace-1"  # changes whenever the same seed would give other bits
INDEX = "model.safetensors.index.json"
CHUNK = 1 << 18  # elements hashed at a time: their 64-bit words stay in a core's cache
CHUNK_DEVICE = 1 << 26  # the same on an accelerator, where launches cost more than memory

Shape = tuple[int, ...]


def write(folder: Path, shapes: Mapping[str, Shape], std: float, seed: int, shard_bytes: int, device: str) -> None:
    """Safetensors shards in bf16 and their index: matrices and biases N(0, std), norms 1.

    A shard exceeds `shard_bytes` only if one tensor does. At most one chunk is in memory at a time.
    """
    shards = list(_pack(shapes, shard_bytes))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    table = quantile_table(std, device)
    for file_name, tensor_names in zip(names, shards, strict=True):
        with (folder / file_name).open("wb") as file:
            file.write(_header({name: shapes[name] for name in tensor_names}))
            for name in tensor_names:
                _write_tensor(file, name, shapes[name], seed, table)
    index = {
        "metadata": {
            "total_size": 2 * sum(map(math.prod, shapes.values())),
            "generator": GENERATOR,
            "seed": seed,
        },
        "weight_map": {name: shard for shard, members in zip(names, shards, strict=True) for name in members},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _pack(shapes: Mapping[str, Shape], shard_bytes: int) -> Iterator[list[str]]:
    """Tensor names, in order, shard by shard; a shard exceeds `shard_bytes` only if one tensor does."""
    shard: list[str] = []
    size = 0
    for name, shape in shapes.items():
        tensor_bytes = 2 * math.prod(shape)
        if shard and size + tensor_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor_bytes
    yield shard


def _header(shapes: Mapping[str, Shape]) -> bytes:
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, name: str, shape: Shape, seed: int, table: "Tensor") -> None:
    import torch

    size = math.prod(shape)
    if len(shape) == 1 and not name.endswith("bias"):  # a norm
        file.write(torch.ones(size, dtype=torch.bfloat16).view(torch.uint8).numpy().data)
        return
    chunk = CHUNK if table.device.type == "cpu" else CHUNK_DEVICE
    for start in range(0, size, chunk):
        values = seeded_normal(seed, name, start, min(chunk, size - start), table)
        file.write(values.view(torch.uint8).cpu().numpy().data)


def quantile_table(std: float, device: str) -> "Tensor":
    """The 65,536 equally likely values of N(0, std), ascending, rounded to bf16."""
    import torch

    normal = NormalDist(0, std)
    quantiles = [normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    return torch.tensor(quantiles, dtype=torch.float64).to(torch.bfloat16).to(device)


def seeded_normal(seed: int, name: str, start: int, count: int, table: "Tensor") -> "Tensor":
    """Elements `start` to `start + count` of the flattened tensor `name`, bf16, on the table's device.

    Element i is the table's entry at 16-bit lane i % 4 of splitmix64's hash of counter i // 4, offset by a
    hash of seed and name: integer arithmetic modulo 2^64, so the bits depend on no device, order or chunk.
    `start` must be a multiple of 4.
    """
    import torch

    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little", signed=True)
    counters = torch.arange(start // 4, -(-(start + count) // 4), dtype=torch.int64, device=table.device)
    word = counters.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        word.bitwise_xor_((word >> shift) & ((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    lane = word.view(torch.int16).to(torch.int32).add_(1 << 15)
    return table.index_select(0, lane[:count])


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word

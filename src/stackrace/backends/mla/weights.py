"""Safetensors shards into a model, strictly."""

from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from stackrace.backends.checkpoint import Checkpoint
from stackrace.harness.errors import UsageError


def load(checkpoint: Checkpoint, destinations: Mapping[str, Tensor]) -> None:
    """Fill every destination with the checkpoint's tensor of its name, converted to the destination's type.

    UsageError names a tensor that is missing, unexpected or of another shape. One tensor is held at a time.
    """
    _compare(checkpoint, destinations)
    for shard in sorted({info.shard for info in checkpoint.tensors.values()}):
        with torch.inference_mode(), safe_open(checkpoint.path / shard, framework="pt") as file:
            for name in checkpoint.tensors.keys() & file.keys():
                destinations[name].copy_(file.get_tensor(name))


def _compare(checkpoint: Checkpoint, destinations: Mapping[str, Tensor]) -> None:
    for name in sorted(destinations.keys() ^ checkpoint.tensors.keys()):
        fault = "is missing" if name in destinations else "is not part of this model"
        raise UsageError(f"{checkpoint.path}: the tensor {name} {fault}; make or copy the checkpoint again")
    for name, place in destinations.items():
        found = checkpoint.tensors[name].shape
        if found != tuple(place.shape):
            wanted = list(place.shape)
            raise UsageError(f"{checkpoint.path}: {name} is {list(found)} where the model wants {wanted}")

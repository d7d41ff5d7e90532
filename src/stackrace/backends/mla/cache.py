"""The key-value cache: pages of 64 tokens, and the tensors that they number."""

import torch
from torch import Tensor

from stackrace.backends.mla.config import Grouped, ModelConfig
from stackrace.harness.errors import UsageError

PAGE = 64  # tokens a page

LayerCache = tuple[Tensor, ...]  # each [pages, PAGE, ...]: one of latents, or keys and values


def row_shapes(config: ModelConfig, attention: str) -> list[tuple[int, ...]]:
    """What one token leaves in one layer: a latent (mla), or keys and values of all heads (mha) or groups (gqa).

    UsageError: the model cannot be run with this kind of attention.
    """
    kv = config.kv
    kinds: dict[str, list[tuple[int, ...]]]
    if isinstance(kv, Grouped):
        kinds = {"gqa": [(kv.num_heads, kv.qk_width), (kv.num_heads, kv.v_width)]}
    else:
        heads = config.num_heads
        kinds = {"mla": [(kv.cached_width,)], "mha": [(heads, kv.qk_width), (heads, kv.v_width)]}
    if attention not in kinds:
        raise UsageError(f"attention {attention!r} is not this model's: it takes {' or '.join(kinds)}")
    return kinds[attention]


def token_bytes(config: ModelConfig, attention: str, dtype: torch.dtype) -> int:
    """Cache bytes of one token in all layers."""
    width = sum(torch.Size(shape).numel() for shape in row_shapes(config, attention))
    return config.num_layers * width * dtype.itemsize


def allocate(
    config: ModelConfig, attention: str, num_pages: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """Zeroed pages for every layer."""
    shapes = row_shapes(config, attention)
    return [
        tuple(torch.zeros(num_pages, PAGE, *shape, dtype=dtype, device=device) for shape in shapes)
        for _ in range(config.num_layers)
    ]


def num_pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens`."""
    return -(-num_tokens // PAGE)

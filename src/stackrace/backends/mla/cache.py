"""The key-value cache: pages of 64 tokens, a free list, and the tensors they number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stackrace.backends.mla.config import ModelConfig

PAGE = 64  # tokens a page

LayerCache = tuple[Tensor, ...]  # each [pages, PAGE, ...]: one of latents, or keys and values


def row_shapes(config: ModelConfig, attention: str) -> list[tuple[int, ...]]:
    """What one token leaves in one layer: a latent (mla), or a key and a value for each head (mha)."""
    if attention == "mla":
        return [(config.latent_width,)]
    return [(config.num_heads, config.qk_width), (config.num_heads, config.v_width)]


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


class PagePool:
    """Which pages are free. A page belongs to one sequence at a time, in every layer."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, lowest numbers first on a fresh pool. The caller has seen that so many are free."""
        assert count <= len(self._free)
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        """Return pages taken before."""
        self._free.extend(reversed(pages))

"""What the tests of decode kernels share, on a CPU and on a GPU: caches full of traps, and attention in float64."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Paged(NamedTuple):
    """Rows of each sequence, and where they lie: `cache[table[i, j // PAGE], j % PAGE]`."""

    rows: list[Tensor]  # [S, ...] each, in float64
    cache: Tensor
    table: Tensor


def paged(lengths: list[int], *shape: int, dtype: torch.dtype, seed: int = 0) -> Paged:
    """Random rows on permuted pages. NaN past each length and on all other pages; table entries past the last page of a
    sequence are out of range.
    """
    rows = [normal(length, *shape, seed=seed + i).to(dtype).double() for i, length in enumerate(lengths)]
    counts = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    cache = torch.full((len(order), PAGE, *shape), math.nan, dtype=dtype)
    table = torch.full((len(lengths), max(counts, default=0) + 1), 1 << 30, dtype=torch.int32)
    for number, row in enumerate(rows):
        for index, chunk in enumerate(row.split(PAGE) if len(row) else ()):
            table[number, index] = page = order.pop()
            cache[page, : len(chunk)] = chunk
    return Paged(rows, cache, table)


def attention(q_THK: Tensor, key_SNK: Tensor, value_SNV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, V] and log-sum-exps [T, H] of the last T tokens of a context, in float64."""
    context, num_kv_heads, _ = key_SNK.shape
    q_TNgK = torch.unflatten(q_THK, 1, (num_kv_heads, -1))
    score_TNgS = torch.einsum("tngk,snk->tngs", q_TNgK, key_SNK) * scale
    last_seen_T = context - len(q_THK) + torch.arange(len(q_THK))
    hidden_TS = torch.arange(context)[None, :] > last_seen_T[:, None]
    score_TNgS = score_TNgS.masked_fill(hidden_TS[:, None, None, :], -math.inf)
    out_TNgV = torch.einsum("tngs,snv->tngv", torch.softmax(score_TNgS, -1), value_SNV)
    return out_TNgV.flatten(1, 2), torch.logsumexp(score_TNgS, -1).flatten(1, 2)


def latents(cached: Paged, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each sequence, where the values are the first numbers of the keys."""
    return [rows[:, None] for rows in cached.rows], [rows[:, None, :rank] for rows in cached.rows]


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite where one is NaN, or infinite and the other not."""
    found, expected = found.double().cpu(), expected.double()
    same = found == expected
    return float(torch.where(same, 0.0, (found - expected).abs()).nan_to_num(math.inf).max())

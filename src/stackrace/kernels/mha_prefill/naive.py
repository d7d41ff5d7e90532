"""Causal attention of a packed batch in plain torch: the reference, and the path taken on a CPU.

Letters: T new tokens and S context tokens, both of all sequences end to end, H heads, K key width, V value
width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 128  # query rows at a time: keeps the scores in cache and skips most of what the causal mask hides


def mha_prefill(
    q_THK: Tensor,
    key_SHK: Tensor,
    value_SHV: Tensor,
    query_starts: Sequence[int],
    context_starts: Sequence[int],
    scale: float,
) -> Tensor:
    """softmax(scale q kT + causal mask) v: [T, H, V], typed as `q_THK`.

    Sequence i owns rows query_starts[i] to query_starts[i+1] of `q_THK` and likewise of keys and values; its
    queries are the last positions of its context. Sums are in float32 at least.
    """
    out_THV = q_THK.new_empty(*q_THK.shape[:2], value_SHV.shape[-1])
    for (first, last), (start, stop) in zip(pairwise(query_starts), pairwise(context_starts), strict=True):
        key_HKS = key_SHK[start:stop].permute(1, 2, 0)
        value_HSV = value_SHV[start:stop].transpose(0, 1)
        for row in range(first, last, BLOCK):
            end = min(row + BLOCK, last)
            visible = stop - start - (last - end)  # context up to this block's last query
            out_THV[row:end] = _attend(q_THK[row:end], key_HKS[..., :visible], value_HSV[:, :visible], scale)
    return out_THV


def _attend(q_THK: Tensor, key_HKS: Tensor, value_HSV: Tensor, scale: float) -> Tensor:
    """One block of queries against its visible context, whose last row is the last query's own."""
    wide = torch.promote_types(q_THK.dtype, torch.float32)
    num_queries, num_keys = q_THK.shape[0], key_HKS.shape[-1]
    score_HTS = torch.bmm(q_THK.transpose(0, 1).to(wide) * scale, key_HKS.to(wide))
    own_TT = score_HTS[..., num_keys - num_queries :]
    own_TT += torch.full((num_queries, num_queries), float("-inf"), dtype=wide, device=q_THK.device).triu(1)
    return torch.bmm(torch.softmax(score_HTS, dim=-1), value_HSV.to(wide)).transpose(0, 1).to(q_THK.dtype)

"""Causal attention of a packed batch in plain torch: the reference, and the path taken on a CPU.

Letters: T new tokens and S context tokens, both of all sequences end to end, H query heads, N key-value heads
(a divisor of H), K key width, V value width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 128  # query rows at a time: keeps the scores in cache and skips most of what the causal mask hides


def mha_prefill(
    q_THK: Tensor,
    key_SNK: Tensor,
    value_SNV: Tensor,
    query_starts: Sequence[int],
    context_starts: Sequence[int],
    scale: float,
) -> Tensor:
    """softmax(scale q kT + causal mask) v: [T, H, V], typed as `q_THK`.

    Sequence i owns rows query_starts[i] to query_starts[i+1] of `q_THK` and likewise of keys and values; its
    queries are the last positions of its context. Query head h reads key-value head h // (H/N). Sums are in
    float32 at least.
    """
    out_THV = q_THK.new_empty(*q_THK.shape[:2], value_SNV.shape[-1])
    for (first, last), (start, stop) in zip(pairwise(query_starts), pairwise(context_starts), strict=True):
        key_NKS = key_SNK[start:stop].permute(1, 2, 0)
        value_NSV = value_SNV[start:stop].transpose(0, 1)
        for row in range(first, last, BLOCK):
            end = min(row + BLOCK, last)
            visible = stop - start - (last - end)  # context up to this block's last query
            out_THV[row:end] = _attend(q_THK[row:end], key_NKS[..., :visible], value_NSV[:, :visible], scale)
    return out_THV


def _attend(q_THK: Tensor, key_NKS: Tensor, value_NSV: Tensor, scale: float) -> Tensor:
    """One block of queries against its visible context, whose last row is the last query's own."""
    wide = torch.promote_types(q_THK.dtype, torch.float32)
    num_queries, (num_heads, _, num_keys) = len(q_THK), key_NKS.shape
    rows_NAK = torch.unflatten(q_THK.transpose(0, 1).to(wide) * scale, 0, (num_heads, -1)).flatten(1, 2)
    score_NgTS = torch.unflatten(torch.bmm(rows_NAK, key_NKS.to(wide)), 1, (-1, num_queries))
    own_TT = score_NgTS[..., num_keys - num_queries :]
    own_TT += torch.full((num_queries, num_queries), float("-inf"), dtype=wide, device=q_THK.device).triu(1)
    out_NAV = torch.bmm(torch.softmax(score_NgTS, dim=-1).flatten(1, 2), value_NSV.to(wide))
    return torch.unflatten(out_NAV, 1, (-1, num_queries)).flatten(0, 1).transpose(0, 1).to(q_THK.dtype)

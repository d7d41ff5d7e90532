"""Mixture of experts in plain torch: the reference, and the path taken on a CPU.

Letters: T tokens, D width of the model, I width of an expert, E experts, K experts chosen for a token.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which experts each token goes to, and how much each counts."""

    expert_TK: Tensor  # int64
    weight_TK: Tensor  # float32 at least


def route_softmax(logit_TE: Tensor, num_chosen: int, renormalise: bool, scale: float) -> Routing:
    """The `num_chosen` most likely experts of each token, weighted by their probability among all E.

    DeepSeek-V2 does not renormalise the chosen probabilities to 1 (`norm_topk_prob` false).
    """
    probability_TE = torch.softmax(logit_TE.to(torch.promote_types(logit_TE.dtype, torch.float32)), dim=-1)
    weight_TK, expert_TK = torch.topk(probability_TE, num_chosen, dim=-1, sorted=False)
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return Routing(expert_TK, weight_TK * scale)


def silu_and_mul(gate_up_TI: Tensor) -> Tensor:
    """silu(first half) * second half of each row: [T, I] from [T, 2I]."""
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TI) * up_TI


def experts(x_TD: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, routing: Routing) -> Tensor:
    """The weighted sum over each token's experts of down(silu(gate x) * up x): [T, D], typed as `x_TD`.

    `gate_up_EID` is [E, 2I, D], the gate's rows first. Rows are sorted by expert, so each expert that was hit
    costs two matrix products and the others nothing.
    """
    num_chosen = routing.expert_TK.shape[1]
    expert_A, order_A = routing.expert_TK.flatten().sort(stable=True)  # A = T*K assignments
    token_A = order_A // num_chosen
    sorted_AD = x_TD.index_select(0, token_A)
    counts = torch.bincount(expert_A, minlength=len(gate_up_EID)).cumsum(0).tolist()
    for index, (start, stop) in enumerate(pairwise([0, *counts])):
        if start < stop:
            hidden_AI = silu_and_mul(sorted_AD[start:stop] @ gate_up_EID[index].T)
            sorted_AD[start:stop] = hidden_AI @ down_EDI[index].T
    weight_A1 = routing.weight_TK.flatten().index_select(0, order_A).unsqueeze(-1)
    out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    return out_TD.index_add_(0, token_A, sorted_AD * weight_A1).to(x_TD.dtype)

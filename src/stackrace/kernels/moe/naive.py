"""Mixture of experts in plain torch: the reference, and the path taken on a CPU.

Letters: T tokens, D width of the model, I width of an expert, E experts in G groups of M, K experts chosen
for a token.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which experts each token goes to, and how much each counts."""

    expert_TK: Tensor  # int64
    weight_TK: Tensor  # float32 at least


def route(
    logit_TE: Tensor,
    bias_E: Tensor | None,
    num_chosen: int,
    num_groups: int,
    num_chosen_groups: int,
    renormalise: bool,
    scale: float,
) -> Routing:
    """The `num_chosen` experts with the highest scores within each token's best groups, weighted by the scores.

    Without a bias scores are softmax's and a group is as good as its best expert (DeepSeek-V2). With one they
    are sigmoid's, the bias counts for the choice alone, and a group is as good as its two best experts together
    (DeepSeek-V3). Sources: arXiv 2405.04434, 2.2 and 2412.19437, 2.1.2.
    """
    logit_TE = logit_TE.to(torch.promote_types(logit_TE.dtype, torch.float32))
    score_TE = torch.softmax(logit_TE, dim=-1) if bias_E is None else torch.sigmoid(logit_TE)
    choice_TE = score_TE if bias_E is None else score_TE + bias_E
    if num_chosen_groups < num_groups:
        choice_TE = _within_groups(choice_TE, num_groups, num_chosen_groups, 1 if bias_E is None else 2)
    expert_TK = torch.topk(choice_TE, num_chosen, dim=-1, sorted=False).indices
    weight_TK = score_TE.gather(1, expert_TK)
    if renormalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return Routing(expert_TK, weight_TK * scale)


def _within_groups(choice_TE: Tensor, num_groups: int, num_chosen: int, num_best: int) -> Tensor:
    """`choice_TE` with -inf outside the groups whose `num_best` best experts sum up highest."""
    choice_TGM = torch.unflatten(choice_TE, -1, (num_groups, -1))
    group_TG = torch.topk(choice_TGM, num_best, dim=-1).values.sum(-1)
    chosen = torch.topk(group_TG, num_chosen, dim=-1, sorted=False).indices
    barred_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, chosen, value=False)
    return choice_TGM.masked_fill(barred_TG.unsqueeze(-1), float("-inf")).flatten(1)


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

"""From logits to tokens: greedy, or temperature with top-k and top-p, reproducible for each request.

Letters: S sampled rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stackrace.harness.types import Sampling


def sample(logit_SV: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """One token a row. Row i uses `draws[i]`, uniform in [0, 1), unless its temperature is 0.

    A token depends on its own row alone, never on which others share the batch.
    """
    tokens = logit_SV.argmax(-1).tolist()
    rows = [row for row, setting in enumerate(settings) if setting.temperature > 0]
    if rows:
        drawn = _draw(logit_SV[rows], [settings[row] for row in rows], [draws[row] for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return [int(token) for token in tokens]


def _draw(logit_SV: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Invert the cumulative distribution over the tokens in descending order, cut at top-k, then at top-p."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logit_SV.device).unsqueeze(-1)

    temperature_S1 = column([setting.temperature for setting in settings])
    sorted_SV, token_SV = torch.sort(logit_SV.double() / temperature_S1, dim=-1, descending=True, stable=True)
    rank_V = torch.arange(sorted_SV.shape[-1], device=logit_SV.device)
    top_k_S1 = column([setting.top_k or sorted_SV.shape[-1] for setting in settings])
    probability_SV = torch.softmax(sorted_SV.masked_fill(rank_V >= top_k_S1, float("-inf")), dim=-1)
    before_SV = probability_SV.cumsum(-1) - probability_SV
    beyond_SV = (before_SV >= column([setting.top_p for setting in settings])) & (rank_V > 0)
    cumulative_SV = probability_SV.masked_fill(beyond_SV, 0.0).cumsum(-1)
    target_S1 = column(draws) * cumulative_SV[:, -1:]
    choice_S1 = torch.searchsorted(cumulative_SV, target_S1, right=True)
    last_S1 = (cumulative_SV < cumulative_SV[:, -1:]).sum(-1, keepdim=True)  # of the tokens that may be drawn
    token_S1 = token_SV.gather(-1, torch.minimum(choice_S1, last_S1))
    return [int(token) for token in token_S1.squeeze(-1).tolist()]

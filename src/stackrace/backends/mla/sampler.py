"""From logits to tokens, reproducible for each request, and how likely those tokens were.

Letters: S sampled rows, V vocabulary, K likeliest tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stackrace.backends.mla.sequence import Sampling, TokenLogprobs

GREEDY_BELOW = 1e-5  # temperatures that float arithmetic cannot tell from 0


def penalise(logit_V: Tensor, setting: Sampling, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Logits [V] less the penalties for tokens that were there before.

    Repetition (arXiv 1909.05858) divides what is positive and multiplies what is negative, of any token of prompt
    or output; frequency subtracts once for each time a token is in the output, presence once if it is.
    """
    seen_V = torch.zeros_like(logit_V, dtype=torch.bool)
    seen_V[torch.tensor([*prompt, *output], device=logit_V.device)] = True
    said = torch.tensor(output, dtype=torch.int64, device=logit_V.device)
    count_V = torch.bincount(said, minlength=len(logit_V))
    factor = setting.repetition_penalty
    repeated_V = torch.where(logit_V > 0, logit_V / factor, logit_V * factor)
    logit_V = torch.where(seen_V, repeated_V, logit_V)
    return logit_V - setting.frequency_penalty * count_V - setting.presence_penalty * (count_V > 0)


def sample(logit_SV: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """One token a row. Row i uses `draws[i]`, uniform in [0, 1), unless its temperature is 0.

    A token depends on its own row alone, never on which others share the batch.
    """
    tokens: list[int] = logit_SV.argmax(-1).tolist()
    rows = [row for row, setting in enumerate(settings) if setting.temperature >= GREEDY_BELOW]
    if rows:
        drawn = _draw(logit_SV[rows], [settings[row] for row in rows], [draws[row] for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _draw(logit_SV: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Invert the cumulative distribution over the tokens in descending order, cut at min-p and top-k, then top-p."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logit_SV.device).unsqueeze(-1)

    temperature_S1 = column([setting.temperature for setting in settings])
    sorted_SV, token_SV = torch.sort(logit_SV.double() / temperature_S1, dim=-1, descending=True, stable=True)
    rank_V = torch.arange(sorted_SV.shape[-1], device=logit_SV.device)
    top_k_S1 = column([setting.top_k or sorted_SV.shape[-1] for setting in settings])
    least_S1 = sorted_SV[:, :1] + column([setting.min_p for setting in settings]).log()
    beyond_SV = (rank_V >= top_k_S1) | (sorted_SV < least_S1)
    probability_SV = torch.softmax(sorted_SV.masked_fill(beyond_SV, float("-inf")), dim=-1)
    before_SV = probability_SV.cumsum(-1) - probability_SV
    beyond_SV = (before_SV >= column([setting.top_p for setting in settings])) & (rank_V > 0)
    cumulative_SV = probability_SV.masked_fill(beyond_SV, 0.0).cumsum(-1)
    target_S1 = column(draws) * cumulative_SV[:, -1:]
    choice_S1 = torch.searchsorted(cumulative_SV, target_S1, right=True)
    last_S1 = (cumulative_SV < cumulative_SV[:, -1:]).sum(-1, keepdim=True)  # of the tokens that may be drawn
    token_S1 = token_SV.gather(-1, torch.minimum(choice_S1, last_S1))
    drawn: list[int] = token_S1.squeeze(-1).tolist()
    return drawn


def token_logprobs(logit_SV: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probability and rank of `tokens[i]` by row i, and of the row's `num_top` likeliest tokens."""
    logprob_SV = torch.log_softmax(logit_SV, dim=-1)
    chosen_S1 = logprob_SV.gather(-1, torch.tensor(tokens, device=logit_SV.device).unsqueeze(-1))
    rank_S = (logprob_SV > chosen_S1).sum(-1) + 1
    top_SK = torch.topk(logprob_SV, min(num_top, logprob_SV.shape[-1]), dim=-1)
    tops = [list(zip(*row, strict=True)) for row in zip(top_SK.indices.tolist(), top_SK.values.tolist(), strict=True)]
    return list(map(TokenLogprobs, tokens, chosen_S1.squeeze(-1).tolist(), rank_S.tolist(), tops))

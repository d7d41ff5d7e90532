"""From scheduled work to sampled tokens: builds the batch, runs the model, samples."""

from collections.abc import Sequence as Many
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from stackrace.backends.mla.attention import Batch
from stackrace.backends.mla.cache import PAGE, LayerCache, num_pages_for
from stackrace.backends.mla.model import Model
from stackrace.backends.mla.sampler import penalise, sample, token_logprobs
from stackrace.backends.mla.scheduler import Work
from stackrace.backends.mla.sequence import Sequence, TokenLogprobs


class Sampled(NamedTuple):
    """A sequence's next token, and how likely it was where that is wanted."""

    sequence: Sequence
    token: int
    logprobs: TokenLogprobs | None


class Runner:
    """Owns the model and its cache pages."""

    def __init__(self, model: Model, caches: Many[LayerCache], device: torch.device) -> None:
        self._model = model
        self._caches = caches
        self._device = device

    def logits(self, work: Many[Work]) -> Tensor:
        """Logits [S, V] of the rows that `num_wanted` counts; fills the cache for all."""
        with torch.inference_mode():
            logit_SV: Tensor = self._model(build_batch(work, self._device), self._caches)
        return logit_SV

    def run(self, work: Many[Work]) -> list[Sampled]:
        """The next token of each sequence that the step brought to its end; prompts are told their likelihoods."""
        logit_SV = self.logits(work)
        counts = [num_wanted(item) for item in work]
        for item, block_SV in zip(work, torch.split(logit_SV, counts), strict=True):
            if item.sequence.tells_prompt:
                _tell_prompt(item, block_SV)
        ready = [item.sequence for item in work if completes(item)]
        if not ready:
            return []
        if len(ready) < len(logit_SV):
            ends = zip(accumulate(counts), work, strict=True)
            logit_SV = logit_SV[[end - 1 for end, item in ends if completes(item)]]
        return _sample(ready, logit_SV)


def completes(work: Work) -> bool:
    """Whether this work computes the sequence's last token, so that the next one follows."""
    return work.num_tokens == work.sequence.num_uncomputed


def num_wanted(work: Work) -> int:
    """How many of its last rows' logits are needed: the very last's, all while its prompt is told, or none."""
    if work.sequence.tells_prompt:
        return work.num_tokens
    return 1 if completes(work) else 0


def _tell_prompt(work: Work, logit_SV: Tensor) -> None:
    sequence = work.sequence
    assert sequence.num_prompt_logprobs is not None
    nexts = sequence.prompt[sequence.num_computed + 1 : sequence.num_computed + work.num_tokens + 1]
    if nexts:
        told = token_logprobs(logit_SV[: len(nexts)], nexts, sequence.num_prompt_logprobs)
        sequence.prompt_logprobs.extend(told)


def _sample(ready: Many[Sequence], logit_SV: Tensor) -> list[Sampled]:
    """Log-probabilities are those of the model, before penalties and temperature."""
    changed_SV = logit_SV
    if any(s.sampling.penalises for s in ready):
        changed_SV = torch.stack([_penalised(s, row_V) for s, row_V in zip(ready, logit_SV, strict=True)])
    tokens = sample(changed_SV, [s.sampling for s in ready], [s.rng.random() for s in ready])
    rows = zip(ready, logit_SV, tokens, strict=True)
    return [Sampled(s, token, _told(s, row_V, token)) for s, row_V, token in rows]


def _penalised(sequence: Sequence, logit_V: Tensor) -> Tensor:
    if not sequence.sampling.penalises:
        return logit_V
    output = sequence.tokens[len(sequence.prompt) :]
    return penalise(logit_V, sequence.sampling, sequence.prompt, output)


def _told(sequence: Sequence, logit_V: Tensor, token: int) -> TokenLogprobs | None:
    if sequence.num_logprobs is None:
        return None
    return token_logprobs(logit_V.unsqueeze(0), [token], sequence.num_logprobs)[0]


def build_batch(work: Many[Work], device: torch.device) -> Batch:
    """The tensors of a step. One-token work comes first in `work`."""
    tokens = [token for s, count in work for token in s.tokens[s.num_computed : s.num_computed + count]]
    decodes = [s for s, count in work if count == 1]
    prefills = [(s, count) for s, count in work if count > 1]
    contexts = [s.num_computed + count for s, count in prefills]
    ends = list(accumulate(count for _, count in work))
    sampled = [row for end, item in zip(ends, work, strict=True) for row in range(end - num_wanted(item), end)]
    slots = [_slots(s, s.num_computed, s.num_computed + count) for s, count in work]
    context_slots = [_slots(s, 0, length) for (s, _), length in zip(prefills, contexts, strict=True)]

    def tensor(values: Many[int] | Many[Many[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(
        token_T=tensor(tokens),
        position_T=tensor([p for s, count in work for p in range(s.num_computed, s.num_computed + count)]),
        slot_T=torch.cat(slots).to(device),
        table_BM=tensor(_table(decodes)),
        length_B=tensor([s.num_computed + 1 for s in decodes]),
        query_starts=list(accumulate((count for _, count in prefills), initial=0)),
        context_starts=list(accumulate(contexts, initial=0)),
        context_slot_S=torch.cat([torch.empty(0, dtype=torch.int64), *context_slots]).to(device),
        sampled_row=tensor(sampled),
    )


def _slots(sequence: Sequence, start: int, stop: int) -> Tensor:
    """Cache rows of a sequence's tokens `start` to `stop`."""
    position = torch.arange(start, stop)
    return torch.tensor(sequence.pages)[position // PAGE] * PAGE + position % PAGE


def _table(sequences: Many[Sequence]) -> list[list[int]]:
    """Page numbers of each sequence as far as its context reaches, padded with 0."""
    used = [sequence.pages[: num_pages_for(sequence.num_computed + 1)] for sequence in sequences]
    width = max(map(len, used), default=0)
    return [pages + [0] * (width - len(pages)) for pages in used]

"""From scheduled work to sampled tokens: builds the batch, runs the model, samples."""

from collections.abc import Sequence as Many
from itertools import accumulate

import torch
from torch import Tensor

from stackrace.backends.mla.attention import Batch
from stackrace.backends.mla.cache import PAGE, LayerCache, num_pages_for
from stackrace.backends.mla.model import Model
from stackrace.backends.mla.sampler import sample
from stackrace.backends.mla.scheduler import Sequence, Work


class Runner:
    """Owns the model and its cache pages."""

    def __init__(self, model: Model, caches: Many[LayerCache], device: torch.device) -> None:
        self._model = model
        self._caches = caches
        self._device = device

    def logits(self, work: Many[Work]) -> Tensor:
        """Logits [S, V] of the sequences whose last token is computed now; fills the cache for all."""
        with torch.inference_mode():
            logit_SV: Tensor = self._model(build_batch(work, self._device), self._caches)
        return logit_SV

    def run(self, work: Many[Work]) -> list[tuple[Sequence, int]]:
        """Each sequence that the step brought to its end, with its next token."""
        logit_SV = self.logits(work)
        ready = [item.sequence for item in work if completes(item)]
        if not ready:
            return []
        draws = [sequence.rng.random() for sequence in ready]
        tokens = sample(logit_SV, [sequence.sampling for sequence in ready], draws)
        return list(zip(ready, tokens, strict=True))


def completes(work: Work) -> bool:
    """Whether this work computes the sequence's last token, so that the next one follows."""
    return work.num_tokens == work.sequence.num_uncomputed


def build_batch(work: Many[Work], device: torch.device) -> Batch:
    """The tensors of a step. One-token work comes first in `work`."""
    tokens = [token for s, count in work for token in s.tokens[s.num_computed : s.num_computed + count]]
    decodes = [s for s, count in work if count == 1]
    prefills = [(s, count) for s, count in work if count > 1]
    contexts = [s.num_computed + count for s, count in prefills]
    ends = list(accumulate(count for _, count in work))
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
        sampled_row=tensor([end - 1 for end, item in zip(ends, work, strict=True) if completes(item)]),
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

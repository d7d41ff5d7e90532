"""Continuous batching: which sequences compute how many tokens in the next step."""

import random
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import NamedTuple

from stackrace.backends.mla.cache import PagePool, num_pages_for
from stackrace.harness.types import Sampling


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine, from its submission to its last token."""

    id: str
    prompt: Many[int]
    max_tokens: int  # output tokens at most, at least 1
    sampling: Sampling
    stop_tokens: frozenset[int]  # ends early, after giving one of these
    tokens: list[int] = field(init=False)  # prompt and output
    num_computed: int = 0  # tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.rng = random.Random(self.sampling.seed)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be run through the model: 1 when decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        """Tokens produced so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def pages_needed(self) -> int:
        """Pages for its whole life; the last output token is never fed back."""
        return num_pages_for(len(self.prompt) + self.max_tokens - 1)

    def finish_reason(self) -> str | None:
        """`stop`, `length`, or None while it goes on; asked after each output token."""
        if self.tokens[-1] in self.stop_tokens:
            return "stop"
        return "length" if self.num_output == self.max_tokens else None


class Work(NamedTuple):
    """A sequence and how many of its tokens the step computes."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """First come, first served under a token budget; decoding goes first, long prompts in chunks.

    A sequence is admitted once pages for its whole life are free and holds them to its end, so that whatever
    was admitted finishes: no deadlock and no preemption. Nobody overtakes the first one waiting.
    """

    def __init__(self, pool: PagePool, max_sequences: int, max_tokens: int) -> None:
        """`max_tokens`, the budget of a step, must be at least `max_sequences`, or decoding would starve."""
        assert max_tokens >= max_sequences > 0
        self.pool = pool
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens

    def submit(self, sequence: Sequence) -> None:
        """Queue it. The caller has seen that the empty pool could hold it."""
        assert sequence.pages_needed <= self.pool.num_pages
        self.waiting.append(sequence)

    def abort(self, id: str) -> None:
        """Forget a sequence between steps; unknown or finished ones are ignored."""
        for sequence in [s for s in self.running if s.id == id]:
            self.finish(sequence)
        self.waiting = deque(s for s in self.waiting if s.id != id)

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free its pages."""
        self.running.remove(sequence)
        self.pool.give_back(sequence.pages)
        sequence.pages = []

    def schedule(self) -> list[Work]:
        """The next step's work: one-token work first, never more tokens than the budget; [] when idle."""
        budget = self._max_tokens - sum(s.num_uncomputed == 1 for s in self.running)
        work = [Work(s, 1) for s in self.running if s.num_uncomputed == 1]
        for sequence in [s for s in self.running if s.num_uncomputed > 1]:
            budget = self._prefill(sequence, budget, work)
        while budget and self._admissible():
            sequence = self.waiting.popleft()
            sequence.pages = self.pool.take(sequence.pages_needed)
            self.running.append(sequence)
            budget = self._prefill(sequence, budget, work)
        return sorted(work, key=lambda item: item.num_tokens > 1)

    def _admissible(self) -> bool:
        return (
            bool(self.waiting)
            and len(self.running) < self._max_sequences
            and self.waiting[0].pages_needed <= self.pool.num_free
        )

    def _prefill(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        """Add as much of `sequence` as the budget allows; returns the budget left."""
        count = min(sequence.num_uncomputed, budget)
        if count:
            work.append(Work(sequence, count))
        return budget - count

"""Continuous batching: which sequences compute how many tokens in the next step."""

from collections import deque
from typing import NamedTuple

from stackrace.backends.mla.cache import PAGE, num_pages_for
from stackrace.backends.mla.pages import PagePool, extend
from stackrace.backends.mla.sequence import Sequence


class Work(NamedTuple):
    """A sequence and how many of its tokens the step computes."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """First come, first served under a token budget; decoding goes first, long prompts in chunks.

    A sequence is admitted once pages for all its tokens are free, and takes a page more as its output grows. If
    none is free then, the sequence that came last gives up all it has and goes back to the head of the queue, to
    be computed again. So whoever runs came before whoever waits, nobody overtakes, and the first one always
    finishes.
    """

    def __init__(self, pool: PagePool, max_sequences: int, max_tokens: int, reuse: bool) -> None:
        """`max_tokens`, the budget of a step, must be at least `max_sequences`, or decoding would starve.

        `reuse`: full pages are found again by their content (prefix caching).
        """
        assert max_tokens >= max_sequences > 0
        self.pool = pool
        self.running: list[Sequence] = []  # in order of arrival
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        self.num_queried = 0  # tokens looked for in the prefix cache
        self.num_found = 0  # and found there
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._reuse = reuse

    def submit(self, sequence: Sequence) -> None:
        """Queue it. The caller has seen that the empty pool could hold all its tokens but the last output."""
        self.waiting.append(sequence)

    def abort(self, id: str) -> None:
        """Forget a sequence between steps; unknown or finished ones are ignored."""
        if running := next((s for s in self.running if s.id == id), None):
            self.finish(running)
        elif waiting := next((s for s in self.waiting if s.id == id), None):
            self.waiting.remove(waiting)

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free its pages."""
        self.running.remove(sequence)
        self.pool.give_back(sequence.pages)
        sequence.pages = []

    def schedule(self) -> list[Work]:
        """The next step's work: one-token work first, never more tokens than the budget; [] when idle."""
        self._grow()
        decoding = [s for s in self.running if s.num_uncomputed == 1]
        work = [Work(s, 1) for s in decoding]
        budget = self._max_tokens - len(work)
        for sequence in [s for s in self.running if s.num_uncomputed > 1]:
            budget = self._chunk(sequence, budget, work)
        while budget and (newcomer := self._admit()):
            budget = self._chunk(newcomer, budget, work)
        return sorted(work, key=lambda item: item.num_tokens > 1)

    def computed(self, work: list[Work]) -> None:
        """Note that the step has run: its tokens are in the cache, full pages can be found."""
        for sequence, count in work:
            first = sequence.num_computed // PAGE
            sequence.num_computed += count
            full = sequence.num_computed // PAGE
            if self._reuse and full > first:
                contents = extend(sequence.digests, sequence.tokens, full)
                for page, content in zip(sequence.pages[first:full], contents[first:], strict=True):
                    self.pool.publish(page, content)

    def _grow(self) -> None:
        """A page for each running sequence that has filled its own, taken from the last to come if need be."""
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            missing = num_pages_for(len(sequence.tokens)) - len(sequence.pages)
            if missing > self.pool.num_free:
                self._preempt(self.running[-1])
            else:
                sequence.pages += self.pool.take(missing)
                index += 1

    def _preempt(self, sequence: Sequence) -> None:
        self.finish(sequence)
        sequence.prompt_logprobs = []
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self) -> Sequence | None:
        """The first one waiting, with pages for all its tokens; None if there is none, or no room for it."""
        if not self.waiting or len(self.running) == self._max_sequences:
            return None
        sequence = self.waiting[0]
        found = self._find(sequence)
        missing = num_pages_for(len(sequence.tokens)) - len(found)
        if missing + self.pool.count_free(found) > self.pool.num_free:
            return None
        self.pool.share(found)
        sequence.pages = found + self.pool.take(missing)
        sequence.num_computed = len(found) * PAGE
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.num_queried += len(sequence.prompt) if self._looks(sequence) else 0
            self.num_found += sequence.num_cached
        self.running.append(self.waiting.popleft())
        return sequence

    def _looks(self, sequence: Sequence) -> bool:
        """Whether it may be found; a prompt that is to be told must be computed."""
        return self._reuse and not sequence.tells_prompt

    def _find(self, sequence: Sequence) -> list[int]:
        """Pages that hold a prefix already, short of its last token, whose logits are wanted."""
        if not self._looks(sequence):
            return []
        return self.pool.find(extend(sequence.digests, sequence.tokens, (len(sequence.tokens) - 1) // PAGE))

    def _chunk(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        """Add as much of `sequence` as the budget allows; returns the budget left."""
        count = min(sequence.num_uncomputed, budget)
        if count:
            work.append(Work(sequence, count))
        return budget - count

"""What one streamed answer consists of and when each piece of it is due. Pure; no sockets, no clock."""

from collections.abc import Iterator
from itertools import islice

from stackrace.backends.mock.behaviour import Behaviour
from stackrace.backends.mock.events import MALFORMED, Events
from stackrace.backends.mock.fate import Fate
from stackrace.backends.mock.question import Question
from stackrace.backends.mock.times import due_times, nanoseconds
from stackrace.backends.mock.truth import Marks

Step = tuple[int, bytes, Marks]
"""Due (ns), the bytes, tokens of each event that they complete."""

_SPLIT = (500_000, 2_000_000)  # ns from one half of a send to the other, evenly distributed


class Script:
    """The events of one answer, without its head."""

    __slots__ = ("_b", "_events", "_fate", "_q")

    def __init__(self, b: Behaviour, q: Question, events: Events, fate: Fate) -> None:
        self._b, self._q, self._events, self._fate = b, q, events, fate

    @property
    def is_cut(self) -> bool:
        """The connection breaks after the last step."""
        return self._fate.cut_at is not None

    def length(self) -> int:
        """Bytes of all of it, as if it were not cut."""
        extra = len(self._events.role()) if self._q.is_chat else 0
        extra += len(MALFORMED) if self._fate.malformed_at is not None else 0
        return extra + sum(map(len, self._events.events(self._q)))

    def steps(self, start: int, earliest: int) -> Iterator[Step]:
        """For a request that is served from `start` on, nothing before `earliest`; a cut is a step without bytes."""
        b, fate = self._b, self._fate
        if self._q.is_chat:
            yield max(start, earliest), self._events.role(), (0,)
        dues = due_times(
            b, max(start + self._ttft(), earliest), self._events.sends(self._q.tokens), fate.stalls_at, fate.rng
        )
        for k, (due, (data, marks)) in enumerate(zip(dues, self._writes(), strict=False)):
            if k == fate.malformed_at:
                yield due, self._events.framed(MALFORMED), (0,)
            if k == fate.cut_at:
                yield due, b"", ()
                return
            if b.split_share and fate.rng.random() < b.split_share:
                cut = fate.rng.randrange(1, len(data))
                yield due, data[:cut], ()
                yield due + fate.rng.randrange(*_SPLIT), data[cut:], marks
            else:
                yield due, data, marks

    def _ttft(self) -> int:
        prefill = self._q.prompt_tokens / self._b.prompt_rate if self._b.prompt_rate else 0.0
        return nanoseconds(self._b.ttft + prefill)

    def _writes(self) -> Iterator[tuple[bytes, Marks]]:
        events = zip(self._events.events(self._q), zip(self._events.marks(self._q.tokens)), strict=True)
        return events if self._b.events_per_write == 1 else _bundles(events, self._b.events_per_write)


def _bundles(events: Iterator[tuple[bytes, Marks]], size: int) -> Iterator[tuple[bytes, Marks]]:
    while bundle := list(islice(events, size)):
        yield b"".join(data for data, _ in bundle), tuple(m for _, marks in bundle for m in marks)

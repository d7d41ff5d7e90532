"""What one streamed answer consists of and when each piece of it is due. Pure; no sockets, no clock."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

from stackrace.backends.mock.behaviour import Behaviour
from stackrace.backends.mock.events import MALFORMED, Events
from stackrace.backends.mock.fate import Fate
from stackrace.backends.mock.question import Question
from stackrace.backends.mock.times import due_times, nanoseconds
from stackrace.backends.mock.truth import Marks

_SPLIT = (500_000, 2_000_000)  # ns from one half of a send to the other, evenly distributed

T = TypeVar("T")


class Tracks(NamedTuple):
    """The sends of an answer, side by side: due (ns), the bytes, and the tokens of each event that they complete."""

    dues: Iterable[int]
    writes: Iterable[bytes]
    marks: Iterable[Marks]


class Even(NamedTuple):
    """The first `whole` of the writes and then a last one, `gap` (ns) apart."""

    writes: Sequence[bytes]
    whole: int
    last: bytes
    gap: int


class Script:
    """The events of one answer, without its head."""

    __slots__ = ("_b", "_events", "_fate", "_q")

    def __init__(self, b: Behaviour, q: Question, events: Events, fate: Fate) -> None:
        self._b, self._q, self._events, self._fate = b, q, events, fate

    @property
    def is_cut(self) -> bool:
        """The connection breaks after the last step."""
        return self._fate.cut_at is not None

    @property
    def is_faultless(self) -> bool:
        """The tracks tell all: no need for `steps`, which are slower."""
        return self._fate.cut_at is None and self._fate.malformed_at is None and not self._b.split_share

    def opening(self) -> bytes | None:
        """The event of a chat that comes as soon as it is served: no token."""
        return self._events.role() if self._q.is_chat else None

    def even(self) -> Even | None:
        """The sends, where they are evenly spaced and nothing befalls them; else None."""
        b = self._b
        if not self.is_faultless or b.jitter or self._fate.stalls_at is not None:
            return None
        if not (kept := self._events.kept(self._q)):
            return None
        whole, count, last = kept
        if b.events_per_write > 1:
            whole = [b"".join(batch) for batch in _batches([*whole[:count], last], b.events_per_write)]
            last, count = whole[-1], len(whole) - 1
        return Even(whole, count, last, nanoseconds(b.gap))

    def length(self) -> int:
        """Bytes of all of it, as if it were not cut."""
        extra = len(self.opening() or b"")
        extra += len(MALFORMED) if self._fate.malformed_at is not None else 0
        return extra + sum(map(len, self._events.events(self._q)))

    def tracks(self, start: int, earliest: int) -> Tracks:
        """For a request that is served from `start` on, nothing before `earliest`; as if nothing befell it."""
        b, q, events, fate = self._b, self._q, self._events, self._fate
        first = max(start + self._ttft(), earliest)
        dues: Iterable[int] = due_times(b, first, events.sends(q.tokens), fate.stalls_at, fate.rng)
        writes: Iterable[bytes] = events.events(q)
        marks: Iterable[Marks] = zip(events.marks(q.tokens))
        if b.events_per_write > 1:
            writes = map(b"".join, _batches(events.events(q), b.events_per_write))
            marks = _batches(events.marks(q.tokens), b.events_per_write)
        return Tracks(dues, writes, marks)

    def steps(self, tracks: Tracks) -> Iterator[tuple[int, bytes, Marks]]:
        """The tracks with what befell it; a cut is a step without bytes."""
        fate, share = self._fate, self._b.split_share
        for k, (due, data, marks) in enumerate(zip(*tracks, strict=False)):
            if k == fate.malformed_at:
                yield due, self._events.framed(MALFORMED), (0,)
            if k == fate.cut_at:
                yield due, b"", ()
                return
            if share and fate.rng.random() < share:
                cut = fate.rng.randrange(1, len(data))
                told = _completed(data[:cut], len(marks))
                yield due, data[:cut], marks[:told]
                yield due + fate.rng.randrange(*_SPLIT), data[cut:], marks[told:]
            else:
                yield due, data, marks

    def _ttft(self) -> int:
        prefill = self._q.prompt_tokens / self._b.prompt_rate if self._b.prompt_rate else 0.0
        return nanoseconds(self._b.ttft + prefill)


def _completed(data: bytes, most: int) -> int:
    """Events with tokens that end within `data`; what follows the last of them brings none."""
    return min(most, data.count(b"\n\n"))


def _batches(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch

"""One streamed answer on its connection: its head, then its script."""

from collections.abc import Iterable, Iterator
from itertools import chain, repeat

from stackrace.backends.mock.connection import Connection
from stackrace.backends.mock.places import Places
from stackrace.backends.mock.pump import Entry, Pump, Sender
from stackrace.backends.mock.script import Script, Tracks
from stackrace.backends.mock.truth import Marks, Record
from stackrace.harness.clock import now


class Head(Sender):
    """The head of a response: whole, or its first byte and then line by line until `delay` (ns) has passed."""

    __slots__ = ()

    def __init__(self, connection: Connection, head: bytes, order: int, start: int, delay: int) -> None:
        connection.attach(self)
        pieces = [head[:1], *head[1:].splitlines(keepends=True)] if delay else [head]
        last = max(1, len(pieces) - 1)
        self.writes = None
        self.steps = iter([(start + delay * i // last, order, piece, self) for i, piece in enumerate(pieces)])


class Stream(Sender):
    """Everything after the head, from when it has a place; leaves the place when its last send was due."""

    __slots__ = (
        "_connection",
        "_has_place",
        "_head_end",
        "_is_opening",
        "_order",
        "_places",
        "_pump",
        "_record",
        "_script",
        "_start",
        "arrived",
        "is_over",
    )

    def __init__(self, script: Script, connection: Connection, pump: Pump, places: Places) -> None:
        self._script, self._connection, self._pump, self._places = script, connection, pump, places
        self.is_over = self._has_place = self._is_opening = False
        self._clear()
        connection.attach(self)
        connection.on_close = self._drop

    def ask(self, order: int, arrived: int, head_end: int, record: Record | None) -> None:
        """Begin as soon as there is a place, and send nothing before `head_end` (ns)."""
        self._order, self.arrived, self._head_end, self._record = order, arrived, head_end, record
        self._places.ask(self)

    def begin(self, start: int) -> None:
        """Be served from `start` (ns) on."""
        self._has_place, self._start = True, start
        if opening := self._script.opening():
            self._is_opening = True
            self._mark([(0,)])
            self._pump.add((max(start, self._head_end), self._order, opening, self))
        else:
            self._tell()

    def ended(self, due: int) -> None:
        """The last step was taken."""
        if self._is_opening and not self.is_over:
            self._is_opening = False
            self._tell()
        elif not self.is_over:
            self._leave(due)
            if self._script.is_cut:
                self._connection.close()
            else:
                self._connection.finish()

    def _tell(self) -> None:
        """Put the events with tokens on their way."""
        tracks = self._script.tracks(self._start, self._head_end)
        if even := self._script.even():
            self._mark(tracks.marks)
            self.writes, self.count, self.last, self.gap = even
            self.sent = 1
            first = self.writes[0] if self.count else self.last
            self._pump.add((next(iter(tracks.dues)), self._order, first, self))
            return
        self.steps = self._entries(tracks)
        self._pump.add(next(self.steps))

    def _entries(self, tracks: Tracks) -> Iterator[Entry]:
        if self._script.is_faultless:
            self._mark(tracks.marks)
            return zip(tracks.dues, repeat(self._order), tracks.writes, repeat(self), strict=False)
        told: list[Marks] = []
        self._mark(told)
        return self._faulty(tracks, told)

    def _faulty(self, tracks: Tracks, told: list[Marks]) -> Iterator[Entry]:
        for due, data, marks in self._script.steps(tracks):
            told.append(marks)
            yield due, self._order, data, self

    def _mark(self, marks: Iterable[Marks]) -> None:
        if self._record:
            self._record.marks = chain(self._record.marks, marks)

    def _drop(self) -> None:
        """The client went away."""
        if not self.is_over:
            at = now()
            if self._record:
                self._record.gone = at
            self._leave(at)

    def _leave(self, at: int) -> None:
        self.is_over = True
        self._clear()
        if self._has_place:
            self._places.leave(at)

    def _clear(self) -> None:
        self.writes, self.steps = None, iter(())  # no cycle: nothing collects them while we serve

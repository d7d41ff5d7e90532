"""One streamed answer on its connection: its head, then its script."""

from collections.abc import Iterator
from itertools import repeat

from stackrace.backends.mock.connection import Connection
from stackrace.backends.mock.places import Places
from stackrace.backends.mock.pump import NOTHING, Entry, Pump, Sender
from stackrace.backends.mock.script import Script, Tracks
from stackrace.backends.mock.truth import Marks, Record
from stackrace.harness.clock import now


class Head(Sender):
    """The head of a response: whole, or its first byte and then line by line until `delay` (ns) has passed."""

    __slots__ = ()

    def __init__(self, wire: Connection, head: bytes, order: int, start: int, delay: int) -> None:
        self.wire = wire
        self.log = NOTHING
        pieces = [head[:1], *head[1:].splitlines(keepends=True)] if delay else [head]
        last = max(1, len(pieces) - 1)
        self.steps = iter([(start + delay * i // last, order, piece, self) for i, piece in enumerate(pieces)])


class Stream(Sender):
    """Everything after the head, from when it has a place; leaves the place when its last send was due."""

    __slots__ = (
        "_connection",
        "_has_place",
        "_head_end",
        "_order",
        "_places",
        "_pump",
        "_record",
        "_script",
        "arrived",
        "is_over",
    )

    def __init__(self, script: Script, connection: Connection, pump: Pump, places: Places) -> None:
        self._script, self._connection, self._pump, self._places = script, connection, pump, places
        self.is_over = self._has_place = False
        self.wire = connection
        self.steps = iter(())

    def ask(self, order: int, arrived: int, head_end: int, record: Record | None) -> None:
        """Begin as soon as there is a place, and send nothing before `head_end` (ns)."""
        self._order, self.arrived, self._head_end, self._record = order, arrived, head_end, record
        self.log = record.sent.append if record else NOTHING
        self._connection.on_close = self._drop
        self._places.ask(self)

    def begin(self, start: int) -> None:
        """Be served from `start` (ns) on."""
        self._has_place = True
        self.steps = self._entries(start)
        self._pump.add(self)

    def ended(self, due: int) -> None:
        """The last step was taken."""
        if not self.is_over:
            self._leave(due)
            if self._script.is_cut:
                self._connection.close()
            else:
                self._connection.finish()

    def _entries(self, start: int) -> Iterator[Entry]:
        tracks = self._script.tracks(start, self._head_end)
        if not self._script.is_faultless:
            return self._faulty(tracks)
        if self._record:
            self._record.marks = tracks.marks
        return zip(tracks.dues, repeat(self._order), tracks.writes, repeat(self), strict=False)

    def _faulty(self, tracks: Tracks) -> Iterator[Entry]:
        told: list[Marks] = []
        if self._record:
            self._record.marks = told
        for due, data, marks in self._script.steps(tracks):
            told.append(marks)
            yield due, self._order, data, self

    def _drop(self) -> None:
        """The client went away."""
        if not self.is_over:
            self._leave(now())

    def _leave(self, at: int) -> None:
        self.is_over = True
        self.steps = iter(())  # no cycle: nothing collects them while we serve
        if self._has_place:
            self._places.leave(at)

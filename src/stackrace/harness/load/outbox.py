"""A worker's way out: messages to the parser; what it read among them, in small parcels while the race goes on."""

import asyncio
from collections import deque
from itertools import islice
from typing import NamedTuple

from stackrace.harness.clock import SECOND, Alarms, now
from stackrace.harness.load import messages
from stackrace.harness.load.driver import Capture
from stackrace.harness.load.received import Journal, Reads

_PAUSE = SECOND // 200  # between two parcels
_READS, _CAPTURES = 1024, 64  # the most that one holds: packing it holds up the loop
_LATE = SECOND // 2000  # so late is an alarm only where the loop has more to do than it can
_POSTPONED = SECOND // 100
_MOST_READS = 1 << 20  # in the journal, beyond which the race has to bear with it


class Parcel(NamedTuple):
    """Reads, and the requests that ended with one of them or one before."""

    reads: Reads
    captures: list[Capture]


class Outbox:
    """Writes to a pipe when it takes something, so that the loop never waits for the parser."""

    def __init__(self, transport: asyncio.WriteTransport, alarms: Alarms, journal: Journal) -> None:
        self._transport = transport
        self._alarms = alarms
        self._journal = journal
        self._captures: deque[Capture] = deque()
        self._next = 0

    def tell(self, message: object) -> None:
        """Now, unless it is a capture: that waits for its reads."""
        if isinstance(message, Capture):
            self._captures.append(message)
        else:
            self._transport.write(messages.encode(message))

    def keep_shipping(self) -> None:
        """From now on, as long as alarms are heard."""
        self._ship_in(_PAUSE)

    def drain(self) -> None:
        """Everything, now: the race is over."""
        while self._journal or self._captures:
            self._write()

    def _ship_in(self, pause: int) -> None:
        self._next = now() + pause
        self._alarms.at(self._next, self._ship)

    def _ship(self) -> None:
        if now() - self._next > _LATE and len(self._journal) < _MOST_READS:
            self._ship_in(_POSTPONED)
            return
        if self._journal or self._captures:
            self._write()
        self._ship_in(_PAUSE)

    def _write(self) -> None:
        reads = self._journal.take(_READS)
        ended = [] if self._journal else list(islice(self._captures, _CAPTURES))
        for _ in ended:
            self._captures.popleft()
        self._transport.write(messages.encode(Parcel(reads, ended)))

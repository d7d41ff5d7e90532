"""A worker's way out: messages to the parser, captures among them only as fast as the race leaves time for."""

import asyncio
from collections import deque

from stackrace.harness.clock import SECOND, Alarms, now
from stackrace.harness.load import messages
from stackrace.harness.load.driver import Capture

_PAUSE = SECOND // 5000  # between two captures: each holds up the loop while it is packed
_LATE = SECOND // 2000  # so late is an alarm only where the loop has more to do than it can
_POSTPONED = SECOND // 100
_MANY = 1000  # captures in the backlog for each one that is sent at once
_MOST_BYTES = 1 << 30  # of the backlog, beyond which the race has to bear with it


class Outbox:
    """Writes to a pipe when it takes something, so that the loop never waits for the parser.

    Requests of a batch end together; if each were packed there and then, the next ones would be sent late.
    """

    def __init__(self, transport: asyncio.WriteTransport, alarms: Alarms) -> None:
        self._transport = transport
        self._alarms = alarms
        self._backlog: deque[Capture] = deque()
        self._bytes = 0
        self._next = 0

    def tell(self, message: object) -> None:
        """Now, unless it is a capture."""
        if not isinstance(message, Capture):
            self._transport.write(messages.encode(message))
            return
        if not self._backlog:
            self._ship_in(_PAUSE)
        self._backlog.append(message)
        self._bytes += message.received.size

    def drain(self) -> None:
        """Every capture, now: the race is over."""
        while self._backlog:
            self._write()

    def _ship_in(self, pause: int) -> None:
        self._next = now() + pause
        self._alarms.at(self._next, self._ship)

    def _ship(self) -> None:
        if now() - self._next > _LATE and self._bytes < _MOST_BYTES:
            self._ship_in(_POSTPONED)
            return
        for _ in range(min(len(self._backlog), 1 + len(self._backlog) // _MANY)):
            self._write()
        if self._backlog:
            self._ship_in(_PAUSE)

    def _write(self) -> None:
        capture = self._backlog.popleft()
        self._bytes -= capture.received.size
        self._transport.write(messages.encode(capture))

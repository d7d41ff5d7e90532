"""A worker's way out: messages to the parser, captures among them only as fast as the race leaves time for."""

import asyncio
from collections import deque

from stackrace.harness.clock import SECOND, Alarms, now
from stackrace.harness.load import messages
from stackrace.harness.load.driver import Capture

_PAUSE = SECOND // 5000  # between two captures: each holds up the loop while it is packed
_MANY = 1000  # captures in the backlog for each one that is sent at once


class Outbox:
    """Writes to a pipe when it takes something, so that the loop never waits for the parser.

    Requests of a batch end together; if each were packed there and then, the next ones would be sent late.
    """

    def __init__(self, transport: asyncio.WriteTransport, alarms: Alarms) -> None:
        self._transport = transport
        self._alarms = alarms
        self._backlog: deque[Capture] = deque()

    def tell(self, message: object) -> None:
        """Now, unless it is a capture."""
        if not isinstance(message, Capture):
            self._transport.write(messages.encode(message))
            return
        if not self._backlog:
            self._alarms.at(now() + _PAUSE, self._ship)
        self._backlog.append(message)

    def drain(self) -> None:
        """Every capture, now: the race is over."""
        while self._backlog:
            self._transport.write(messages.encode(self._backlog.popleft()))

    def _ship(self) -> None:
        for _ in range(min(len(self._backlog), 1 + len(self._backlog) // _MANY)):
            self._transport.write(messages.encode(self._backlog.popleft()))
        if self._backlog:
            self._alarms.at(now() + _PAUSE, self._ship)

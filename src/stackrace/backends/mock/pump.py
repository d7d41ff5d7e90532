"""Sends what is due, in the order of its times: the hot path of the mock."""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from stackrace.harness.clock import now

NOTHING: Callable[[Any], object] = deque(maxlen=0).append
"""Takes anything and keeps nothing; no Python function is as quick."""


class Wire(Protocol):
    """Where bytes go; never waits."""

    send: Callable[[bytes], int]  # returns how many it took; BlockingIOError if none

    def hold(self, rest: bytes) -> None:
        """Send this once there is room, before anything else."""

    def close(self) -> None:
        """Forget it."""


class Sender:
    """Something that sends at times of its own."""

    __slots__ = ("log", "steps", "wire")

    wire: Wire
    steps: Iterator["Entry"]
    log: Callable[[int], object]  # takes the time (ns) just before each send

    def ended(self, due: int) -> None:
        """Called once its steps are exhausted, with the time at which the last was due."""


Entry = tuple[int, int, bytes, Sender]
"""Due (ns), order among those due at once (each sender has its own), what to send, and for whom."""


class Pump:
    """All senders, by the time of the next send of each."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []

    def add(self, sender: Sender) -> None:
        """Take its first step, at once if it is due."""
        heapq.heappush(self._heap, next(sender.steps))

    def run(self, most: int, until: int) -> int | None:
        """Send what is due, at most `most` times and none from `until` on; returns when (ns) the next is due."""
        heap, clock, replace = self._heap, now, heapq.heapreplace
        for _ in range(most):
            if not heap:
                return None
            due, _, data, sender = heap[0]
            at = clock()
            if not due <= at < until:
                return due
            try:
                taken = sender.wire.send(data)
                sender.log(at)
            except BlockingIOError:
                taken = 0
                sender.log(at)
            except OSError:
                taken = len(data)
                sender.wire.close()
            if taken != len(data):
                sender.wire.hold(data[taken:])
            try:
                replace(heap, next(sender.steps))
            except StopIteration:
                heapq.heappop(heap)
                sender.ended(due)
        return heap[0][0] if heap else None

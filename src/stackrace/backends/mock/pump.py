"""Sends what is due, in the order of its times: the hot path of the mock.

With a thousand streams hardly anything of a stream is still in the cache when its turn comes, so that each object
touched for a send costs more than the work done with it: there are few, and what can be shared is shared.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from stackrace.backends.mock.truth import Log
from stackrace.harness.clock import now


class Wire(Protocol):
    """Where bytes go."""

    def hold(self, rest: bytes) -> None:
        """Send this once there is room, before anything else."""

    def close(self) -> None:
        """Forget it."""


class Sender:
    """Something that sends at times of its own: `steps`, or `count` of the `writes` and a `last`, `gap` (ns) apart."""

    __slots__ = ("count", "gap", "last", "send", "sent", "steps", "wire", "writes")

    wire: Wire
    send: Callable[[bytes], int]  # never waits; returns how many bytes it took, BlockingIOError if none
    writes: Sequence[bytes] | None  # None: steps
    count: int
    last: bytes
    gap: int
    sent: int  # of the writes, the one under way included
    steps: Iterator["Entry"]

    def ended(self, due: int) -> None:
        """Called once nothing is left to send, with the time at which the last was due."""


Entry = tuple[int, int, bytes, Sender]
"""Due (ns), order among those due at once (each sender has its own), what to send, and for whom."""


class Pump:
    """All senders, by the time of the next send of each."""

    def __init__(self, log: Log) -> None:
        self._heap: list[Entry] = []
        self._log = log

    def add(self, entry: Entry) -> None:
        """Send this, and then whatever its sender has next."""
        heapq.heappush(self._heap, entry)

    def run(self, most: int, until: int) -> int | None:
        """Send what is due, at most `most` times and none from `until` on; returns when (ns) the next is due."""
        heap, clock, replace, log_time, log_order = self._heap, now, heapq.heapreplace, self._log.time, self._log.order
        for _ in range(most):
            if not heap:
                return None
            due, order, data, sender = heap[0]
            at = clock()
            if not due <= at < until:
                return due
            log_time(at)
            log_order(order)
            try:
                taken = sender.send(data)
                if taken != len(data):
                    sender.wire.hold(data[taken:])
            except BlockingIOError:
                sender.wire.hold(data)
            except OSError:
                sender.wire.close()
            writes = sender.writes
            if writes is None:
                self._step(due, sender)
            elif (k := sender.sent) < sender.count:
                sender.sent = k + 1
                replace(heap, (due + sender.gap, order, writes[k], sender))
            elif k == sender.count:
                sender.sent = k + 1
                replace(heap, (due + sender.gap, order, sender.last, sender))
            else:
                heapq.heappop(heap)
                sender.ended(due)
        return heap[0][0] if heap else None

    def _step(self, due: int, sender: Sender) -> None:
        try:
            heapq.heapreplace(self._heap, next(sender.steps))
        except StopIteration:
            heapq.heappop(self._heap)
            sender.ended(due)

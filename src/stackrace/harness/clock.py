"""The one clock: CLOCK_MONOTONIC in nanoseconds, and alarms at absolute times on it."""

import asyncio
import ctypes
import functools
import heapq
import itertools
import os
import struct
import sys
import time
from collections.abc import Callable

now = time.monotonic_ns
SECOND = 1_000_000_000

_TFD_TIMER_ABSTIME = 1
_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_CLOEXEC = getattr(os, "O_CLOEXEC", 0)


class Alarms:
    """Callbacks at absolute nanoseconds of the clock.

    On Linux a timerfd wakes the loop: asyncio rounds its own timers up to 1 ms and uvloop cuts them to whole
    milliseconds, so that both would be late or early by up to that much. Elsewhere the loop's timers serve.
    A callback never runs before its time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._fd = timerfd_create()
        self._fallback: asyncio.TimerHandle | None = None
        if self._fd is not None:
            loop.add_reader(self._fd, self._on_readable)

    def at(self, when: int, callback: Callable[[], None]) -> None:
        """Call `callback` at `when` (ns), at once if that has passed."""
        heapq.heappush(self._heap, (when, next(self._order), callback))
        if self._heap[0][0] == when:
            self._arm()

    async def sleep_until(self, when: int) -> None:
        """Return at `when` (ns), never before."""
        future = self._loop.create_future()
        self.at(when, lambda: None if future.done() else future.set_result(None))
        await future

    def close(self) -> None:
        """Forget every alarm."""
        self._heap.clear()
        if self._fallback:
            self._fallback.cancel()
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _on_readable(self) -> None:
        assert self._fd is not None
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        self._run_due()

    def _run_due(self) -> None:
        heap = self._heap
        try:
            while heap and heap[0][0] <= now():
                heapq.heappop(heap)[2]()
        finally:  # a callback that fails must not silence the others
            self._arm()

    def _arm(self) -> None:
        if not self._heap:
            return
        when = self._heap[0][0]
        if self._fd is not None:
            timerfd_settime(self._fd, when)
            return
        if self._fallback:
            self._fallback.cancel()
        self._fallback = self._loop.call_later(max(0.0, (when - now()) / SECOND), self._run_due)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def timerfd_create() -> int | None:
    """A file descriptor that becomes readable at the time it is set to; None where the system has none."""
    if sys.platform != "linux":
        return None
    fd = _libc().timerfd_create(time.CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
    return None if fd < 0 else int(fd)


def timerfd_settime(fd: int, when: int) -> None:
    """Set it to `when` (ns of the clock); until then it is not readable."""
    # struct itimerspec: interval (none), then the absolute time; zero would disarm it
    seconds, nanoseconds = divmod(max(when, 1), SECOND)
    spec = struct.pack("@llll", 0, 0, seconds, nanoseconds)
    if _libc().timerfd_settime(fd, _TFD_TIMER_ABSTIME, spec, None) != 0:
        raise OSError(ctypes.get_errno(), "timerfd_settime")

"""Waits for sockets and for a time, to the microsecond; epoll and a timerfd on Linux."""

import os
import select
import selectors
import sys
from typing import Protocol

from stackrace.harness.clock import now, timerfd_create, timerfd_settime

_SPIN = 80_000  # ns before a time from which on we look again and again rather than sleep
_EVENTS = 4  # told at once: what is due is sent between them
_READ, _WRITE = 1, 4  # EPOLLIN and EPOLLOUT


class Handler(Protocol):
    """Whoever is told about its socket."""

    def readable(self) -> None:
        """Something came, or it broke."""

    def writable(self) -> None:
        """There is room to send."""


class Portable:
    """As much of select.epoll as we use, for systems without it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: int, mask: int) -> None:
        """Watch it, too."""
        self._selector.register(fd, self._events(mask))

    def modify(self, fd: int, mask: int) -> None:
        """For something else."""
        self._selector.modify(fd, self._events(mask))

    def unregister(self, fd: int) -> None:
        """No more."""
        self._selector.unregister(fd)

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        """Descriptors that are ready, and for what; waits `timeout` seconds, for ever if that is below 0."""
        ready = self._selector.select(None if timeout < 0 else timeout)
        masks = {selectors.EVENT_READ: _READ, selectors.EVENT_WRITE: _WRITE}
        return [(key.fd, sum(bit for event, bit in masks.items() if event & got)) for key, got in ready[:most]]

    def _events(self, mask: int) -> int:
        reads = selectors.EVENT_READ if mask & _READ else 0
        return reads | (selectors.EVENT_WRITE if mask & _WRITE else 0)


class Watch:
    """Every socket with its handler."""

    def __init__(self) -> None:
        self._poll = select.epoll() if sys.platform == "linux" else Portable()
        self._handlers: dict[int, Handler] = {}
        self._timer = timerfd_create()
        if self._timer is not None:
            self._poll.register(self._timer, _READ)

    def add(self, fd: int, handler: Handler) -> None:
        """Tell it when something came."""
        self._handlers[fd] = handler
        self._poll.register(fd, _READ)

    def change(self, fd: int, writes: bool) -> None:
        """Tell its handler when there is room to send, too, or no more."""
        self._poll.modify(fd, _READ | _WRITE if writes else _READ)

    def remove(self, fd: int) -> None:
        """Say no more about it."""
        del self._handlers[fd]
        self._poll.unregister(fd)

    def wait(self, until: int | None) -> list[tuple[Handler, int]]:
        """A few handlers that have something to do, and what; shortly before `until` (ns) none, and at once."""
        ready = self._poll.poll(self._timeout(until), _EVENTS)
        return [(self._handlers[fd], mask) for fd, mask in ready if not self._is_timer(fd)]

    def _timeout(self, until: int | None) -> float:
        if until is None:
            return -1
        sleeps = until - _SPIN - now()
        if sleeps <= 0:
            return 0
        if self._timer is None:
            return sleeps // 1_000_000 / 1000  # whole milliseconds, so that it is not rounded up
        timerfd_settime(self._timer, until - _SPIN)
        return -1

    def _is_timer(self, fd: int) -> bool:
        if fd != self._timer:
            return False
        os.read(fd, 8)
        return True


def tell(handler: Handler, mask: int) -> None:
    """Have it do what it has to do."""
    if mask & _WRITE:
        handler.writable()
    if mask & ~_WRITE:
        handler.readable()

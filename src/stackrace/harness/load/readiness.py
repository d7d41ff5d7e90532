"""Which streams have something to read: an epoll of our own inside the loop's, at a fraction of its cost an event.

It is edge-triggered: a stream is told of when something came, and not again until more does. Whoever is told has to
read until a read comes up short. The end of a stream raises no edge of its own if it came with the last data, but it
shows; such a stream is told of until it is ignored.

Linux acknowledges each event by a packet of its own. A busy process is told to be sparing: then it has the kernel
acknowledge every other one, as on a connection that carries data both ways: a packet costs it much of the time that an
event takes. It asks once a request, and the kernel returns to its habit where an event was more than 40 ms in coming. A
process that has time is not sparing: a server that holds an event back until the last one was acknowledged (Nagle) is
slowed by it.
"""

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable

_AT_ONCE = 128  # reads between two looks at the clock: what is to be sent must not wait for all that has come


_QUICKACK = getattr(socket, "TCP_QUICKACK", None)
_MORE = getattr(select, "EPOLLIN", 0)
_EDGES = _MORE | getattr(select, "EPOLLRDHUP", 0) | getattr(select, "EPOLLET", 0)


class Readiness:
    """Calls back whenever a watched socket can be read; where there is no epoll, by way of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._acknowledging: dict[int, socket.socket] = {}  # each event at once
        self.is_sparing = False
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        if self._epoll is not None:
            loop.add_reader(self._epoll.fileno(), self._on_ready)

    def watch(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """From now on."""
        fd = sock.fileno()
        self._callbacks[fd] = callback
        self._acknowledging[fd] = sock
        if self._epoll is not None:
            self._epoll.register(fd, _EDGES)
        else:
            self._loop.add_reader(fd, callback)

    def ignore(self, fd: int) -> None:
        """No longer; before it is closed."""
        if self._callbacks.pop(fd, None) is None:
            return
        self._acknowledging.pop(fd, None)
        if self._epoll is not None:
            self._epoll.unregister(fd)
        else:
            self._loop.remove_reader(fd)

    def close(self) -> None:
        """Forget them all."""
        for fd in list(self._callbacks):
            self.ignore(fd)
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _on_ready(self) -> None:
        assert self._epoll is not None
        callbacks = self._callbacks
        ready = self._epoll.poll(0, _AT_ONCE)
        for fd, events in ready:
            callback = callbacks.get(fd)  # None: one of the callbacks before it gave this stream up
            if callback is not None:
                callback()
                if events != _MORE and fd in callbacks:
                    self._epoll.modify(fd, _MORE)
        if self.is_sparing and self._acknowledging:
            self._acknowledge_less(ready)

    def _acknowledge_less(self, ready: list[tuple[int, int]]) -> None:
        for fd, _ in ready:
            sock = self._acknowledging.pop(fd, None)
            if sock is not None and _QUICKACK is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 0)

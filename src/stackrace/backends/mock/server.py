"""One thread: sends what is due, then looks for what has come."""

import gc
import socket

from stackrace.backends.mock.behaviour import Behaviour
from stackrace.backends.mock.connection import Connection
from stackrace.backends.mock.freeze import NEVER, Freeze
from stackrace.backends.mock.service import Service
from stackrace.backends.mock.watch import Watch, tell
from stackrace.harness.clock import now

_SENDS = 32  # between two looks at the sockets
_ACCEPTS = 16  # at once
_BACKLOG = 65535  # the system cuts it to what it permits


class Server:
    """Listens on 127.0.0.1."""

    def __init__(self, port: int, b: Behaviour) -> None:
        self._watch = Watch()
        self._freeze = Freeze(b)
        service = Service(b, self._freeze)
        self._pump, self._answer = service.pump, service.answer
        self._listener = socket.create_server(("127.0.0.1", port), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._watch.add(self._listener.fileno(), self)

    def run(self) -> None:
        """Serve for ever."""
        gc.freeze()
        gc.disable()
        while True:
            due = self._pump.run(_SENDS, self._freeze.begins)
            self._freeze.sit_out()
            self._look(due)

    def readable(self) -> None:
        """Accept whoever is there."""
        for _ in range(_ACCEPTS):
            try:
                sock, _ = self._listener.accept()
            except OSError:  # nobody more, or no more files
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            Connection(sock, self._watch, self._answer)

    def writable(self) -> None:
        """A listener never is."""

    def _look(self, due: int | None) -> None:
        begins = self._freeze.begins
        until = begins if due is None else min(due, begins)
        for handler, mask in self._watch.wait(None if until == NEVER else until):
            if now() >= begins:  # frozen; what is there stays there
                return
            tell(handler, mask)

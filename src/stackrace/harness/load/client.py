"""One request over one connection: send the bytes, keep what comes back with its time, and do nothing else."""

import asyncio
from collections.abc import Callable

from stackrace.harness.clock import now
from stackrace.harness.load.connections import READ_BYTES, Connection
from stackrace.harness.load.framing import EndOfResponse
from stackrace.harness.load.readiness import Readiness
from stackrace.harness.load.received import Journal


class Exchange:
    """Sends `payload`, enters in the journal what is read for the request at `position`; calls `on_end(self)` once.

    That is when the response is complete, or it is clear that it never will be.
    """

    __slots__ = (
        "_end_of_response",
        "_journal",
        "_loop",
        "_on_end",
        "_pending",
        "_position",
        "_read",
        "_readiness",
        "body_sent",
        "connection",
        "end",
        "error",
        "is_reset",
        "is_reusable",
        "last_activity",
        "sent",
    )

    def __init__(
        self,
        payload: bytes,
        position: int,
        loop: asyncio.AbstractEventLoop,
        readiness: Readiness,
        journal: Journal,
        on_end: Callable[["Exchange"], None],
    ) -> None:
        self.connection: Connection | None = None
        self.sent: int | None = None
        self.body_sent: int | None = None
        self.end: int | None = None
        self.last_activity: int | None = None  # when something arrived or was sent
        self.error: str | None = None
        self.is_reusable = False  # the connection can carry another request
        self.is_reset = False  # the connection broke before any byte of a response
        self._loop = loop
        self._readiness = readiness
        self._journal = journal
        self._position = position
        self._on_end: Callable[[Exchange], None] | None = on_end
        self._pending = memoryview(payload)
        self._end_of_response = EndOfResponse()

    def start(self, connection: Connection) -> None:
        """Send now."""
        self.connection = connection
        self._read = connection.reader(self._journal, self._position)
        self._readiness.watch(connection.sock, self._on_readable)
        self.sent = self.last_activity = now()
        self._write()

    def give_up(self, error: str | None) -> None:
        """Stop here and close the connection, whatever has come."""
        if self.end is None:
            self._finish(error)

    @property
    def is_refused(self) -> bool:
        """The server answered with another status than 200."""
        return self._end_of_response.status not in (b"200", b"")

    def _write(self) -> None:
        assert self.connection is not None
        try:
            taken = self.connection.send(self._pending)
        except OSError as e:
            self._break(f"{type(e).__name__}: {e}")
            return
        self._pending = self._pending[taken:]
        if not self._pending:
            self.body_sent = now()
        else:
            self._loop.add_writer(self.connection.fd, self._on_writable)

    def _on_writable(self) -> None:
        assert self.connection is not None
        self._loop.remove_writer(self.connection.fd)
        self._write()

    def _on_readable(self) -> None:
        try:
            while data := self._read():
                self.last_activity = self._journal.stamps[-1]
                if self._end_of_response.is_here(data):
                    self.is_reusable = self._end_of_response.keeps_alive and not self._pending
                    self._finish(None)
                    return
                if len(data) < READ_BYTES:
                    return  # nothing more is there
        except BlockingIOError:
            return
        except OSError as e:
            self._break(f"{type(e).__name__}: {e}")
            return
        self._on_eof()

    def _on_eof(self) -> None:
        if self._end_of_response.is_at_close:
            self._finish(None)
        else:
            self._break("connection closed by the server before the end of its response")

    def _break(self, error: str) -> None:
        self.is_reset = not self._end_of_response.has_begun
        self._finish(error)

    def _finish(self, error: str | None) -> None:
        self.end = now()
        self.error = error
        if self.connection is not None and self.connection.fd >= 0:
            self._readiness.ignore(self.connection.fd)
            if self.body_sent is None:
                self._loop.remove_writer(self.connection.fd)
            if not self.is_reusable:
                self.connection.close()
        on_end, self._on_end = self._on_end, None  # no cycle: the collector sleeps while the clock runs
        if on_end is not None:
            on_end(self)

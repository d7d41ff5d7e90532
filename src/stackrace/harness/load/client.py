"""One request over one connection: send the bytes, keep what comes back with its time, and do nothing else."""

import asyncio
import re
from collections.abc import Callable

from stackrace.harness.clock import now
from stackrace.harness.load.connections import Connection, Received

_LAST_CHUNK = b"\r\n0\r\n\r\n"
_LAST_CHUNK_AND_TRAILERS = re.compile(rb"\r\n0+(?:;[^\r\n]*)?\r\n(?:[^\r\n]+\r\n)*\r\n\Z")
_TAIL_BYTES = 1024  # as much of the end is looked at for a last chunk with extensions or trailers
_TAIL_PIECES = 512  # of 4 bytes or more each; half of them are kept when there are more


class Exchange:
    """Sends `payload` and keeps what is read until the response is complete; then calls `on_end(self)` once."""

    __slots__ = (
        "_end_of_response",
        "_loop",
        "_on_end",
        "_pending",
        "body_sent",
        "connection",
        "end",
        "error",
        "is_reset",
        "is_reusable",
        "received",
        "sent",
    )

    def __init__(self, payload: bytes, loop: asyncio.AbstractEventLoop, on_end: Callable[["Exchange"], None]) -> None:
        self.connection: Connection | None = None
        self.received = Received()
        self.sent: int | None = None
        self.body_sent: int | None = None
        self.end: int | None = None
        self.error: str | None = None
        self.is_reusable = False  # the connection can carry another request
        self.is_reset = False  # the connection broke before any byte of a response
        self._loop = loop
        self._on_end: Callable[[Exchange], None] | None = on_end
        self._pending = memoryview(payload)
        self._end_of_response = _EndOfResponse()

    def start(self, connection: Connection) -> None:
        """Send now."""
        self.connection = connection
        self._loop.add_reader(connection.fd, self._on_readable)
        self.sent = now()
        self._write()

    def give_up(self, error: str | None) -> None:
        """Stop here and close the connection, whatever has come."""
        if self.end is None:
            self._finish(error)

    @property
    def is_refused(self) -> bool:
        """The server answered with another status than 200."""
        return self._end_of_response.status not in (b"200", b"")

    @property
    def last_activity(self) -> int | None:
        """When something last arrived or was sent."""
        return self.received.stamps[-1] if self.received.stamps else self.sent

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
        assert self.connection is not None
        try:
            data = self.connection.receive(self.received)
        except BlockingIOError:
            return
        except OSError as e:
            self._break(f"{type(e).__name__}: {e}")
            return
        if not data:
            self._on_eof()
        elif self._end_of_response.seen(data):
            self.is_reusable = self._end_of_response.keeps_alive and not self._pending
            self._finish(None)

    def _on_eof(self) -> None:
        if self.received.data and self._end_of_response.is_at_close:
            self._finish(None)
        else:
            self._break("connection closed by the server before the end of its response")

    def _break(self, error: str) -> None:
        self.is_reset = not self.received.data
        self._finish(error)

    def _finish(self, error: str | None) -> None:
        self.end = now()
        self.error = error
        if self.connection is not None and self.connection.fd >= 0:
            self._loop.remove_reader(self.connection.fd)
            self._loop.remove_writer(self.connection.fd)
            if not self.is_reusable:
                self.connection.close()
        on_end, self._on_end = self._on_end, None  # no cycle: the collector sleeps while the clock runs
        if on_end is not None:
            on_end(self)


class _EndOfResponse:
    """Tells from the raw bytes, without parsing them, when an HTTP/1.1 response is over."""

    __slots__ = ("_head", "_left", "_tail", "is_at_close", "keeps_alive", "status")

    def __init__(self) -> None:
        self._head: bytes | None = b""  # None once the headers are complete
        self._left: int | None = None  # body bytes still to come, where the headers told
        self._tail: list[bytes] = []  # the last pieces, _TAIL_BYTES of them or more
        self.status = b""
        self.is_at_close = False
        self.keeps_alive = True

    def seen(self, data: bytes) -> bool:
        """Whether the response ends with `data`, the next bytes of it."""
        while self._head is not None:
            head, separator, data = (self._head + data).partition(b"\r\n\r\n")
            if not separator:
                self._head = head
                return False
            self._head = b""
            if _is_interim(head):
                continue
            self._read_head(head.lower())
            data = b"\r\n" + data  # so that an empty chunked body ends like any other
            if self._left is not None:
                self._left += 2
        if self._left is not None:
            self._left -= len(data)
            return self._left <= 0
        if self.is_at_close:
            return False
        self._tail.append(data)
        if len(data) < 4 or data.endswith(b"\r\n\r\n"):  # else no need to look closer
            return self._is_last_chunk()
        if len(self._tail) > _TAIL_PIECES:
            del self._tail[: -_TAIL_PIECES // 2]
        return False

    def _is_last_chunk(self) -> bool:
        tail = b"".join(self._tail)[-_TAIL_BYTES:]
        self._tail = [tail]
        if tail.endswith(_LAST_CHUNK):
            return True
        return tail.endswith(b"\r\n\r\n") and _LAST_CHUNK_AND_TRAILERS.search(tail) is not None

    def _read_head(self, head: bytes) -> None:
        self._head = None
        self.status = head.partition(b" ")[2][:3]
        fields = dict(line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
        self.keeps_alive = b"close" not in fields.get(b"connection", b"")
        if b"chunked" in fields.get(b"transfer-encoding", b""):
            return
        length = fields.get(b"content-length", b"").strip()
        if length.isdigit():
            self._left = int(length)
        else:
            self.is_at_close = True


def _is_interim(head: bytes) -> bool:
    """A 1xx response, which another one follows."""
    return head.partition(b" ")[2].startswith(b"1")

"""Warm connections to one endpoint, unlimited in number, opened off the clock."""

import asyncio
import socket
import ssl
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from stackrace.harness.clock import SECOND, now
from stackrace.harness.errors import UsageError
from stackrace.harness.load import stamps

MAX_IDLE = 4 * SECOND  # vLLM and SGLang close an idle connection after 5 s
_READ_BYTES = 16384  # more is read the next time round; asking for more costs each small read
_AT_ONCE = 256  # connections that are opened side by side: a server's backlog is not endless


@dataclass(slots=True)
class Received:
    """What came on a stream, read by read, unparsed."""

    data: list[bytes] = field(default_factory=list)
    stamps: "array[int]" = field(default_factory=lambda: array("q"))  # just after the read, ns of CLOCK_MONOTONIC
    kernel: bytearray = field(default_factory=bytearray)  # STAMP_BYTES a read, zeros where the kernel told none


@dataclass(slots=True, eq=False)
class Connection:
    """A non-blocking socket, plain or TLS."""

    sock: socket.socket
    used: bool = False  # carried a request already
    idle_since: int = field(default_factory=now)
    _recvmsg: Callable[[int, int], tuple[bytes, list[tuple[int, int, bytes]], int, object]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sock, ssl.SSLSocket):
            self._recvmsg = self.sock.recvmsg

    @property
    def fd(self) -> int:
        """Its file descriptor, -1 when closed."""
        return self.sock.fileno()

    def receive(self, received: Received) -> bytes:
        """Add what has arrived, and return it; nothing at the end of the stream. OSError if the connection broke."""
        if self._recvmsg is not None:
            data, ancillary, _, _ = self._recvmsg(_READ_BYTES, stamps.ANCILLARY_BYTES)
        else:
            data, ancillary = _decrypted(self.sock), []
        if data:
            received.stamps.append(now())
            received.kernel += ancillary[0][2] if ancillary else stamps.NO_STAMP
            received.data.append(data)
        return data

    def send(self, data: memoryview) -> int:
        """Bytes taken by the kernel, 0 if it takes none now."""
        try:
            return self.sock.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0

    def is_open(self) -> bool:
        """Whether the server has not closed it meanwhile: an idle connection has nothing to read."""
        if isinstance(self.sock, ssl.SSLSocket):
            return now() - self.idle_since < MAX_IDLE
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Close it."""
        self.sock.close()


class Connections:
    """A pool that never makes a request wait for a limit."""

    def __init__(self, url: str, connect_timeout: float) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._timeout = connect_timeout
        self._idle: deque[Connection] = deque()
        self._opening = 0
        self._address: tuple[socket.AddressFamily, tuple[object, ...]] | None = None

    async def resolve(self) -> None:
        """Look the host up, once and off the clock, and settle on the first of its addresses that answers."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as e:
            raise UsageError(f"cannot resolve {self._host!r} ({e}): check the backend's URL") from None
        self._address = found[0][0], found[0][4]
        for family, _, _, _, address in found if len(found) > 1 else []:  # nobody may listen on some of them
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.setblocking(False)
                try:
                    async with asyncio.timeout(self._timeout):
                        await loop.sock_connect(trial, address)
                except OSError:
                    continue
                self._address = family, address
                return

    async def open(self) -> Connection:
        """A new connection. OSError where the server refuses."""
        if self._address is None:
            await self.resolve()
        assert self._address is not None
        family, address = self._address
        loop = asyncio.get_running_loop()
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stamps.enable(sock)
            async with asyncio.timeout(self._timeout):
                await loop.sock_connect(sock, address)
                if self._tls is not None:
                    sock = await _handshake(loop, self._tls, sock, self._host)
        except BaseException:
            sock.close()
            raise
        return Connection(sock)

    def take(self) -> Connection | None:
        """The most recently used idle connection that is still open, if there is one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open():
                return connection
            connection.close()
        return None

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for later."""
        connection.used = True
        connection.idle_since = now()
        self._idle.append(connection)

    async def keep_ready(self, number: int) -> None:
        """Close what has idled too long and open what is missing to have `number` connections idle."""
        expired = now() - MAX_IDLE
        while self._idle and self._idle[0].idle_since < expired:
            self._idle.popleft().close()
        missing = number - len(self._idle) - self._opening
        if missing > 0:
            self._opening += missing
            try:
                for first in range(0, missing, _AT_ONCE):
                    wave = (self.open() for _ in range(min(_AT_ONCE, missing - first)))
                    opened = await asyncio.gather(*wave, return_exceptions=True)
                    self._idle.extend(c for c in opened if isinstance(c, Connection))
            finally:
                self._opening -= missing

    def close(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self._idle.pop().close()


def _decrypted(sock: socket.socket) -> bytes:
    """All that is there: what TLS has decrypted does not wake the loop again. BlockingIOError if that is nothing."""
    parts: list[bytes] = []
    try:
        while part := sock.recv(_READ_BYTES):
            parts.append(part)
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        if not parts:
            raise BlockingIOError from None
    except OSError:
        if not parts:  # else what came is kept first; the next call fails again
            raise
    return b"".join(parts)


async def _handshake(
    loop: asyncio.AbstractEventLoop, context: ssl.SSLContext, sock: socket.socket, host: str
) -> ssl.SSLSocket:
    secure = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    while True:
        ready = loop.create_future()
        try:
            secure.do_handshake()
        except ssl.SSLWantReadError:
            loop.add_reader(secure.fileno(), ready.set_result, None)
            await ready
            loop.remove_reader(secure.fileno())
        except ssl.SSLWantWriteError:
            loop.add_writer(secure.fileno(), ready.set_result, None)
            await ready
            loop.remove_writer(secure.fileno())
        else:
            return secure

"""Warm connections to one endpoint, unlimited in number, opened off the clock."""

import asyncio
import functools
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from stackrace.harness.clock import SECOND, Alarms, now
from stackrace.harness.errors import UsageError
from stackrace.harness.load import stamps
from stackrace.harness.load.received import Journal

_UPKEEP = SECOND // 4
MAX_IDLE = 4 * SECOND  # vLLM and SGLang close an idle connection after 5 s
READ_BYTES = 16384  # asking for more costs each small read
_AT_ONCE = 8  # connections that are opened or closed before the loop looks at what is due


@dataclass(slots=True, eq=False)
class Connection:
    """A non-blocking socket, plain or TLS."""

    sock: socket.socket
    used: bool = False  # carried a request already
    idle_since: int = field(default_factory=now)

    @property
    def fd(self) -> int:
        """Its file descriptor, -1 when closed."""
        return self.sock.fileno()

    def reader(self, journal: Journal, position: int) -> Callable[[], bytes]:
        """A function that enters what has arrived for the request at `position`, and returns it; b"" at the end.

        It raises OSError if the connection broke.
        """
        if isinstance(self.sock, ssl.SSLSocket):
            return functools.partial(_read_tls, self.sock, journal, position)
        return _plain_reader(self.sock, journal, position)

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
        closed = 0
        while self._idle and self._idle[0].idle_since < expired:
            self._idle.popleft().close()
            closed += 1
            if closed % _AT_ONCE == 0:
                await asyncio.sleep(0)
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

    async def stay_ready(self, alarms: Alarms, number: Callable[[], int]) -> None:
        """Have as many idle as `number` says, four times a second, until it is cancelled."""
        while True:
            await alarms.sleep_until(now() + _UPKEEP)
            await self.keep_ready(number())

    def close(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self._idle.pop().close()


def _plain_reader(sock: socket.socket, journal: Journal, position: int) -> Callable[[], bytes]:
    recvmsg, clock, no_stamp = sock.recvmsg, now, stamps.NO_STAMP  # looked up once: this runs for each event
    size, room = READ_BYTES, stamps.ANCILLARY_BYTES
    enter_data, enter_kernel = journal.data.append, journal.kernel.append
    enter_position, enter_stamp = journal.positions.append, journal.stamps.append

    def read() -> bytes:
        data, ancillary, _, _ = recvmsg(size, room)
        if data:
            enter_stamp(clock())
            enter_kernel(ancillary[0][2] if ancillary else no_stamp)
            enter_data(data)
            enter_position(position)
        return data

    return read


def _read_tls(sock: ssl.SSLSocket, journal: Journal, position: int) -> bytes:
    """All that is there: what TLS has decrypted does not wake the loop again. BlockingIOError if that is nothing."""
    parts: list[bytes] = []
    try:
        while part := sock.recv(READ_BYTES):
            parts.append(part)
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        if not parts:
            raise BlockingIOError from None
    except OSError:
        if not parts:  # else what came is kept first; the next call fails again
            raise
    if parts:
        journal.stamps.append(now())
        journal.kernel.append(stamps.NO_STAMP)
        journal.data.append(b"".join(parts))
        journal.positions.append(position)
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

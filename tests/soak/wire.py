"""HTTP by hand, so that a client may misbehave."""

import asyncio
import json
import socket
import struct
from typing import NamedTuple

PATIENCE = 60.0  # seconds; an answer that takes longer never comes
AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: a close sends RST
SMALL = 4096  # bytes, a slow reader's buffer


class Reply(NamedTuple):
    """One answer."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


def message(method: str, target: str, body: bytes | None, headers: dict[str, str]) -> bytes:
    """A request; without a body where there is None."""
    fields = {"Host": "soak"} | headers
    if body is not None and "Transfer-Encoding" not in headers:
        fields = {"Content-Length": str(len(body))} | fields
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + (body or b"")


def post(target: str, body: object, headers: dict[str, str] | None = None) -> bytes:
    """A POST of bytes, or of anything else as JSON."""
    return message("POST", target, body if isinstance(body, bytes) else json.dumps(body).encode(), headers or {})


def chunked(target: str, body: bytes, size: int) -> bytes:
    """A POST in chunks."""
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    data = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    return message("POST", target, data, {"Transfer-Encoding": "chunked"})


class Wire:
    """A connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int, small: bool = False) -> "Wire":
        """`small`: it takes no more than a few kilobytes that were not asked for."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            return cls(*await asyncio.open_connection(sock=sock, limit=SMALL if small else 1 << 20))
        except BaseException:  # cancelled
            sock.close()
            raise

    async def send(self, data: bytes) -> None:
        """Returns once most of it is on its way."""
        self._writer.write(data)
        await self._writer.drain()

    def end(self) -> None:
        """Nothing more is sent."""
        self._writer.write_eof()

    async def some(self, most: int) -> bytes:
        """What has come or comes next; b"" at the end."""
        return await self._reader.read(most)

    def leave(self, reset: bool) -> None:
        """Close, by RST or FIN."""
        if reset:
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
            self._writer.transport.abort()
        else:
            self._writer.close()

    async def reply(self, pause: float = 0) -> Reply | None:
        """The next answer, read with a pause before each piece; None: the server closed instead."""
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        first, *lines = head[:-4].split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split(" ", 2)[1])
        if headers.get("transfer-encoding") == "chunked":
            return Reply(status, headers, await self._chunks(pause))
        return Reply(status, headers, await self._reader.readexactly(int(headers["content-length"])))

    async def _chunks(self, pause: float) -> bytes:
        pieces: list[bytes] = []
        while True:
            await asyncio.sleep(pause)
            size = int((await self._reader.readuntil(b"\r\n"))[:-2], 16)
            pieces.append((await self._reader.readexactly(size + 2))[:-2])
            if not size:
                return b"".join(pieces)

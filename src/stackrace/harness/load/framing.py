"""When an HTTP/1.1 response is over, told from its raw bytes without parsing them."""

import re

_LAST_CHUNK = re.compile(rb"\r\n0+(?:;[^\r\n]*)?\r\n(?:[^\r\n]+\r\n)*\r\n\Z")
_BLANK_LINE = b"\r\n\r\n"
_END_OF_EVENT = b"\n\n\r\n"  # as most chunks of a stream end; it cannot be a part of the last chunk
_DIGITS = 19  # of a length that there can be
_TAIL_BYTES = 1024  # as much of the end is looked at for a last chunk with extensions or trailers


class EndOfResponse:
    """Watches the pieces of one response, as they are read; `is_here` is asked of each of them."""

    __slots__ = ("_head", "_is_chunked", "_left", "_tail", "is_at_close", "keeps_alive", "status")

    def __init__(self) -> None:
        self._tail = b""  # of what came so far
        self._head: bytes | None = b""  # None once the headers are complete
        self._left: int | None = None  # body bytes still to come, where the headers told
        self._is_chunked = False
        self.status = b""
        self.is_at_close = False
        self.keeps_alive = True

    def is_here(self, piece: bytes) -> bool:
        """Whether the response ends with this piece, the next one."""
        if self._is_chunked and piece[-4:] == _END_OF_EVENT:
            self._tail = piece
            return False
        self._tail = (self._tail + piece)[-_TAIL_BYTES:]
        while self._head is not None:
            head, separator, piece = (self._head + piece).partition(_BLANK_LINE)
            if not separator:
                self._head = head
                return False
            self._head = b""
            if not _is_interim(head):
                self._read_head(head.lower())
        if self._left is not None:
            self._left -= len(piece)
            return self._left <= 0
        return self._is_chunked and self._tail[-4:] == _BLANK_LINE and _LAST_CHUNK.search(self._tail) is not None

    @property
    def has_begun(self) -> bool:
        """Anything has come."""
        return bool(self._tail)

    def _read_head(self, head: bytes) -> None:
        self._head = None
        self.status = head.partition(b" ")[2][:3]
        fields = dict(line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
        self.keeps_alive = b"close" not in fields.get(b"connection", b"")
        self._is_chunked = b"chunked" in fields.get(b"transfer-encoding", b"")
        length = fields.get(b"content-length", b"").strip()
        if length.isdigit() and len(length) < _DIGITS and not self._is_chunked:
            self._left = int(length)
        self.is_at_close = self._left is None and not self._is_chunked


def _is_interim(head: bytes) -> bool:
    """A 1xx response, which another one follows."""
    return head.partition(b" ")[2].startswith(b"1")

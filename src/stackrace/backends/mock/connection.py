"""One keep-alive HTTP/1.1 connection, never waited for."""

from collections import deque
from collections.abc import Callable
from socket import socket
from typing import NamedTuple

import httptools

from stackrace.backends.mock.pump import Sender
from stackrace.backends.mock.watch import Watch
from stackrace.harness.clock import now

_READ = memoryview(bytearray(1 << 20))


class Call(NamedTuple):
    """One request as it came."""

    url: bytes
    body: bytes
    arrived: int  # ns, when its last byte was read
    closes: bool  # the connection ends with the response


class Connection:
    """Reads requests and hands them to `answer` one at a time; what the client does not take is held."""

    __slots__ = (
        "_answer",
        "_body",
        "_calls",
        "_is_busy",
        "_outbox",
        "_parser",
        "_send",
        "_senders",
        "_sock",
        "_stamp",
        "_url",
        "_watch",
        "is_last",
        "on_close",
    )

    def __init__(self, sock: socket, watch: Watch, answer: Callable[["Connection", Call], None]) -> None:
        self._sock, self._watch, self._answer = sock, watch, answer
        self._senders: list[Sender] = []
        self._send: Callable[[bytes], int] = sock.send
        self.on_close: Callable[[], None] | None = None  # called when it closes before `finish`
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._url, self._body = b"", bytearray()
        self._calls: deque[Call] = deque()
        self._outbox = bytearray()
        self._is_busy = False
        self.is_last = False  # it closes after this response
        watch.add(sock.fileno(), self)

    def readable(self) -> None:
        """Take what has come."""
        try:
            size = self._sock.recv_into(_READ)
            self._stamp = now()
            if size and self._parser:
                self._parser.feed_data(_READ[:size])
        except BlockingIOError:
            return
        except httptools.HttpParserCallbackError as e:
            raise e.__context__ or e from None
        except (OSError, httptools.HttpParserError):
            size = 0
        if not size:
            self.close()

    def writable(self) -> None:
        """Send what is held."""
        try:
            del self._outbox[: self._sock.send(self._outbox)]
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not self._outbox:
            self._redirect(self._sock.send)
            self._watch.change(self._sock.fileno(), writes=False)
            self._close_if_last()

    def hold(self, rest: bytes) -> None:
        """Send this once there is room, before anything else."""
        self._outbox += rest
        self._redirect(self._send_later)
        self._watch.change(self._sock.fileno(), writes=True)

    def attach(self, sender: Sender) -> None:
        """Have it send here."""
        sender.wire, sender.send = self, self._send
        self._senders.append(sender)

    def reply(self, response: bytes) -> None:
        """Answer with this and be done."""
        try:
            rest = response[self._send(response) :]
        except BlockingIOError:
            rest = response
        except OSError:
            self.close()
            return
        if rest:
            self.hold(rest)
        self.finish()

    def finish(self) -> None:
        """The response was handed over; on to the next request, unless this was the last."""
        self._is_busy, self.on_close = False, None
        self._senders.clear()
        self._close_if_last()
        if self._calls:
            self._begin(self._calls.popleft())

    def close(self) -> None:
        """Break it off, whatever is under way."""
        if self._parser is None:
            return
        self._parser = None  # no cycle: nothing collects them while we serve
        self._calls.clear()
        self._watch.remove(self._sock.fileno())
        self._sock.close()
        self._redirect(len)
        self._senders.clear()
        on_close, self.on_close = self.on_close, None
        if on_close:
            on_close()

    def on_message_begin(self) -> None:
        """Parser: another request."""
        self._url, self._body = b"", bytearray()

    def on_url(self, url: bytes) -> None:
        """Parser: a piece of the URL."""
        self._url += url

    def on_body(self, data: bytes) -> None:
        """Parser: a piece of the body."""
        self._body += data

    def on_message_complete(self) -> None:
        """Parser: the request is whole."""
        assert self._parser is not None
        call = Call(self._url, bytes(self._body), self._stamp, not self._parser.should_keep_alive())
        if self._is_busy:
            self._calls.append(call)
        else:
            self._begin(call)

    def _begin(self, call: Call) -> None:
        self._is_busy, self.is_last = True, call.closes
        self._answer(self, call)

    def _redirect(self, send: Callable[[bytes], int]) -> None:
        self._send = send
        for sender in self._senders:
            sender.send = send

    def _send_later(self, data: bytes) -> int:
        self._outbox += data
        return len(data)

    def _close_if_last(self) -> None:
        if self.is_last and not self._is_busy and not self._outbox:
            self.close()

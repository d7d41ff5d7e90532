"""The bytes of responses. What does not depend on the request is rendered once: sending is all that is left to do."""

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import orjson

from stackrace.backends.mock.behaviour import Behaviour
from stackrace.backends.mock.question import Question

MALFORMED = b'data: {"choices": [{"index": 0, "text": " t\n\n'
_WORDS = (" t", " é", "世", "😀")  # one to four bytes a character, so that a cut can go through one
_TEMPLATES = 1 << 14  # kept, of _SIZE bytes or so each
_ROOM = 1 << 26  # bytes of rendered events that are kept
_SIZE = 300
_WIDE = "%-8d"  # padded, so that a line has one length whatever the request
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 503: "Service Unavailable"}


def text_of(first: int, end: int) -> str:
    """The text of tokens `first` to `end` of an answer."""
    return "".join(_WORDS[i % len(_WORDS)] for i in range(first, end))


def reply(status: int, body: dict[str, Any] | bytes, closes: bool) -> bytes:
    """A whole response, JSON."""
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = [_status(status), "Content-Type: application/json", f"Content-Length: {len(content)}", *_closing(closes)]
    return _head(lines) + content


def stream_head(transfer: str, length: int, closes: bool) -> bytes:
    """The head of a stream whose end is told by `transfer`; of `length` bytes, where that tells it."""
    how = {"chunked": ["Transfer-Encoding: chunked"], "length": [f"Content-Length: {length}"], "close": []}[transfer]
    return _head([_status(200), "Content-Type: text/event-stream; charset=utf-8", *how, *_closing(closes)])


class Events:
    """Renders the events of one API, completions or chat."""

    def __init__(self, b: Behaviour, is_chat: bool) -> None:
        self.is_chat = is_chat
        self._per_write = b.events_per_write
        self._width = b.tokens_per_event
        self._is_chunked = b.transfer == "chunked"
        self._templates: list[bytes] = []
        self._rendered: dict[int, list[bytes]] = {}  # by prompt tokens
        self._room = _ROOM
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        self._base = {"id": "mock", "object": kind, "created": 0, "model": "mock"}

    def sends(self, tokens: int) -> int:
        """Sends that the events of `tokens` tokens take."""
        return -(-self._count(tokens) // self._per_write)

    def marks(self, tokens: int) -> Iterator[int]:
        """Tokens of each event."""
        whole = self._count(tokens) - 1
        return chain(repeat(self._width, whole), [tokens - whole * self._width])

    def role(self) -> bytes:
        """The event that opens a chat: no token."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        return self.framed(b"data: " + orjson.dumps({**self._base, "choices": [choice]}) + b"\n\n")

    def events(self, q: Question) -> Iterable[bytes]:
        """The bytes of each event with tokens; the last brings the usage, [DONE] and the end of the body."""
        if kept := self.kept(q):
            return [*kept[0][: kept[1]], kept[2]]
        whole = self._count(q.tokens) - 1
        return chain(self._render(q.prompt_tokens, 0, whole), [self._last(q, whole * self._width)])

    def kept(self, q: Question) -> tuple[list[bytes], int, bytes] | None:
        """The same as a list shared by prompts as long, how many of it are meant, and the last; None if too many."""
        whole = self._count(q.tokens) - 1
        known = self._rendered.get(q.prompt_tokens, [])
        if len(known) < whole:
            if whole * _SIZE > self._room:
                return None
            self._rendered[q.prompt_tokens] = known
            new = list(self._render(q.prompt_tokens, len(known), whole))
            self._room -= sum(map(len, new))
            known += new
        return known, whole, self._last(q, whole * self._width)

    def whole(self, q: Question) -> bytes:
        """The answer to a question that wants it in one piece: JSON."""
        text, ids = text_of(0, q.tokens), list(range(q.tokens))
        said = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice = {"index": 0, **said, "token_ids": ids, "finish_reason": "length"}
        kind = {"object": "chat.completion"} if self.is_chat else {}
        return orjson.dumps({**self._base, **kind, "choices": [choice], "usage": _usage(q)})

    def framed(self, data: bytes) -> bytes:
        """As a chunk, where the body comes in chunks."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data

    def _count(self, tokens: int) -> int:
        return -(-tokens // self._width)

    def _render(self, prompt: int, first: int, end: int) -> Iterator[bytes]:
        for k in range(first, end):
            yield self._template(k) % (prompt, prompt + (k + 1) * self._width)

    def _template(self, k: int) -> bytes:
        if k < len(self._templates):
            return self._templates[k]
        line = self._line(k * self._width, (k + 1) * self._width, None)
        if k == len(self._templates) < _TEMPLATES:
            self._templates.append(line)
        return line

    def _line(self, first: int, end: int, reason: str | None) -> bytes:
        """An event but for its prompt tokens and total tokens."""
        text, ids = text_of(first, end), list(range(first, end))
        said = {"delta": {"content": text}} if self.is_chat else {"text": text}
        choice = {"index": 0, **said, "token_ids": ids, "finish_reason": reason}
        start = orjson.dumps({**self._base, "choices": [choice]})[:-1]
        usage = f'"prompt_tokens":{_WIDE},"completion_tokens":{end},"total_tokens":{_WIDE}'
        line = b'data: %b,"usage":{%b}}\n\n' % (start, usage.encode())
        return b"%x\r\n%b\r\n" % (len(line % (0, 0)), line) if self._is_chunked else line

    def _last(self, q: Question, first: int) -> bytes:
        line = self._line(first, q.tokens, "length") % (q.prompt_tokens, q.prompt_tokens + q.tokens)
        usage = orjson.dumps({**self._base, "choices": [], "usage": _usage(q)})
        end = self.framed(b"data: " + usage + b"\n\n") + self.framed(b"data: [DONE]\n\n")
        return line + end + (b"0\r\n\r\n" if self._is_chunked else b"")


def _usage(q: Question) -> dict[str, int]:
    total = q.prompt_tokens + q.tokens
    return {"prompt_tokens": q.prompt_tokens, "completion_tokens": q.tokens, "total_tokens": total}


def _status(status: int) -> str:
    return f"HTTP/1.1 {status} {_REASONS.get(status, '-')}"


def _closing(closes: bool) -> list[str]:
    return ["Connection: close"] if closes else []


def _head(lines: list[str]) -> bytes:
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()

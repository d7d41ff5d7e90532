"""The wire, inbound: what the bytes of a response say. Pure; no sockets, no clock."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httptools
import orjson

from stackrace.harness.errors import ProtocolError

_LARGEST = (1 << 31) - 1  # token id or token count


@dataclass(slots=True)
class Answer:
    """What a response said. A chunk is an event that carried a token."""

    status: int = 0
    complete: bool = False  # the HTTP message reached its end
    is_at_close: bool = True  # no header tells where that is: it ends with the connection
    done: bool = False  # data: [DONE] was seen
    chunk_reads: list[int] = field(default_factory=list)  # number of the read that completed it
    chunk_tokens: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    token_source: str | None = None
    error: str | None = None


def parse(reads: Iterable[bytes]) -> Answer:
    """Everything that one response says, given as it was read. Never raises: what is wrong stands in `error`."""
    return _Parser().parse(reads)


class _Parser:
    """HTTP framing by httptools, events by the rules of text/event-stream, tokens by ids, usage or text."""

    def __init__(self) -> None:
        self._http = httptools.HttpResponseParser(self)
        self._answer = Answer()
        self._read = 0
        self._counted = 0  # tokens of all chunks so far
        self._body = bytearray()  # of an answer that is no event stream
        self._events = _EventStream()
        self._is_stream = False

    def parse(self, reads: Iterable[bytes]) -> Answer:
        for self._read, data in enumerate(reads):
            try:
                self._http.feed_data(data)
            except httptools.HttpParserUpgrade:
                self._fail("the server wants to switch protocols")
                break
            except httptools.HttpParserError as e:
                if self._answer.complete:  # what follows the end is none of this response
                    break
                self._fail(f"not HTTP: {e}: {data[:80]!r}")
                break
        if self._body or self._answer.status not in (0, 200):
            self._fail(_plain_error(self._answer.status, bytes(self._body)))
        return self._answer

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer.complete:  # what follows the end is none of this response, here as below
            return
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._answer.is_at_close = False
        elif name.lower() == b"content-type":
            self._is_stream = value.lower().startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        if not self._answer.complete:
            self._answer.status = self._http.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._answer.complete:
            return
        if self._answer.status != 200 or not self._is_stream:
            self._body += data
            return
        for payload in self._events.feed(data):
            self._on_event(payload)

    def on_message_complete(self) -> None:
        self._answer.complete = self._answer.complete or self._answer.status >= 200  # 1xx: the response follows

    def _on_event(self, payload: bytes) -> None:
        if payload == b"[DONE]":
            self._answer.done = True
            return
        try:
            event = orjson.loads(payload)
            if error := event.get("error"):
                self._fail(f"error event: {_message(error)}")
                return
            self._take_tokens(event)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, ProtocolError) as e:
            self._fail(f"bad event ({e}): {payload[:120]!r}")

    def _take_tokens(self, event: dict[str, Any]) -> None:
        answer = self._answer
        _take_usage(answer, event.get("usage"))
        tokens, source = _tokens_of(event, self._counted, answer.output_tokens)
        if tokens <= 0:
            return
        self._counted += tokens
        answer.token_source = _weakest(answer.token_source, source)
        answer.chunk_reads.append(self._read)
        answer.chunk_tokens.append(tokens)
        for choice in event["choices"]:
            answer.output_ids += _ids(choice)

    def _fail(self, message: str) -> None:
        if self._answer.error is None:
            self._answer.error = message


class _EventStream:
    """Cuts a text/event-stream into the data of its events, wherever the reads were cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[bytes]:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    yield b"\n".join(self._data)
                    self._data.clear()
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))


_SOURCES = ("ids", "usage", "text")


def _weakest(a: str | None, b: str) -> str:
    return b if a is None else _SOURCES[max(_SOURCES.index(a), _SOURCES.index(b))]


def _tokens_of(event: dict[str, Any], before: int, after: int | None) -> tuple[int, str]:
    """Tokens that an event brought, and what says so: its ids, the running usage, or failing both its text."""
    choices = event.get("choices") or []
    if any(choice.get("token_ids") is not None for choice in choices):
        return sum(len(_ids(choice)) for choice in choices), "ids"
    if not choices:
        return 0, "usage"
    if event.get("usage") and after is not None:
        return after - before, "usage"
    return sum(bool(_text(choice)) for choice in choices), "text"


def _ids(choice: dict[str, Any]) -> list[int]:
    ids = choice.get("token_ids") or []
    if not all(type(i) is int and 0 <= i <= _LARGEST for i in ids):
        raise ProtocolError("token_ids are no list of ids")
    return list(ids)


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""


def _take_usage(answer: Answer, usage: dict[str, Any] | None) -> None:
    if not usage:
        return
    answer.prompt_tokens = _count(usage, "prompt_tokens", answer.prompt_tokens)
    answer.output_tokens = _count(usage, "completion_tokens", answer.output_tokens)
    details = usage.get("prompt_tokens_details") or {}
    answer.cached_tokens = _count(details, "cached_tokens", answer.cached_tokens)


def _count(fields: dict[str, Any], name: str, before: int | None) -> int | None:
    value = fields.get(name)
    if value is None:
        return before
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ProtocolError(f"{name} is no count")
    return value


def _plain_error(status: int, body: bytes) -> str:
    try:
        message = _message(orjson.loads(body).get("error"))
    except (ValueError, AttributeError, RecursionError):
        message = body[:200].decode(errors="replace")
    return f"HTTP {status}: {message}" if status != 200 else f"no event stream: {message}"


def _message(error: object) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)

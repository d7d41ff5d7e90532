"""A server whose every delay is set and therefore known: the truth that the harness is held against."""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httptools

from stackrace.backends.base import Backend, flags, source_hash
from stackrace.backends.running import Placement
from stackrace.harness.clock import SECOND, Alarms, now
from stackrace.harness.errors import require

_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What the mock does to every request; seconds and shares."""

    ttft: float  # first event after the request arrived
    gap: float  # between events
    tokens_per_event: int
    jitter: float  # each gap is stretched or shrunk by up to this share, evenly distributed
    stall_share: float  # share of requests that pause once, in their middle
    stall: float
    error_share: float  # share of requests answered with HTTP 500
    cut_share: float  # share of requests whose connection breaks in their middle
    seed: int

    def __post_init__(self) -> None:
        for name in ("ttft", "gap", "stall"):
            require(f"backend.{name}", getattr(self, name), (int, float), lambda v: v >= 0, "a number of seconds")
        for name in ("jitter", "stall_share", "error_share", "cut_share"):
            require(f"backend.{name}", getattr(self, name), (int, float), lambda v: 0 <= v <= 1, "a share from 0 to 1")
        require("backend.tokens_per_event", self.tokens_per_event, int, lambda v: v > 0, "a whole number above 0")


@dataclass(frozen=True, kw_only=True)
class Mock(Behaviour, Backend):
    """The mock as a stack."""

    def command(self, at: Placement) -> list[str]:
        """Ourselves, with every setting as a flag."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(Behaviour)}
        return [sys.executable, "-m", "stackrace.backends.mock", *flags({"port": at.port, **settings})]

    def version(self) -> str:
        """Hash of this file."""
        return f"mock {source_hash(Path(__file__))}"


class _Answer:
    """One request's stream: event k leaves at a time fixed when the request arrived."""

    def __init__(self, body: dict[str, Any], b: Behaviour, rng: random.Random, arrived: int) -> None:
        self.tokens = int(body["max_tokens"])
        self.prompt_tokens = len(body["prompt"]) if "prompt" in body else None  # a chat's it cannot count
        self.sent_tokens = 0
        self._per_event = b.tokens_per_event
        self.due = self._times(b, rng, arrived)
        is_cut = rng.random() < b.cut_share
        self.cut_after = len(self.due) // 2 if is_cut else None

    def _times(self, b: Behaviour, rng: random.Random, arrived: int) -> list[int]:
        n = -(-self.tokens // self._per_event)
        stalls_at = max(1, n // 2) if rng.random() < b.stall_share else None
        at, times = arrived + b.ttft * SECOND, []
        for k in range(n):
            times.append(round(at))
            gap = b.gap * (1 + b.jitter * rng.uniform(-1, 1)) + (b.stall if k + 1 == stalls_at else 0)
            at += gap * SECOND
        return times

    def event(self) -> bytes:
        """The next event."""
        tokens = min(self._per_event, self.tokens - self.sent_tokens)
        ids = list(range(self.sent_tokens, self.sent_tokens + tokens))
        self.sent_tokens += tokens
        is_last = self.sent_tokens == self.tokens
        text = " t" * tokens
        choice = {
            "index": 0,
            **({"delta": {"content": text}} if self.prompt_tokens is None else {"text": text}),
            "token_ids": ids,
            "finish_reason": "length" if is_last else None,
        }
        return self._chunk([choice]) + (
            self._chunk([]) + _chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n" if is_last else b""
        )

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        usage = {"completion_tokens": self.sent_tokens}
        if self.prompt_tokens is not None:
            usage |= {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens + self.sent_tokens}
        event = {"object": "text_completion", "model": "mock", "choices": choices, "usage": usage}
        return _chunked(b"data: " + json.dumps(event).encode() + b"\n\n")


class _Connection(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection."""

    def __init__(self, behaviour: Behaviour, rng: random.Random, alarms: Alarms) -> None:
        self._behaviour = behaviour
        self._rng = rng
        self._alarms = alarms
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        with contextlib.suppress(httptools.HttpParserUpgrade):
            self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        arrived = now()
        body, self._body = bytes(self._body), bytearray()
        if self._url in (b"/v1/completions", b"/v1/chat/completions"):
            self._complete(json.loads(body), arrived)
        elif self._url == b"/v1/models":
            self._reply(200, {"object": "list", "data": [{"id": "mock", "object": "model"}]})
        else:
            self._reply(200 if self._url == b"/health" else 404, {})

    def _complete(self, body: dict[str, Any], arrived: int) -> None:
        if not body.get("stream"):
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
            self._reply(200, {"choices": [{"index": 0, "text": " t", "finish_reason": "length"}], "usage": usage})
        elif self._rng.random() < self._behaviour.error_share:
            self._reply(500, {"error": {"message": "planted by the mock", "type": "server_error"}})
        else:
            answer = _Answer(body, self._behaviour, self._rng, arrived)
            self._transport.write(_STREAM_HEAD)
            self._at(answer, 0)

    def _at(self, answer: _Answer, k: int) -> None:
        self._alarms.at(answer.due[k], lambda: self._send(answer, k))

    def _send(self, answer: _Answer, k: int) -> None:
        if self._transport.is_closing():
            return
        if k == answer.cut_after:
            self._transport.abort()
            return
        self._transport.write(answer.event())
        if k + 1 < len(answer.due):
            self._at(answer, k + 1)

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self._transport.write(head.encode() + content)


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _serve(port: int, behaviour: Behaviour) -> None:
    loop = asyncio.get_running_loop()
    alarms, rng = Alarms(loop), random.Random(behaviour.seed)
    server = await loop.create_server(lambda: _Connection(behaviour, rng, alarms), "127.0.0.1", port, backlog=4096)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Every setting of `Behaviour` as a flag, and --port."""
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    for f in dataclasses.fields(Behaviour):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=float if f.type is float else int)
    settings = vars(parser.parse_args())
    uvloop.run(_serve(settings.pop("port"), Behaviour(**settings)))


if __name__ == "__main__":
    main()

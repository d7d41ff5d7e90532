"""What a client is told of its request: one JSON object, or a stream of server-sent events."""

import asyncio
import time

import orjson
from aiohttp import web

from stackrace.backends.mla.engine import TokenEvent
from stackrace.backends.mla.protocol import Completion, Json, choice, usage
from stackrace.backends.mla.tokenizer import Detokenizer

SSE = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


def as_json(body: Json) -> web.Response:
    """A 200 with `body`."""
    return web.Response(body=orjson.dumps(body), content_type="application/json")


class Answer:
    """What one request is told, from its token events."""

    def __init__(
        self,
        id: str,
        model: str,
        ask: Completion,
        detokenizer: Detokenizer,
        events: asyncio.Queue[TokenEvent],
    ) -> None:
        created = int(time.time())
        self._head: Json = {"id": id, "object": "text_completion", "created": created, "model": model}
        self._ask = ask
        self._detokenizer = detokenizer
        self._events = events
        self._num_output = 0

    async def whole(self) -> web.Response:
        """All tokens in one answer."""
        tokens: list[int] = []
        reason = None
        while reason is None:
            event = await self._events.get()
            tokens.append(event.token)
            reason = event.finish_reason
        choices = [self._choice(tokens, reason)]
        self._num_output = len(tokens)
        return as_json(self._head | {"choices": choices, "usage": self._usage()})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events, one for each step that gave a token (steps share one if the client is slow)."""
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        reason = None
        while reason is None:
            events = [await self._events.get()]
            while not self._events.empty():
                events.append(self._events.get_nowait())
            reason = events[-1].finish_reason
            data = self._chunk([event.token for event in events], reason)
            await response.write(data + self._tail() if reason else data)
        await response.write_eof()
        return response

    def _chunk(self, tokens: list[int], reason: str | None) -> bytes:
        body = self._head | {"choices": [self._choice(tokens, reason)]}
        self._num_output += len(tokens)
        if self._ask.continuous_usage:
            body["usage"] = self._usage()
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def _tail(self) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self._ask.include_usage:
            return done
        return b"data: " + orjson.dumps(self._head | {"choices": [], "usage": self._usage()}) + b"\n\n" + done

    def _choice(self, tokens: list[int], reason: str | None) -> Json:
        text = self._detokenizer.add(tokens)
        if not self._ask.return_token_ids:
            return choice(text, reason, None, None)
        return choice(text, reason, tokens, None if self._num_output else self._ask.prompt)

    def _usage(self) -> Json:
        return usage(len(self._ask.prompt), self._num_output)

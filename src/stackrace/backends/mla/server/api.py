"""OpenAI's API over an engine: HTTP requests become engine messages, token events become answers."""

import asyncio
import hmac
import traceback
import uuid
from collections.abc import Sequence as Many
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler

import stackrace
from stackrace.backends.mla.engine import Engine, Limits, TokenEvent
from stackrace.backends.mla.server.answer import Answer, ChatAnswer, CompletionAnswer, as_json
from stackrace.backends.mla.server.metrics import Metrics, Timing
from stackrace.backends.mla.server.protocol import Ask, ChatAsk, CompletionAsk, parse, sequences
from stackrace.backends.mla.server.refusal import HEADERS, Refusal
from stackrace.backends.mla.server.worker import Worker
from stackrace.harness.tokenizer import TextTokenizer

MAX_BODY = 1 << 24  # bytes; a million token ids are about 7 MB
LONG_TEXT = 10_000  # characters that take the tokenizer about a step's time: the event loop must not wait
SOON = 1.0  # seconds in which a handler can tell its client that the end has come

A = TypeVar("A", bound=Ask)


class Open(NamedTuple):
    """A sequence that somebody waits for."""

    answer: Answer[Any]
    timing: Timing


class Api:
    """The routes, and who waits for which sequence."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        tokenizer: TextTokenizer,
        name: str,
        max_num_queued_reqs: int,
        api_key: str | None,
    ) -> None:
        """`max_num_queued_reqs`: sequences that may be unfinished at once; `api_key`: None lets everybody in."""
        self.error: BaseException | None = None
        self.stopped = asyncio.Event()
        self._is_draining = False
        self._limits = limits
        self._tokenizer = tokenizer
        self._name = name
        self._max_open = max_num_queued_reqs
        self._api_key = api_key
        self._open: dict[str, Open] = {}
        self._num_answering = 0
        loop = asyncio.get_running_loop()
        self.worker = Worker(
            engine,
            deliver=lambda events: loop.call_soon_threadsafe(self._deliver, events),
            fail=lambda error: loop.call_soon_threadsafe(self._fail, error),
        )
        self._metrics = Metrics(name, lambda: self.worker.stats)
        engine.observers.append(self._metrics.step)

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[json_errors, self._check_key])
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{id:.+}", self.model)
        app.router.add_post("/reset_prefix_cache", self.reset_prefix_cache)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/version", self.version)
        return app

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """One or more completions, whole or streamed. A client that leaves aborts them."""
        self._check_room(1)
        ask = parse(await request.read(), CompletionAsk, self._name)
        given = ask.prompts()
        self._check_room(len(given) * ask.n)
        prompts = await self._encode(given, ask.add_special_tokens)
        return await self._answer(request, ask, prompts, "cmpl", CompletionAnswer)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """The next message of a conversation, whole or streamed."""
        self._check_room(1)
        ask = parse(await request.read(), ChatAsk, self._name)
        messages = [message.model_dump(exclude_none=True) for message in ask.messages]
        variables = {"add_generation_prompt": ask.add_generation_prompt, **ask.chat_template_kwargs}
        try:
            text = self._tokenizer.render(messages, variables)
        except ValueError as error:
            raise Refusal(400, str(error), "messages") from None
        prompts = await self._encode([text], ask.add_special_tokens)
        return await self._answer(request, ask, prompts, "chatcmpl", ChatAnswer)

    async def models(self, request: web.Request) -> web.Response:
        """The one model served."""
        return as_json({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        """The model of that name."""
        if request.match_info["id"] != self._name:
            raise Refusal(404, f"the model {request.match_info['id']!r} does not exist; {self._name!r} is served here")
        return as_json(self._model())

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        """Requests that come after the answer find nothing in the prefix cache."""
        self.worker.reset_prefix_cache()
        return web.Response()

    async def health(self, request: web.Request) -> web.Response:
        """200 while requests are taken, else 503; the server listens only once a step has worked."""
        return web.Response(status=503 if self.error or self._is_draining else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus text, the engine's gauges as they were after its last step."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def version(self, request: web.Request) -> web.Response:
        """Who answers here."""
        return as_json({"version": stackrace.__version__, "engine": "stackrace"})

    async def drain(self, seconds: float) -> None:
        """Take no new requests, wait for those that are there, cut off what is left after `seconds`, and stop."""
        if self._is_draining:
            seconds = 0
        self._is_draining = True
        await self._settle(seconds)
        self._cut(Refusal(503, "the server is shutting down"))
        await self._settle(SOON)
        self.stopped.set()

    async def _answer(
        self, request: web.Request, ask: A, prompts: Many[list[int]], prefix: str, kind: type[Answer[A]]
    ) -> web.StreamResponse:
        id = f"{prefix}-{uuid.uuid4().hex}"
        wanted = sequences(ask, prompts, id, self._limits)
        self._check_room(len(wanted))
        answer = kind(id, self._name, ask, wanted, self._tokenizer)
        for sequence in wanted:
            self._open[sequence.id] = Open(answer, Timing(len(sequence.prompt)))
            self.worker.submit(sequence)
        self._num_answering += 1
        try:
            return await (answer.stream if ask.stream else answer.whole)(request)
        finally:
            self._num_answering -= 1
            for sequence in wanted:
                if self._open.pop(sequence.id, None):  # the client left before the end
                    self.worker.abort(sequence.id)

    async def _encode(self, given: Many[str | list[int]], special: bool) -> list[list[int]]:
        def encode() -> list[list[int]]:
            return [p if isinstance(p, list) else self._tokenizer.encode(p, special) for p in given]

        if sum(len(p) for p in given if isinstance(p, str)) < LONG_TEXT:
            return encode()
        return await asyncio.to_thread(encode)

    def _model(self) -> dict[str, object]:
        fixed = {"id": self._name, "object": "model", "created": 0, "owned_by": "stackrace", "root": self._name}
        return {**fixed, "max_model_len": self._limits.max_model_len}

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A bearer token, where one is wanted, for all that costs or tells something."""
        guarded = request.path.startswith("/v1") or request.path == "/reset_prefix_cache"
        if self._api_key is not None and guarded:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode(errors="surrogateescape"), self._api_key.encode())
            if scheme.lower() != "bearer" or not is_right:
                raise Refusal(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        return await handler(request)

    def _check_room(self, count: int) -> None:
        """Refuse what comes too late, or would make the queue longer than it may be."""
        if self.error or self._is_draining:
            raise Refusal(503, "the server is shutting down")
        if count > self._max_open:
            raise Refusal(400, f"{count} sequences in one request; at most {self._max_open} may be unfinished at once")
        if len(self._open) + count > self._max_open:
            self._metrics.rejections.inc()
            raise Refusal(429, f"{len(self._open)} of {self._max_open} sequences are unfinished; try again later")

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            waiting = self._open.get(event.id)
            if waiting is None:  # nobody waits any more
                continue
            self._metrics.token(waiting.timing, event)
            if reason := waiting.answer.add(event):
                del self._open[event.id]
                self._metrics.end(waiting.timing, reason)
                if not event.finish_reason:  # a stop string, of which the engine knows nothing
                    self.worker.abort(event.id)

    def _fail(self, error: BaseException) -> None:
        """The engine's thread has died: say so to everybody, and stop."""
        traceback.print_exception(error)
        self.error = error
        self._cut(Refusal(500, f"the engine failed: {type(error).__name__}"))
        self._stopping = asyncio.ensure_future(self.drain(SOON))

    def _cut(self, refusal: Refusal) -> None:
        for id, waiting in self._open.items():
            self.worker.abort(id)
            waiting.answer.refuse(refusal)
        self._open.clear()

    async def _settle(self, seconds: float) -> None:
        """Wait until nobody is being answered, `seconds` at most."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self._num_answering and loop.time() < deadline:
            await asyncio.sleep(0.01)


@web.middleware
async def json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every refusal as OpenAI's error object; a fault of ours as a 500, with a traceback in the log."""
    allowed: dict[str, str] = {}
    try:
        return await handler(request)
    except Refusal as error:
        refusal = error
    except web.HTTPRequestEntityTooLarge:
        refusal = Refusal(413, f"the body exceeds {MAX_BODY} bytes")
    except web.RequestPayloadError:
        refusal = Refusal(400, "the body is not encoded as its headers say")
    except web.HTTPMethodNotAllowed as error:
        refusal = Refusal(405, f"{request.path} is not for {request.method}; use {' or '.join(error.allowed_methods)}")
        allowed = {"Allow": ", ".join(error.allowed_methods)}
    except web.HTTPException as error:
        refusal = Refusal(error.status, f"{request.method} {request.path}: {error.reason}")
    except ConnectionError:  # the client has gone
        raise
    except Exception as error:
        traceback.print_exception(error)
        refusal = Refusal(500, HTTPStatus.INTERNAL_SERVER_ERROR.phrase)
    response = as_json(refusal.body, refusal.status)
    response.headers.update(HEADERS.get(refusal.status, {}) | allowed)
    return response

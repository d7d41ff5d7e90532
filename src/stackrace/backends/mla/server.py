"""The engine behind OpenAI's completions API: python -m stackrace.backends.mla.server --help."""

import argparse
import asyncio
import os
import signal
import socket
import sys
import time
import traceback
import uuid
from pathlib import Path

import orjson
import torch
import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler

from stackrace.backends import checkpoint as checkpoints
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla import tokenizer as tokenizers
from stackrace.backends.mla.attention import KINDS
from stackrace.backends.mla.engine import Engine, TokenEvent
from stackrace.backends.mla.protocol import (
    BadRequest,
    Completion,
    Json,
    choice,
    error_body,
    parse,
    usage,
)
from stackrace.backends.mla.scheduler import Sequence
from stackrace.backends.mla.worker import Worker
from stackrace.harness.errors import UsageError
from stackrace.harness.types import Sampling

MAX_BODY = 1 << 26  # bytes; a million token ids are about 7 MB
LAST_STEP = 5.0  # seconds that a stopping server waits for the engine's current step
SSE = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class Server:
    """Turns HTTP requests into engine messages and token events into answers."""

    def __init__(self, engine: Engine, limits: engines.Limits, tokenizer: tokenizers.Tokenizer, name: str) -> None:
        self.stopped = asyncio.Event()
        self.error: BaseException | None = None
        self._limits = limits
        self._tokenizer = tokenizer
        self._name = name
        self._streams: dict[str, asyncio.Queue[TokenEvent]] = {}
        loop = asyncio.get_running_loop()
        self.worker = Worker(
            engine,
            deliver=lambda events: loop.call_soon_threadsafe(self._deliver, events),
            fail=lambda error: loop.call_soon_threadsafe(self._fail, error),
        )

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[json_errors])
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        return app

    async def health(self, request: web.Request) -> web.Response:
        """200 while the engine steps; the server listens only once one has worked."""
        return web.Response(status=503 if self.error else 200)

    async def models(self, request: web.Request) -> web.Response:
        """The one model served."""
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "stackrace"}
        model["max_model_len"] = self._limits.max_model_len
        return _json({"object": "list", "data": [model]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """One completion, whole or streamed. A client that leaves aborts it."""
        ask = parse(await request.read(), self._name, self._limits, self._encode)
        id = f"cmpl-{uuid.uuid4().hex}"
        stop_tokens = frozenset[int]() if ask.ignore_eos else self._limits.eos_tokens
        events = self._streams[id] = asyncio.Queue()
        self.worker.submit(Sequence(id, ask.prompt, ask.max_tokens, ask.sampling, stop_tokens))
        try:
            answer = Answer(id, self._name, ask, tokenizers.Detokenizer(self._tokenizer, ask.prompt), events)
            return await (answer.stream(request) if ask.stream else answer.whole())
        finally:
            del self._streams[id]
            self.worker.abort(id)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            if stream := self._streams.get(event.id):
                stream.put_nowait(event)

    def _fail(self, error: BaseException) -> None:
        traceback.print_exception(error)
        self.error = error
        self.stopped.set()


class Answer:
    """What one request is told, from its token events."""

    def __init__(
        self,
        id: str,
        model: str,
        ask: Completion,
        detokenizer: tokenizers.Detokenizer,
        events: asyncio.Queue[TokenEvent],
    ) -> None:
        self._head: Json = {"id": id, "object": "text_completion", "created": int(time.time()), "model": model}
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
        self._num_output = len(tokens)
        return _json(self._head | {"choices": [self._choice(tokens, reason)], "usage": self._usage()})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events, one for each step that gave tokens (more steps share one if the client is slow)."""
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


@web.middleware
async def json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every refusal as OpenAI's error object."""
    try:
        return await handler(request)
    except BadRequest as error:
        return web.Response(status=error.status, body=error.body, content_type="application/json")
    except web.HTTPException as error:
        kind = "NotFoundError" if error.status == 404 else "BadRequestError"
        body = error_body(f"{request.method} {request.path}: {error.reason}", kind, None, error.status)
        return web.Response(status=error.status, body=body, content_type="application/json")


def _json(body: Json) -> web.Response:
    return web.Response(body=orjson.dumps(body), content_type="application/json")


def warm_up(engine: Engine) -> None:
    """Prefill and decode once, so that a server which listens has been seen to work."""
    greedy = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
    engine.submit(Sequence("warm-up", [0, 0], 2, greedy, frozenset()))
    while not engine.idle:
        engine.step()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused until the engine works."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return sock


async def serve(server: Server, sock: socket.socket) -> int:
    """Answer until SIGTERM or SIGINT (exit code 0), or until the engine fails (1)."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stopped.set)
    runner = web.AppRunner(server.application(), handler_cancellation=True, access_log=None, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
    except OSError as error:
        raise UsageError(f"cannot listen on {sock.getsockname()}: {error.strerror}; choose another --port") from None
    server.worker.start()
    print("listening on http://{}:{}".format(*sock.getsockname()[:2]), flush=True)
    await server.stopped.wait()
    await runner.cleanup()
    return 1 if server.error else 0


def run(args: argparse.Namespace) -> int:
    """Check, load, warm up, serve; returns the exit code."""
    names = engines.Settings._fields
    settings = engines.Settings(**{name: getattr(args, name) for name in names})
    checkpoint = checkpoints.check(settings.checkpoint)
    limits = engines.limits(settings, checkpoint)
    sock = bind(args.host, args.port)
    torch.set_num_threads(args.threads)
    engine = engines.build(settings, checkpoint)
    warm_up(engine)

    async def main() -> int:
        server = Server(engine, limits, tokenizers.load(settings.checkpoint), args.served_model_name)
        code = await serve(server, sock)
        if not server.worker.stop(LAST_STEP):
            os._exit(code)  # the interpreter would wait for, or crash in, a step of a slow engine
        return code

    return uvloop.run(main())


def arguments() -> argparse.ArgumentParser:
    """vLLM's names, and no defaults: values live in YAML."""
    parser = argparse.ArgumentParser(prog="stackrace.backends.mla.server", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True, help="0: any free one, printed")
    parser.add_argument("--attention", choices=sorted(KINDS), required=True, help="what the cache holds")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--device", choices=["cpu"], required=True)
    parser.add_argument("--threads", type=int, required=True, help="CPU threads of the engine")
    parser.add_argument("--max-num-seqs", type=int, required=True, help="sequences in a batch")
    parser.add_argument("--max-num-batched-tokens", type=int, required=True, help="tokens in a step")
    parser.add_argument("--max-model-len", type=int, required=True, help="prompt and output of a request")
    parser.add_argument("--kv-cache-memory-bytes", type=int, required=True)
    return parser


def main() -> None:
    """Exit code 2 and one line for what was asked wrongly."""
    try:
        code = run(arguments().parse_args())
    except UsageError as error:
        print(f"stackrace: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()

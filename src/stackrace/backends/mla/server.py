"""The engine behind OpenAI's completions API: python -m stackrace.backends.mla.server --help."""

import argparse
import asyncio
import os
import signal
import socket
import sys
import traceback
import uuid
from pathlib import Path

import torch
import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler
from tokenizers import Tokenizer

from stackrace.backends import checkpoint as checkpoints
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla.answer import Answer, as_json
from stackrace.backends.mla.attention import KINDS
from stackrace.backends.mla.engine import Engine, TokenEvent
from stackrace.backends.mla.protocol import BadRequest, error_body, parse
from stackrace.backends.mla.scheduler import Sequence
from stackrace.backends.mla.tokenizer import Detokenizer, load_tokenizer
from stackrace.backends.mla.worker import Worker
from stackrace.harness.errors import UsageError
from stackrace.harness.types import Sampling

MAX_BODY = 1 << 26  # bytes; a million token ids are about 7 MB
LAST_STEP = 5.0  # seconds that a stopping server waits for the engine's current step


class Server:
    """Turns HTTP requests into engine messages and token events into answers."""

    def __init__(self, engine: Engine, limits: engines.Limits, tokenizer: Tokenizer, name: str) -> None:
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
        app.router.add_get("/metrics", self.metrics)
        return app

    async def health(self, request: web.Request) -> web.Response:
        """200 while the engine steps; the server listens only once one has worked."""
        return web.Response(status=503 if self.error else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        """The engine's counters after its last step, as Prometheus text."""
        lines = [f"mla:{name} {value}\n" for name, value in self.worker.stats._asdict().items()]
        return web.Response(text="".join(lines))

    async def models(self, request: web.Request) -> web.Response:
        """The one model served."""
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "stackrace"}
        model["max_model_len"] = self._limits.max_model_len
        return as_json({"object": "list", "data": [model]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """One completion, whole or streamed. A client that leaves aborts it."""
        ask = parse(await request.read(), self._name, self._limits, self._encode)
        id = f"cmpl-{uuid.uuid4().hex}"
        stop_tokens = frozenset[int]() if ask.ignore_eos else self._limits.eos_tokens
        events = self._streams[id] = asyncio.Queue()
        self.worker.submit(Sequence(id, ask.prompt, ask.max_tokens, ask.sampling, stop_tokens))
        try:
            answer = Answer(id, self._name, ask, Detokenizer(self._tokenizer, ask.prompt), events)
            return await (answer.stream(request) if ask.stream else answer.whole())
        finally:
            if self._streams.pop(id, None):  # the client left before the end
                self.worker.abort(id)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            ended = event.finish_reason is not None
            stream = self._streams.pop(event.id, None) if ended else self._streams.get(event.id)
            if stream is not None:
                stream.put_nowait(event)

    def _fail(self, error: BaseException) -> None:
        traceback.print_exception(error)
        self.error = error
        self.stopped.set()


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
    except (OSError, OverflowError) as error:
        raise _no_port((host, port), error) from None
    return sock


def _no_port(address: tuple[str, int], error: Exception) -> UsageError:
    return UsageError(f"cannot listen on {address[0]}:{address[1]}: {error}; choose another --port")


async def serve(server: Server, sock: socket.socket) -> int:
    """Answer until SIGTERM or SIGINT (exit code 0), or until the engine fails (1)."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stopped.set)
    app = server.application()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
    except OSError as error:
        raise _no_port(sock.getsockname()[:2], error) from None
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
        server = Server(engine, limits, load_tokenizer(settings.checkpoint), args.served_model_name)
        code = await serve(server, sock)
        if not server.worker.stop(LAST_STEP):
            os._exit(code)  # the interpreter would wait for, or crash in, a step of a slow engine
        return code

    return uvloop.run(main())


def positive(text: str) -> int:
    """An argument that counts something. ValueError: it is below 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def arguments() -> argparse.ArgumentParser:
    """vLLM's names, and no defaults: values live in YAML."""
    parser = argparse.ArgumentParser(prog="stackrace.backends.mla.server", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the model")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True, help="0: any free one, printed")
    parser.add_argument("--attention", choices=sorted(KINDS), required=True, help="what the cache holds")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--device", choices=["cpu"], required=True)
    parser.add_argument("--threads", type=positive, required=True, help="CPU threads of the engine")
    parser.add_argument("--max-num-seqs", type=positive, required=True, help="sequences in a batch")
    parser.add_argument("--max-num-batched-tokens", type=positive, required=True, help="tokens in a step")
    parser.add_argument("--max-model-len", type=positive, required=True, help="of prompt and output")
    parser.add_argument("--kv-cache-memory-bytes", type=positive, required=True)
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

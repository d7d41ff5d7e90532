"""The process that serves an engine: python -m stackrace.backends.mla.server --help."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import torch
import uvloop
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from stackrace.backends import checkpoint as checkpoints
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla.attention import KINDS
from stackrace.backends.mla.engine import Engine
from stackrace.backends.mla.sequence import Sampling, Sequence
from stackrace.backends.mla.server.api import Api
from stackrace.backends.mla.steps import StepLog
from stackrace.harness.errors import UsageError
from stackrace.harness.tokenizer import TextTokenizer

LAST_STEP = 5.0  # seconds that a stopping server waits for the engine's current step
LAST_WORD = 0.1  # seconds that a connection gets once everybody has been told; 0 would be for ever


def warm_up(engine: Engine) -> None:
    """Prefill and decode once, so that a server which listens has been seen to work."""
    engine.submit(Sequence("warm-up", [0, 0], 2, Sampling(seed=0, temperature=0), frozenset()))
    while not engine.idle:
        engine.step()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused until the engine works."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise _no_port((host, port), error) from None
    return sock


def _no_port(address: tuple[str, int], error: Exception) -> UsageError:
    return UsageError(f"cannot listen on {address[0]}:{address[1]}: {error}; choose another --port")


async def serve(api: Api, sock: socket.socket, shutdown_timeout: float) -> int:
    """Answer until SIGTERM, after the requests that are there, or at once until SIGINT or a second signal.

    Returns the exit code: 0, or 1 if the engine failed.
    """
    logging.getLogger("aiohttp.server").addFilter(_is_fault_of_ours)
    loop = asyncio.get_running_loop()
    drains: list[asyncio.Task[None]] = []

    def stop(seconds: float) -> None:
        drains.append(loop.create_task(api.drain(seconds)))

    loop.add_signal_handler(signal.SIGTERM, stop, shutdown_timeout)
    loop.add_signal_handler(signal.SIGINT, stop, 0.0)
    runner = web.AppRunner(api.application(), handler_cancellation=True, access_log=None, shutdown_timeout=LAST_WORD)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
    except OSError as error:
        raise _no_port(sock.getsockname()[:2], error) from None
    api.worker.start()
    host, port = sock.getsockname()[:2]
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    await api.stopped.wait()
    await runner.cleanup()
    return 1 if api.error else 0


def _is_fault_of_ours(record: logging.LogRecord) -> bool:
    """Clients that do not speak HTTP (they are answered 400), or have gone, are nothing to log."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | ConnectionError)


def run(args: argparse.Namespace) -> int:
    """Check, load, warm up, serve; returns the exit code."""
    settings = engines.Settings(**{name: getattr(args, name) for name in engines.Settings._fields})
    checkpoint = checkpoints.check(settings.checkpoint)
    limits = engines.limits(settings, checkpoint)
    api_key = _api_key(args.api_key_env)
    log = _step_log(args.step_events)
    sock = bind(args.host, args.port)
    torch.set_num_threads(args.threads)
    engine = engines.build(settings, checkpoint)
    warm_up(engine)
    if log:
        engine.observers.append(log.write)

    async def main() -> int:
        tokenizer = TextTokenizer(settings.checkpoint)
        api = Api(engine, limits, tokenizer, args.served_model_name, args.max_num_queued_reqs, api_key)
        code = await serve(api, sock, args.shutdown_timeout)
        if not api.worker.stop(LAST_STEP):
            os._exit(code)  # the interpreter would wait for, or crash in, a step of a slow engine
        return code

    return uvloop.run(main())


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise UsageError(f"--api-key-env {variable}: this variable is not set; export it, or leave the option out")
    return os.environ[variable]


def _step_log(path: Path | None) -> StepLog | None:
    try:
        return StepLog(path) if path else None
    except OSError as error:
        raise UsageError(f"--step-events {path}: {error.strerror}; give a file that can be written") from None


def positive(text: str) -> int:
    """An argument that counts something. ValueError: it is below 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def arguments() -> argparse.ArgumentParser:
    """vLLM's names, where it has one, and no defaults: values live in YAML."""
    parser = argparse.ArgumentParser(prog="stackrace.backends.mla.server", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the model")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True, help="0: any free one, printed")
    parser.add_argument("--api-key-env", help="variable that holds the key; left out: no key is wanted")
    parser.add_argument("--attention", choices=sorted(KINDS), required=True, help="what the cache holds")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--device", choices=["cpu"], required=True)
    parser.add_argument("--threads", type=positive, required=True, help="CPU threads of the engine")
    parser.add_argument("--max-num-seqs", type=positive, required=True, help="sequences in a batch")
    parser.add_argument("--max-num-batched-tokens", type=positive, required=True, help="tokens in a step")
    parser.add_argument("--max-model-len", type=positive, required=True, help="of prompt and output")
    parser.add_argument("--max-num-queued-reqs", type=positive, required=True, help="unfinished; beyond it 429")
    parser.add_argument("--kv-cache-memory-bytes", type=positive, required=True)
    parser.add_argument("--enable-prefix-caching", action="store_true")
    parser.add_argument("--shutdown-timeout", type=float, required=True, help="seconds between SIGTERM and the end")
    parser.add_argument("--step-events", type=Path, help="file that gets a line of JSON a step")
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

"""The engine's server as a real process, and what it answers over real HTTP."""

import http.client
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from engine_kit import GREEDY, published
from prometheus_client.parser import text_string_to_metric_families

from stackrace.backends import checkpoint
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla.sequence import Sequence

SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 512, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "n_routed_experts": 4, "moe_intermediate_size": 32}
PAGES = 10  # of 64 tokens: what the server's cache holds
OPTIONS: dict[str, Any] = {
    "served-model-name": "tiny",
    "host": "127.0.0.1",
    "port": 0,
    "attention": "mla",
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "max-num-seqs": 4,
    "max-num-batched-tokens": 64,
    "max-num-queued-reqs": 40,
    "max-model-len": 700,
    "kv-cache-memory-bytes": PAGES * 64 * 576 * 4 * 2,
    "shutdown-timeout": 0,
}
MODULE = ("-m", "stackrace.backends.mla.server")

Json = dict[str, Any]


def small(folder: Path, **changes: Any) -> Path:
    """A checkpoint on which a step takes about a millisecond."""
    return checkpoint.make(published("tiny") | SMALL | changes, folder / "model", 0, 1 << 30, "cpu").path


def command(path: Path, start: tuple[str, ...] = MODULE, **changes: Any) -> list[str]:
    options = OPTIONS | {"checkpoint": str(path)} | {key.replace("_", "-"): value for key, value in changes.items()}
    words = []
    for key, value in options.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return [sys.executable, "-P", *start, *words]


@contextmanager
def running(path: Path, **changes: Any) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The server's process and port."""
    with subprocess.Popen(command(path, **changes), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line.startswith("listening on http://127.0.0.1:")
            yield process, int(line.rsplit(":", 1)[1])
        finally:
            process.kill()


def call(
    port: int, method: str, target: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, target, data, headers or {})
        with connection.getresponse() as response:
            return response.status, response.read()


def ask(prompt: object, **fields: object) -> Json:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True} | fields


def complete(port: int, body: Json, target: str = "/v1/completions", headers: dict[str, str] | None = None) -> Json:
    status, content = call(port, "POST", target, body, headers)
    assert status == 200, content
    answer: Json = json.loads(content)
    return answer


def stream(port: int, body: Json, target: str = "/v1/completions") -> list[Json]:
    """The events, [DONE] checked and dropped."""
    status, content = call(port, "POST", target, body | {"stream": True})
    assert status == 200
    *events, done, rest = content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@contextmanager
def streaming(port: int, body: Json, headers: dict[str, str] | None = None) -> Iterator[http.client.HTTPResponse]:
    """The answer to a streamed completion, to be read as it comes; leaving it closes the connection."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}).encode(), headers or {})
        with connection.getresponse() as response:
            assert response.status == 200
            yield response


def prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(3, 512) for _ in range(length)]


def offline_events(path: Path, tokens: list[int], count: int, **fields: Any) -> list[engines.TokenEvent]:
    """What the engine tells of one sequence, without a server."""
    settings = engines.Settings(path, "mha", "float32", "cpu", 4, 64, 700, 1 << 24, False)
    engine = engines.build(settings, checkpoint.check(path))
    sampling = fields.pop("sampling", GREEDY)
    engine.submit(Sequence("x", tokens, count, sampling, frozenset(), **fields))
    events: list[engines.TokenEvent] = []
    while not engine.idle:
        events += engine.step()
    return events


def offline(path: Path, tokens: list[int], count: int, **fields: Any) -> list[int]:
    """What the engine says without a server."""
    return [event.token for event in offline_events(path, tokens, count, **fields)]


def text_of(tokens: list[int]) -> str:
    """How output is told: each token's word after a space."""
    return "".join(f" t{token}" for token in tokens)


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, 20 s at most."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def metrics(port: int) -> dict[str, float]:
    """Samples by name, `vllm:` dropped; of those with further labels, the sum."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(call(port, "GET", "/metrics")[1].decode()):
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:")
            found[name] = found.get(name, 0) + sample.value
    return found

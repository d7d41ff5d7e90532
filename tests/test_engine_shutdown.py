"""How the engine's server ends: drained, cut off, killed twice, or by a fault of its own."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server_kit import Json, ask, call, metrics, prompt, running, small, streaming, until

pytestmark = pytest.mark.engine

ROOM = {"attention": "mha", "kv_cache_memory_bytes": 1 << 24}
BROKEN = """
import sys
from stackrace.backends.mla.engine import Engine
from stackrace.backends.mla.server.__main__ import main

def step(self, whole=Engine.step, left=[20]):
    left[0] -= 1
    if left[0] < 0:
        raise RuntimeError("broken step")
    return whole(self)

Engine.step = step
main()
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("shutdown"))


def events(lines: Sequence[bytes]) -> list[Json]:
    """What followed `data: `; [DONE] as {}."""
    told = [line.removeprefix(b"data: ").strip() for line in lines if line.strip()]
    return [{} if line == b"[DONE]" else json.loads(line) for line in told]


def health(port: int) -> int:
    return call(port, "GET", "/health")[0]


def code(process: subprocess.Popen[str], started: float, most: float) -> int:
    """The exit code, once it has ended: `most` seconds after `started` at the latest."""
    found = process.wait(20)
    assert time.monotonic() - started < most
    return found


def test_sigterm_drains(path: Path) -> None:
    with running(path, shutdown_timeout=60, **ROOM) as (process, port), ThreadPoolExecutor() as pool:
        with streaming(port, ask([5], max_tokens=300, return_token_ids=True)) as response:
            lines = [response.readline()]
            whole = pool.submit(call, port, "POST", "/v1/completions", ask(prompt(600), n=2, prompt_logprobs=20))
            until(lambda: metrics(port)["prompt_tokens_total"] > 600)
            process.send_signal(signal.SIGTERM)
            until(lambda: health(port) == 503)
            for target in ("/v1/completions", "/v1/chat/completions"):
                status, content = call(port, "POST", target, ask([5]))
                error = json.loads(content)["error"]
                assert (status, error["message"], error["code"]) == (503, "the server is shutting down", 503)
            lines += response.readlines()
        *told, done = events(lines)
        assert done == {}
        assert sum(len(event["choices"][0]["token_ids"]) for event in told) == 300
        status, content = whole.result()  # a megabyte, to the last byte
        assert [len(choice["prompt_logprobs"]) for choice in json.loads(content)["choices"]] == [600, 600]
        assert process.wait(20) == 0


def test_what_takes_longer_than_the_timeout_is_told_so(path: Path) -> None:
    with (
        running(path, shutdown_timeout=0.3, **ROOM) as (process, port),
        ThreadPoolExecutor() as pool,
        socket.create_connection(("127.0.0.1", port)) as silent,
        streaming(port, ask([5], n=4, max_tokens=690)) as response,
    ):
        silent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        lines = [response.readline()]
        whole = pool.submit(call, port, "POST", "/v1/completions", ask([6], n=8, max_tokens=690))
        until(lambda: metrics(port)["num_requests_waiting"] == 8)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        lines += response.readlines()
        assert time.monotonic() - started > 0.25
        *told, last = events(lines)
        assert all("choices" in event for event in told)
        assert last["error"]["message"] == "the server is shutting down"
        status, content = whole.result()
        assert (status, json.loads(content)) == (503, last)
        assert code(process, started, 5) == 0  # though one client never finished its request


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT,)]
)
def test_at_once(path: Path, signals: tuple[int, ...]) -> None:
    with (
        running(path, shutdown_timeout=60, **ROOM) as (process, port),
        streaming(port, ask([5], n=8, max_tokens=690)) as response,
    ):
        assert response.readline().startswith(b"data: ")
        for number in signals[:-1]:
            process.send_signal(number)
            until(lambda: health(port) == 503)
            assert response.readline() == b"\n"
            assert response.readline().startswith(b'data: {"id"')
        started = time.monotonic()
        process.send_signal(signals[-1])
        assert "error" in events(response.readlines())[-1]
        assert code(process, started, 3) == 0


def test_a_failing_engine(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        running(path, start=("-c", BROKEN), **ROOM) as (process, port),
        ThreadPoolExecutor() as pool,
        streaming(port, ask([5], max_tokens=690, return_token_ids=True)) as response,
    ):
        lines = [response.readline()]
        whole = pool.submit(call, port, "POST", "/v1/completions", ask([6], max_tokens=690))
        *told, last = events(lines + response.readlines())
        assert 0 < sum(len(event["choices"][0]["token_ids"]) for event in told) <= 20
        assert last["error"]["message"] == "the engine failed: RuntimeError"
        status, content = whole.result()
        assert status in (500, 503)  # as it came before or after
        assert json.loads(content)["error"]["code"] == status
        assert process.wait(20) == 1
    assert "RuntimeError: broken step" in capfd.readouterr().err

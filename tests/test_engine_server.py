"""The engine's server, a real process over real HTTP."""

import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import yaml

from stackrace.backends import checkpoint
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla.engine import Engine, TokenEvent
from stackrace.backends.mla.scheduler import Sequence
from stackrace.backends.mla.worker import Worker
from stackrace.harness.errors import UsageError
from stackrace.harness.types import Sampling

CONF = Path(checkpoint.__file__).parents[1] / "conf" / "model" / "tiny.yaml"
SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 512, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "n_routed_experts": 4, "moe_intermediate_size": 32}
PAGES = 10  # of 64 tokens: what the server's cache holds
OPTIONS: dict[str, str | int] = {
    "served-model-name": "tiny",
    "host": "127.0.0.1",
    "port": 0,
    "attention": "mla",
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "max-num-seqs": 4,
    "max-num-batched-tokens": 64,
    "max-model-len": 700,
    "kv-cache-memory-bytes": PAGES * 64 * 576 * 4 * 2,
}

Json = dict[str, Any]


def command(path: Path, **changes: str | int) -> list[str]:
    options = OPTIONS | {"checkpoint": str(path)} | {key.replace("_", "-"): value for key, value in changes.items()}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-P", "-m", "stackrace.backends.mla.server", *words]


@contextmanager
def running(path: Path, **changes: str | int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with subprocess.Popen(command(path, **changes), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line.startswith("listening on http://127.0.0.1:")
            yield process, int(line.rsplit(":", 1)[1])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = yaml.safe_load(CONF.read_text())["config"] | SMALL
    return checkpoint.make(config, tmp_path_factory.mktemp("server") / "model", 0, 1 << 30, "cpu").path


@pytest.fixture(scope="module")
def port(path: Path) -> Iterator[int]:
    with running(path) as (process, port):
        yield port
        assert process.poll() is None


def call(port: int, method: str, target: str, body: object = None) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, target, data)
        with connection.getresponse() as response:
            return response.status, response.read()


def ask(prompt: object, **fields: object) -> Json:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True} | fields


def complete(port: int, body: Json) -> Json:
    status, content = call(port, "POST", "/v1/completions", body)
    assert status == 200, content
    answer: Json = json.loads(content)
    return answer


def stream(port: int, body: Json) -> list[Json]:
    """The events, [DONE] checked and dropped."""
    status, content = call(port, "POST", "/v1/completions", body | {"stream": True})
    assert status == 200
    *events, done, rest = content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(3, 512) for _ in range(length)]


def offline(path: Path, tokens: list[int], count: int) -> list[int]:
    """What the engine says without a server."""
    settings = engines.Settings(path, "mha", "float32", "cpu", 4, 64, 700, 1 << 24)
    engine = engines.build(settings, checkpoint.check(path))
    greedy = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
    engine.submit(Sequence("x", tokens, count, greedy, frozenset()))
    events: list[TokenEvent] = []
    while not engine.idle:
        events += engine.step()
    return [event.token for event in events]


def metrics(port: int) -> dict[str, float]:
    lines = call(port, "GET", "/metrics")[1].decode().splitlines()
    return {name.removeprefix("mla:"): float(value) for name, value in map(str.split, lines)}


def test_streamed_whole_and_offline_tokens_are_equal(path: Path, port: int) -> None:
    tokens = prompt(100)
    expected = offline(path, tokens, 20)
    whole = complete(port, ask(tokens, return_token_ids=True))["choices"][0]
    events = stream(port, ask(tokens, return_token_ids=True))
    choices = [event["choices"][0] for event in events]
    assert whole["token_ids"] == expected
    assert [token for choice in choices for token in choice["token_ids"]] == expected
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert whole["text"].split() == [f"t{token}" for token in expected]
    assert whole["prompt_token_ids"] == choices[0]["prompt_token_ids"] == tokens
    assert all("prompt_token_ids" not in choice for choice in choices[1:])
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


def test_shapes(port: int) -> None:
    answer = complete(port, ask([5, 6], max_tokens=1))
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason"}
    (event,) = stream(port, ask([5, 6], max_tokens=1))
    assert event.keys() == {"id", "object", "created", "model", "choices"}


def test_usage(port: int) -> None:
    def usage(prompt: int, output: int) -> Json:
        counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        return counts | {"prompt_tokens_details": {"cached_tokens": 0}}

    assert complete(port, ask(prompt(70)))["usage"] == usage(70, 20)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = stream(port, ask(prompt(70), stream_options=options, return_token_ids=True))
    assert (last["choices"], last["usage"]) == ([], usage(70, 20))
    count = 0
    for event in events:
        count += len(event["choices"][0]["token_ids"])
        assert event["usage"] == usage(70, count)
    *events, last = stream(port, ask([5], stream_options={"include_usage": True}))
    assert last["usage"] == usage(1, 20)
    assert all("usage" not in event for event in events)


@pytest.mark.parametrize("given", ["t5 t6 t7", ["t5 t6 t7"], [5, 6, 7], [[5, 6, 7]]])
def test_prompts_in_every_form(port: int, given: object) -> None:
    answer = complete(port, ask(given, return_token_ids=True))
    assert answer["choices"][0]["prompt_token_ids"] == [5, 6, 7]


def test_end_of_text_stops(path: Path, tmp_path: Path) -> None:
    tokens = prompt(9)
    output = offline(path, tokens, 20)
    last = next(index for index in range(1, 20) if output[index] not in output[:index])
    config = yaml.safe_load(CONF.read_text())["config"] | SMALL | {"eos_token_id": output[last]}
    other = checkpoint.make(config, tmp_path / "model", 0, 1 << 30, "cpu").path  # the same weights
    with running(other) as (_, port):
        stopped = complete(port, ask(tokens, ignore_eos=False, return_token_ids=True))
        assert stopped["choices"][0]["token_ids"] == output[: last + 1]
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert stopped["usage"]["completion_tokens"] == last + 1
        assert len(stopped["choices"][0]["text"].split()) == last  # the special token is silent
        assert complete(port, ask(tokens))["usage"]["completion_tokens"] == 20


def test_seeds(port: int) -> None:
    def draw(**fields: object) -> list[int]:
        body = ask([5], temperature=1.0, top_p=0.95, top_k=100, return_token_ids=True) | fields
        tokens: list[int] = complete(port, body)["choices"][0]["token_ids"]
        return tokens

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw() != draw()
    assert draw(seed=1, top_k=1) == draw(temperature=0)


REFUSED: list[tuple[object, int, str]] = [
    (b"{", 400, "not JSON"),
    (b"", 400, "not JSON"),
    ([], 400, "JSON object"),
    ({"prompt": [5], "model": "other"}, 404, "'other' does not exist; 'tiny' is served"),
    ({"model": "tiny"}, 400, "prompt must be"),
    (ask([]), 400, "no tokens"),
    (ask(""), 400, "no tokens"),
    (ask([5, 512]), 400, "token id 512 is out of range: the vocabulary has 512"),
    (ask([-1]), 400, "token id -1"),
    (ask([5, "t6"]), 400, "prompt must be"),
    (ask([[5], [6]]), 400, "prompt must be"),
    (ask([True]), 400, "prompt must be"),
    (ask(prompt(690)), 400, "690 prompt tokens + max_tokens 20 = 710 exceeds the maximum model length 700"),
    (ask(prompt(650)), 400, "650 prompt tokens + max_tokens 20 = 670 exceeds the KV cache of 640 tokens"),
    (ask([5], max_tokens=0), 400, "max_tokens = 0 must be at least 1"),
    (ask([5], max_tokens="4"), 400, "max_tokens = '4' must be an integer"),
    (ask([5], max_tokens=True), 400, "must be an integer"),
    (ask([5], temperature=-1), 400, "temperature = -1.0 must be at least 0.0"),
    (ask([5], top_p=1.5), 400, "top_p = 1.5 must be at most 1.0"),
    (ask([5], top_p=0), 400, "top_p = 0 must be above 0"),
    (ask([5], top_k=1.5), 400, "top_k = 1.5 must be an integer"),
    (ask([5], ignore_eos=1), 400, "ignore_eos = 1 must be true or false"),
    (ask([5], n=2), 400, "n = 2 is not supported"),
    (ask([5], logprobs=1), 400, "logprobs = 1 is not supported"),
    (ask([5], stop=["t7"]), 400, "stop = ['t7'] is not supported"),
    (ask([5], echo=True), 400, "echo = True is not supported"),
    (ask([5], frequency_penalty=0.5), 400, "frequency_penalty = 0.5 is not supported"),
    (ask([5], surprise=1), 400, "surprise = 1 is not supported"),
    (ask([5], stream_options={"include_usage": True}), 400, "stream_options needs stream"),
    (ask([5], stream=True, stream_options={"x": 1}), 400, "stream_options.x is not supported"),
]


@pytest.mark.parametrize(("body", "status", "expected"), REFUSED)
def test_refusals(port: int, body: object, status: int, expected: str) -> None:
    found, content = call(port, "POST", "/v1/completions", body)
    error = json.loads(content)["error"]
    assert (found, error["code"]) == (status, status)
    assert expected in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_fields_that_change_nothing_are_accepted(port: int) -> None:
    fields = {"n": 1, "echo": False, "logprobs": None, "stop": None, "presence_penalty": 0.0, "user": "me"}
    assert complete(port, ask([5], **fields))["usage"]["completion_tokens"] == 20


def test_other_routes(port: int) -> None:
    assert call(port, "GET", "/health") == (200, b"")
    (model,) = json.loads(call(port, "GET", "/v1/models")[1])["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 700)
    for method, target, status in (("GET", "/none", 404), ("GET", "/v1/completions", 405)):
        found, content = call(port, method, target)
        assert found == status == json.loads(content)["error"]["code"]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_pages(port: int, streamed: bool) -> None:
    body = json.dumps(ask(prompt(10), max_tokens=620, stream=streamed)).encode()
    before = metrics(port)["generation_tokens_total"]
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
        while metrics(port)["kv_cache_usage_perc"] < 1:
            time.sleep(0.005)
    while metrics(port)["kv_cache_usage_perc"] > 0:
        time.sleep(0.005)
    assert metrics(port)["generation_tokens_total"] < before + 620
    assert complete(port, ask(prompt(600)))["usage"]["completion_tokens"] == 20


def test_many_at_once_share_steps(path: Path, port: int) -> None:
    before = metrics(port)
    bodies = [ask(prompt(20 + index), return_token_ids=True) for index in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: complete(port, body), bodies))
    after = metrics(port)
    for body, answer in zip(bodies, answers, strict=True):
        assert answer["choices"][0]["token_ids"] == complete(port, body)["choices"][0]["token_ids"]
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 240
    assert after["iterations_total"] - before["iterations_total"] < 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_it_cleanly_amid_a_stream(path: Path, number: int) -> None:
    with (
        running(path, attention="mha", kv_cache_memory_bytes=1 << 24) as (process, port),
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection,
    ):
        connection.request("POST", "/v1/completions", json.dumps(ask([5], max_tokens=600, stream=True)))
        with connection.getresponse() as response:
            assert response.readline().startswith(b"data: ")
            started = time.monotonic()
            process.send_signal(number)
            assert process.wait(10) == 0
            assert time.monotonic() - started < 2


def refused(path: Path, **changes: str | int) -> str:
    done = subprocess.run(command(path, **changes), capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("stackrace: ")
    return done.stderr


def test_faults_at_the_start_are_one_line(path: Path, port: int, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "none")
    assert f"cannot listen on 127.0.0.1:{port}" in refused(path, port=port)


def test_settings_that_contradict_are_named(path: Path) -> None:
    settings = engines.Settings(path, "mla", "float32", "cpu", 4, 64, 700, 1 << 24)
    found = checkpoint.check(path)
    for change, expected in (
        ({"kv_cache_memory_bytes": 1000}, "--kv-cache-memory-bytes 1000 is under a page"),
        ({"max_num_seqs": 65}, "--max-num-batched-tokens 64 is below --max-num-seqs 65"),
        ({"max_model_len": 200_000}, "--max-model-len 200000 exceeds"),
    ):
        with pytest.raises(UsageError, match=expected):
            engines.limits(settings._replace(**change), found)


def test_a_failed_step_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = engines.Settings(path, "mla", "float32", "cpu", 4, 64, 700, 1 << 24)
    engine = engines.build(settings, checkpoint.check(path))

    def broken(self: Engine) -> list[TokenEvent]:
        raise RuntimeError("broken step")

    monkeypatch.setattr(Engine, "step", broken)
    errors: SimpleQueue[BaseException] = SimpleQueue()
    worker = Worker(engine, deliver=lambda events: None, fail=errors.put)
    worker.start()
    worker.submit(Sequence("x", [5], 1, Sampling(0, 1, 0, 0), frozenset()))
    assert str(errors.get(timeout=10)) == "broken step"
    assert worker.stop(10)

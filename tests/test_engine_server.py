"""The engine's server, a real process over real HTTP."""

import http.client
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest
from engine_kit import GREEDY
from server_kit import (
    MODULE,
    Json,
    ask,
    call,
    command,
    complete,
    metrics,
    offline,
    prompt,
    running,
    small,
    stream,
    until,
)

import stackrace
from stackrace.backends import checkpoint
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla.engine import Engine, TokenEvent
from stackrace.backends.mla.sequence import Sequence
from stackrace.backends.mla.server import __main__ as server
from stackrace.backends.mla.server.worker import Worker
from stackrace.harness.errors import UsageError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def port(path: Path) -> Iterator[int]:
    with running(path) as (process, port):
        yield port
        assert process.poll() is None


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
    assert answer["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
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


def test_seeds(port: int) -> None:
    def draw(**fields: object) -> list[int]:
        body = ask([5], temperature=1.0, top_p=0.95, top_k=100, return_token_ids=True) | fields
        tokens: list[int] = complete(port, body)["choices"][0]["token_ids"]
        return tokens

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw() != draw()
    assert draw(seed=1, top_k=1) == draw(temperature=0)


def test_other_routes(port: int) -> None:
    assert call(port, "GET", "/health") == (200, b"")
    (model,) = json.loads(call(port, "GET", "/v1/models")[1])["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 700)
    assert json.loads(call(port, "GET", "/v1/models/tiny")[1]) == model
    version = {"version": stackrace.__version__, "engine": "stackrace"}
    assert json.loads(call(port, "GET", "/version")[1]) == version


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_pages(port: int, streamed: bool) -> None:
    body = json.dumps(ask(prompt(10), max_tokens=620, stream=streamed)).encode()
    before = metrics(port)["generation_tokens_total"]
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
        until(lambda: metrics(port)["kv_cache_usage_perc"] > 0)
    until(lambda: metrics(port)["kv_cache_usage_perc"] == 0)
    assert metrics(port)["num_requests_running"] == 0
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
    assert after["iteration_tokens_total_count"] - before["iteration_tokens_total_count"] < 200


def test_faults_at_the_start_are_one_line(
    path: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("STACKRACE_TEST_KEY", raising=False)
    for where, changes, expected in (
        (tmp_path / "none", {}, "no such folder"),
        (path, {"port": port}, f"cannot listen on 127.0.0.1:{port}: "),
        (path, {"api_key_env": "STACKRACE_TEST_KEY"}, "--api-key-env STACKRACE_TEST_KEY: this variable is not set"),
        (path, {"step_events": tmp_path}, f"--step-events {tmp_path}: Is a directory"),
        (path, {"max_model_len": 200_000}, "--max-model-len 200000 exceeds"),
    ):
        monkeypatch.setattr("sys.argv", command(where, **changes)[len(MODULE) + 1 :])
        with pytest.raises(SystemExit, match="2"):
            server.main()
        error = capsys.readouterr().err
        assert error.startswith("stackrace: ")
        assert expected in error
        assert error.count("\n") == 1


def test_a_client_that_does_not_read_holds_up_nobody(port: int) -> None:
    body = ask([5], n=4, max_tokens=120, logprobs=20, return_token_ids=True, stream=True)
    data = json.dumps(body).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # nor may the server's side buffer much
        client.connect(("127.0.0.1", port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        assert complete(port, ask([6]))["usage"]["completion_tokens"] == 20
        until(lambda: metrics(port)["num_requests_running"] == 0)  # though what it said has not been read
        with http.client.HTTPResponse(client) as response:
            response.begin()
            events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    told = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    counts = [len(choice["token_ids"]) for choice in told]
    assert sum(counts) == 4 * 120
    assert max(counts) > 20  # what could not be sent has been gathered


def test_settings_that_contradict_are_named(path: Path) -> None:
    settings = engines.Settings(path, "mla", "float32", "cpu", 4, 64, 700, 1 << 24, False)
    found = checkpoint.check(path)
    for change, expected in (
        ({"kv_cache_memory_bytes": 1000}, "--kv-cache-memory-bytes 1000 is under a page"),
        ({"max_num_seqs": 65}, "--max-num-batched-tokens 64 is below --max-num-seqs 65"),
        ({"max_model_len": 3}, "--max-model-len 3 is below 4"),
        ({"max_model_len": 200_000}, "--max-model-len 200000 exceeds"),
    ):
        with pytest.raises(UsageError, match=expected):
            engines.limits(settings._replace(**change), found)


def test_a_failed_step_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = engines.Settings(path, "mla", "float32", "cpu", 4, 64, 700, 1 << 24, False)
    engine = engines.build(settings, checkpoint.check(path))

    def broken(self: Engine) -> list[TokenEvent]:
        raise RuntimeError("broken step")

    monkeypatch.setattr(Engine, "step", broken)
    errors: SimpleQueue[BaseException] = SimpleQueue()
    worker = Worker(engine, deliver=lambda events: None, fail=errors.put)
    worker.start()
    worker.submit(Sequence("x", [5], 1, GREEDY, frozenset()))
    assert str(errors.get(timeout=10)) == "broken step"
    assert worker.stop(10)

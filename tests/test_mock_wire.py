"""The mock's bytes: faults that are planted, ways to end a stream, and what other clients expect."""

import random
import re
import select
import socket
import time

import numpy as np
import orjson
import pytest
from mock_kit import MS, lateness, read, starter

from stackrace.backends.mock.events import Events
from stackrace.backends.mock.fate import draw
from stackrace.backends.mock.question import Question
from stackrace.backends.mock.script import Script
from stackrace.harness.errors import UsageError


@pytest.fixture
def mock(mock_engine):
    return starter(mock_engine)


def test_a_malformed_event_is_one_too_many(mock, mock_engine, load, ask):
    client = mock("malformed_share=1")
    got = client.stream()
    row = client.truth()[0]
    assert row["tokens"] == [1] * 4 + [0] + [1] * 4
    assert row["sent"][4] <= row["sent"][5]
    bad = [p for p in got.payloads if not p.endswith((b"}", b"[DONE]"))]
    assert len(bad) == 1
    got.payloads.remove(bad[0])
    assert got.ids == list(range(8))
    records, _ = load(mock_engine("backend.malformed_share=1", "backend.ttft=0.01", "backend.gap=0"), ask(2, 8))
    assert all("bad event" in r.error for r in records)


def test_a_slow_head_dribbles_and_nothing_comes_before_its_end(mock):
    client = mock("head_delay=0.2")
    got = client.stream()
    row = client.truth()[0]
    assert got.pieces[0][1] == b"H"
    whole = next(i for i in range(len(got.pieces)) if b"\r\n\r\n" in b"".join(data for _, data in got.pieces[: i + 1]))
    assert whole >= 3, "line by line"
    assert got.pieces[whole][0] - row["arrived"] >= 200 * MS
    assert lateness(row, 0.2 + 0.002 * np.arange(8)).min() >= 0
    assert got.ids == list(range(8))


def test_refusals_have_the_status_that_was_set(mock):
    client = mock("error_share=1", "error_status=429")
    with client.open(seed=3) as s:
        assert s.recv(1000).startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    assert client.truth()[3].items() >= {"status": 429, "sent": [], "tokens": []}.items()


@pytest.mark.parametrize("transfer", ["chunked", "length", "close"])
def test_the_end_of_a_stream_is_told_as_set(mock, transfer):
    client = mock(f"transfer={transfer}", "tokens_per_event=3", "split_share=0.3")
    got = client.stream(tokens=20)
    told = {"chunked": b"Transfer-Encoding: chunked", "length": b"Content-Length: ", "close": b"Connection: close"}
    assert [name for name, header in told.items() if header in got.head] == [transfer]
    if transfer == "length":
        assert int(got.head.partition(told["length"])[2].split()[0]) == len(got.body)
    assert got.ids == list(range(20))
    with client.open() as s:
        s.settimeout(0.5)
        size = 0
        try:
            while data := s.recv(1 << 16):
                size += len(data)
            is_closed = True
        except TimeoutError:
            is_closed = False
    assert is_closed == (transfer == "close")


@pytest.mark.parametrize("transfer", ["chunked", "length"])
def test_the_client_understands_each(mock_engine, load, ask, transfer):
    settings = [f"transfer={transfer}", "split_share=0.5", "head_delay=0.01", "ttft=0.01", "gap=0.001", "jitter=0.5"]
    records, _ = load(mock_engine(*[f"backend.{s}" for s in settings]), ask(20, 9), concurrency=4)
    assert [r.error for r in records] == [None] * 20
    assert {tuple(r.output_ids) for r in records} == {tuple(range(9))}


def test_split_events_are_complete_with_their_second_half(mock):
    client = mock("split_share=1", "tokens_per_event=4", "gap=0.01")
    got = client.stream(tokens=200)
    row = client.truth()[0]
    assert got.text == " t é世😀" * 50
    assert got.ids == list(range(200))
    assert row["tokens"] == [4] * 50
    halves = lateness(row, 0.01 + 0.01 * np.arange(50))
    assert halves.min() >= 0.5 * MS
    assert np.median(halves) < 4 * MS


def test_the_events_are_what_other_clients_expect(mock):
    """vLLM's own takes the usage from an event without choices, and wants `data: ` and no comments."""
    client = mock()
    got = client.stream(prompt="four words are here", stream_options={"include_usage": True})
    assert all(e.startswith(b"data: ") for e in got.body.split(b"\n\n")[:-1])
    assert got.payloads[-1] == b"[DONE]"
    assert got.events[-1]["choices"] == []
    assert got.events[-1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    assert [e["usage"]["completion_tokens"] for e in got.events] == [*range(1, 9), 8]
    assert [e["choices"][0]["finish_reason"] for e in got.events[:-1]] == [None] * 7 + ["length"]


def test_a_prompt_of_128k_tokens_is_read_fast(mock):
    client = mock()
    began = time.monotonic_ns()
    got = client.stream(prompt=list(range(100_000, 231_072)))
    row = client.truth()[0]
    assert row["arrived"] - began < 500 * MS
    assert got.events[0]["usage"]["prompt_tokens"] == 131_072


def test_a_slow_reader_gets_everything_in_order(mock):
    client = mock("gap=0")
    s = client.open(tokens=60_000)  # 15 MB, far more than the buffers of a socket
    time.sleep(0.5)
    other = client.stream(seed=1)
    assert other.ids == list(range(8)), "nobody else waits for it"
    assert read(s).ids == list(range(60_000))


def test_requests_on_one_connection_follow_each_other(mock):
    client = mock()
    content = orjson.dumps({"prompt": [1], "max_tokens": 2, "stream": True})
    one = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    last = b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    with socket.create_connection(client.at, timeout=10) as s:
        s.sendall(one + one + last)
        data = b""
        while more := s.recv(1 << 16):
            data += more
    assert data.count(b"HTTP/1.1 200 OK") == 3
    assert data.count(b"[DONE]") == 2
    assert data.index(b"application/json") > data.rindex(b"[DONE]")


def test_the_rest_of_the_api(mock):
    client = mock()
    assert client.call("GET", "/health") == (200, b"{}")
    assert client.call("GET", "/nowhere")[0] == 404
    assert orjson.loads(client.call("GET", "/v1/models")[1])["data"][0]["id"] == "mock"
    for bad in (b"{", [], {"prompt": 1}, {"prompt": "x", "max_tokens": "y"}, {"prompt": "x", "max_tokens": -1}):
        assert client.call("POST", "/v1/completions", bad)[0] == 400, bad
    whole = orjson.loads(client.call("POST", "/v1/completions", {"prompt": [1, 2], "max_tokens": 3})[1])
    assert whole["choices"][0]["token_ids"] == [0, 1, 2]
    assert whole["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_without_record_truth_there_is_none(mock):
    status, content = mock("record_truth=false").call("GET", "/truth")
    assert (status, orjson.loads(content)["error"]["message"]) == (404, "backend.record_truth is false")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["transfer=gzip"], "backend.transfer='gzip': must be chunked, length or close"),
        (["error_status=200"], "backend.error_status=200: must be an HTTP status from 400 to 599"),
        (["events_per_write=0"], "backend.events_per_write=0: must be"),
        (["max_num_seqs=0"], "backend.max_num_seqs=0: must be"),
        (["prompt_rate=0"], "backend.prompt_rate=0: must be"),
        (["freeze_after=-1"], "backend.freeze_after=-1: must be"),
        (["split_share=2"], "backend.split_share=2: must be a share"),
        (["in_step=1"], "backend.in_step=1: must be true or false"),
        (["in_step=true", "gap=0"], "backend.in_step=True: needs a backend.gap above 0"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_settings_that_make_no_sense_are_refused(compose, settings, words):
    from stackrace.harness.point import build_backend

    with pytest.raises(UsageError) as refused:
        build_backend(compose("backend=mock", *[f"backend.{s}" for s in settings]))
    assert words in str(refused.value)


def test_without_epoll_the_systems_selector_serves():
    from stackrace.backends.mock.watch import Portable

    poll, (a, b) = Portable(), socket.socketpair()
    with a, b:
        poll.register(a.fileno(), select.EPOLLIN)
        assert poll.poll(0, 4) == []
        poll.modify(a.fileno(), select.EPOLLIN | select.EPOLLOUT)
        assert poll.poll(-1, 4) == [(a.fileno(), select.EPOLLOUT)]
        b.send(b"x")
        poll.modify(a.fileno(), select.EPOLLIN)
        assert poll.poll(-1, 4) == [(a.fileno(), select.EPOLLIN)]
        poll.unregister(a.fileno())


def test_what_the_first_half_of_a_split_send_completes_is_logged_with_it(compose):
    from stackrace.harness.point import build_backend

    mock, _ = build_backend(compose("backend=mock", "backend.split_share=1", "backend.events_per_write=3"))
    question, events = Question(False, True, 30, 3, 0), Events(mock, is_chat=False)
    script = Script(mock, question, events, draw(mock, 10, random.Random(0)))
    said, logged, wrong = b"", 0, 0
    for _, data, marks in script.steps(script.tracks(0, 0)):
        said, logged = said + data, logged + len(marks)
        wrong += len(re.findall(rb'"token_ids".*\n\n', said)) - logged
    assert logged == 30
    assert wrong == 0

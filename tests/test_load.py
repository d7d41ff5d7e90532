"""The load generator against servers whose truth is known: the mock, and sockets that misbehave on purpose."""

import asyncio
import contextlib
import gc
import shutil
import socket
import ssl
import subprocess
import threading
import time

import numpy as np
import pytest

from stackrace.harness import records as table
from stackrace.harness.clock import Alarms, now
from stackrace.harness.load.client import Exchange
from stackrace.harness.load.connections import Connections
from stackrace.harness.load.dialect import request_bytes
from stackrace.harness.load.driver import Driver, Plan
from stackrace.harness.load.worker import Heart
from stackrace.harness.schedule import Schedule
from stackrace.harness.summary import summarize
from stackrace.harness.types import Endpoint, Request, Sampling

MS = 1e-3
_EVENTS = b'data: {"choices": [{"token_ids": [1], "text": "a"}]}\n\ndata: [DONE]\n\n'
STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(_EVENTS), _EVENTS)
)


def rows(records, schedule):
    asked = {r.id: r for r in schedule.requests}
    return table.frame(table.row(r, asked[r.id]) for r in records)


@pytest.mark.parametrize("tokens_per_event", [1, 4])
def test_the_truth_of_the_mock_is_recovered(mock_engine, load, ask, tokens_per_event):
    """TTFT 50 ms, gap 10 ms, 64 streams: within 0.5 ms; throughput within 1 %; token counts exact."""
    endpoint = mock_engine("backend.ttft=0.05", "backend.gap=0.01", f"backend.tokens_per_event={tokens_per_event}")
    events, n = 50, 256
    tokens = events * tokens_per_event
    service = 0.05 + 0.01 * (events - 1)
    due = [i * service / 64 for i in range(n)]  # 64 streams at once, evenly spread
    schedule = ask(n, tokens, due)
    records, health = load(endpoint, schedule)
    found = summarize(rows(records, schedule), {})
    assert found["ttft"]["p50"] == pytest.approx(50 * MS, abs=0.5 * MS)
    assert found["tpot"]["p50"] == pytest.approx(10 * MS / tokens_per_event, abs=0.5 * MS)
    assert found["itl"]["p50"] == pytest.approx(10 * MS, abs=0.5 * MS)
    whole = due[-1] + service
    assert found["output_throughput"]["whole"] == pytest.approx(n * tokens / whole, rel=0.01)
    assert found["batch"]["run"] == pytest.approx(n * service / whole, rel=0.02)
    assert [sum(r.chunk_tokens) for r in records] == [tokens] * n
    assert [r.output_tokens for r in records] == [tokens] * n
    assert {tuple(r.output_ids) for r in records} == {tuple(range(tokens))}
    assert found["failed"]["run"] == 0
    assert health.cpu_share < 0.9


def test_closed_loop_keeps_the_cap_and_is_due_when_its_slot_is_free(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.02", "backend.gap=0.005")
    schedule = ask(40, 9)
    records, _ = load(endpoint, schedule, concurrency=8)
    assert all(r.due == r.slot for r in records)
    ends = sorted(r.end for r in records)
    for k, r in enumerate(sorted(records, key=lambda r: r.slot)):
        if k >= 8:  # the slot that the (k - 8)th end set free
            assert r.slot == pytest.approx(ends[k - 8], abs=2e6)
    times = [(r.sent, 1) for r in records] + [(r.end, -1) for r in records]
    assert max(np.cumsum([step for _, step in sorted(times)])) == 8


def test_a_cap_on_an_open_loop_shows_the_wait_as_queued(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.1", "backend.gap=0.0")
    schedule = ask(5, 1, due=[0.001, 0.001, 0.001, 0.001, 0.001])
    records, _ = load(endpoint, schedule, concurrency=1)
    found = summarize(rows(records, schedule), {})
    waits = sorted((r.slot - r.due) / 1e9 for r in records)
    assert waits == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=20 * MS)
    assert found["ttft"]["max"] == pytest.approx(0.5, abs=25 * MS)
    assert found["ttft_service"]["max"] == pytest.approx(0.1, abs=10 * MS)
    assert found["lag"]["max"] < 5 * MS


def test_requests_are_never_early_and_hardly_late(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.001", "backend.gap=0.0")
    rng = np.random.default_rng(0)
    schedule = ask(600, 1, due=np.cumsum(rng.exponential(1 / 300, 600)).tolist())
    records, _ = load(endpoint, schedule)
    lag = np.array([r.sent - r.due for r in records])
    assert lag.min() >= 0
    assert np.quantile(lag, 0.9) < 2e6
    assert all(r.body_sent >= r.sent for r in records)


def test_stop_by_seconds_censors_what_is_in_flight(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.05", "backend.gap=0.1")
    schedule = ask(3, 60, due=[0.0, 0.1, 0.9])
    began = time.monotonic()
    records, _ = load(endpoint, schedule, seconds=0.5, drain=0.2)
    assert time.monotonic() - began < 5
    assert [r.id for r in records] == [0, 1]  # the third was never due before the end
    assert all(r.censored and r.error is None and r.chunk_times for r in records)


def test_what_waits_for_a_slot_at_the_cutoff_is_censored_unsent(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.6", "backend.gap=0.0")
    schedule = ask(2, 1, due=[0.001, 0.002])
    records, _ = load(endpoint, schedule, concurrency=1, seconds=0.3, drain=1.0)
    assert [r.censored for r in records] == [False, True]
    assert records[1].sent is None
    assert summarize(rows(records, schedule), {"ttft_ms": 100})["attainment"]["whole"] == 0.0


def test_errors_cuts_and_stalls_are_recorded_and_the_rest_goes_on(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.002", "backend.error_share=0.3", "backend.cut_share=0.3")
    schedule = ask(100, 10)
    records, _ = load(endpoint, schedule, concurrency=10)
    assert len(records) == 100
    refused = [r for r in records if r.error and "HTTP 500: planted by the mock" in r.error]
    cut = [r for r in records if r.error and "connection" in r.error.lower()]
    fine = [r for r in records if r.error is None]
    assert len(refused) + len(cut) + len(fine) == 100
    assert min(len(refused), len(cut), len(fine)) > 5
    assert all(sum(r.chunk_tokens) == 5 for r in cut)  # what came before the cut is kept
    assert all(sum(r.chunk_tokens) == 10 for r in fine)


def test_a_silent_stream_is_given_up(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.01", "backend.stall_share=1", "backend.stall=30")
    records, _ = load(endpoint, ask(2, 8), stall_timeout=0.5)
    assert all("no byte for 0.5 s (timeouts.stall)" in r.error for r in records)
    assert all(sum(r.chunk_tokens) == 4 for r in records)


def test_silence_is_not_taken_for_a_reset(load, ask):
    """A request given up for want of an answer is not sent again, even on a connection that was used before."""
    requests = []

    def handle(connection, number):
        for answer in (STREAM, b""):
            receive_request(connection)
            requests.append(number)
            connection.sendall(answer)
        time.sleep(2)

    with scripted(handle) as endpoint:
        records, _ = load(endpoint, ask(2, 1), concurrency=1, stall_timeout=0.5)
    assert records[0].error is None
    assert "timeouts.stall" in records[1].error
    assert records[1].reconnected == 0
    assert len(requests) == 2


def test_nobody_listens(load, ask):
    records, _ = load(Endpoint("http://127.0.0.1:9", "m"), ask(3, 1), concurrency=1)
    assert len(records) == 3
    assert all("cannot connect" in r.error for r in records)


@contextlib.contextmanager
def scripted(handle):
    """A server that gives each accepted connection, with its number, to `handle` in a thread of its own."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept():
        with contextlib.suppress(OSError):
            for number in range(1000):
                connection, _ = server.accept()
                threading.Thread(target=serve, args=(connection, number), daemon=True).start()

    def serve(connection, number):
        with connection, contextlib.suppress(OSError):
            handle(connection, number)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.getsockname()[1]}", "m")
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def receive_request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            raise OSError("closed")
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(next(v for k, v in (line.split(b": ") for line in head.split(b"\r\n")[1:]) if k == b"Content-Length"))
    while len(body) < length:
        body += connection.recv(65536)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_a_reset_of_a_used_connection_is_retried_once_with_its_due_time_kept(load, ask):
    def handle(connection, number):
        receive_request(connection)
        connection.sendall(STREAM)
        if number == 0:
            receive_request(connection)  # the second request on this connection, and then a reset
            reset(connection)
            return
        while True:
            receive_request(connection)
            connection.sendall(STREAM)

    with scripted(handle) as endpoint:
        records, _ = load(endpoint, ask(3, 1), concurrency=1)
    assert [r.error for r in records] == [None, None, None]
    assert [r.reconnected for r in records] == [0, 1, 0]


def test_a_reset_of_a_fresh_connection_is_an_error(load, ask):
    def handle(connection, number):
        receive_request(connection)
        reset(connection)

    with scripted(handle) as endpoint:
        records, _ = load(endpoint, ask(2, 1), concurrency=1)
    assert all(r.error and r.reconnected == 0 for r in records)


def test_a_connection_that_the_server_closed_is_not_used(load, ask):
    def handle(connection, number):
        receive_request(connection)
        connection.sendall(STREAM)

    with scripted(handle) as endpoint:
        records, _ = load(endpoint, ask(4, 1, due=[0, 0.1, 0.2, 0.3]))
    assert [(r.error, r.reconnected) for r in records] == [(None, 0)] * 4


def test_a_name_with_two_addresses_is_reached_on_the_one_that_answers(load, ask, mock_engine):
    """The mock listens on 127.0.0.1 alone; localhost is ::1 first on many machines."""
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.0")
    records, _ = load(Endpoint(endpoint.url.replace("127.0.0.1", "localhost"), "mock"), ask(2, 1))
    assert [r.error for r in records] == [None, None]


def test_a_body_cut_short_by_an_early_answer_spoils_its_connection(load):
    """The server answers before it has read the request: what is left of the body must not precede the next request."""
    seen = []

    def handle(connection, number):
        seen.append(connection.recv(1000)[:4])
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        time.sleep(0.3)

    prompt = tuple(range(1_000_000))
    requests = tuple(Request(i, prompt, 1, Sampling(0.0, 1.0, 0, 0)) for i in range(2))
    with scripted(handle) as endpoint:
        records, _ = load(endpoint, Schedule(requests, (0, 0)), concurrency=1)
    assert [r.error for r in records] == ["HTTP 413: "] * 2
    assert seen == [b"POST"] * 2
    assert [r.reconnected for r in records] == [0, 0]


def test_the_slot_is_free_when_the_last_request_ended_not_when_the_client_noticed():
    """A slow consumer of captures stands for a busy client: what it costs must show as lag, not hide in the slot."""

    def handle(connection, number):
        while True:
            receive_request(connection)
            connection.sendall(STREAM)

    with scripted(handle) as endpoint:
        captures = drive(endpoint, 4, concurrency=1, on_end=lambda capture: time.sleep(0.02))
    ends = [c.end for c in captures]
    assert [c.slot for c in captures[1:]] == ends[:-1]


def test_nothing_that_was_received_outlives_its_request_while_the_collector_sleeps():
    def handle(connection, number):
        while True:
            receive_request(connection)
            connection.sendall(STREAM)

    with scripted(handle) as endpoint:
        gc.collect()
        gc.disable()
        try:
            drive(endpoint, 50, concurrency=4, on_end=lambda capture: None)
            alive = sum(type(o) is Exchange for o in gc.get_objects())
        finally:
            gc.enable()
    assert alive == 0


def drive(endpoint, n, concurrency, on_end):
    """Drive n requests in this process; returns the captures."""
    captures = []

    def keep(capture):
        captures.append(capture)
        on_end(capture)

    async def run():
        alarms, start = Alarms(asyncio.get_running_loop()), now()
        request = Request(0, (5, 6), 1, Sampling(0.0, 1.0, 0, 0))
        plan = Plan(
            payloads=[request_bytes(endpoint, request)] * n,
            due=[start] * n,
            is_closed=True,
            concurrency=concurrency,
            cutoff=None,
            drain=0,
            request_timeout=10**10,
            stall_timeout=10**10,
        )
        connections = Connections(endpoint.url, 5.0)
        await Driver(plan, alarms, connections, keep).run()
        alarms.close()
        connections.close()

    asyncio.run(run())
    return captures


def test_a_blocked_loop_is_late_by_every_beat_that_it_swallowed():
    """200 ms of every second: about a fifth of the beats is late, and p99 says so."""

    async def run():
        alarms = Alarms(asyncio.get_running_loop())
        heart = Heart(alarms)
        for _ in range(2):
            await asyncio.sleep(0.8)
            time.sleep(0.2)
        await asyncio.sleep(0.05)
        health = heart.health(0)
        alarms.close()
        return health

    health = asyncio.run(run())
    assert health.loop_lag_p99 == pytest.approx(0.2, abs=0.03)
    assert health.loop_lag_p50 < 0.01


def test_a_failing_callback_does_not_silence_later_alarms():
    async def run():
        loop = asyncio.get_running_loop()
        failures = []
        loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
        alarms = Alarms(loop)
        alarms.at(now(), lambda: 1 / 0)
        await alarms.sleep_until(now() + 10_000_000)
        alarms.close()
        return failures

    assert [type(f) for f in asyncio.run(asyncio.wait_for(run(), 5))] == [ZeroDivisionError]


def test_a_large_prompt_leaves_whole(load):
    sizes = []

    def handle(connection, number):
        receive_request(connection)
        sizes.append(True)
        connection.sendall(STREAM)

    prompt = tuple(range(100_000, 500_000))
    schedule = Schedule((Request(0, prompt, 1, Sampling(0.0, 1.0, 0, 0)),), (0,))
    with scripted(handle) as endpoint:
        (record,), _ = load(endpoint, schedule)
    assert record.error is None
    assert record.body_sent > record.sent
    assert sizes == [True]


def test_warm_up_is_not_recorded(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.0")
    warmup = ask(5, 2)
    records, _ = load(endpoint, ask(3, 2), warmup=warmup, warmup_concurrency=2)
    assert [r.id for r in records] == [0, 1, 2]
    assert min(r.due for r in records) == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_tls_is_spoken_and_verified(load, ask, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def handle(connection, number):
        with context.wrap_socket(connection, server_side=True) as secure:
            while True:
                receive_request(secure)
                for at in range(0, len(STREAM), 20):
                    secure.sendall(STREAM[at : at + 20])

    with scripted(handle) as endpoint:
        secure = Endpoint(endpoint.url.replace("http://127.0.0.1", "https://localhost"), "m")
        refused, _ = load(secure, ask(1, 1))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        records, _ = load(secure, ask(3, 1), concurrency=1)
    assert "CERTIFICATE_VERIFY_FAILED" in refused[0].error
    assert [(r.error, r.chunk_tokens) for r in records] == [(None, [1])] * 3

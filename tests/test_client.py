"""The client against sockets that misbehave on purpose, and against its own lateness."""

import asyncio
import gc
import shutil
import ssl
import subprocess
import time

import pytest
from scripted import STREAM, drive, receive_request, reset, scripted

from stackrace.harness.clock import Alarms, now
from stackrace.harness.load.client import Exchange
from stackrace.harness.load.health import Heart
from stackrace.harness.schedule import Schedule
from stackrace.harness.types import Endpoint, Request, Sampling


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
        captures, _ = drive(endpoint, 4, concurrency=1, on_end=lambda capture: time.sleep(0.02))
    ends = [c.end for c in captures]
    assert [c.slot for c in captures[1:]] == ends[:-1]


def test_no_exchange_outlives_its_request_while_the_collector_sleeps():
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


@pytest.mark.alone
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
        heart.stop()
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

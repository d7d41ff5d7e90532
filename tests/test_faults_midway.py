"""What befalls an engine in mid-point: the point says so and keeps its records, the next one has a new engine."""

import signal
import socket

import psutil
import pytest
from command import FAST, LENIENT, ONE_ROUND, make_stack, runs, start, wait_for

SMALL = ["model=tiny", "lengths.input.tokens=8", "lengths.output.tokens=8", *ONE_ROUND]

pytestmark = pytest.mark.engine

# A front that passes everything to a mock in a process of its own, and answers 500 once that is gone.
FRONT = """
import socket, subprocess, sys, threading
settings = {"ttft": 0.01, "gap": 0.002, "tokens-per-event": 1, "events-per-write": 1, "jitter": 0, "stall-share": 0,
    "stall": 0, "error-share": 0, "error-status": 500, "cut-share": 0, "malformed-share": 0, "split-share": 0,
    "head-delay": 0, "transfer": "chunked", "freeze": 0, "template-tokens": 0, "seed": 0}
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    inner = s.getsockname()[1]
flags = [word for name, value in settings.items() for word in ("--" + name, str(value))]
subprocess.Popen([sys.executable, "-m", "stackrace.backends.mock", "--port", str(inner), *flags])

def copy(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass

def serve(client):
    try:
        behind = socket.create_connection(("127.0.0.1", inner))
    except OSError:
        client.recv(65536)
        client.sendall(b"HTTP/1.1 500 Sorry\\r\\nConnection: close\\r\\nContent-Length: 11\\r\\n\\r\\nEngine dead")
        client.close()
        return
    threading.Thread(target=copy, args=(behind, client), daemon=True).start()
    copy(client, behind)

with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


def in_mid_point(tmp_path, process):
    """Wait until a point has journalled some requests; returns the processes that its engine consists of."""
    journals = tmp_path / "results" / "s"
    wait_for(lambda: any(len(j.read_bytes().splitlines()) > 5 for j in journals.glob("*/journal.jsonl")))
    (guardian,) = [
        p for p in psutil.Process(process.pid).children() if any(w.endswith("guardian") for w in p.cmdline())
    ]
    return guardian.children(recursive=True)


def ports_of(engine):
    return {c.laddr.port for p in engine for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def first_failed_second_ok(tmp_path, process):
    """The records and the error of the first point, once the sweep has ended as told."""
    out, notes = process.communicate(timeout=60)
    assert process.returncode == 1, notes
    assert "Traceback" not in notes
    assert "1 of 2 points failed" in out
    found = {run.status: run for run in runs(tmp_path, "s")}
    assert found.keys() == {"failed", "ok"}
    assert found["ok"].meta["summary"]["failed"]["run"] == 0
    failed = found["failed"]
    assert failed.records["error"].isna().sum() > 5  # what was right before stays
    assert not list(failed.folder.glob("journal.jsonl"))
    return failed.records, failed.meta["error"]


def nothing_listens(ports):
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    return bool(ports)


def test_an_engine_that_is_killed_with_all_that_it_is(tmp_path, processes_of):
    """Our own, and the next stack goes on."""
    load = ["stop.requests=30", "arrival.rate=30", *SMALL, "sweep=s"]
    process = start(tmp_path, "-m", "backend=mla,mock", "verify=none", *load)
    engine = in_mid_point(tmp_path, process)
    ports = ports_of(engine)
    for p in engine:
        p.kill()
    _, error = first_failed_second_ok(tmp_path, process)
    assert "mla was killed by SIGKILL (out of memory?)" in error
    assert processes_of() == []
    assert nothing_listens(ports)


def test_an_engine_that_stops_in_its_tracks(tmp_path, processes_of):
    """It hears no SIGTERM, and every request of its would be one timeout more."""
    settings = [*FAST, "arrival.rate=20,80", "stop.requests=60", "timeouts.stall=0.7", "backend.stop_grace=0.3"]
    process = start(tmp_path, "-m", *settings, "sweep=s")
    engine = in_mid_point(tmp_path, process)
    ports = ports_of(engine)
    for p in engine:
        p.send_signal(signal.SIGSTOP)
    records, error = first_failed_second_ok(tmp_path, process)
    assert error.startswith("no token for 0.7 s (timeouts.stall): mock hangs")
    assert records["error"].notna().sum() < 40  # and not those that were still to come
    assert len(records) < 60
    assert processes_of() == []
    assert nothing_listens(ports)


def test_an_engine_of_which_only_the_front_is_left(tmp_path, processes_of):
    where, env = make_stack(tmp_path, FRONT, "front")
    settings = ["backend=front", *SMALL, "arrival.rate=20,80", "stop.requests=60"]
    process = start(tmp_path, *where, "-m", *settings, "sweep=s", env=env)
    outer, inner = in_mid_point(tmp_path, process)
    ports = ports_of([outer, inner])
    inner.kill()
    records, error = first_failed_second_ok(tmp_path, process)
    assert "front has not exited, but is broken: HTTP 500: Engine dead" in error
    assert 8 <= records["error"].notna().sum() < 40
    assert processes_of() == []
    assert nothing_listens(ports)


def test_a_server_that_fails_one_request_in_ten(stackrace, tmp_path):
    """No reason to end the point, but one to doubt it."""
    done = stackrace("bench", *FAST, *LENIENT, "backend.error_share=0.1", "stop.requests=100", "arrival.rate=200")
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path)
    errors = run.records["error"].dropna()
    assert run.status == "ok"
    assert set(errors) == {"HTTP 500: planted by the mock"}
    assert 2 <= len(errors) <= 25
    assert len(run.records) == 100
    assert run.meta["summary"]["failed"]["run"] == len(errors)
    assert run.meta["validity"]["verdict"] == ("invalid" if len(errors) > 10 else "suspect")
    assert f"{len(errors):.1f}% of the requests failed" in run.meta["validity"]["reasons"]

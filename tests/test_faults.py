"""What goes wrong in a sweep is said, costs nothing else, and leaves nothing behind."""

import contextlib
import socket
import subprocess
import sys
from threading import Thread

import pytest
from command import FAST, ONE_ROUND, make_stack, runs

EXITS = """
import sys
print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 31.00 GiB")
sys.exit(3)
"""
KILLED = """
import os, signal
print("loading weights", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.engine
def test_stacks_that_cannot_start_cost_the_others_nothing(stackrace, tmp_path, processes_of):
    """Also: a new stack is one file and one yaml, wherever they lie."""
    where, env = make_stack(tmp_path, EXITS, "exits")
    make_stack(tmp_path, KILLED, "killed")
    for name, setting in (("refuses", "error_share: 1.0"), ("late", "startup_timeout: 0.0001")):
        text = f"defaults: [mock, _self_]\nname: {name}\n{setting}\n"
        (tmp_path / "more" / "backend" / f"{name}.yaml").write_text(text)
    point = ["stop.requests=10", *ONE_ROUND, "lengths.output.tokens=8", "sweep=s", "arrival.rate=40,80"]
    done = stackrace("bench", *where, "-m", "backend=exits,killed,refuses,late,mock", *point, env=env)
    assert done.returncode == 1
    assert "8 of 10 points failed" in done.stdout
    assert "Traceback" not in done.stderr
    by_stack = {}
    for run in runs(tmp_path, "s"):
        by_stack.setdefault(run.meta["point"]["stack"], []).append(run)
    assert [r.status for r in by_stack["mock"]] == ["ok", "ok"]
    for name, *words in (
        ("exits", "exits exited with 3", "CUDA out of memory"),
        ("killed", "killed was killed by SIGKILL (out of memory?)", "loading weights"),
        ("refuses", "every request of the warm-up failed, the first with: HTTP 500: planted by the mock"),
        ("late", "gave no token within backend.startup_timeout=0.0001 s"),
    ):
        assert [r.status for r in by_stack[name]] == ["failed", "failed"]
        assert all(w in run.meta["error"] for run in by_stack[name] for w in words)
    assert processes_of() == []


TAKEN = """
import http.server, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"choices": [{"index": 0, "text": "not me"}]}')
server = http.server.HTTPServer(("127.0.0.1", at.port), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
"""
BINDS = """
import socket, sys, time
with socket.create_server(("127.0.0.1", int(sys.argv[1]))):
    time.sleep(60)
"""


def test_whoever_took_the_port_in_the_meantime_is_not_raced(stackrace, tmp_path, processes_of):
    """It answers well, and is no engine of ours."""
    where, env = make_stack(tmp_path, BINDS, before=f"exec({TAKEN!r})")
    done = stackrace("bench", *where, "backend=broken", *ONE_ROUND, "stop.requests=3", env=env)
    assert done.returncode == 1
    (run,) = runs(tmp_path)
    assert "Address already in use" in run.meta["error"]
    assert len(run.records) == 0
    assert processes_of() == []


@pytest.mark.parametrize(("limit", "kept"), [(24_000, 5), (2_000, None)], ids=["in the journal", "at once"])
def test_a_full_disk_is_said_and_leaves_nothing_running(tmp_path, processes_of, limit, kept):
    """A file-size limit stands in for the disk: the kernel refuses to write more, as it does when the disk is full."""
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"
        "sys.argv = ['stackrace', *sys.argv[1:]]\n"
        "from stackrace.harness.cli import main\nmain()\n"
    )
    args = ["bench", *FAST, "stop.requests=400", "arrival.rate=400", "lengths.input.tokens=4", "sweep=s"]
    done = subprocess.run(
        [sys.executable, "-c", limited.format(limit), *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    if kept is None:
        assert list((tmp_path / "results" / "s").glob("*/run.json")) == []
    else:
        (run,) = runs(tmp_path, "s")
        assert run.status in ("failed", "killed")
        assert len(run.records) > kept
    assert processes_of() == []


def test_something_that_is_no_http_server_is_told_apart(stackrace, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as ssh:

        def greet():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = ssh.accept()
                    connection.sendall(b"SSH-2.0-none\r\n")
                    connection.close()

        Thread(target=greet, daemon=True).start()
        url = f"http://127.0.0.1:{ssh.getsockname()[1]}"
        args = ["backend=external", f"backend.url={url}", "backend.model=m", "backend.startup_timeout=1"]
        done = stackrace("bench", *args)
        ssh.shutdown(socket.SHUT_RDWR)
    assert done.returncode == 1
    assert f"is there a server at {url}?" in done.stderr
    assert "Traceback" not in done.stderr

"""What goes wrong in a sweep is said, costs nothing else, and leaves nothing behind."""

import contextlib
import os
import socket
import subprocess
import sys
from threading import Thread

import pytest
from command import FAST, QUICK, runs, start, wait_for


@pytest.fixture
def broken(tmp_path):
    """A config folder with a stack that prints its last words and exits."""
    folder = tmp_path / "more" / "backend"
    folder.mkdir(parents=True)
    module = tmp_path / "broken_stack.py"
    module.write_text(
        "import sys\nfrom dataclasses import dataclass\nfrom stackrace.backends.base import Backend\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Broken(Backend):\n"
        "    def command(self, at):\n"
        "        code = 'import sys; print(\"out of luck: no such device\"); sys.exit(3)'\n"
        "        return [sys.executable, '-c', code]\n"
        "    def version(self):\n        return '1'\n"
    )
    (folder / "broken.yaml").write_text(
        "defaults: [_stack, _self_]\n_target_: broken_stack.Broken\n"
        "name: broken\ncheckpoint: null\nmax_model_len: null\n"
    )
    return ["--config-dir", str(tmp_path / "more")], {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_a_stack_that_cannot_start_costs_the_others_nothing(stackrace, tmp_path, broken, processes_of):
    """Also: a new stack is one file and one yaml, wherever they lie."""
    where, env = broken
    point = ["stop.requests=10", "warmup.requests=1", "lengths.output.tokens=8", "sweep=s", "arrival.rate=40,80"]
    done = stackrace("bench", *where, "-m", "backend=broken,mock", *point, env=env)
    assert done.returncode == 1
    assert "2 of 4 points failed" in done.stdout
    assert "Traceback" not in done.stderr
    by_stack = {}
    for run in runs(tmp_path, "s"):
        by_stack.setdefault(run.meta["point"]["stack"], []).append(run)
    assert [r.status for r in by_stack["mock"]] == ["ok", "ok"]
    assert [r.status for r in by_stack["broken"]] == ["failed", "failed"]
    for run in by_stack["broken"]:
        assert "exited with 3" in run.meta["error"]
        assert "out of luck: no such device" in run.meta["error"]
    assert processes_of() == []


def test_an_engine_that_dies_in_mid_point_fails_the_point_and_keeps_its_records(tmp_path, stackrace, processes_of):
    process = start(tmp_path, "backend=mock", *QUICK, "stop.requests=40", "arrival.rate=10", "sweep=s")
    journal = tmp_path / "results" / "s"
    wait_for(lambda: any(len(j.read_bytes().splitlines()) > 5 for j in journal.glob("*/journal.jsonl")))
    (engine,) = [
        p for p in processes_of.now() if "stackrace.backends.mock" in p.cmdline() and "--port" in p.cmdline()[3]
    ]
    engine.kill()
    out, notes = process.communicate(timeout=30)
    assert process.returncode == 1, notes
    (run,) = runs(tmp_path, "s")
    assert run.status == "failed"
    assert "mock exited with" in run.meta["error"]
    assert len(run.records) > 5
    assert "1 of 1 points failed" in out
    assert processes_of() == []


def test_a_server_that_refuses_everything_fails_the_point_with_its_words(stackrace, tmp_path, processes_of):
    done = stackrace("bench", *FAST, "backend.error_share=1")
    assert done.returncode == 1
    (run,) = runs(tmp_path)
    assert "every request of the warm-up failed, the first with: HTTP 500: planted by the mock" in run.meta["error"]
    assert processes_of() == []


def test_an_engine_that_never_gives_a_token_times_out(stackrace, tmp_path, processes_of):
    done = stackrace("bench", *FAST, "backend.startup_timeout=0.0001")
    assert done.returncode == 1
    (run,) = runs(tmp_path)
    assert "gave no token within backend.startup_timeout=0.0001 s" in run.meta["error"]
    assert processes_of() == []


def test_a_full_disk_is_said_and_leaves_nothing_running(tmp_path, processes_of):
    """A file-size limit stands in for the disk: the kernel refuses to write more, as it does when the disk is full."""
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))\n"
        "sys.argv = ['stackrace', *sys.argv[1:]]\n"
        "from stackrace.harness.cli import main\nmain()\n"
    )
    args = ["bench", *FAST, "stop.requests=400", "arrival.rate=400", "lengths.input.tokens=4", "sweep=s"]
    done = subprocess.run(
        [sys.executable, "-c", limited, *args], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    (run,) = runs(tmp_path, "s")
    assert run.status in ("failed", "killed")
    assert len(run.records) > 5
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

"""The real command, end to end over the mock: sweeps, resume, kills, stacks that cannot start, bad input."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from rich.console import Console

from stackrace.harness import store
from stackrace.harness.progress import Progress
from stackrace.harness.sweep import Sweep

QUICK = ["backend.ttft=0.01", "backend.gap=0.002", "warmup.requests=1", "lengths.output.tokens=8"]
FAST = ["backend=mock", *QUICK, "stop.requests=20", "arrival.rate=40"]


def runs(tmp_path, sweep="adhoc"):
    return [store.read_run(f) for f in store.find_runs(tmp_path / "results" / sweep)]


def statuses(tmp_path, sweep="adhoc"):
    return sorted(r.status for r in runs(tmp_path, sweep))


def test_a_sweep_leaves_records_a_table_and_no_process(stackrace, tmp_path, processes_of):
    done = stackrace("bench", "-m", *FAST, "arrival.rate=40,80", "sweep=s")
    assert done.returncode == 0, done.stderr
    assert "[2/2] mock · 80 req/s" in done.stderr
    assert "dashboard: stackrace report results/s" in done.stdout
    found = runs(tmp_path, "s")
    assert {r.meta["point"]["rate"] for r in found} == {40, 80}
    for run in found:
        files = {p.name for p in run.folder.iterdir()}
        assert {"run.json", "config.yaml", "schedule.parquet", "requests.parquet", "server.log"} <= files
        assert "journal.jsonl" not in files
        assert len(run.records) == 20
        assert run.meta["summary"]["failed"]["run"] == 0
        assert run.meta["validity"]["verdict"] in ("valid", "suspect")  # a busy machine may be late
        assert run.meta["schedule"]["hash"]
        assert run.meta["provenance"]["cpu"]["model"]
        assert "stackrace.backends.mock" in run.meta["backend"]["command"]
    assert len({r.meta["backend"]["command"][4] for r in found}) == 1  # one launch, and so one port, for both
    assert processes_of() == []


def test_a_finished_point_is_skipped_and_a_changed_flag_runs_again(stackrace, tmp_path):
    assert stackrace("bench", *FAST).returncode == 0
    (first,) = runs(tmp_path)
    again = stackrace("bench", *FAST)
    assert again.returncode == 0
    assert "1 of 1 points are finished already" in again.stderr
    assert runs(tmp_path)[0].meta["started_at"] == first.meta["started_at"]
    assert stackrace("bench", *FAST, "backend.ttft=0.02").returncode == 0
    assert len(runs(tmp_path)) == 2


def start(tmp_path, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "stackrace", "bench", *args],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, patience=40.0):
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


LONG = ["-m", "backend=mock", *QUICK, "stop.requests=30", "sweep=s", "arrival.rate=60,10"]  # half a second, then 3 s


def journal_of_second(tmp_path):
    """Lines that the running second point has journalled, once the first point is finished."""
    metas = [json.loads(p.read_text()) for p in (tmp_path / "results" / "s").glob("*/run.json")]
    if not any(m["status"] == "ok" for m in metas):
        return 0
    journals = list((tmp_path / "results" / "s").glob("*/journal.jsonl"))
    return sum(len(j.read_bytes().splitlines()) for j in journals)


def test_sigkill_loses_only_what_was_in_flight_and_leaves_no_orphan(stackrace, tmp_path, processes_of):
    process = start(tmp_path, *LONG)
    wait_for(lambda: journal_of_second(tmp_path) >= 5)
    assert len(processes_of.now()) >= 3  # the harness, the guardian with its engine, the worker's working directory
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert processes_of() == []

    assert statuses(tmp_path, "s") == ["killed", "ok"]
    killed = next(r for r in runs(tmp_path, "s") if r.status == "killed")
    kept = len(killed.records)
    assert kept >= 5
    assert killed.records["error"].isna().all()

    finished = {r.meta["key"]: r.meta["started_at"] for r in runs(tmp_path, "s") if r.status == "ok"}
    again = stackrace("bench", *LONG)
    assert again.returncode == 0, again.stderr
    assert "1 of 2 points are finished already" in again.stderr
    assert statuses(tmp_path, "s") == ["ok", "ok"]
    for run in runs(tmp_path, "s"):
        if run.meta["key"] in finished:
            assert run.meta["started_at"] == finished[run.meta["key"]]
    attempt = store.read_run(killed.folder / "attempts" / "1")
    assert len(attempt.records) == kept  # nothing that was measured is thrown away
    assert processes_of() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_sweep_cleanly_and_the_same_command_resumes(stackrace, tmp_path, processes_of, number):
    process = start(tmp_path, *LONG)
    wait_for(lambda: journal_of_second(tmp_path) >= 5)
    process.send_signal(number)
    _, notes = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command goes on from there" in notes
    assert "Traceback" not in notes
    assert processes_of() == []
    assert statuses(tmp_path, "s") == ["interrupted", "ok"]
    interrupted = next(r for r in runs(tmp_path, "s") if r.status == "interrupted")
    assert len(interrupted.records) >= 5
    if number == signal.SIGINT:
        assert stackrace("bench", *LONG).returncode == 0
        assert statuses(tmp_path, "s") == ["ok", "ok"]


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
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))\n"
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


BAD = [
    (["bench", "results=/dev/null/x", "backend=mock"], "/dev/null/x"),
    (["model", "make", "tiny", "--out", "/proc/x"], "/proc/x"),
    (["bench", "backend=nonesuch"], "nonesuch"),
    (["bench", "backend=mock", "arrival.rate=-1"], "arrival.rate=-1"),
    (["bench", "lengths.input.tokens=9999"], "exceed model.max_model_len=4096"),
    (["bench", "-m", "backend=mock", "arrival.rate=1,-1"], "arrival.rate=-1"),
    (["bench", "no_such_key=1"], "no_such_key"),
    (["bench", "arrival.rate="], "arrival.rate"),
    (["bench", "experiment=nonesuch"], "nonesuch"),
    (["serve", "backend=nonesuch"], "nonesuch"),
    (["report", "nowhere"], "nowhere"),
    (["model", "make", "nonesuch"], "nonesuch"),
    (["model", "inspect", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("args", "words"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(stackrace, tmp_path, args, words):
    done = stackrace(*args)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    left = {p.name for p in tmp_path.rglob("*") if p.is_file() and ".hydra" not in p.parts and "models" not in p.parts}
    assert left == set()


def test_a_port_in_use_is_refused(stackrace, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = stackrace("bench", *FAST, f"backend.port={port}")
    assert done.returncode == 2
    assert f"backend.port={port} is in use" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_checkpoint_with_a_missing_shard_is_refused(stackrace, tmp_path):
    assert stackrace("model", "make", "tiny").returncode == 0
    shard = next((tmp_path / "models" / "tiny-seed0").glob("*.safetensors"))
    shard.unlink()
    done = stackrace("bench", "backend=mla")
    assert done.returncode == 2
    assert shard.name in done.stderr
    assert done.stderr.count("\n") == 1


def test_results_of_a_newer_schema_are_refused(stackrace, tmp_path):
    assert stackrace("bench", *FAST).returncode == 0
    (path,) = (tmp_path / "results" / "adhoc").glob("*/run.json")
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "schema_version": store.SCHEMA_VERSION + 1}))
    for command in (["bench", *FAST], ["report", "results/adhoc"]):
        done = stackrace(*command)
        assert done.returncode == 2
        assert f"schema version {store.SCHEMA_VERSION + 1}" in done.stderr
        assert "upgrade stackrace" in done.stderr
        assert done.stderr.count("\n") == 1


def test_each_engine_is_launched_once_whatever_varies_fastest(stackrace, tmp_path):
    args = ["-m", *FAST, "stop.requests=4", "arrival.rate=40,80", "backend.ttft=0.01,0.02", "sweep=s"]
    done = stackrace("bench", *args)
    assert done.returncode == 0, done.stderr
    ran = sorted(runs(tmp_path, "s"), key=lambda r: r.meta["started_at"])
    assert [r.config["backend"]["ttft"] for r in ran] == [0.01, 0.01, 0.02, 0.02]
    ports = [r.meta["backend"]["command"][4] for r in ran]
    assert (ports[0], ports[2]) == (ports[1], ports[3])
    assert ports[0] != ports[2]


def test_repeats_are_apart(compose, tmp_path):
    """Repeat by repeat, so that a drift of the machine meets every stack; within one, engine by engine."""
    points = [(f"backend.ttft={t}", f"arrival.rate={r}", f"repeat={n}") for t in (1, 2) for r in (5, 6) for n in (0, 1)]
    configs = [compose("backend=mock", f"results={tmp_path}", *p) for p in points]
    with Sweep(Progress(Console(quiet=True))) as sweep:
        order = sweep.expect(configs)
    ran = [(configs[i].repeat, configs[i].backend.ttft, configs[i].arrival.rate) for i in order]
    assert ran == [(n, t, r) for n in (0, 1) for t in (1, 2) for r in (5, 6)]


def test_a_port_of_ones_own_is_kept_over_a_sweep(stackrace, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    args = ["-m", *FAST, "stop.requests=4", "arrival.rate=40,80", f"backend.port={port}"]
    for launcher in ("stackrace", "basic"):
        done = stackrace("bench", *args, f"hydra/launcher={launcher}", f"sweep={launcher}")
        assert done.returncode == 0, done.stderr
        assert statuses(tmp_path, launcher) == ["ok", "ok"]


def test_a_proxy_of_the_environment_is_not_used(stackrace, tmp_path):
    env = {**os.environ, "http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    assert stackrace("bench", *FAST, "backend.startup_timeout=20", env=env).returncode == 0


def test_a_server_that_repeats_the_key_does_not_get_it_onto_the_disk(tmp_path, stackrace):
    class Echo(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            said = f"Incorrect API key provided: {self.headers['Authorization']}".encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Echo) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        args = ["bench", "backend=external", f"backend.url={url}", "backend.model=m", "backend.api_key_env=RACE_KEY"]
        done = stackrace(*args, env={**os.environ, "RACE_KEY": "sk-12345678"})
        server.shutdown()
    assert done.returncode == 1
    assert "Incorrect API key provided: ***" in runs(tmp_path)[0].meta["error"]
    assert "sk-12345678" not in done.stderr + done.stdout
    for path in (tmp_path / "results").rglob("*"):
        assert not path.is_file() or b"sk-12345678" not in path.read_bytes(), path


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


def test_secrets_reach_the_server_but_never_the_disk(stackrace, tmp_path, mock_engine):
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.001")
    secret = "s3cr3t-" + "x" * 20
    args = ["bench", "backend=external", f"backend.url={endpoint.url}", "backend.model=mock", "stop.requests=5"]
    args += ["backend.api_key_env=RACE_KEY", "+backend.headers_env.X-Team=RACE_TEAM", "lengths.output.tokens=4"]
    args += ["+backend.env.HF_TOKEN=${oc.env:RACE_KEY}", "+backend.env.OMP_NUM_THREADS=1"]
    done = stackrace(*args, env={**os.environ, "RACE_KEY": secret, "RACE_TEAM": secret})
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path)
    assert run.status == "ok"
    assert run.config["backend"]["env"] == {"HF_TOKEN": "<redacted>", "OMP_NUM_THREADS": 1}
    for path in (tmp_path / "results").rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


def test_cfg_job_shows_everything(stackrace):
    done = stackrace("bench", "--cfg", "job")
    assert done.returncode == 0
    for key in ("backend:", "model:", "workload:", "lengths:", "arrival:", "slo:", "hardware:", "validity:", "stop:"):
        assert f"\n{key}" in done.stdout or done.stdout.startswith(key)


def test_the_three_ways_in_are_one(stackrace):
    by_module = stackrace("--help")
    by_script = subprocess.run(
        [Path(sys.executable).parent / "stackrace", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("bench", "serve", "report", "model", "doctor"):
        assert command in by_module.stdout
        assert command in by_script.stdout


def test_help_is_quick(stackrace):
    stackrace("--help")
    times = []
    for _ in range(3):
        began = time.monotonic()
        stackrace("--help")
        times.append(time.monotonic() - began)
    assert min(times) < 0.5


def test_doctor_and_model_say_something(stackrace):
    doctor = stackrace("doctor")
    assert doctor.returncode == 0
    assert "torch" in doctor.stdout
    made = stackrace("model", "make", "tiny", "--seed", "3", "--out", "m")
    assert made.returncode == 0, made.stderr
    assert "deepseek_v2" in made.stdout
    assert stackrace("model", "inspect", "m").stdout == made.stdout

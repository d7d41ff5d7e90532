"""The command line: bad input is one line and exit code 2; help is quick; nothing secret is written."""

import json
import os
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from command import FAST, runs

from stackrace.harness import cli, store

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
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, args, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stackrace", *args])
    monkeypatch.setitem(os.environ, "HYDRA_FULL_ERROR", "0")  # which the command sets: undone at the end
    with pytest.raises(SystemExit) as end:
        cli.main()
    said, complaint = capsys.readouterr()
    assert end.value.code == 2, complaint
    assert words in complaint
    assert complaint.count("\n") == 1
    assert said == ""
    left = {p.name for p in tmp_path.rglob("*") if p.is_file() and ".hydra" not in p.parts and "models" not in p.parts}
    assert left == set()
    asked_too_much = words.startswith("exceed")  # of a checkpoint, which is made to be looked at
    assert (tmp_path / "models").exists() == asked_too_much


def test_a_port_in_use_is_refused(stackrace, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = stackrace("bench", *FAST, f"backend.port={port}")
    assert done.returncode == 2
    assert f"backend.port={port} is in use" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_checkpoint_with_a_missing_shard_is_refused(stackrace, tmp_path):
    assert stackrace("model", "make", "tiny", "--no-experts").returncode == 0
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


@pytest.mark.alone
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
    assert "\nexperts: 2 of 16 a token" in made.stdout
    assert made.stdout.startswith(stackrace("model", "inspect", "m").stdout)

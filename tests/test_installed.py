"""Stacks in environments of their own: their command lines, and what is refused before anything runs."""

import http.server
import json
import re
import sys
import threading
from pathlib import Path

import pytest

from stackrace.backends.asking import refused
from stackrace.backends.running import Placement
from stackrace.harness.errors import UsageError
from stackrace.harness.point import plan
from stackrace.harness.types import Endpoint

FAKE_SERVER = """
import argparse
parser = argparse.ArgumentParser(prog="fake")
for name in KNOWN:
    parser.add_argument("--" + name)
for name in SWITCHES:
    parser.add_argument("--" + name, action="store_true")
parser.parse_args()
raise SystemExit("this server was started")
"""
VALUES = [
    "model",
    "served-model-name",
    "host",
    "port",
    "dtype",
    "max-model-len",
    "kv-cache-memory-bytes",
    "max-num-seqs",
    "max-num-batched-tokens",
    "tensor-parallel-size",
    "generation-config",
    "attention-backend",
]
SWITCHES = [
    "no-enable-prefix-caching",
    "enable-prefix-caching",
    "enable-prompt-tokens-details",
    "disable-uvicorn-access-log",
    "enforce-eager",
]
HERE = f"backend.python={sys.executable}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return f"models={tmp_path_factory.mktemp('models')}"


@pytest.fixture
def fake_vllm(tmp_path):
    """A folder with a package called vllm 9.9 whose server knows vLLM's flags; returns overrides that use it."""
    module = tmp_path / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    module.write_text(f"KNOWN, SWITCHES = {VALUES}, {SWITCHES}\n{FAKE_SERVER}")
    about = tmp_path / "vllm-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    return [HERE, f"+backend.env.PYTHONPATH={tmp_path}"]


def words(command):
    """Flags of a command line with their values; True where there is none."""
    found, last = {}, None
    begin = next(i for i, word in enumerate(command) if word.startswith("--"))
    for word in command[begin:]:
        if word.startswith("--"):
            last, found[word] = word, True
        else:
            found[last] = word
    return found


def at(tmp_path):
    return Placement(folder=tmp_path, cores=(0,), port=8123)


def test_vllm_command_line(compose, models, fake_vllm, tmp_path):
    common = ["common.max_num_seqs=7", "common.max_num_batched_tokens=99", "common.kv_cache_memory_bytes=1000000"]
    point = plan(compose("backend=vllm_cpu", models, *fake_vllm, *common, "common.dtype=bfloat16"))
    assert re.fullmatch(r"vllm 9\.9, torch 2\.\S+, \d+ packages [0-9a-f]{8}", point.version)
    command = point.backend.command(at(tmp_path))
    assert command[:3] == [str(Path(sys.executable)), "-m", "vllm.entrypoints.openai.api_server"]
    assert words(command) == {
        "--model": str(Path(point.backend.checkpoint).resolve()),
        "--served-model-name": "tiny",
        "--host": "127.0.0.1",
        "--port": "8123",
        "--dtype": "bfloat16",
        "--max-model-len": "4096",
        "--kv-cache-memory-bytes": "1000000",
        "--max-num-seqs": "7",
        "--max-num-batched-tokens": "99",
        "--tensor-parallel-size": "1",
        "--no-enable-prefix-caching": True,
        "--enable-prompt-tokens-details": True,
        "--generation-config": "vllm",
        "--disable-uvicorn-access-log": True,
        "--enforce-eager": True,
    }
    assert "VLLM_SERVER_DEV_MODE" not in point.backend.environment()


def test_vllm_empties_the_cache_that_it_has_only_in_development_mode(compose, models, fake_vllm, tmp_path):
    caching = plan(compose("backend=vllm", models, *fake_vllm, "common.enable_prefix_caching=true")).backend
    assert "--enable-prefix-caching" in caching.command(at(tmp_path))
    assert caching.environment()["VLLM_SERVER_DEV_MODE"] == "1"
    assert caching.has_prefix_cache
    assert caching.reset_path == "/reset_prefix_cache"


def test_mla_is_switched_off_by_vllms_own_variable(compose, models, fake_vllm):
    on = plan(compose("backend=vllm", models, *fake_vllm))
    off = plan(compose("backend=vllm_mha", models, *fake_vllm))
    assert off.backend.environment()["VLLM_MLA_DISABLE"] == "1"
    assert off.fingerprint != on.fingerprint


def test_sglang_command_line(compose, models, tmp_path):
    point = compose(
        "backend=sglang", models, HERE, "backend.check_flags=false", "common.dtype=bfloat16", "+backend.flags.tp-size=2"
    )
    (tmp_path / "sglang-9.9.dist-info").mkdir()
    (tmp_path / "sglang-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9.9\n")
    point.backend.env = {"PYTHONPATH": str(tmp_path)}
    found = words(plan(point).backend.command(at(tmp_path)))
    # tiny keeps 576 numbers of two bytes a token in each of 2 layers
    assert found["--max-total-tokens"] == str(402653184 // (2 * 576 * 2))
    assert found["--max-running-requests"] == "64"
    assert found["--chunked-prefill-size"] == found["--max-prefill-tokens"] == "512"
    assert found["--disable-radix-cache"] is found["--enable-cache-report"] is found["--enable-metrics"] is True
    assert found["--tp-size"] == "2", "a flag of the yaml replaces ours"
    assert "--attention-backend" not in found, "the engine chooses"


def test_flags_are_read_by_the_engines_own_parser_before_anything_runs(compose, models, fake_vllm):
    cfg = compose("backend=vllm", models, *fake_vllm, "+backend.flags.no-such-flag=1")
    with pytest.raises(UsageError, match=r"unrecognized arguments: --no-such-flag 1 \(tried with vllm 0.26.0"):
        plan(cfg)


def test_a_flag_that_adds_nothing_is_refused(compose, models, fake_vllm):
    """vLLM would keep its default, and the stack be taken for another one."""
    with pytest.raises(UsageError, match="enable-chunked-prefill=false adds nothing: write no-enable-chunked-prefill"):
        plan(compose("backend=vllm", models, *fake_vllm, "+backend.flags.enable-chunked-prefill=false"))
    off = ["backend.check_flags=false", "+backend.flags.disable-uvicorn-access-log=false", "+backend.flags.conf={a: 1}"]
    command = plan(compose("backend=vllm", models, *fake_vllm, *off)).backend.command(at(Path()))
    assert "--disable-uvicorn-access-log" not in command, "one of ours is left out"
    assert command[command.index("--conf") + 1] == '{"a": 1}'


def test_inherited_variables_that_change_engines_are_told_and_make_another_stack(
    compose, models, fake_vllm, monkeypatch
):
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
    before = plan(compose("backend=vllm", models, *fake_vllm))
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "X")
    after = plan(compose("backend=vllm", models, *fake_vllm))
    assert after.backend.environment()["VLLM_ATTENTION_BACKEND"] == "X"
    assert after.fingerprint != before.fingerprint
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    elsewhere = plan(compose("backend=vllm", models, *fake_vllm))
    assert elsewhere.backend.environment()["CUDA_VISIBLE_DEVICES"] == "1"
    assert elsewhere.fingerprint == after.fingerprint, "the same stack, on another of the machine's GPUs"


def test_an_environment_without_the_engine_is_refused(compose, models):
    with pytest.raises(UsageError, match=r"no sglang in the environment of .*: stackrace engine install sglang"):
        plan(compose("backend=sglang", models, HERE))


@pytest.mark.parametrize("python", ["/no/such/python", "no-such-command"])
def test_an_interpreter_that_is_not_there_is_refused(compose, models, python):
    with pytest.raises(UsageError, match=f"backend.python={python}: neither an interpreter nor a folder"):
        plan(compose("backend=vllm", models, f"backend.python={python}"))


def test_python_may_be_the_words_of_a_container_command(compose, models, fake_vllm, tmp_path):
    _, env = fake_vllm
    container = f"backend.python=[env,'IN_CONTAINER=1',{sys.executable}]"
    backend = plan(compose("backend=vllm", models, env, container)).backend
    assert backend.command(at(tmp_path))[:4] == ["env", "IN_CONTAINER=1", sys.executable, "-m"]


def test_an_environments_folder_serves_as_python(compose, models, fake_vllm, tmp_path):
    _, env = fake_vllm
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    backend = plan(compose("backend=vllm", models, env, f"backend.python={tmp_path / 'venv'}")).backend
    assert backend.command(at(tmp_path))[0] == str(tmp_path / "venv" / "bin" / "python")


def test_matched_is_the_same_for_every_stack_and_tuned_its_own(compose, models):
    tuned = ["+backend.tuned.max_num_seqs=99", "+backend.tuned.env={A: '1'}"]
    matched = plan(compose("backend=mla", models, *tuned)).backend
    best = plan(compose("backend=mla", models, *tuned, "division=tuned", "+backend.env.B='2'")).backend
    assert (matched.max_num_seqs, matched.env) == (64, {})
    assert (best.max_num_seqs, best.env) == (99, {"A": "1", "B": "2"})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("division=best", "division='best': must be matched or tuned"),
        ("+backend.tuned.nothing=1", "backend.tuned.nothing: there is no backend.nothing to tune"),
        (
            "+backend.tuned.dtype=bfloat16",
            "the budget is the same for every stack; set common.dtype",
        ),
        ("common.max_num_seqs=0", "backend.max_num_seqs=0: must be a whole number above 0"),
        ("stop.rounds=0", "stop.rounds=0: must be above 0, or null"),
    ],
)
def test_what_is_refused(compose, models, override, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        plan(compose("backend=mla", "division=tuned", models, override))


def test_rounds_are_requests_a_slot(compose, models):
    rounds = ["backend=mock", "arrival=immediate", "stop.requests=10", "stop.rounds=4"]
    assert len(plan(compose(*rounds, "concurrency=1")).due) == 10
    assert len(plan(compose(*rounds, "concurrency=16")).due) == 64


@pytest.fixture
def reset_server():
    """An HTTP server that answers a POST with what is in `answers`, in turn; its URL, and those."""
    answers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            code, text = answers.pop(0)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def test_a_cache_that_is_not_emptied_is_told(reset_server):
    url, answers = reset_server
    answers += [(200, json.dumps({"success": True})), (200, "Cache flushed.\n"), (200, json.dumps({"success": False}))]
    answers += [(404, "Not Found")]
    said = [refused(Endpoint(url, "tiny"), "/reset_prefix_cache") for _ in range(4)]
    assert said[:2] == [None, None]
    assert "success" in said[2]
    assert "HTTP 404: Not Found" in said[3]

"""What the tests of the command share: quick points over the mock, and what they left on disk."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from stackrace.harness import store

SOURCES = Path(__file__).parents[1] / "src"

ONE_ROUND = ["warmup.requests=1", "warmup.tolerance=null"]


QUICK = ["backend.ttft=0.01", "backend.gap=0.002", "lengths.output.tokens=8", *ONE_ROUND]


FAST = ["backend=mock", *QUICK, "stop.requests=20", "arrival.rate=40"]


# what a busy machine does to the client's times, which are not what such tests are about
LENIENT = [f"validity.{name}.invalid=null" for name in ("lag_p99", "loop_lag_p99", "cpu_share")]


def runs(tmp_path, sweep="adhoc"):
    return [store.read_run(f) for f in store.find_runs(tmp_path / "results" / sweep)]


def statuses(tmp_path, sweep="adhoc"):
    return sorted(r.status for r in runs(tmp_path, sweep))


def start(tmp_path, *args, command="bench", env=None):
    return subprocess.Popen(
        [sys.executable, "-m", "stackrace", command, *args],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def touching(folder):
    """Processes that work below `folder` or were told about it."""
    found = []
    for process in psutil.process_iter(["pid", "cwd", "cmdline"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(process)
    return found


def left(folder, patience=10.0):
    """Command lines of those, once they had `patience` seconds to go."""
    deadline = time.monotonic() + patience
    while touching(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [" ".join(process.info["cmdline"] or []) for process in touching(folder)]


def wait_for(condition, patience=40.0):
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


STACK = """
import sys
from dataclasses import dataclass
from stackrace.backends.base import Backend

CODE = {code!r}


@dataclass(frozen=True, kw_only=True)
class Stack(Backend):
    def command(self, at):
        {before}
        return [sys.executable, "-c", CODE, str(at.port)]

    def version(self):
        return "1"
"""


def make_stack(tmp_path, code, name="broken", before="pass"):
    """A stack that runs `code`, its port in sys.argv[1]; `before` is run as it is about to be launched.

    Returns the arguments and the environment that make `backend=<name>` known.
    """
    folder = tmp_path / "more" / "backend"
    folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / f"{name}_stack.py").write_text(STACK.format(code=code, before=before))
    (folder / f"{name}.yaml").write_text(
        f"defaults: [_stack, _self_]\n_target_: {name}_stack.Stack\n"
        f"name: {name}\ncheckpoint: null\nmax_model_len: null\nstop_grace: 0.5\n"
    )
    return ["--config-dir", str(tmp_path / "more")], {**os.environ, "PYTHONPATH": f"{tmp_path}:{SOURCES}"}

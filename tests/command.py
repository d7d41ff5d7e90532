"""What the tests of the command share: quick points over the mock, and what they left on disk."""

import subprocess
import sys
import time

from stackrace.harness import store

ONE_ROUND = ["warmup.requests=1", "warmup.tolerance=null"]


QUICK = ["backend.ttft=0.01", "backend.gap=0.002", "lengths.output.tokens=8", *ONE_ROUND]


FAST = ["backend=mock", *QUICK, "stop.requests=20", "arrival.rate=40"]


# what a busy machine does to the client's times, which are not what such tests are about
LENIENT = [f"validity.{name}.invalid=null" for name in ("lag_p99", "loop_lag_p99", "cpu_share")]


def runs(tmp_path, sweep="adhoc"):
    return [store.read_run(f) for f in store.find_runs(tmp_path / "results" / sweep)]


def statuses(tmp_path, sweep="adhoc"):
    return sorted(r.status for r in runs(tmp_path, sweep))


def start(tmp_path, *args, command="bench"):
    return subprocess.Popen(
        [sys.executable, "-m", "stackrace", command, *args],
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

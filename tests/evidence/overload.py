"""Twenty runs that overload the client on purpose and twenty that do not: what each sees of itself, and the verdict."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
from evidence.page import ms, table
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from stackrace.harness import host
from stackrace.harness import records as rows_of
from stackrace.harness.calibrate import trial as lab_of
from stackrace.harness.calibrate.ladder import in_step, staggered
from stackrace.harness.calibrate.outcome import compare
from stackrace.harness.calibrate.trial import Asked, Lab, ask
from stackrace.harness.summary import summarize
from stackrace.harness.validity import judge

LADDER = {"stream_rate": 50, "seconds": 3, "ramp": 1}


def spread(rate):
    """Events a second, streams spread over time."""
    return staggered(LADDER, rate)


def step(streams):
    """Streams in step."""
    return in_step(LADDER, streams)


def requests(rate, seconds=3):
    """Poisson, one token each."""
    due = np.cumsum(np.random.default_rng(int(rate)).exponential(1 / rate, round(rate * seconds))).tolist()
    return Asked(mock={"ttft": 0.01, "gap": 0.01}, schedule=ask(len(due), 1, due))


def closed(cap, number):
    """A closed loop."""
    mock = {"ttft": 0.05, "gap": 0.01}
    return Asked(mock=mock, schedule=ask(number, 20, [0.0] * number), concurrency=cap)


@contextlib.contextmanager
def nothing():
    """Leave it alone."""
    yield


@contextlib.contextmanager
def busy_neighbours(number):
    """Processes that compute without end on the load generator's core."""
    core = host.usable_cores()[-1:]
    code = f"import os; os.sched_setaffinity(0, {set(core)})\nwhile True: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", code], start_new_session=True) for _ in range(number)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


@contextlib.contextmanager
def frozen_now_and_then(seconds):
    """The worker is stopped for so long, twice a second, as a hypervisor would."""
    over = threading.Event()
    thread = threading.Thread(target=_freeze, args=(seconds, over))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _freeze(seconds, over):
    while not over.wait(0.5):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if "stackrace.harness.load.worker" in child.cmdline():
                    os.kill(child.pid, signal.SIGSTOP)
                    time.sleep(seconds)
                    os.kill(child.pid, signal.SIGCONT)


HEALTHY = [
    *((f"{r:,} events/s", spread(r), nothing) for r in (500, 1000, 2500, 5000, 10000, 20000, 30000, 40000)),
    *((f"{n} streams in step", step(n), nothing) for n in (16, 64, 128, 256, 400)),
    *((f"{r} requests/s", requests(r), nothing) for r in (50, 200, 500, 1000)),
    *((f"closed loop of {c}", closed(c, 10 * c), nothing) for c in (8, 32, 64)),
]
OVERLOADED = [
    *((f"{r:,} events/s", spread(r), nothing) for r in (170000, 180000, 190000, 200000)),
    *((f"{r:,} requests/s", requests(r, 2), nothing) for r in (15000, 18000, 22000, 26000)),
    *(
        (f"{r:,} events/s, {n} busy neighbours", spread(r), lambda n=n: busy_neighbours(n))
        for r in (50000, 70000, 90000)
        for n in (2, 4, 6)
    ),
    *((f"20,000 events/s, stopped {s} s", spread(20000), lambda s=s: frozen_now_and_then(s)) for s in (0.05, 0.1, 0.2)),
]


def run(lab, asked, trouble, config):
    """The outcome, the worker's health, the summary and the verdict of one trial."""
    endpoint = lab.start(asked.mock)
    lab_of.truth_of(endpoint)
    with trouble():
        heard = lab.race(asked, endpoint)
    truth = lab_of.truth_of(endpoint)
    outcome = compare(heard.records, truth, heard.start, heard.health, heard.stamped)
    asked_for = asked.schedule.requests
    frame = rows_of.frame(rows_of.row(r, asked_for[r.id]) for r in heard.records)
    meta = {"load_generator": {"workers": [h._asdict() for h in heard.health], "stamps": "kernel"}}
    summary = summarize(frame, {})
    return outcome, heard.health[0], summary, judge(frame, summary, config, meta)


def row(name, outcome, health, summary, verdict):
    """How wrong it was, what it saw, what it says."""
    late = summary.get("receive_lag", {}).get("p99")
    wrong = [ms(v, 2) for v in (outcome.lag.p99, outcome.served, outcome.itl)]
    saw = [ms(health.loop_lag_p99, 2), ms(late, 2), f"{outcome.coalesced:.1%}", f"{health.cpu_share:.0%}"]
    return [name, *wrong, *saw, f"{health.run_delay_share or 0:.0%}", verdict.verdict, "; ".join(verdict.reasons)]


def main():
    """Markdown of both tables."""
    with initialize_config_module("stackrace.conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("bench", ["backend=mock"]), resolve=True)
    head = ["load", "lag p99", "TTFT p99 error", "ITL p99 error", "loop lag p99", "receive lag p99", "coalesced", "CPU"]
    head += ["waiting for a core", "verdict", "why"]
    parts = []
    with Lab(host.split_cores(1, None)) as lab:
        for title, trials in (("Healthy", HEALTHY), ("Overloaded", OVERLOADED)):
            done = [(name, *run(lab, asked, trouble, config)) for name, asked, trouble in trials]
            called = sum(d[-1].verdict == "valid" for d in done)
            parts.append(f"{title}: {called} of {len(done)} called valid.\n\n{table(head, [row(*d) for d in done])}")
    return "\n\n".join(parts) + "\n\nTimes in ms."

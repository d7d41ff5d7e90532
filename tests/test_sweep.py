"""The real command, end to end over the mock: sweeps, their order, resume, kills."""

import contextlib
import json
import os
import random
import signal
import socket

import psutil
import pytest
from command import FAST, LENIENT, QUICK, runs, start, statuses, wait_for
from rich.console import Console

from stackrace.harness import store
from stackrace.harness.progress import Progress
from stackrace.harness.sweep import Sweep


def free_port():
    """One that no connection of another test is given: below those that Linux hands out."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("none of a hundred ports is free")


def test_a_sweep_leaves_records_and_a_table_and_runs_again_only_what_changed(stackrace, tmp_path, processes_of):
    sweep = ["-m", *FAST, *LENIENT, "arrival.rate=40,80", "sweep=s"]
    done = stackrace("bench", *sweep)
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
        assert run.meta["validity"]["verdict"] in ("valid", "suspect"), run.meta["validity"]["reasons"]
        assert run.meta["schedule"]["hash"]
        assert run.meta["provenance"]["cpu"]["model"]
        assert "stackrace.backends.mock" in run.meta["backend"]["command"]
    assert len({r.meta["backend"]["command"][4] for r in found}) == 1  # one launch, and so one port, for both
    assert processes_of() == []

    again = stackrace("bench", *sweep)
    assert again.returncode == 0
    assert "2 of 2 points are finished already" in again.stderr
    changed = stackrace("bench", *sweep, "backend.ttft=0.01,0.02", "arrival.rate=80")
    assert changed.returncode == 0
    assert "1 of 2 points are finished already" in changed.stderr
    began = {r.meta["key"]: r.meta["started_at"] for r in runs(tmp_path, "s")}
    assert len(began) == 3
    assert began.items() >= {(r.meta["key"], r.meta["started_at"]) for r in found}


# two stacks: 0.5 s, then 2 s
LONG = ["-m", "backend=mock", *QUICK, "arrival=immediate", "concurrency=1", "stop.requests=20", "sweep=s"]
LONG += ["backend.gap=0.002,0.013"]


def journal_of_second(tmp_path):
    """Lines that the running second point has journalled, once the first point is finished."""
    metas = {p.parent: json.loads(p.read_text()) for p in (tmp_path / "results" / "s").glob("*/run.json")}
    finished = {folder for folder, meta in metas.items() if meta["status"] == "ok"}
    if not finished:
        return 0
    journals = [folder / "journal.jsonl" for folder in metas.keys() - finished]
    return sum(len(j.read_bytes().splitlines()) for j in journals if j.exists())


def test_sigkill_loses_only_what_was_in_flight_and_leaves_no_orphan(stackrace, tmp_path, processes_of):
    process = start(tmp_path, *LONG)
    wait_for(lambda: journal_of_second(tmp_path) >= 5)
    assert len(processes_of.now()) >= 3  # the harness, the guardian with its engine, the worker's working directory
    engines = [p for p in psutil.Process(process.pid).children(recursive=True) if "--ttft" in p.cmdline()]
    ports = [int(p.cmdline()[p.cmdline().index("--port") + 1]) for p in engines]
    assert ports
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert processes_of() == []
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass

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


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.engine)])
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


@pytest.mark.engine
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


@pytest.mark.engine
def test_a_port_of_ones_own_is_kept_over_a_sweep(stackrace, tmp_path):
    args = ["-m", *FAST, "stop.requests=4", "arrival.rate=40,80", f"backend.port={free_port()}"]
    for launcher in ("stackrace", "basic"):
        done = stackrace("bench", *args, f"hydra/launcher={launcher}", f"sweep={launcher}")
        assert done.returncode == 0, done.stderr
        assert statuses(tmp_path, launcher) == ["ok", "ok"]

"""Telemetry of whole points: of our engine, beside the race, and of one that fails."""

import os

import pytest
from command import FAST, LENIENT, QUICK, runs, start, wait_for

from stackrace.harness.clock import SECOND

CLOSED_LOOP = ["arrival=immediate", "concurrency=4", "stop.requests=24", "telemetry.interval=0.1"]


@pytest.mark.engine
def test_our_engine_runs_as_many_as_the_closed_loop_has_in_flight(stackrace, tmp_path):
    asked = [
        "backend=mla",
        "verify=none",
        *CLOSED_LOOP,
        "lengths.input.tokens=16",
        "lengths.output.tokens=24",
        "warmup.requests=2",
    ]
    done = stackrace("bench", *asked)
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path)
    summary = run.meta["summary"]
    told = run.meta["telemetry"]["sources"]
    assert (told["gpu"], told["processes"]) == ("this stack uses none", "ok")
    assert told["gauges"] == "ok" or "readings failed, the first: TimeoutError" in told["gauges"]  # a busy machine
    assert summary["batch"]["run"] * 0.75 <= summary["engine_batch"]["run"] <= 4
    running = run.telemetry[run.telemetry["name"] == "requests_running"]["value"]
    assert running.max() == 4
    assert 0 < summary["kv_cache_peak"]["run"] < 1
    assert summary["preemptions"]["run"] == 0
    assert 0.2 < summary["engine_cpu"]["run"] < len(os.sched_getaffinity(0)) + 0.5
    assert summary["engine_memory"]["run"] > 50e6
    tokens = run.telemetry[run.telemetry["name"] == "generation_tokens"]["value"]
    assert tokens.iloc[-1] - tokens.iloc[0] >= 24 * 24  # the last reading came after the last token
    assert not {"energy_per_output_token", "energy_covered", "gpu_power", "throttled", "prefix_hits"} & set(summary)


@pytest.mark.engine
def test_sampling_does_not_disturb(stackrace, tmp_path):
    point = ["stop.requests=100", "arrival.rate=100", "telemetry.interval=null,0.05", "sweep=s"]
    done = stackrace("bench", "-m", *FAST, *LENIENT, *point)
    assert done.returncode == 0, done.stderr
    found = {run.config["telemetry"]["interval"]: run for run in runs(tmp_path, "s")}
    without, sampled = found[None], found[0.05]
    assert not (without.folder / "telemetry.parquet").exists()
    assert "telemetry" not in without.meta
    assert not len(without.telemetry)
    assert "engine_cpu" not in without.meta["summary"]
    assert sampled.meta["summary"]["engine_cpu"]["run"] > 0
    lags = [run.meta["summary"]["lag"]["p99"] for run in (without, sampled)]
    assert lags[1] < lags[0] + 0.005


@pytest.mark.engine
def test_a_point_that_fails_keeps_what_was_read(tmp_path, processes_of):
    process = start(tmp_path, "backend=mock", *QUICK, "stop.requests=40", "arrival.rate=10", "telemetry.interval=0.05")
    wait_for(lambda: any(j.read_bytes().count(b"\n") > 5 for j in tmp_path.glob("results/adhoc/*/journal.jsonl")))
    (engine,) = [p for p in processes_of.now() if p.cmdline()[2:4] == ["stackrace.backends.mock", "--port"]]
    engine.kill()
    process.communicate(timeout=30)
    (run,) = runs(tmp_path)
    assert run.status == "failed"
    assert (run.telemetry["time"] > 0.3 * SECOND).any()
    assert set(run.telemetry["source"]) == {"processes"}
    assert run.meta["telemetry"]["sources"]["gauges"] == "this stack names none"

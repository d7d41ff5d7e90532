"""Runs that the reports' tests draw, made rather than raced."""

import itertools

from stackrace.harness.records import row
from stackrace.harness.report.points import from_runs
from stackrace.harness.store import RunWriter, find_runs, read_run
from stackrace.harness.types import Record, Request, Sampling

MS = 1_000_000
OUTPUT = 10
GREEDY = Sampling(0, 1, 0, 0)


def writer(results):
    """Writes one run, of requests 100 ms apart that all wait `ttft` ms and then bring a token every `tpot` ms."""
    number = itertools.count()

    def write(stack="a", *, ttft=20, tpot=4, requests=20, rate=10.0, repeat=0, context=128, concurrency=None, **more):
        run = RunWriter(results / f"{next(number):03d}")
        config = {
            "backend": {"name": stack},
            "model": {"name": more.get("model", "tiny")},
            "workload": {"name": more.get("workload", "synthetic")},
            "lengths": more.get("lengths", {"input": {"tokens": context}, "output": {"tokens": OUTPUT}}),
            "arrival": {"name": "poisson", "rate": rate},
            "slo": {"ttft_ms": 500, "tpot_ms": None},
            "seed": 0,
            "compare_models": more.get("compare_models", False),
        }
        point = {
            "stack": stack,
            "model": more.get("model", "tiny"),
            "workload": more.get("workload", "synthetic"),
            "arrival": "poisson" if rate else "immediate",
            "rate": rate,
            "concurrency": concurrency,
            "input_tokens": float(context),
            "output_tokens": float(OUTPUT),
            "repeat": repeat,
            "division": more.get("division"),
        }
        schedule = {"hash": more.get("schedule", f"{rate}-{context}-{repeat}"), "requests": requests}
        backend = {"command": ["serve", "--flag", "a b"], "version": "1.2.3", "fingerprint": more.get("print", "f")}
        provenance = {"gpus": [{"name": "NVIDIA H200"}], "git": {"commit": "abcdef123456", "dirty": True}}
        meta = {"point": point, "schedule": schedule, "backend": backend, "provenance": provenance}
        meta |= {"equivalence": more["equivalence"]} if "equivalence" in more else {}
        run.begin(config, {**meta, "started_at": "2026-11-23T10:00:00Z"})
        if "error" in more:
            run.end("failed", error=more["error"])
            return run.folder
        for i in range(requests):
            due = i * 100 * MS
            times = [due + ttft * MS + k * tpot * MS for k in range(OUTPUT)]
            record = Record(i, due, due, due, due, times, [1] * OUTPUT, end=times[-1], output_tokens=OUTPUT)
            run.add(row(record, Request(i, (1,) * int(context), OUTPUT, GREEDY)))
        if more.get("killed"):
            run.release()
            return run.folder
        validity = {"verdict": more.get("verdict", "valid"), "reasons": more.get("reasons", [])}
        run.end("ok", **({} if more.get("unjudged") else {"validity": validity}))
        return run.folder

    return write


def points_of(results):
    """The points that a report makes of what was written until then."""
    return from_runs(read_run(folder) for folder in find_runs(results))

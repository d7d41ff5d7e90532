"""Verdicts: each ground on its own, on records whose fault is planted."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from stackrace.harness import records as table
from stackrace.harness.summary import summarize
from stackrace.harness.telemetry import samples
from stackrace.harness.validity import judge

BENCH = yaml.safe_load((Path(__file__).parents[1] / "src/stackrace/conf/bench.yaml").read_text())
HEALTHY = {"loop_lag_p99": 0.0005, "cpu_share": 0.1}
APART = {"load_generator": [1], "engine": [0]}
S = 1_000_000_000


def row(i, due, sent=None, first=0.05, service=0.2, tokens=5, slot=None, **changes):
    """A healthy request: due, sent and answered as told; seconds."""
    slot = due if slot is None else slot
    sent = slot if sent is None else sent
    times = np.linspace(sent + first, sent + service, tokens)
    fields = {
        "id": i,
        "asked_prompt_tokens": 10,
        "asked_output_tokens": tokens,
        "session": None,
        "turn": None,
        "due": round(due * S),
        "slot": round(slot * S),
        "sent": round(sent * S),
        "body_sent": round(sent * S),
        "chunk_times": [round(t * S) for t in times],
        "chunk_tokens": [1] * tokens,
        "output_ids": None,
        "end": round((sent + service) * S),
        "prompt_tokens": 10,
        "output_tokens": tokens,
        "cached_tokens": 0,
        "token_source": "usage",
        "reconnected": 0,
        "censored": False,
        "error": None,
    }
    return {**fields, **changes}


def verdict(rows, health=HEALTHY, cores=APART, shared_prefix=0.0, equivalence=None, **schedule):
    frame = table.frame(rows)
    config = {"validity": BENCH["validity"], "workload": {"shared_prefix": shared_prefix}}
    meta = {"load_generator": health, "provenance": {"cores": cores}, "schedule": schedule, "equivalence": equivalence}
    found = judge(frame, summarize(frame, {}), config, meta)
    return found.verdict, " ".join(found.reasons)


def healthy(n=200, rate=10.0, seed=0):
    due = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n))
    return [row(i, t) for i, t in enumerate(due)]


def test_healthy_is_valid_without_reasons():
    assert verdict(healthy()) == ("valid", "")


@pytest.mark.parametrize(("late", "expected"), [(0.009, "valid"), (0.011, "suspect"), (0.051, "invalid")])
def test_a_late_client(late, expected):
    rows = [row(i, r["due"] / S, sent=r["due"] / S + late) for i, r in enumerate(healthy())]
    found, reasons = verdict(rows)
    assert found == expected
    assert ("late at p99" in reasons) == (expected != "valid")


def test_few_samples_are_judged_by_the_worst_and_say_so():
    rows = healthy(20)
    rows[7] = row(7, rows[7]["due"] / S, sent=rows[7]["due"] / S + 0.02)
    assert verdict(rows) == ("suspect", "the client sent 0.0200 s late at worst")


@pytest.mark.parametrize(
    ("health", "expected"),
    [({"loop_lag_p99": 0.02, "cpu_share": 0.1}, "suspect"), ({"loop_lag_p99": 0.0, "cpu_share": 0.98}, "invalid")],
)
def test_a_saturated_client(health, expected):
    assert verdict(healthy(), health)[0] == expected


@pytest.mark.parametrize(("failures", "expected"), [(1, "suspect"), (21, "invalid")])
def test_errors(failures, expected):
    rows = healthy()
    for i in range(failures):
        rows[i]["error"] = "boom"
    assert verdict(rows)[0] == expected


@pytest.mark.parametrize(
    "fault",
    [{"prompt_tokens": 11}, {"output_tokens": 4}, {"chunk_tokens": [1, 1, 1, 1, 2]}],
    ids=lambda f: next(iter(f)),
)
def test_wrong_lengths(fault):
    rows = healthy()
    rows[0].update(fault)
    assert verdict(rows)[0] == "suspect"
    for r in rows[:3]:
        r.update(fault)
    assert verdict(rows)[0] == "invalid"


def test_counts_that_were_never_told_are_no_fault():
    rows = [{**r, "prompt_tokens": None, "output_tokens": None, "cached_tokens": None} for r in healthy()]
    assert verdict(rows) == ("valid", "")


def test_unasked_prefix_cache_hits():
    rows = [{**r, "cached_tokens": 5} for r in healthy()]
    assert verdict(rows)[0] == "invalid"
    assert verdict(rows, shared_prefix=0.5)[0] == "valid"  # of a run that did not count what it repeats
    assert verdict(rows, shared_prefix=0.5, repeated_tokens=0)[0] == "invalid"


def test_what_the_schedule_repeats_may_be_cached():
    rows = [{**r, "cached_tokens": 5} for r in healthy()]  # 200 x 5 of 200 x 10
    assert verdict(rows, repeated_tokens=1000) == ("valid", "")
    assert verdict(rows, repeated_tokens=999)[0] == "suspect"
    found, reasons = verdict(rows, repeated_tokens=799)
    assert found == "invalid"  # 201 of 2000 are above 10 %
    assert "10.1% of the prompt tokens came from a prefix cache, unasked" in reasons


def test_text_counts_and_a_shared_core_are_said():
    rows = [{**r, "token_source": "text"} for r in healthy()]
    assert verdict(rows)[0] == "suspect"
    assert verdict(healthy(), cores={"load_generator": [0], "engine": [0]})[0] == "suspect"


@pytest.mark.parametrize(
    ("bit", "reason"), [(0x4, ""), (0x1, ""), (0x8, "")] + [(bit, "power brake") for bit in (0x20, 0x40, 0x80)]
)
def test_a_gpu_held_back_by_heat_or_the_power_brake_is_suspect_and_by_its_power_limit_it_is_not(bit, reason):
    told = [samples.Sample(round(t * S), "gpu", 0, "clock_reasons", bit * (t == 2)) for t in range(10)]
    telemetry = samples.frame(told, 0)
    summary = summarize(table.frame(healthy()), {}, telemetry)
    config = {"validity": BENCH["validity"], "workload": {"shared_prefix": 0.0}}
    meta = {"load_generator": HEALTHY, "provenance": {"cores": APART}}
    found = judge(table.frame(healthy()), summary, config, meta)
    assert found.verdict == ("suspect" if reason else "valid")
    assert reason in " ".join(found.reasons)
    assert ("10.0% of the readings" in " ".join(found.reasons)) == bool(reason)


def test_nothing_succeeded():
    found, reasons = verdict([row(i, i, error="x") for i in range(5)])
    assert found == "invalid"
    assert "no request succeeded" in reasons


def queue(rate, service, seconds, seed, cap=None):
    """An open loop before one server (or `cap` of them) of constant service time."""
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    free, rows = np.zeros(cap or 1), []
    for i, t in enumerate(due):
        k = free.argmin()
        begin = max(t, free[k])
        free[k] = begin + service
        if cap:
            rows.append(row(i, t, slot=begin, service=service))
        else:
            rows.append(row(i, t, first=begin - t + service / 2, service=begin - t + service))
    return rows


def test_a_queue_that_keeps_growing_is_found():
    """Twice the rate that one server can take, for 30 s."""
    found = [verdict(queue(20, 0.1, 30, seed))[1] for seed in range(20)]
    assert all("unsustainable: the queue kept growing" in reasons for reasons in found)


def test_it_is_found_in_front_of_a_cap_too():
    found = [verdict(queue(20, 0.2, 30, seed, cap=2))[1] for seed in range(20)]
    assert all("the queue kept growing" in reasons for reasons in found)


def test_a_steady_queue_is_not_called_growing():
    """Load 0.6, 200 runs: false alarms as rare as the rule promises (1 in 120, and the 1.3 besides)."""
    alarms = sum("growing" in verdict(queue(6, 0.1, 30, seed))[1] for seed in range(200))
    assert alarms <= 4


def test_a_run_that_is_still_filling_up_is_not_called_growing():
    due = np.linspace(0, 2, 60)
    assert verdict([row(i, t, first=3.0, service=3.2) for i, t in enumerate(due)]) == ("valid", "")
    slow = [row(i, t, service=1.5) for i, t in enumerate(due)]
    assert verdict(slow) == ("valid", "")


def test_a_stack_that_computes_something_else_is_invalid_whatever_its_speed():
    words = "computes something else: mean |Δlogp| 0.59 over 32 prefixes"
    assert verdict(healthy(), equivalence={"verdict": "differs", "words": words}) == ("invalid", words)
    for other in ("equal", "not judged"):
        assert verdict(healthy(), equivalence={"verdict": other, "words": other}) == ("valid", "")


def test_one_cached_prompt_of_many_is_one_whether_or_not_the_others_are_told_to_have_had_none():
    """SGLang leaves a count of 0 out."""
    told = [{**r, "cached_tokens": 10 if i == 0 else 0} for i, r in enumerate(healthy())]
    untold = [{**r, "cached_tokens": 10 if i == 0 else None} for i, r in enumerate(healthy())]
    assert (
        verdict(untold) == verdict(told) == ("suspect", "0.5% of the prompt tokens came from a prefix cache, unasked")
    )


def test_a_stack_that_breaks_on_the_check_is_suspect():
    said = "failed when asked to compute: HTTP 500: NaN"
    assert verdict(healthy(), equivalence={"verdict": "failed", "words": said}) == ("suspect", said)

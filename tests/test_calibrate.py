"""Calibration: its arithmetic, a short one of the real command, and what later runs make of it."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import start

from stackrace.harness import host
from stackrace.harness.calibrate import calibration, table
from stackrace.harness.calibrate.ladder import Rung, in_step, limits, staggered
from stackrace.harness.calibrate.outcome import Spread, compare
from stackrace.harness.calibrate.trial import Lab
from stackrace.harness.load.health import Health
from stackrace.harness.observed import busiest_second
from stackrace.harness.types import Record

MS = 1_000_000
START = 5_000 * MS
HEALTH = Health(0, 1.0, 0.0, 0.002, 0.003, 0.4, 0.01, 0, 0.0, 0.0, 0.0)
RIGHT = {"kernel": 0.0001, "user": 0.001, "lag": 0.001}
FEW = ["ladder.events=[1000]", "ladder.in_step=[8]", "ladder.requests=[100]", "ladder.request_seconds=1"]
FEW += ["ladder.connections=50", "ladder.long_prompts=1", "ladder.long_outputs=1", "ladder.long_output=500"]


def recorded(number, errors, late=2):
    """A request due at 10 ms x number, sent 1 ms late, three events, received `errors` (ms) after they were sent."""
    due = 10 * MS * number
    true = [due + (31 + 20 * k) * MS for k in range(3)]
    return (
        Record(
            id=number,
            due=due,
            slot=due,
            sent=due + MS,
            body_sent=due + MS,
            chunk_times=[round(t + e * MS) for t, e in zip(true, errors, strict=True)],
            chunk_tokens=[1, 1, 1],
            chunk_lateness=[late * MS] * 3,
            chunk_coalesced=[False, number == 0, False],
            end=due + 80 * MS,
        ),
        {"seed": number, "arrived": START + due + MS, "sent": [START + t for t in true], "tokens": [1, 1, 1]},
    )


def test_errors_are_what_was_said_less_what_was_true():
    pairs = [recorded(i, (0.5, 0.5, 0.5)) for i in range(99)] + [recorded(99, (3, 0, 1))]
    found = compare([r for r, _ in pairs], [t for _, t in pairs], START, [HEALTH], True)
    assert (found.requests, found.events, found.lost, found.failed) == (100, 300, 0, 0)
    assert found.kernel == pytest.approx((0.0005, 0.0005, 0.003), abs=1e-9)
    assert found.user == pytest.approx((0.0025, 0.0025, 0.005), abs=1e-9)
    assert found.coalesced == pytest.approx(1 / 300)
    assert found.lag == pytest.approx((0.001, 0.001, 0.001))
    assert found.served == pytest.approx(0.0015)  # its own lag, and half a millisecond of receiving
    assert found.ttft == pytest.approx(0.0005)
    assert found.itl == pytest.approx(0.0, abs=1e-9)


def test_another_token_count_or_a_missing_event_is_lost():
    (right, truth), (wrong, other), (short, third) = (recorded(i, (0, 0, 0)) for i in range(3))
    wrong.chunk_tokens = [1, 2, 1]
    short = replace(short, chunk_times=short.chunk_times[:2], chunk_tokens=[1, 1])
    found = compare([right, wrong, short], [truth, other, third], START, [HEALTH], True)
    assert (found.events, found.lost) == (9, 6)


def rung(load, kernel, user=0.0, ladder="events", lag=0.0, sent=None, **changes):
    pairs = [recorded(i, (0, 0, 0)) for i in range(2)]
    outcome = compare([r for r, _ in pairs], [t for _, t in pairs], START, [HEALTH], True)
    spreads = {name: Spread(0.0, p99, p99) for name, p99 in (("kernel", kernel), ("user", user), ("lag", lag))}
    outcome = replace(outcome, events_per_s=load if sent is None else sent, **spreads, **changes)
    return Rung(ladder=ladder, workers=1, load=load, outcome=outcome)


def test_a_limit_is_the_last_rung_before_the_first_that_is_not_right():
    events = [rung(1000, 1e-5, 1e-4), rung(2000, 1e-5, 2e-3), rung(3000, 9e-4, 1e-4), rung(4000, 1e-5, 1e-4)]
    requests = [rung(100, 0, ladder="requests", lag=1e-4), rung(500, 0, ladder="requests", lag=5e-3)]
    found = limits([*events, *requests], RIGHT)
    assert found == {"events_per_s": {"kernel": 2000, "user": 1000}, "requests_per_s": 100}
    assert limits([rung(1000, 1e-5, lost=1)], RIGHT)["events_per_s"]["kernel"] is None
    slow_mock = [rung(1000, 1e-5), rung(2000, 1e-5, sent=1500)]
    assert limits(slow_mock, RIGHT)["events_per_s"]["kernel"] == 1000
    assert "the mock's limit" in table.cells(slow_mock[1])


@pytest.mark.alone
def test_a_lab_finds_receive_times_right_and_nothing_lost():
    """The short form of what make evidence shows at 120,000 events a second."""
    with Lab(host.split_cores(1, None)) as lab:
        settings = {"stream_rate": 50, "seconds": 1, "ramp": 0.5}
        spread, step = lab.trial(staggered(settings, 10_000)), lab.trial(in_step(settings, 100))
    for outcome in (spread, step):
        assert (outcome.failed, outcome.lost) == (0, 0)
        assert outcome.stamped
        assert outcome.kernel.p50 < 0.0001
        assert outcome.kernel.p99 < 0.001  # 0.00003 on an idle machine
    assert abs(step.itl) < 0.001


@pytest.mark.engine
def test_the_command_prints_a_table_and_later_runs_keep_and_judge_by_it(stackrace, tmp_path):
    done = stackrace("calibrate", "ladder=quick", "ladder.seconds=1", *FEW)
    assert done.returncode == 0, done.stderr
    assert "one worker keeps receive times right" in done.stdout
    path = tmp_path / "results" / "calibration.json"
    found = json.loads(path.read_text())
    assert {r["ladder"] for r in found["rungs"]} >= {"events", "in step", "requests", "connections", "long outputs"}
    found["limits"]["events_per_s"] = {"kernel": 100, "user": 100}  # as if this machine could take no more
    path.write_text(json.dumps(found))
    load = ["backend=mock", "backend.ttft=0.01", "backend.gap=0.001", "arrival.rate=40", "stop.requests=40"]
    assert stackrace("bench", *load, "lengths.output.tokens=16", "sweep=s").returncode == 0
    (meta,) = (json.loads(p.read_text()) for p in (tmp_path / "results" / "s").glob("*/run.json"))
    assert meta["calibration"]["limits"]["events_per_s"]["kernel"] == 100
    assert any("of the events that this machine's client can take" in r for r in meta["validity"]["reasons"])


@pytest.mark.engine
def test_half_a_calibration_is_shown_and_not_kept(tmp_path, processes_of):
    process = start(tmp_path, "ladder=quick", command="calibrate")
    assert "events 5,000/s, 1 worker: receive times within" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    said, notes = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "5,000/s" in said
    assert notes.endswith("interrupted: half a ladder is no calibration, so none was kept\n")
    assert not (tmp_path / "results" / "calibration.json").exists()
    assert processes_of() == []


def test_a_calibration_of_another_machine_is_not_used(tmp_path):
    path = Path(tmp_path, "calibration.json")
    calibration.save(path, [rung(1000, 1e-5)], RIGHT, "stackrace calibrate")
    assert calibration.load(path)["limits"]["events_per_s"]["kernel"] == 1000
    other = json.loads(path.read_text())
    other["machine"]["cpu"] = "another"
    path.write_text(json.dumps(other))
    assert calibration.load(path) is None
    path.write_text("{")
    assert calibration.load(path) is None
    assert calibration.load(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("override", "words"),
    [("ladder.seconds=0", "ladder.seconds=0"), ("ladder=none", "none"), ("ladder.events=[x]", "ladder.events='x'")],
)
def test_settings_that_cannot_be_are_one_line(stackrace, override, words):
    done = stackrace("calibrate", override)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_busiest_second_counts():
    times = np.concatenate([np.linspace(0, 1, 100, endpoint=False), np.linspace(1, 2, 1000, endpoint=False)])
    assert busiest_second(times) == pytest.approx(1000, abs=2)

"""`stackrace bench experiment=capacity`: the real command over the mock, interrupted and resumed; what it refuses."""

import json
import signal

import pytest
from command import LENIENT, QUICK, runs, start, wait_for

from stackrace.harness.capacity import at_level, in_words, measurement, rules_of
from stackrace.harness.errors import UsageError
from stackrace.harness.levels import Measurement
from stackrace.harness.point import plan
from stackrace.harness.search import Rules, Search

# Five slots, a request takes 0.05 + 5 * 0.01 s: 50 requests per second, and 41 for the second stack.
SEARCH = ["experiment=capacity", "backend=mock", *QUICK, "backend.ttft=0.05,0.071", "backend.gap=0.01", "concurrency=5"]
SEARCH += ["lengths.output.tokens=6", "lengths.input.tokens=8", "arrival=constant", "stop.seconds=1", "stop.drain=1"]
SEARCH += ["slo.ttft_ms=90", "search.low=45", "search.start=45", "search.high=60", "search.target=0.9"]
SEARCH += ["search.precision=0.35", "search.repeats=1", "search.max_repeats=2"]


def results(tmp_path):
    return [json.loads(p.read_text()) for p in sorted((tmp_path / "results" / "capacity").glob("capacity-*.json"))]


def port(run):
    command = run.meta["backend"]["command"]
    return command[command.index("--port") + 1]


@pytest.mark.engine
def test_one_search_a_stack_interrupted_and_resumed(stackrace, tmp_path, processes_of):
    process = start(tmp_path, *SEARCH, *LENIENT)
    wait_for(lambda: any(r["log"] for r in results(tmp_path)))  # a measurement is over, the next one runs
    process.send_signal(signal.SIGINT)
    _, notes = process.communicate(timeout=20)
    assert process.returncode == 130, notes
    (cut_short,) = results(tmp_path)
    assert cut_short["status"] == "interrupted"
    kept = [step["key"] for step in cut_short["log"]]
    before = {r.meta["key"]: r.meta["started_at"] for r in runs(tmp_path, "capacity") if r.status == "ok"}
    assert set(kept) <= set(before)

    done = stackrace("bench", *SEARCH, *LENIENT)
    assert done.returncode == 0, done.stderr
    assert "measured before" in done.stderr
    assert [r["status"] for r in results(tmp_path)] == ["done", "done"]
    assert {r["words"] for r in results(tmp_path)} == {"51.96 (45 to 60)", "below 45"}
    assert "shown" in done.stdout
    assert "as precise as asked" in done.stdout
    found = runs(tmp_path, "capacity")
    points = {r.meta["key"]: r for r in found}
    for result in results(tmp_path):
        keys = {step["key"] for step in result["log"]}
        assert keys <= set(points)
        assert len({port(points[key]) for key in keys - set(before)}) == 1  # one launch for all
    assert all(points[key].meta["started_at"] == at for key, at in before.items())
    assert all("search" not in r.config for r in found)
    assert processes_of() == []


def test_a_measurement_is_an_ordinary_point(compose, tmp_path):
    """Its key does not depend on the search; every repeat has other draws."""
    cfg = compose("experiment=capacity", "backend=mock", "arrival=constant", f"results={tmp_path}")
    other = compose("experiment=capacity", "backend=mock", "arrival=constant", "search.target=0.5")
    first, again = plan(at_level(cfg, 16.0, 0)), plan(at_level(cfg, 16.0, 1))
    assert first.key == plan(at_level(other, 16.0, 0)).key
    assert (first.config["arrival"]["rate"], first.config["repeat"], first.launch) == (16.0, 0, 0)
    assert first.schedule_hash != again.schedule_hash
    assert cfg.arrival.rate == 8.0


def test_a_search_over_concurrency_asks_whole_numbers(compose):
    cfg = compose("backend=mock", "search=concurrency", "arrival=immediate")
    assert rules_of(cfg).whole
    assert plan(at_level(cfg, 16.0, 0)).config["concurrency"] == 16


RATE = ["experiment=capacity", "backend=mock"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.over=speed"], "search.over='speed': must be arrival.rate or concurrency"),
        (["search.low=0"], "search.low=0: must be a number above 0"),
        (["search.high=0.05"], "search.high=0.05: must be search.low=0.1 or more"),
        (["search.start=2000"], "search.start=2000: must be between 0.1 and 1000"),
        (["search.target=1"], "search.target=1: must be"),
        (["search.confidence=1.5"], "search.confidence=1.5: must be"),
        (["search.precision=0"], "search.precision=0: must be"),
        (["search.repeats=0"], "search.repeats=0: must be"),
        (["search.max_repeats=1"], "search.max_repeats=1: must be search.repeats=2 or more"),
        (["search.max_points=many"], "search.max_points='many': must be"),
        (["stop.seconds=null"], "stop.seconds=null: at every rate"),
        (["arrival=immediate"], "arrival=immediate has no rate: give search=concurrency"),
        (["search=concurrency"], "arrival=poisson is an open loop: give arrival=immediate"),
        (["slo=none"], "slo: a search needs a limit"),
        (["repeat=1"], "repeat=1: a search repeats by itself"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_bad_settings_are_refused_in_one_line(compose, overrides, words):
    with pytest.raises(UsageError) as refused:
        rules_of(compose(*RATE, *overrides))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_bad_search_launches_nothing(stackrace, tmp_path):
    done = stackrace("bench", *RATE, "search.high=0.01")
    assert done.returncode == 2
    assert done.stderr == "stackrace: search.high=0.01: must be search.low=0.1 or more\n"
    assert not (tmp_path / "results" / "capacity").exists()


WIDE = Rules(
    low=1.0,
    high=64.0,
    start=8.0,
    target=0.9,
    confidence=0.98,
    precision=0.1,
    repeats=1,
    max_repeats=2,
    max_points=20,
    whole=False,
)


@pytest.mark.parametrize(
    ("capacity", "words"), [(30, "30.64 (29.34 to 32)"), (0.1, "below 1"), (100, "at least 64")], ids=str
)
def test_answers_in_words(capacity, words):
    answer = Search(WIDE, lambda rate, repeat: Measurement(100 if rate <= capacity else 0, 100, None)).run()
    assert in_words(answer) == words


def judged_point(monkeypatch, validity):
    """What a point with this verdict counts as."""
    import pandas as pd

    from stackrace.harness import capacity
    from stackrace.harness.records import frame
    from stackrace.harness.store import StoredRun

    run = StoredRun(None, {}, {"slo": {"ttft_ms": 1}}, frame([]))
    assert isinstance(run.records, pd.DataFrame)
    monkeypatch.setattr(capacity.store, "read_run", lambda folder: run)
    monkeypatch.setattr(capacity, "judge", lambda *args: validity)
    return measurement(None)


@pytest.mark.parametrize(
    ("invalid", "fault", "is_client"),
    [
        (["lag_p99"], "why", True),
        (["cpu_share", "error_share"], "why", True),
        (["wrong_lengths"], "why", False),
        (["error_share"], None, False),  # requests that fail are the server's failure
        ([], None, False),
    ],
    ids=str,
)
def test_who_is_to_blame_for_an_invalid_point(monkeypatch, invalid, fault, is_client):
    from stackrace.harness.validity import Validity

    found = judged_point(monkeypatch, Validity("invalid", ["why"], invalid, None))
    assert (found.fault, found.is_client) == (fault, is_client)

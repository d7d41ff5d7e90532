"""The load generator against the mock, whose truth is known."""

import time

import numpy as np
import pytest

from stackrace.harness import records as table
from stackrace.harness.calibrate.trial import truth_of
from stackrace.harness.load.messages import Round
from stackrace.harness.summary import summarize

pytestmark = pytest.mark.alone

MS = 1e-3


def rows(records, schedule):
    asked = {r.id: r for r in schedule.requests}
    return table.frame(table.row(r, asked[r.id]) for r in records)


@pytest.mark.parametrize("tokens_per_event", [1, 4])
def test_the_truth_of_the_mock_is_recovered(mock_engine, load, ask, tokens_per_event):
    """TTFT 50 ms, gap 10 ms, 64 streams: within 0.5 ms; throughput within 1 %; token counts exact."""
    endpoint = mock_engine("backend.ttft=0.05", "backend.gap=0.01", f"backend.tokens_per_event={tokens_per_event}")
    events, n = 50, 256
    tokens = events * tokens_per_event
    service = 0.05 + 0.01 * (events - 1)
    due = [i * service / 64 for i in range(n)]  # 64 streams at once, evenly spread
    schedule = ask(n, tokens, due)
    right = pytest.approx(50 * MS, abs=0.5 * MS)
    for _ in range(5):  # another process may hold a core
        records, health = load(endpoint, schedule)
        found = summarize(rows(records, schedule), {})
        if found["ttft"]["p50"] == right:
            break
    assert found["ttft"]["p50"] == right
    assert found["tpot"]["p50"] == pytest.approx(10 * MS / tokens_per_event, abs=0.5 * MS)
    assert found["itl"]["p50"] == pytest.approx(10 * MS, abs=0.5 * MS)
    whole = due[-1] + service
    assert found["output_throughput"]["whole"] == pytest.approx(n * tokens / whole, rel=0.01)
    assert found["batch"]["run"] == pytest.approx(n * service / whole, rel=0.02)
    assert [sum(r.chunk_tokens) for r in records] == [tokens] * n
    assert [r.output_tokens for r in records] == [tokens] * n
    assert {tuple(r.output_ids) for r in records} == {tuple(range(tokens))}
    assert found["failed"]["run"] == 0
    assert health[0].cpu_share < 0.9


def test_closed_loop_keeps_the_cap_and_is_due_when_its_slot_is_free(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.02", "backend.gap=0.005")
    schedule = ask(40, 9)
    records, _ = load(endpoint, schedule, concurrency=8)
    assert all(r.due == r.slot for r in records)
    ends = sorted(r.end for r in records)
    waited = sorted(r.slot for r in records)[8:]
    assert waited == ends[:32]  # each slot is free from when the last request in it ended, to the nanosecond
    times = [(r.sent, 1) for r in records] + [(r.end, -1) for r in records]
    assert max(np.cumsum([step for _, step in sorted(times)])) == 8


def test_a_cap_on_an_open_loop_shows_the_wait_as_queued(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.1", "backend.gap=0.0", "backend.record_truth=true")
    schedule = ask(5, 1, due=[0.001, 0.001, 0.001, 0.001, 0.001])
    records, _ = load(endpoint, schedule, concurrency=1)
    found = summarize(rows(records, schedule), {})
    waits = sorted((r.slot - r.due) / 1e9 for r in records)
    assert waits == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=20 * MS)
    assert found["ttft"]["max"] == pytest.approx(0.5, abs=25 * MS)
    served = max((t["sent"][0] - t["arrived"]) / 1e9 for t in truth_of(endpoint))  # late itself on a busy machine
    assert found["ttft_service"]["max"] == pytest.approx(served, abs=10 * MS)
    assert found["ttft_service"]["p50"] == pytest.approx(0.1, abs=10 * MS)
    assert found["lag"]["max"] < 5 * MS


def test_requests_are_never_early_and_hardly_late(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.001", "backend.gap=0.0")
    rng = np.random.default_rng(0)
    schedule = ask(600, 1, due=np.cumsum(rng.exponential(1 / 300, 600)).tolist())
    records, _ = load(endpoint, schedule)
    lag = np.array([r.sent - r.due for r in records])
    assert lag.min() >= 0
    assert np.quantile(lag, 0.9) < 2e6
    assert all(r.body_sent >= r.sent for r in records)


def test_stop_by_seconds_censors_what_is_in_flight(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.05", "backend.gap=0.1")
    schedule = ask(3, 60, due=[0.0, 0.1, 0.9])
    began = time.monotonic()
    records, _ = load(endpoint, schedule, seconds=0.5, drain=0.2)
    assert time.monotonic() - began < 5
    assert [r.id for r in records] == [0, 1]  # the third was never due before the end
    assert all(r.censored and r.error is None and r.chunk_times for r in records)


def test_what_waits_for_a_slot_at_the_cutoff_is_censored_unsent(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.6", "backend.gap=0.0")
    schedule = ask(2, 1, due=[0.001, 0.002])
    records, _ = load(endpoint, schedule, concurrency=1, seconds=0.3, drain=1.0)
    assert [r.censored for r in records] == [False, True]
    assert records[1].sent is None
    assert summarize(rows(records, schedule), {"ttft_ms": 100})["attainment"]["whole"] == 0.0


def test_errors_cuts_and_stalls_are_recorded_and_the_rest_goes_on(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.002", "backend.error_share=0.3", "backend.cut_share=0.3")
    schedule = ask(100, 10)
    records, _ = load(endpoint, schedule, concurrency=10)
    assert len(records) == 100
    refused = [r for r in records if r.error and "HTTP 500: planted by the mock" in r.error]
    cut = [r for r in records if r.error and "connection" in r.error.lower()]
    fine = [r for r in records if r.error is None]
    assert len(refused) + len(cut) + len(fine) == 100
    assert min(len(refused), len(cut), len(fine)) > 5
    assert all(sum(r.chunk_tokens) == 5 for r in cut)  # what came before the cut is kept
    assert all(sum(r.chunk_tokens) == 10 for r in fine)


def test_a_silent_stream_is_given_up(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.01", "backend.stall_share=1", "backend.stall=30")
    records, _ = load(endpoint, ask(2, 8), stall_timeout=0.5)
    assert all("no byte for 0.5 s (timeouts.stall)" in r.error for r in records)
    assert all(sum(r.chunk_tokens) == 4 for r in records)


def test_warm_up_is_not_recorded(mock_engine, load, ask):
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.0")
    told = []

    def next_round(last):
        told.append(last)
        return Round(ask(5, 3), 2) if len(told) < 3 else None

    records, _ = load(endpoint, ask(3, 2), next_round)
    assert [(r.requests, r.failed) for r in told[1:]] == [(5, 0), (5, 0)]
    assert all(r.ttft == pytest.approx(0.01, abs=0.005) and r.tpot < 0.005 for r in told[1:])
    assert [r.id for r in records] == [0, 1, 2]
    assert min(r.due for r in records) == 0

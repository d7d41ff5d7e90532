"""A golden file of hand-written records: every metric worked out by hand beside it, from docs/metrics.md alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from stackrace.harness import records as table
from stackrace.harness.errors import UsageError
from stackrace.harness.summary import metrics, quantile, summarize
from stackrace.harness.telemetry import samples

MS = 1_000_000
GOLDEN = Path(__file__).parent / "golden" / "records.json"
TOLD = GOLDEN.with_name("telemetry.json")


def golden():
    """Six requests, times in ms. See tests/golden/README.md for the working."""
    rows = json.loads(GOLDEN.read_text())
    times = ("due", "slot", "sent", "body_sent", "end")
    for row in rows:
        row.update({t: None if row[t] is None else row[t] * MS for t in times})
        row["chunk_times"] = [t * MS for t in row["chunk_times"]]
    return table.frame(rows)


def golden_telemetry():
    """Readings of two GPUs, an engine and its processes; times in ms."""
    return samples.frame([samples.Sample(row[0] * MS, *row[1:]) for row in json.loads(TOLD.read_text())], 0)


@pytest.fixture(scope="module")
def summary():
    return summarize(golden(), {"ttft_ms": 150, "tpot_ms": 25, "e2e_ms": None}, golden_telemetry())


# Requests 0, 1, 2 and 5 succeed; 3 fails; 4 is censored.
EXPECTED = {
    # first token - due: 0: 110-0, 1: 250-100, 2: 500-200, 5: 700-600
    ("ttft", "n"): 4,
    ("ttft", "mean"): 0.165,
    ("ttft", "p50"): 0.110,  # nearest rank 2 of 100, 110, 150, 300
    ("ttft", "max"): 0.300,
    # ok and due in 170..600: 2 and 5
    ("ttft", "steady_n"): 2,
    ("ttft", "steady_p50"): 0.100,  # nearest rank 1 of 100, 300
    ("ttft", "steady_mean"): 0.200,
    ("e2e", "steady_p50"): 0.100,  # of 100 (5) and 330 (2)
    ("tpot", "steady_n"): 1,  # 5 has none
    # whole: first due to the last token; steady: with so few requests from the first end, 0's, to the last due
    ("window_begin", "whole"): 0.0,
    ("window_end", "whole"): 0.7,
    ("window_begin", "steady"): 0.170,
    ("window_end", "steady"): 0.600,
    # first token - sent: 0: 110-10, 1: 250-101, 2: 500-402, 5: 700-600
    ("ttft_service", "p50"): 0.098 + 0.002,  # 98, 100, 100, 149
    ("ttft_service", "max"): 0.149,
    # 0: (170-110)/(4-1) = 20; 1: (310-250)/(5-2) = 20; 2: (530-500)/(3-2) = 30; 5: one chunk, undefined
    ("tpot", "n"): 3,
    ("tpot", "p50"): 0.020,
    ("tpot", "max"): 0.030,
    ("interactivity", "n"): 3,
    ("interactivity", "p50"): 50.0,
    ("interactivity", "max"): 50.0,
    # gaps: 0: 20, 20, 20; 1: 40, 20; 2: 30
    ("itl", "n"): 6,
    ("itl", "mean"): 0.025,
    ("itl", "p50"): 0.020,
    ("itl", "max"): 0.040,
    # per token: 0: 20, 20, 20; 1: 40/2, 20/1; 2: 30/1
    ("itl_token", "mean"): 0.130 / 6,
    ("itl_token", "max"): 0.030,
    # longest gap: 0: 20, 1: 40, 2: 30, 5: none
    ("stall", "n"): 3,
    ("stall", "p50"): 0.030,
    ("stall", "max"): 0.040,
    # last - due: 170, 210, 330, 100
    ("e2e", "p50"): 0.170,
    ("e2e", "max"): 0.330,
    # sent - max(due, slot), all that were sent: 10, 1, 2, 0, 0, 0
    ("lag", "n"): 6,
    ("lag", "p50"): 0.0,
    ("lag", "mean"): 0.013 / 6,
    ("lag", "max"): 0.010,
    # told of request 0 alone: 1, 2, 3, 4
    ("receive_lag", "n"): 4,
    ("receive_lag", "p50"): 0.002,
    ("receive_lag", "max"): 0.004,
    # one of the seven chunks of 0 and 1; of the six gaps none is short
    ("coalesced", "run"): 1 / 7,
    ("short_gaps", "run"): 0.0,
    # slot - due: 0, 0, 200, 0, 0, 0
    ("queued", "max"): 0.200,
    ("queued", "mean"): 0.200 / 6,
    # whole run 0 to 700 ms: 4 + 5 + 3 + 2 (failed) + 1 (censored) + 2 tokens
    ("output_throughput", "whole"): 17 / 0.7,
    # steady: first end (0's last token, 170) to last due (600): 0: 1 (at 170), 1: 5, 2: 3, 3: 2, 4: 1
    ("output_throughput", "steady"): 12 / 0.43,
    # prompts by first token: all six begin within the whole run
    ("input_throughput", "whole"): (100 + 200 + 300 + 50 + 60 + 70) / 0.7,
    # within 170..600: 1 (250), 2 (500), 3 (450), 4 (560)
    ("input_throughput", "steady"): (200 + 300 + 50 + 60) / 0.43,
    ("total_throughput", "whole"): (780 + 17) / 0.7,
    ("total_throughput", "steady"): (610 + 12) / 0.43,
    ("request_throughput", "whole"): 4 / 0.7,
    ("request_throughput", "steady"): 3 / 0.43,  # 0 at 170, 1 at 310, 2 at 530
    # SLO: TTFT <= 150 and TPOT <= 25. 0 and 1 (just) meet it; 2 misses; 3 failed; 4 is censored with a token
    # after 60 ms and nothing missed: not judged; 5 meets TTFT, has no TPOT to judge: meets
    ("goodput", "whole"): 3 / 0.7,
    ("attainment", "whole"): 3 / 5,
    # due in 170..600: 2 (200, misses), 3 (400, failed), 4 (500, not judged), 5 (600, meets)
    ("goodput", "steady"): 1 / 0.43,
    ("attainment", "steady"): 1 / 3,
    ("offered_rate", "run"): 5 / 0.6,
    ("achieved_rate", "run"): 5 / 0.59,
    # in flight: 160 + 211 + 130 + 60 + 200 + 100 ms, over 700
    ("batch", "run"): 0.861 / 0.7,
    ("failed", "run"): 1,
    ("censored", "run"): 1,
    # both GPUs tell their energy until 500 of 0 to 700. GPU 0: 1140 less 1010, half-way from 1000 to 1020; GPU 1: 50 J
    # a second. Tokens until 500: 4 (0), 5 (1), 2 of 3 (2), 2 (3)
    ("energy_covered", "run"): 5 / 7,
    ("energy_per_output_token", "run"): (130 + 25) / 13,
    ("gpu_power", "run"): 300.0,  # the five within 0 to 700
    ("gpu_memory", "run"): 8e9,  # 7 GB until the first reading after 700, and GPU 1's 1 GB
    # from the last before 0 to the first after 700: 1 (idle), 4 (cap), 36 (cap and heat), 0
    ("throttled", "run"): 1 / 4,
    ("power_capped", "run"): 2 / 4,
    ("engine_batch", "run"): (1 + 2 + 2 + 3 + 1) / 5,
    ("kv_cache_peak", "run"): 0.6,
    ("kv_cache_capacity", "run"): 4096,
    ("preemptions", "run"): 3,  # 5 - 2
    ("prefix_hits", "run"): 78 / 780,
    ("engine_cpu", "run"): 1.05 / 0.7,
    ("engine_memory", "run"): 3e9,
}


@pytest.mark.parametrize("stat", EXPECTED, ids=".".join)
def test_metric_by_hand(summary, stat):
    metric, name = stat
    assert summary[metric][name] == pytest.approx(EXPECTED[stat], rel=1e-9)


def test_every_metric_is_worked_out():
    assert {metric for metric, _ in EXPECTED} == set(metrics())


def test_a_counter_that_comes_onto_the_page_within_the_window_began_at_0():
    pages = {0: {"queries": 100}, 300: {"queries": 150, "hits": 30}, 800: {"queries": 200, "hits": 40}}
    told = [
        samples.Sample(ms * MS, "gauges", None, f"prefix_cache_{name}", value)
        for ms, page in pages.items()
        for name, value in page.items()
    ]
    assert summarize(golden(), {}, samples.frame(told, 0))["prefix_hits"]["run"] == 40 / 100


def test_underpowered_percentiles_are_absent(summary):
    assert "p90" not in summary["ttft"]  # 4 samples
    assert "p99" not in summary["itl"]  # 6 samples


def test_a_wait_past_the_slo_makes_a_censored_request_a_miss():
    strict = summarize(golden(), {"ttft_ms": 150, "tpot_ms": 25, "e2e_ms": 190})
    # 4 was due at 500 and given up at 700, after 200 ms: past 190, so judged; 1 (210) misses as well
    assert strict["attainment"]["whole"] == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("slo", "attained"),
    [
        # request 4, censored: due and sent at 500, its only token at 560, given up at 700
        ({"stall_ms": 139}, 4 / 6),  # it has waited 140 ms for the next: judged, a miss
        ({"stall_ms": 141}, 4 / 5),  # not past it: not judged
        ({"ttft_service_ms": 59}, 0),  # 60 ms; the successes took 98 to 149
        ({"tpot_ms": 1}, 1 / 5),  # may yet shrink: not judged; only 5, without TPOT, passes
    ],
    ids=str,
)
def test_what_a_censored_request_can_already_have_missed(slo, attained):
    assert summarize(golden(), slo)["attainment"]["whole"] == pytest.approx(attained)


def test_waiting_without_a_token_counts_against_an_slo_on_service():
    rows = golden()
    rows.at[4, "chunk_times"], rows.at[4, "chunk_tokens"] = [], []
    # 4 waits 200 ms from sent: past 160, as is none of the successes (149 at most)
    assert summarize(rows, {"ttft_service_ms": 160})["attainment"]["whole"] == pytest.approx(4 / 6)
    assert summarize(rows, {"ttft_service_ms": 210})["attainment"]["whole"] == pytest.approx(4 / 5)


def test_a_run_without_any_token_attained_nothing():
    rows = golden()
    rows["chunk_times"] = rows["chunk_tokens"] = [[]] * len(rows)
    found = summarize(rows, {"ttft_ms": 50})
    assert found["attainment"]["whole"] == 0
    assert found["output_throughput"]["whole"] == 0


def test_without_slo_nothing_is_judged():
    nothing = summarize(golden(), {"ttft_ms": None, "tpot_ms": None, "e2e_ms": None})
    assert "goodput" not in nothing
    assert "attainment" not in nothing


def test_nothing_recorded_gives_no_number():
    empty = summarize(table.frame([]), {})
    assert empty == {"failed": {"run": 0.0}, "censored": {"run": 0.0}}


def test_unknown_slo_names_what_is_known():
    with pytest.raises(UsageError, match=r"slo\.ttf_ms .* ttft_ms"):
        summarize(golden(), {"ttf_ms": 5})


@pytest.mark.parametrize(
    ("n", "q", "expected"),
    [
        (1, 0.5, None),
        (2, 0.5, 1),
        (3, 0.5, 2),
        (9, 0.9, None),
        (10, 0.9, 9),
        (99, 0.99, None),
        (100, 0.99, 99),
        (101, 0.99, 100),
        (10, 0.1, 1),
        (9, 0.1, None),
    ],
)
def test_nearest_rank(n, q, expected):
    shuffled = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    assert quantile(shuffled, q) == expected

"""When a run has warmed up, and whether its queue keeps growing: by hand, and over simulated queues of known load."""

import numpy as np
import pytest
from evidence.queue_verdicts import verdicts
from test_validity import BENCH, queue, row

from stackrace.harness import records as table
from stackrace.harness.observed import Observed
from stackrace.harness.settling import BRIEF, DETECTED, NEVER, NONE, PLAIN, mser, outstanding, settled
from stackrace.harness.summary import steadiness, summarize
from stackrace.harness.validity import judge


def test_mser_by_hand():
    """The example of docs/metrics.md: squares about the mean / m^2 are 0.80, 0.28, 0.17, 0.19 and, at half, 0.25."""
    assert mser(np.array([0.0, 4, 8, 6, 8, 6, 8, 6])) == 2
    assert mser(np.array([0.0, 4, 8, 6, 8, 6, 8, 6]), earliest=3) == 3


@pytest.mark.parametrize(
    ("values", "cut"),
    [
        ([5] * 20, 0),  # nothing to cut
        (range(20), None),  # a queue that grows: the least is at half
        ([9, 9, 9, 9, *[5] * 16], 4),
        ([5 + 1e-7 * (i % 3) for i in range(20)], 0),  # the client's lateness is no trend
        ([], None),
    ],
    ids=["constant", "growing", "step", "noise", "nothing"],
)
def test_mser_of_plain_shapes(values, cut):
    assert mser(np.array(list(values), dtype=float)) == cut


def test_outstanding_by_hand():
    """One from 0 to 4, one from 1 to 2: in [0, 2] 3 request-seconds, in [2, 5] 2."""
    found = outstanding(np.array([0.0, 1.0]), np.array([4.0, 2.0]), np.array([0.0, 2.0, 5.0]))
    assert found == pytest.approx([1.5, 2 / 3])


def test_the_rule_is_named():
    due = np.arange(200) / 10
    assert settled(due, due + 1, 1.0, 19.9) == (pytest.approx(1.0, abs=0.5), DETECTED)
    assert settled(due[:99], due[:99] + 1, 1.0, 9.8) == (1.0, PLAIN)  # 19 bins of 5
    assert settled(due, due * 2 + 1, 1.0, 19.9) == (None, NEVER)
    assert settled(due, due + 30, 30.0, 19.9) == (None, NONE)
    assert settled(due[:99], due[:99] + 4.9, 4.9, 9.8) == (4.9, PLAIN)
    assert settled(due[:99], due[:99] + 5.0, 5.0, 9.8) == (None, BRIEF)  # 4.8 s of requests that take 5
    assert settled(due, due + 12, 12.0, 19.9) == (None, NEVER)  # its first answer comes in the second half


def test_a_slow_start_is_cut_off():
    """Requests of the first 4 s take 3 s, later ones half a second: the queue falls until about 6 s."""
    due = np.arange(400) / 10
    window = settled(due, due + np.where(due < 4, 3.0, 0.5), 3.0, due.max())
    assert window.rule == DETECTED
    assert 4 <= window.begin <= 8


def test_a_closed_loop_is_steady_from_its_first_answer_to_its_last_start():
    """Four slots, 0.5 s each: a request comes due when its slot comes free."""
    rows = [row(i, 0.5 * (i // 4), service=0.5) for i in range(200)]
    run = Observed(table.frame(rows))
    assert run.steady == (pytest.approx(0.5), pytest.approx(24.5))
    assert steadiness(table.frame(rows)) == {"begin": 0.5, "end": 24.5, "rule": DETECTED}


def test_waves_too_few_leave_no_window_between_them():
    """Four slots, two waves: the first answer comes at 0.5 s, the last request starts 10 ms later."""
    rows = [row(i, 0.5 * (i // 4) + (i == 7) * 0.01, service=0.5) for i in range(8)]
    found = summarize(table.frame(rows), {"ttft_ms": 500})
    assert steadiness(table.frame(rows)) == {"begin": None, "end": None, "rule": BRIEF}
    assert found["output_throughput"].keys() == {"whole"}


def test_a_run_that_never_settles_has_no_steady_numbers():
    rows = queue(20, 0.1, 60, seed=0)
    found = summarize(table.frame(rows), {"ttft_ms": 500})
    assert steadiness(table.frame(rows)) == {"begin": None, "end": None, "rule": NEVER}
    assert "steady" not in found["output_throughput"]
    assert not any(name.startswith("steady") for name in found["ttft"])


def sustainable(rows, **config):
    frame = table.frame(rows)
    config = {"validity": BENCH["validity"], "workload": {"shared_prefix": 0.0}, **config}
    return judge(frame, summarize(frame, {}), config, {}).sustainable


def test_sustainable_is_true_false_or_unknown():
    assert sustainable(queue(4, 0.1, 100, seed=0)) is True
    assert sustainable(queue(20, 0.1, 30, seed=0)) is False
    assert sustainable(queue(4, 0.1, 4, seed=0)) is None  # too short to tell
    closed = {"_target_": "stackrace.workloads.arrivals.Immediate", "name": "immediate"}
    assert sustainable(queue(20, 0.1, 30, seed=0), arrival=closed) is None


@pytest.mark.parametrize(("load", "alarms", "unsettled"), [(0.5, 0, 0.01), (0.7, 0.01, 0.02), (0.9, 0.06, 0.04)])
def test_false_alarms_at_loads_that_can_be_sustained(load, alarms, unsettled):
    """1,000 requests; docs/methodology.md has the whole table."""
    found = verdicts(load, 1000, seeds=40)
    assert sum(f[0] is False for f in found) <= alarms * len(found)
    assert sum(not f[1] for f in found) <= unsettled * len(found)


@pytest.mark.parametrize(("load", "found_out", "missed"), [(1.1, 0.6, 0.05), (1.2, 0.9, 0.01), (2.0, 1, 0)])
def test_misses_at_loads_that_cannot(load, found_out, missed):
    found = verdicts(load, 1000, seeds=40)
    assert sum(f[0] is False for f in found) >= found_out * len(found)
    assert sum(f[0] is True for f in found) <= missed * len(found)

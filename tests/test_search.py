"""The search alone, over simulated servers whose capacity is known."""

from math import log

import numpy as np
import pytest

from stackrace.harness.levels import FAILS, OPEN, PASSES, Level, Measurement, wilson
from stackrace.harness.search import Rules, Search

RULES = {
    "low": 0.5,
    "high": 1000.0,
    "start": 8.0,
    "target": 0.99,
    "confidence": 0.98,
    "precision": 0.02,
    "repeats": 2,
    "max_repeats": 4,
    "max_points": 60,
    "whole": False,
}


def search(measure, **changes):
    return Search(Rules(**{**RULES, **changes}), measure).run()


def sharp(capacity, judged=800):
    """Up to its capacity every request meets the SLOs, beyond it a fifth does not."""
    return lambda rate, repeat: Measurement(judged if rate <= capacity else judged * 4 // 5, judged, None)


def soft(capacity, seed, judged=1000, steepness=12.0):
    """Attainment falls smoothly, and is just 99 % at the capacity; each request draws its own luck."""
    rng = np.random.default_rng(seed)

    def measure(rate, repeat):
        odds = log(0.99 / 0.01) - steepness * log(rate / capacity)
        return Measurement(int(rng.binomial(judged, 1 / (1 + np.exp(-odds)))), judged, None)

    return measure


def capacities(n):
    return np.exp(np.random.default_rng(0).uniform(log(1), log(900), n))


def test_a_sharp_threshold_is_found_within_the_precision():
    for capacity in capacities(200):
        found = search(sharp(capacity))
        assert found.low <= capacity < found.high, capacity
        assert found.high <= found.low * 1.02
        assert found.estimate == pytest.approx(capacity, rel=0.03)
        assert found.is_complete
        assert len(found.log) <= 20


def test_a_soft_threshold_lies_in_the_stated_interval():
    """In at least 95 % of 200 seeds; where a side was never shown, that side is open."""
    inside, widths, errors, points = 0, [], [], []
    for seed, capacity in enumerate(capacities(200)):
        found = search(soft(capacity, seed))
        inside += (found.low or 0) <= capacity <= (found.high or np.inf)
        widths.append((found.high or np.inf) / (found.low or 1e-9) - 1)
        errors.append(abs(found.estimate / capacity - 1))
        points.append(len(found.log))
    print(f"inside {inside}/200, median width {np.median(widths):.1%}, error {np.median(errors):.2%}")
    print(f"largest error {max(errors):.1%}, points {np.median(points):.0f}, at most {max(points)}")
    assert inside >= 190
    assert np.median(errors) < 0.02


def test_the_same_measurements_give_the_same_search():
    assert search(soft(50, 3)).log == search(soft(50, 3)).log


def test_both_sides_of_the_answer_are_measured_again():
    found = search(sharp(50), repeats=3)
    by_level = {level.value: len(level.measured) for level in found.levels}
    assert by_level[found.low] == by_level[found.high] == 3
    assert by_level[8.0] == 1


def test_whole_numbers_are_found_exactly():
    for capacity in (1, 2, 3, 7, 16, 31, 100):
        found = search(sharp(capacity), whole=True, low=1, high=256, precision=0.01)
        assert found.estimate == capacity
        assert (found.low, found.high) == (capacity, capacity + 1) or capacity == 100
        assert all(step.level == int(step.level) for step in found.log)


def test_never_passing_and_always_passing_are_said():
    never = search(lambda rate, repeat: Measurement(0, 400, None))
    assert (never.estimate, never.low, never.high) == (None, None, 0.5)
    assert never.ended == "every level failed, down to search.low=0.5"
    always = search(lambda rate, repeat: Measurement(800, 800, None))
    assert (always.low, always.high) == (1000.0, None)
    assert always.ended == "every level passed, up to search.high=1000"


def test_a_growing_queue_fails_whatever_was_attained():
    found = search(lambda rate, repeat: Measurement(400, 400, rate <= 50))
    assert found.low <= 50 < found.high


def test_one_false_alarm_of_a_growing_queue_is_outvoted():
    """The second and third measurement of a level say otherwise."""
    found = search(lambda rate, repeat: Measurement(400 if rate <= 50 else 200, 400, not (rate > 45 and repeat == 0)))
    assert found.low <= 50 < found.high


CLIENT = Measurement(0, 400, None, fault="the client used 95% of its core", is_client=True)


def test_a_client_at_its_limit_is_no_failure_of_the_server():
    found = search(lambda rate, repeat: CLIENT if rate > 100 else Measurement(800, 800, None))
    assert found.ended == "the client, not the server, is the limit: the client used 95% of its core at 128"
    assert (found.low, found.high) == (64.0, None)
    assert not found.is_complete
    assert [s.measurement.fault is not None for s in found.log[-2:]] == [True, True]


def test_what_is_invalid_now_and_then_is_measured_again():
    rng = np.random.default_rng(1)
    hiccups = iter(rng.permutation([True] + [False] * 4) for _ in range(100))
    flaky = (bad for group in hiccups for bad in group)
    last = []

    def measure(rate, repeat):
        bad = next(flaky) and not (last and last[-1])
        last.append(bad)
        return CLIENT if bad else sharp(50)(rate, repeat)

    found = search(measure)
    assert any(last)
    assert found.is_complete
    assert found.low <= 50 < found.high


def test_too_few_requests_to_show_the_target_end_the_search():
    found = search(sharp(50, judged=20))
    assert "80 requests at" in found.ended
    assert "too few to show 0.99: measure longer" in found.ended
    assert found.estimate == pytest.approx(50, rel=0.03)
    assert found.low is None


def test_it_stops_at_the_most_points_with_what_it_knows():
    found = search(sharp(50), max_points=5)
    assert len(found.log) == 5
    assert (found.low, found.high) == (45.25, 64.0)
    assert found.ended == "search.max_points=5 are measured: raise it for a better answer"


@pytest.mark.parametrize(
    ("attained", "judged", "sustainable", "expected"),
    [(400, 400, None, PASSES), (380, 400, None, FAILS), (396, 400, None, OPEN), (400, 400, False, FAILS)],
)
def test_verdicts_on_a_level(attained, judged, sustainable, expected):
    assert Level(1.0, [Measurement(attained, judged, sustainable)]).verdict(0.99, 0.95) == expected


def test_wilson():
    """Newcombe 1998, table I: 81 of 263 and 15 of 148."""
    assert wilson(81, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148, 0.95) == pytest.approx((0.0624, 0.1605), abs=1e-4)

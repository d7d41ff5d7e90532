"""Prompts and schedules: exact lengths, unique prompts, an exact shared prefix, frozen and replayed unchanged."""

from itertools import islice, pairwise

import numpy as np
import pytest

from stackrace.harness import schedule
from stackrace.harness.errors import UsageError
from stackrace.harness.schedule import Schedule
from stackrace.workloads.arrivals import Immediate, Poisson
from stackrace.workloads.lengths import Fixed, Lognormal, Uniform
from stackrace.workloads.synthetic import Synthetic


def synthetic(**changes):
    settings = {
        "input_lengths": Fixed(tokens=40),
        "output_lengths": Fixed(tokens=7),
        "shared_prefix": 0.0,
        "vocab_size": 512,
        "first_token": 4,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 5,
    }
    return Synthetic(**{**settings, **changes})


def requests(workload, n, seed=0):
    return list(islice(workload.requests(np.random.default_rng(seed)), n))


def common_prefix(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_the_shared_prefix_is_exact(share):
    prompts = [r.prompt for r in requests(synthetic(shared_prefix=share), 300)]
    assert {len(p) for p in prompts} == {40}
    assert {common_prefix(prompts[0], p) for p in prompts[1:]} == {round(share * 40)}


def test_the_shared_prefix_is_exact_for_every_length():
    lengths = Uniform(low=20, high=60)
    prompts = [r.prompt for r in requests(synthetic(input_lengths=lengths, shared_prefix=0.5), 200)]
    for a, b in pairwise(prompts):
        assert common_prefix(a, b) >= min(round(0.5 * len(a)), round(0.5 * len(b)))
    shared = max(prompts, key=len)
    for p in prompts:
        n = round(0.5 * len(p))
        assert p[:n] == shared[:n]


def test_prompts_are_unique_and_ids_in_range():
    tiny = synthetic(input_lengths=Fixed(tokens=4), vocab_size=40)
    prompts = {r.prompt for r in requests(tiny, 20_000)}
    assert len(prompts) == 20_000
    assert min(map(min, prompts)) >= 4
    assert max(map(max, prompts)) < 40


def test_too_short_to_be_unique_is_refused():
    with pytest.raises(UsageError, match="cannot make request 0 unique"):
        requests(synthetic(input_lengths=Fixed(tokens=1)), 1)


def test_sampling_seeds_differ_and_repeat():
    first, again = requests(synthetic(), 5), requests(synthetic(), 5)
    assert first == again
    assert [r.sampling.seed for r in first] == [5, 6, 7, 8, 9]
    assert requests(synthetic(), 5, seed=1) != first


def test_lengths_keep_their_word():
    rng = np.random.default_rng(0)
    uniform = [Uniform(low=3, high=6).draw(rng) for _ in range(20_000)]
    values, counts = np.unique(uniform, return_counts=True)
    assert values.tolist() == [3, 4, 5, 6]
    assert np.abs(counts / 20_000 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 20_000)
    lognormal = np.array([Lognormal(median=100, sigma=0.5, low=1, high=100_000).draw(rng) for _ in range(20_000)])
    assert np.median(lognormal) == pytest.approx(100, rel=0.03)
    assert np.log(lognormal).std() == pytest.approx(0.5, rel=0.03)
    clipped = [Lognormal(median=100, sigma=2.0, low=50, high=200).draw(rng) for _ in range(2_000)]
    assert min(clipped) >= 50
    assert max(clipped) <= 200
    assert np.mean([v == 50 for v in clipped]) < 0.05  # truncated, not piled up at the edge


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(tokens=0),
        lambda: Fixed(tokens=1.5),
        lambda: Uniform(low=5, high=4),
        lambda: Lognormal(median=10, sigma=1, low=20, high=30),
    ],
)
def test_bad_lengths_are_named(make):
    with pytest.raises(UsageError, match=r"lengths\."):
        make()


def test_schedule_round_trip(tmp_path):
    drawn = schedule.draw(synthetic(), Poisson(rate=20.0), seed=3, max_requests=50, max_seconds=None)
    drawn.save(tmp_path / "schedule.parquet")
    loaded = Schedule.load(tmp_path / "schedule.parquet")
    assert loaded == drawn
    assert loaded.hash == drawn.hash


def test_schedule_hash_sees_every_value():
    base = {"workload": synthetic(), "arrival": Poisson(rate=20.0), "seed": 3, "max_requests": 20, "max_seconds": None}
    variants = [
        {},
        {"seed": 4},
        {"max_requests": 19},
        {"arrival": Poisson(rate=21.0)},
        {"workload": synthetic(temperature=0.5)},
        {"workload": synthetic(seed=6)},
        {"workload": synthetic(output_lengths=Fixed(tokens=8))},
    ]
    assert len({schedule.draw(**{**base, **v}).hash for v in variants}) == len(variants)
    assert schedule.draw(**base).hash == schedule.draw(**base).hash


def test_another_rate_asks_the_same_prompts():
    slow, fast = (schedule.draw(synthetic(), Poisson(rate=r), 0, 30, None) for r in (1.0, 10.0))
    assert [r.prompt for r in slow.requests] == [r.prompt for r in fast.requests]
    np.testing.assert_allclose(np.array(slow.due) / np.array(fast.due), 10, rtol=1e-6)


def test_stop_by_seconds():
    drawn = schedule.draw(synthetic(), Poisson(rate=50.0), seed=0, max_requests=None, max_seconds=4.0)
    assert max(drawn.due) < 4e9
    assert len(drawn.due) == pytest.approx(200, abs=5 * np.sqrt(200))
    assert list(drawn.due) == sorted(drawn.due)


def test_immediate_is_closed_loop_material():
    assert schedule.draw(synthetic(), Immediate(), 0, 5, None).is_immediate
    assert not schedule.draw(synthetic(), Poisson(rate=1.0), 0, 5, None).is_immediate

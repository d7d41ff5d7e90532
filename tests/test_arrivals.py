"""Each arrival process against its name, over 10^5 draws."""

from itertools import islice, pairwise

import numpy as np
import pytest

from stackrace.harness.errors import UsageError
from stackrace.workloads.arrivals import Bursts, Constant, Gamma, Immediate, Poisson

N = 100_000


def gaps_of(arrival, n=N, seed=0):
    times = np.array(list(islice(arrival(np.random.default_rng(seed)), n + 1)))
    return np.diff(times)


@pytest.mark.parametrize(
    ("arrival", "cv"),
    [
        (Poisson(rate=7.0), 1.0),
        (Gamma(rate=7.0, cv=0.5), 0.5),
        (Gamma(rate=7.0, cv=1.0), 1.0),
        (Gamma(rate=0.1, cv=3.0), 3.0),
    ],
    ids=str,
)
def test_rate_and_cv_within_sampling_error(arrival, cv):
    gaps = gaps_of(arrival)
    mean = 1 / arrival.rate
    assert abs(gaps.mean() - mean) < 5 * cv * mean / np.sqrt(N)
    # a gamma gap of shape k has kurtosis 3 + 6/k, so the variance of its sample variance is known
    spread_of_cv = cv * np.sqrt((2 + 6 * cv**2) / (4 * N) + cv**2 / N)
    assert abs(gaps.std() / gaps.mean() - cv) < 5 * spread_of_cv


def test_poisson_gaps_are_exponential_and_independent():
    gaps = gaps_of(Poisson(rate=1.0))
    for q in (0.01, 0.1, 0.5, 0.9, 0.99):  # nothing is clipped at either end
        below = (gaps < -np.log(1 - q)).mean()
        assert abs(below - q) < 5 * np.sqrt(q * (1 - q) / N)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 5 / np.sqrt(N)


def test_the_count_in_a_window_varies_as_a_poisson_count():
    """Rescaled processes (every run ends at N / rate) fail here: their count has no variance."""
    counts = []
    for seed in range(400):
        times = Poisson(rate=50.0)(np.random.default_rng(seed))
        counts.append(sum(1 for _ in iter(lambda t=times: next(t) < 1.0, False)))
    assert abs(np.mean(counts) - 50) < 5 * np.sqrt(50 / 400)
    assert np.var(counts, ddof=1) == pytest.approx(50, rel=5 * np.sqrt(2 / 400))


def test_constant_has_no_drift():
    times = list(islice(Constant(rate=3.0)(np.random.default_rng(0)), N))
    assert times[0] == 0
    assert times[-1] == (N - 1) / 3.0
    assert max(b - a for a, b in pairwise(times)) == pytest.approx(1 / 3, abs=1e-9)


def test_immediate_is_at_once():
    assert set(islice(Immediate()(np.random.default_rng(0)), 1000)) == {0.0}


@pytest.mark.parametrize("arrival", [Poisson(rate=5.0), Gamma(rate=5.0, cv=2.0)], ids=str)
def test_same_seed_same_times(arrival):
    first, again, other = (gaps_of(arrival, 100, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "fast", None, True])
@pytest.mark.parametrize("kind", [Constant, Poisson])
def test_bad_rate_is_named(kind, rate):
    with pytest.raises(UsageError, match=r"arrival\.rate="):
        kind(rate=rate)


def test_bad_cv_is_named():
    with pytest.raises(UsageError, match=r"arrival\.cv=0"):
        Gamma(rate=1.0, cv=0)


def bursts(**changes):
    return Bursts(**{"rate": 7.0, "busy": 1.5, "quiet": 4.5, **changes})


def test_bursts_are_silent_in_the_quiet_and_keep_the_mean_rate():
    times = np.array(list(islice(bursts()(np.random.default_rng(0)), N)))
    assert (np.diff(times) >= 0).all()
    assert (times % 6.0 < 1.5 + 1e-6).all()
    assert abs(N / times[-1] - 7.0) < 5 * 7.0 / np.sqrt(N)
    # 7 a second over 6 s are 42 in each busy time, and they vary as a Poisson count
    counts = np.bincount((times // 6.0).astype(int))[:-1]
    assert abs(counts.mean() - 42) < 5 * np.sqrt(42 / len(counts))
    assert counts.var() == pytest.approx(42, rel=5 * np.sqrt(2 / len(counts)))


def test_bursts_without_quiet_are_poisson():
    gaps = gaps_of(bursts(quiet=0))
    assert (gaps == gaps_of(Poisson(rate=7.0))).all()


def test_bad_bursts_are_named():
    for name, value in (("rate", 0), ("busy", 0), ("quiet", -1), ("quiet", float("inf"))):
        with pytest.raises(UsageError, match=rf"arrival\.{name}={value}"):
            bursts(**{name: value})

"""Arrival processes: rng -> due times in seconds after the start, without end. No clipping, no rescaling."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, repeat
from math import inf

import numpy as np

from stackrace.harness.errors import require


def _positive_rate(rate: float) -> None:
    require("arrival.rate", rate, (int, float), lambda v: 0 < v < inf, "a number of requests per second above 0")


@dataclass(frozen=True, kw_only=True)
class Immediate:
    """Everything is due at the start; with a concurrency cap this is the closed loop."""

    def __call__(self, rng: np.random.Generator) -> Iterator[float]:
        """0, 0, 0, …"""
        return repeat(0.0)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One request every 1 / rate seconds, exactly."""

    rate: float

    def __post_init__(self) -> None:
        _positive_rate(self.rate)

    def __call__(self, rng: np.random.Generator) -> Iterator[float]:
        """0, 1 / rate, 2 / rate, …: multiples, so that no rounding error adds up."""
        return (i / self.rate for i in count())


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Exponential gaps of mean 1 / rate: independent users, the first one of them a gap after the start."""

    rate: float

    def __post_init__(self) -> None:
        _positive_rate(self.rate)

    def __call__(self, rng: np.random.Generator) -> Iterator[float]:
        """Ascending times, mean gap 1 / rate, coefficient of variation 1."""
        due = 0.0
        while True:
            due += rng.exponential(1 / self.rate)
            yield due


@dataclass(frozen=True, kw_only=True)
class Gamma:
    """Gamma gaps of mean 1 / rate and coefficient of variation `cv`: above 1 burstier than Poisson, below calmer."""

    rate: float
    cv: float

    def __post_init__(self) -> None:
        _positive_rate(self.rate)
        require("arrival.cv", self.cv, (int, float), lambda v: v > 0, "above 0 (for 0 use arrival=constant)")

    def __call__(self, rng: np.random.Generator) -> Iterator[float]:
        """Ascending times, mean gap 1 / rate, coefficient of variation `cv`."""
        shape = self.cv**-2
        due = 0.0
        while True:
            due += rng.gamma(shape, 1 / (self.rate * shape))
            yield due


@dataclass(frozen=True, kw_only=True)
class Bursts:
    """Poisson for `busy` seconds, silence for `quiet`, in turns; the mean rate over both is `rate`."""

    rate: float
    busy: float
    quiet: float

    def __post_init__(self) -> None:
        _positive_rate(self.rate)
        seconds = "a number of seconds"
        require("arrival.busy", self.busy, (int, float), lambda v: 0 < v < inf, f"{seconds} above 0")
        require("arrival.quiet", self.quiet, (int, float), lambda v: 0 <= v < inf, f"{seconds}, 0 or more")

    def __call__(self, rng: np.random.Generator) -> Iterator[float]:
        """Ascending times, none of them in the quiet; the first busy time begins at 0."""
        gap = self.busy / (self.busy + self.quiet) / self.rate
        time = 0.0  # on a clock that stands still while it is quiet
        while True:
            time += rng.exponential(gap)
            yield time + self.quiet * (time // self.busy)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The workload's own times, as a trace has them; `schedule.draw` reads them from the requests."""

    def __call__(self, rng: np.random.Generator) -> Iterator[float]:
        """No times: there are none but the workload's."""
        return iter(())

"""Think times: how long the user of a session waits between an answer's end and the next question."""

from dataclasses import dataclass
from math import inf
from typing import Protocol

import numpy as np

from stackrace.harness.errors import require


class Think(Protocol):
    """A distribution of seconds."""

    def draw(self, rng: np.random.Generator) -> float:
        """Seconds, 0 or more."""
        ...


def _check(name: str, seconds: float) -> None:
    wanted = "a number of seconds, 0 or more"
    require(f"workload.think.{name}", seconds, (int, float), lambda v: 0 <= v < inf, wanted)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Always as long."""

    seconds: float

    def __post_init__(self) -> None:
        _check("seconds", self.seconds)

    def draw(self, rng: np.random.Generator) -> float:
        """`seconds`."""
        return float(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Exponentially distributed."""

    mean: float  # seconds

    def __post_init__(self) -> None:
        _check("mean", self.mean)

    def draw(self, rng: np.random.Generator) -> float:
        """Seconds of mean `mean`."""
        return float(rng.exponential(self.mean))

"""Length distributions: each draws a token count for one prompt or one output."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stackrace.harness.errors import UsageError, require


class Lengths(Protocol):
    """A distribution of token counts."""

    def draw(self, rng: np.random.Generator) -> int:
        """One token count, at least 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Always the same number of tokens."""

    tokens: int

    def __post_init__(self) -> None:
        require("lengths.tokens", self.tokens, int, lambda v: v > 0, "a whole number of tokens above 0")

    def draw(self, rng: np.random.Generator) -> int:
        """`tokens`."""
        return self.tokens


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every number of tokens from `low` to `high`, both included, equally often."""

    low: int
    high: int

    def __post_init__(self) -> None:
        require("lengths.low", self.low, int, lambda v: v > 0, "a whole number of tokens above 0")
        require("lengths.high", self.high, int, lambda v: v >= self.low, f"at least lengths.low={self.low}")

    def draw(self, rng: np.random.Generator) -> int:
        """One of low .. high."""
        return int(rng.integers(self.low, self.high, endpoint=True))


@dataclass(frozen=True, kw_only=True)
class Lognormal:
    """Lognormal with the given median and sigma, rounded, redrawn outside low .. high (truncated, not clipped)."""

    median: float
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        require("lengths.median", self.median, (int, float), lambda v: v > 0, "above 0")
        require("lengths.sigma", self.sigma, (int, float), lambda v: v >= 0, "0 or more")
        require("lengths.low", self.low, int, lambda v: v > 0, "a whole number of tokens above 0")
        require("lengths.high", self.high, int, lambda v: v >= self.low, f"at least lengths.low={self.low}")
        if not self.low <= round(self.median) <= self.high:
            raise UsageError(f"lengths.median={self.median} lies outside lengths.low..high={self.low}..{self.high}")

    def draw(self, rng: np.random.Generator) -> int:
        """A token count of low .. high."""
        while True:
            tokens = round(rng.lognormal(math.log(self.median), self.sigma))
            if self.low <= tokens <= self.high:
                return tokens

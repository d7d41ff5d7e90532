"""What workloads of random token ids have in common: ids of the vocabulary, prompts that spell a number, sampling."""

from dataclasses import dataclass

import numpy as np

from stackrace.harness.errors import require
from stackrace.harness.types import Sampling

REQUESTS = 1 << 20  # that can be told apart by the token ids that spell their number


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """How output tokens are drawn; request i is sent seed + i."""

    temperature: float
    top_p: float
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        number = (int, float)
        require("workload.temperature", self.temperature, number, lambda v: v >= 0, "0 or more")
        require("workload.top_p", self.top_p, number, lambda v: 0 < v <= 1, "above 0, 1 at most")
        require("workload.top_k", self.top_k, int, lambda v: v >= 0, "a whole number, 0 for no limit")
        require("workload.seed", self.seed, int, lambda v: True, "a whole number")

    def sampling(self, number: int) -> Sampling:
        """Of the request `number`."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed + number)


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Sampled):
    """Ids from `first_token` to `vocab_size`, evenly."""

    vocab_size: int
    first_token: int  # ids below are special

    def __post_init__(self) -> None:
        super().__post_init__()
        require("workload.first_token", self.first_token, int, lambda v: v >= 0, "a whole number, 0 or more")
        least = self.first_token + 2
        require(
            "workload.vocab_size", self.vocab_size, int, lambda v: v >= least, f"at least first_token + 2 = {least}"
        )

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """`n` random ids."""
        return rng.integers(self.first_token, self.vocab_size, size=n)

    def own(self, rng: np.random.Generator, n: int, number: int, span: int = REQUESTS) -> np.ndarray:
        """`n` random ids, the first of which spell `number`, which is below `span`, as far as they suffice."""
        tokens = self.draw(rng, n)
        spelled = digits(number, self.num_ordinary, span)[:n]
        tokens[: len(spelled)] = np.array(spelled, dtype=np.int64) + self.first_token
        return tokens

    @property
    def num_ordinary(self) -> int:
        """Ids that may be drawn."""
        return self.vocab_size - self.first_token


def digits(number: int, base: int, span: int = REQUESTS) -> list[int]:
    """`number` in `base`, least significant digit first, with as many digits as any number below `span` needs."""
    found = []
    while span > 0:
        found.append(number % base)
        number //= base
        span //= base
    return found

"""Prompts of random token ids: exact lengths, unique for each request, with an exactly shared prefix if asked."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stackrace.harness.errors import UsageError, require
from stackrace.harness.types import Request, Sampling
from stackrace.workloads.lengths import Lengths

_ID_WIDTH = 1 << 20  # requests that can be told apart by the token ids that spell their number


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Random token ids.

    The first `round(shared_prefix * length)` tokens of every prompt are those of one common sequence. The next ones
    spell the request's number, so that no two prompts share more than the prefix by accident; the rest is random.
    """

    input_lengths: Lengths
    output_lengths: Lengths
    shared_prefix: float  # share of each prompt, 0 to 1
    vocab_size: int
    first_token: int  # ids below are special
    temperature: float
    top_p: float
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        share = self.shared_prefix
        require("workload.shared_prefix", share, (int, float), lambda v: 0 <= v <= 1, "a share from 0 to 1")
        least = self.first_token + 2
        require(
            "workload.vocab_size", self.vocab_size, int, lambda v: v >= least, f"at least first_token + 2 = {least}"
        )
        require("workload.temperature", self.temperature, (int, float), lambda v: v >= 0, "0 or more")

    def requests(self, rng: np.random.Generator) -> Iterator[Request]:
        """Requests without end; lengths, the prefix and the rest come from streams of their own."""
        lengths, bodies, common = rng.spawn(3)
        prefix = np.empty(0, dtype=np.int64)
        number = 0
        while True:
            n_input, n_output = self.input_lengths.draw(lengths), self.output_lengths.draw(lengths)
            n_shared = round(self.shared_prefix * n_input)
            if n_shared > len(prefix):
                prefix = np.concatenate([prefix, self._draw(common, n_shared - len(prefix))])
            own = self._own(number, n_input - n_shared, bodies)
            prompt = (*prefix[:n_shared].tolist(), *own.tolist())
            yield Request(number, prompt, n_output, self._sampling(number))
            number += 1

    def _draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.integers(self.first_token, self.vocab_size, size=n)

    def _own(self, number: int, n: int, rng: np.random.Generator) -> np.ndarray:
        own = self._draw(rng, n)
        spelled = _digits(number, self.vocab_size - self.first_token)
        if n < len(spelled) and self.shared_prefix < 1:
            raise UsageError(
                f"prompt of {n} own tokens cannot make request {number} unique: lengthen lengths.input "
                f"or lower workload.shared_prefix={self.shared_prefix}"
            )
        if n >= len(spelled):
            own[: len(spelled)] = np.array(spelled) + self.first_token
        return own

    def _sampling(self, number: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed + number)


def _digits(number: int, base: int) -> list[int]:
    """`number` in `base`, least significant digit first, with as many digits as any number below 2^20 needs."""
    digits = []
    span = _ID_WIDTH
    while span > 0:
        digits.append(number % base)
        number //= base
        span //= base
    return digits

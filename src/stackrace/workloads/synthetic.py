"""Prompts of random token ids: exact lengths, unique for each request, with an exactly shared prefix if asked."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from stackrace.harness.errors import UsageError, require
from stackrace.harness.types import Request
from stackrace.workloads.lengths import Lengths
from stackrace.workloads.tokens import RandomTokens, digits


@dataclass(frozen=True, kw_only=True)
class Synthetic(RandomTokens):
    """Random token ids.

    The first `round(shared_prefix * length)` tokens of every prompt are those of one common sequence. The next ones
    spell the request's number, so that no two prompts share more than the prefix by accident; the rest is random.
    """

    input_lengths: Lengths
    output_lengths: Lengths
    shared_prefix: float  # share of each prompt, 0 to 1

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.shared_prefix
        require("workload.shared_prefix", share, (int, float), lambda v: 0 <= v <= 1, "a share from 0 to 1")

    def requests(self, rng: np.random.Generator) -> Iterator[Request]:
        """Requests without end; lengths, the prefix and the rest come from streams of their own."""
        lengths, bodies, common = rng.spawn(3)
        prefix = np.empty(0, dtype=np.int64)
        for number in count():
            n_input, n_output = self.input_lengths.draw(lengths), self.output_lengths.draw(lengths)
            n_shared = round(self.shared_prefix * n_input)
            if n_shared > len(prefix):
                prefix = np.concatenate([prefix, self.draw(common, n_shared - len(prefix))])
            self._check_room(number, n_input - n_shared)
            own = self.own(bodies, n_input - n_shared, number)
            prompt = (*prefix[:n_shared].tolist(), *own.tolist())
            yield Request(number, prompt, n_output, self.sampling(number))

    def _check_room(self, number: int, n: int) -> None:
        if n < len(digits(number, self.num_ordinary)) and self.shared_prefix < 1:
            raise UsageError(
                f"prompt of {n} own tokens cannot make request {number} unique: lengthen lengths.input "
                f"or lower workload.shared_prefix={self.shared_prefix}"
            )

"""What stacks are asked: prefixes of random tokens, and prompts to continue greedily; drawn from a seed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stackrace.harness.verify.settings import Settings

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Questions:
    """Of each prefix, what follows; of each prompt, the next `greedy_tokens`; each with the likeliest `logprobs`."""

    prefixes: tuple[Tokens, ...]
    prompts: tuple[Tokens, ...]
    greedy_tokens: int
    logprobs: int

    @property
    def hash(self) -> str:
        """16 hex digits over every token."""
        return hashlib.sha256(json.dumps(self.as_dict()).encode()).hexdigest()[:16]

    @property
    def longest(self) -> int:
        """Positions that the longest of them needs."""
        return max(*map(len, self.prefixes), *(len(p) + self.greedy_tokens for p in self.prompts))

    def as_dict(self) -> dict[str, Any]:
        """For the judge's process."""
        return asdict(self)


def draw(settings: Settings, usable: Sequence[int], max_model_len: int | None) -> Questions:
    """Questions over the `usable` token ids; the same arguments, the same questions.

    No prefix with its answer, and no prompt with its output, is longer than `max_model_len`.
    """
    rng = np.random.default_rng(settings.seed)
    tokens = np.asarray(usable)
    most = max_model_len or max(settings.longest, *settings.exact) + settings.greedy_tokens
    outputs = min(settings.greedy_tokens, most - 1)

    def drawn(lengths: Sequence[int], most: int) -> tuple[Tokens, ...]:
        return tuple(tuple(rng.choice(tokens, size=max(1, min(length, most))).tolist()) for length in lengths)

    return Questions(
        prefixes=drawn(prefix_lengths(settings, most - 1), most - 1),
        prompts=drawn(_spread(settings, settings.greedy), most - outputs),
        greedy_tokens=outputs,
        logprobs=settings.logprobs,
    )


def prefix_lengths(settings: Settings, most: int) -> list[int]:
    """Those wanted exactly, as far as they fit and are not too many, and others from the shortest to the longest.

    Twice each, of other tokens: what goes wrong with a length goes wrong with both, what rounding does hardly ever.
    """
    exact = [length for length in settings.exact if length <= most]
    exact = [*exact, *exact][: settings.prefixes]
    return exact + _spread(settings, settings.prefixes - len(exact))


def _spread(settings: Settings, number: int) -> list[int]:
    return [int(length) for length in np.geomspace(settings.shortest, settings.longest, number).round()]

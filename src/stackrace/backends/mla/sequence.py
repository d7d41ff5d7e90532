"""One request inside the engine: its tokens, its pages, and when it ends."""

import random
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Sampling:
    """How output tokens are drawn, by vLLM's names; each default changes nothing."""

    seed: int
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def penalises(self) -> bool:
        """Whether what was said before changes what is likely next."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1, 0, 0)


class TokenLogprobs(NamedTuple):
    """How likely the model held one token, and the likeliest ones, as log-probabilities of the raw logits."""

    token: int
    logprob: float
    rank: int  # 1: no token was likelier
    top: list[tuple[int, float]]  # (token, log-probability), likeliest first


@dataclass(slots=True, eq=False)
class Sequence:
    """One request from its submission to its last token."""

    id: str
    prompt: Many[int]
    max_tokens: int  # output tokens at most, at least 1
    sampling: Sampling
    stop_tokens: frozenset[int]  # ends early, after giving one of these
    num_logprobs: int | None = None  # likeliest tokens told beside each output token; None: nothing is told
    num_prompt_logprobs: int | None = None  # the same for each prompt token but the first
    tokens: list[int] = field(init=False)  # prompt and output
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_cached: int | None = None  # prompt tokens found in the prefix cache when first admitted
    admitted: int = 0  # when its first step began, ns of the clock
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of its full pages, as far as anybody asked
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.rng = random.Random(self.sampling.seed % 2**64)  # of a negative seed it takes the absolute value

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be run through the model: 1 when decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        """Tokens produced so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def tells_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are wanted and not all there yet."""
        return self.num_prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt) - 1

    def take_prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """What was wanted of the prompt, once; None where nothing was."""
        if self.num_prompt_logprobs is None:
            return None
        self.num_prompt_logprobs = None
        return self.prompt_logprobs

    def finish_reason(self) -> str | None:
        """`stop`, `length`, or None while it goes on; asked after each output token."""
        if self.tokens[-1] in self.stop_tokens:
            return "stop"
        return "length" if self.num_output == self.max_tokens else None

"""Made-up conversations: each turn's prompt is all that was said before and a new question."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from stackrace.harness.errors import UsageError, require
from stackrace.harness.types import Request
from stackrace.workloads.lengths import Lengths
from stackrace.workloads.think import Think
from stackrace.workloads.tokens import RandomTokens, digits


@dataclass(frozen=True, kw_only=True)
class Sessions(RandomTokens):
    """Random token ids, in sessions.

    A prompt is the one of the turn before, an answer of as many tokens as that turn asks, and the new question. The
    answer in it is drawn beforehand, not what the server said: so every stack is asked the same. A session begins with
    the system prompt that all share, then spells its number.
    """

    turns: Lengths  # of a session
    input_lengths: Lengths  # of each question
    output_lengths: Lengths
    system_tokens: int
    think: Think

    def __post_init__(self) -> None:
        super().__post_init__()
        require("workload.system_tokens", self.system_tokens, int, lambda v: v >= 0, "a whole number, 0 for none")

    def requests(self, rng: np.random.Generator) -> Iterator[Request]:
        """Session after session, without end; lengths, tokens and think times come from streams of their own."""
        lengths, bodies, common, thinks = rng.spawn(4)
        system = tuple(self.draw(common, self.system_tokens).tolist())
        ids = count()
        for session in count():
            history = system
            for turn in range(self.turns.draw(lengths)):
                n_input, n_output = self.input_lengths.draw(lengths), self.output_lengths.draw(lengths)
                history += self._question(session, turn, n_input, bodies)
                id, think = next(ids), self.think.draw(thinks) if turn else 0.0
                yield Request(id, history, n_output, self.sampling(id), None, session, turn, think)
                history += tuple(self.draw(bodies, n_output).tolist())

    def _question(self, session: int, turn: int, n: int, rng: np.random.Generator) -> tuple[int, ...]:
        if turn:
            return tuple(self.draw(rng, n).tolist())
        if n < (least := len(digits(session, self.num_ordinary))):
            raise UsageError(
                f"a first question of {n} tokens cannot make session {session} unique: let lengths.input give at "
                f"least {least}"
            )
        return tuple(self.own(rng, n, session).tolist())

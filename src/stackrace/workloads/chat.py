"""Another workload's lengths asked as chats: made-up messages that become exactly so many tokens by the template."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stackrace.harness.errors import UsageError
from stackrace.harness.types import Request, Workload
from stackrace.workloads import text
from stackrace.workloads.tokens import digits

_TRIES = 50  # drawings of the words, until their tokens come out right
_VARIABLES = {"add_generation_prompt": True}  # as a server renders it for an answer

Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Each request of `asked` as a conversation with as many tokens as its prompt has, the template's own included.

    It keeps lengths, times, sessions and sampling; of the prompts nothing else, so shared prefixes only within a
    session, whose answers are made up, too. Words are random, the first ones spell the request's number.
    """

    asked: Workload
    tokenizer: str
    vocab_size: int

    @property
    def is_finite(self) -> bool:
        """Whether what is asked ends by itself."""
        return bool(getattr(self.asked, "is_finite", False))

    def requests(self, rng: np.random.Generator) -> Iterator[Request]:
        """As many as `asked` has, of the very lengths that it would ask."""
        writer = _Writer(self.tokenizer, self.vocab_size, rng)
        talks: dict[int, Messages] = {}
        for request in self.asked.requests(rng):
            before = talks.get(request.session, ()) if request.session is not None else ()
            messages, prompt = writer.write(before, request.id, len(request.prompt))
            if request.session is not None:
                talks[request.session] = (*messages, ("assistant", writer.words(request.output_tokens, request.id)))
            yield replace(request, prompt=tuple(prompt), messages=messages)


class _Writer:
    """Makes up messages of a known number of tokens."""

    def __init__(self, path: str, vocab_size: int, rng: np.random.Generator) -> None:
        self._encoder = text.Encoder(path, vocab_size)
        self._words = text.words(self._encoder.tokenizer)
        if len(self._words) < 2:
            raise UsageError(f"workload.tokenizer={path}: it has no words of one token to write chats with")
        seeds = rng.bit_generator.seed_seq
        self._key = [int(word) for word in seeds.generate_state(4)]  # takes nothing from `rng`, nor its children

    def write(self, before: Messages, number: int, length: int) -> tuple[Messages, list[int]]:
        """The conversation `before` with one more question, and its ids: `length` of them. UsageError: impossible."""
        rng, spelled = self._stream(number, 0), self._spelled(number)
        least = len(self._ids((*before, ("user", " ".join(spelled)))))
        if length < least:
            raise UsageError(self._too_short(number, length, least, bool(before)))
        count = length - least
        for _ in range(_TRIES):
            messages = (*before, ("user", " ".join([*spelled, *self._draw(rng, count)])))
            ids = self._ids(messages)
            if len(ids) == length:
                return messages, ids
            count = max(0, count + length - len(ids))
        raise UsageError(
            f"workload.tokenizer={self._encoder.path}: found no chat of exactly {length} tokens: ask others"
        )

    def words(self, count: int, number: int) -> str:
        """An answer of `count` words."""
        return " ".join(self._draw(self._stream(number, 1), count))

    def _too_short(self, number: int, length: int, least: int, is_later: bool) -> str:
        what = "what was said before and the template" if is_later else "the template"
        return (
            f"lengths: request {number} asks a chat of {length} tokens, but {what} with a question that nobody else "
            f"asks need {least}: lengthen lengths.input"
        )

    def _ids(self, messages: Messages) -> list[int]:
        spoken = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._encoder.encode(self._encoder.tokenizer.render(spoken, _VARIABLES), special=False)
        except ValueError as e:
            raise UsageError(f"workload.tokenizer={self._encoder.path}: {e}") from None

    def _stream(self, number: int, use: int) -> np.random.Generator:
        return np.random.default_rng([*self._key, number, use])

    def _spelled(self, number: int) -> list[str]:
        return [self._words[digit] for digit in digits(number, len(self._words))]

    def _draw(self, rng: np.random.Generator, count: int) -> Sequence[str]:
        return [self._words[i] for i in rng.integers(len(self._words), size=count)]

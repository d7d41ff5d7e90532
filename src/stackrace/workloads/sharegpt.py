"""Recorded conversations in ShareGPT's format: real texts, and as many output tokens as the recorded answers have."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson

from stackrace.harness.errors import UsageError, require
from stackrace.harness.types import Request
from stackrace.workloads.skipped import Skipped, absolute, cannot_read, check_max_tokens, check_policy
from stackrace.workloads.text import Encoder
from stackrace.workloads.think import Think
from stackrace.workloads.tokens import Sampled

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

Tokens = list[int]


@dataclass(frozen=True, kw_only=True)
class ShareGPT(Sampled):
    """A JSON list of `{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}`, shuffled.

    A later turn's prompt is the recorded history and the next question, token sequences put end to end.
    """

    path: str
    tokenizer: str
    vocab_size: int
    max_turns: int  # 1: the first question alone
    max_tokens: int | None  # of prompt and answer together; a conversation ends before the turn that has more
    think: Think
    on_bad_entry: str  # error or skip
    is_finite: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require("workload.max_turns", self.max_turns, int, lambda v: v > 0, "a whole number above 0")
        check_max_tokens(self.max_tokens)
        check_policy("workload.on_bad_entry", self.on_bad_entry)

    def requests(self, rng: np.random.Generator) -> Iterator[Request]:
        """Every conversation once, in random order; with `max_turns` above 1 each is a session."""
        order, thinks = rng.spawn(2)
        ids = count()
        for session, turns in enumerate(self._conversations(order)):
            history: list[int] = []
            for turn, (question, answer) in enumerate(turns):
                history = history + question
                if self.max_tokens is not None and len(history) + len(answer) > self.max_tokens:
                    break
                id, think = next(ids), self.think.draw(thinks) if turn else 0.0
                place = (None, None) if self.max_turns == 1 else (session, turn)
                yield Request(id, tuple(history), len(answer), self.sampling(id), None, place[0], place[1], think)
                history = history + answer
        if not next(ids):
            raise UsageError(f"workload.path={self.path}: no conversation in it that could be asked")

    def _conversations(self, order: np.random.Generator) -> Iterator[list[tuple[Tokens, Tokens]]]:
        """Questions and answers; UsageError for a bad entry, or how many were skipped on stderr."""
        encoder, entries = Encoder(self.tokenizer, self.vocab_size), self._entries()
        skipped, num_read = Skipped(self.path, "workload.on_bad_entry", self.on_bad_entry), 0
        try:
            for index in order.permutation(len(entries)).tolist():
                num_read += 1
                try:
                    turns = _encoded(_turns(entries[index], self.max_turns), encoder)
                except ValueError as e:
                    skipped.add(f"entry {index}", e)
                    continue
                yield turns
        finally:
            skipped.tell(f"{num_read} entries")

    def _entries(self) -> Sequence[Any]:
        path = absolute(self.path)
        try:
            return _read(path, path.stat().st_mtime_ns)
        except OSError as e:
            raise cannot_read(self.path, e) from None
        except ValueError as e:
            raise UsageError(f"workload.path={self.path}: {e}: give a JSON list of conversations") from None


@lru_cache(1)  # a schedule is drawn more than once
def _read(path: Path, changed: int) -> Sequence[Any]:
    entries = orjson.loads(path.read_bytes())
    if not isinstance(entries, list):
        raise ValueError("not a list")
    return entries


def _turns(entry: object, most: int) -> list[tuple[str, str]]:
    """The first questions with their answers; a last question without one is passed over. ValueError: what is wrong."""
    said = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
        raise ValueError("it has no list of conversations")
    said = said[: 2 * most]
    for number, (one, expected) in enumerate(zip(said, ["user", "assistant"] * most, strict=False)):
        if _ROLES.get(str(one.get("from"))) != expected:
            raise ValueError(f"message {number} is from {one.get('from')!r}, where the {expected} should speak")
        if not isinstance(one.get("value"), str):
            raise ValueError(f"message {number} has no text in value")
    texts = [one["value"] for one in said]
    pairs = list(zip(texts[::2], texts[1::2], strict=False))
    if not pairs:
        raise ValueError("it has no question with an answer")
    return pairs


def _encoded(turns: list[tuple[str, str]], encoder: Encoder) -> list[tuple[Tokens, Tokens]]:
    """Token ids of questions and answers. ValueError: one has none."""
    pairs = []
    for turn, (question, answer) in enumerate(turns):
        asked, answered = encoder.encode(question, special=turn == 0), encoder.encode(answer, special=False)
        if not asked or not answered:
            raise ValueError(f"the {'answer' if asked else 'question'} of turn {turn} has no tokens")
        pairs.append((asked, answered))
    return pairs

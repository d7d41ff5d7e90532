"""Replays of recorded traces: lengths, times and, where they are told, shared prefixes; the tokens are made up."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from math import inf
from typing import ClassVar

import numpy as np

from stackrace.harness.clock import SECOND
from stackrace.harness.errors import UsageError, require
from stackrace.harness.types import Request
from stackrace.workloads.skipped import Skipped, absolute, cannot_read, check_max_tokens, check_policy
from stackrace.workloads.tokens import RandomTokens
from stackrace.workloads.trace_formats import BLOCK, Format, Line, Parse

_BLOCKS = 1 << 40  # that can be told apart by the token ids that spell their id
_KEPT_BLOCKS = 1 << 13

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Trace(RandomTokens):
    """Requests of a file, each due as long after the first one as it was recorded, divided by `speed`."""

    path: str
    format: Format
    speed: float
    begin: float  # seconds of the trace that are passed over
    seconds: float | None  # how much of the trace is asked from there, at its own speed; None: the rest
    max_tokens: int | None  # of input and output together; longer requests are left out
    on_bad_line: str  # error or skip
    is_finite: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number = (int, float)
        require("workload.speed", self.speed, number, lambda v: 0 < v < inf, "above 0")
        require("workload.begin", self.begin, number, lambda v: 0 <= v < inf, "a number of seconds, 0 or more")
        if self.seconds is not None:
            require("workload.seconds", self.seconds, number, lambda v: v > 0, "a number of seconds above 0, or null")
        check_max_tokens(self.max_tokens)
        check_policy("workload.on_bad_line", self.on_bad_line)

    def requests(self, rng: np.random.Generator) -> Iterator[Request]:
        """The requests of the window, in the order of the file; its end is theirs."""
        bodies, keys = rng.spawn(2)
        block = self._block_maker(int(keys.integers(1 << 62)))
        first: int | None = None
        for number, line in enumerate(self._wanted()):
            first = line.time if first is None else first
            prompt = self._prompt(line, number, bodies, block)
            due = (line.time - first) / SECOND / self.speed
            yield Request(number, prompt, line.output_tokens, self.sampling(number), due)
        if first is None:
            raise UsageError(f"workload.path={self.path}: no request in it, or in the part that was chosen of it")

    def _prompt(self, line: Line, number: int, rng: np.random.Generator, block: Callable[[int], Tokens]) -> Tokens:
        if line.blocks is None:
            return tuple(self.own(rng, line.input_tokens, number).tolist())
        return tuple(islice(chain.from_iterable(map(block, line.blocks)), line.input_tokens))

    def _block_maker(self, key: int) -> Callable[[int], Tokens]:
        """Tokens by a block's id alone, beginning with its spelled id, so that other ids differ from the first on."""

        @lru_cache(_KEPT_BLOCKS)
        def block(id: int) -> Tokens:
            return tuple(self.own(np.random.default_rng([key, id]), BLOCK, id, _BLOCKS).tolist())

        return block

    def _wanted(self) -> Iterator[Line]:
        """Lines of the window that are not too long."""
        begin: int | None = None
        end = inf if self.seconds is None else self.begin + self.seconds
        for line in self._lines():
            begin = line.time if begin is None else begin
            at = (line.time - begin) / SECOND
            if at >= end:
                return
            is_short = self.max_tokens is None or line.input_tokens + line.output_tokens <= self.max_tokens
            if at >= self.begin and is_short:
                yield line

    def _lines(self) -> Iterator[Line]:
        """Good lines; UsageError for a bad one, or how many were skipped on stderr."""
        skipped, number, latest = Skipped(self.path, "workload.on_bad_line", self.on_bad_line), 0, -inf
        try:
            with absolute(self.path).open(encoding="utf-8", errors="replace") as file:
                texts = enumerate(file, start=1)
                parse = self._open(text for _, text in texts)
                for number, text in texts:
                    if not text.strip():
                        continue
                    try:
                        line = parse(text)
                        if line.time < latest:
                            raise ValueError("its time lies before that of the line before")
                    except ValueError as e:
                        skipped.add(f"line {number}", e)
                        continue
                    latest = line.time
                    yield line
        except OSError as e:
            raise cannot_read(self.path, e) from None
        finally:
            skipped.tell(f"{number} lines")

    def _open(self, lines: Iterator[str]) -> Parse:
        try:
            return self.format.open(lines)
        except ValueError as e:
            raise UsageError(f"workload.path={self.path}: line 1: {e}: is it another format?") from None

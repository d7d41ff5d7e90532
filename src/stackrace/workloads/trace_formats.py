"""Formats of published traces: each turns a line into when, how long a prompt, how long an output."""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import orjson

from stackrace.harness.clock import SECOND

BLOCK = 512  # tokens of a block of a Mooncake trace
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Line(NamedTuple):
    """One request of a trace."""

    time: int  # nanoseconds, from whatever the trace counts from
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] | None = None  # ids of the prompt's blocks: equal ids, equal tokens


Parse = Callable[[str], Line]


class Format(Protocol):
    """How a trace is written."""

    def open(self, lines: Iterator[str]) -> Parse:
        """What parses a line; takes the heading off `lines`, if there is one. ValueError: what is wrong with it."""
        ...


@dataclass(frozen=True)
class Mooncake:
    """JSON lines: `timestamp` in milliseconds, `input_length`, `output_length`, `hash_ids`."""

    def open(self, lines: Iterator[str]) -> Parse:
        """There is no heading."""
        return self._parse

    def _parse(self, text: str) -> Line:
        try:
            fields = orjson.loads(text)
        except orjson.JSONDecodeError as e:
            raise ValueError(f"not JSON: {e}") from None
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        n_input, n_output = _count(fields, "input_length"), _count(fields, "output_length")
        time = round(_time(fields, "timestamp") * (SECOND // 1000))
        return Line(time, n_input, n_output, _blocks(fields, n_input))


@dataclass(frozen=True)
class Azure:
    """CSV: TIMESTAMP as date and time of day, ContextTokens, GeneratedTokens."""

    def open(self, lines: Iterator[str]) -> Parse:
        """Columns may come in any order."""
        return _csv(lines, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), self._line)

    def _line(self, fields: Mapping[str, str]) -> Line:
        text = fields["TIMESTAMP"]
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"TIMESTAMP={text!r} is no date and time") from None
        since = time.replace(tzinfo=time.tzinfo or UTC) - _EPOCH
        microseconds = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
        return Line(microseconds * 1000, _count(fields, "ContextTokens"), _count(fields, "GeneratedTokens"))


@dataclass(frozen=True)
class BurstGPT:
    """CSV: Timestamp in seconds, Request tokens, Response tokens; all else, sessions too, is passed over."""

    def open(self, lines: Iterator[str]) -> Parse:
        """Columns may come in any order."""
        return _csv(lines, ("Timestamp", "Request tokens", "Response tokens"), self._line)

    def _line(self, fields: Mapping[str, str]) -> Line:
        n_input, n_output = _count(fields, "Request tokens"), _count(fields, "Response tokens")
        return Line(round(_time(fields, "Timestamp") * SECOND), n_input, n_output)


def _csv(lines: Iterator[str], needed: Sequence[str], to_line: Callable[[Mapping[str, str]], Line]) -> Parse:
    heading = [name.strip().removeprefix("\ufeff") for name in next(csv.reader([next(lines, "")]), [])]
    if lacking := [name for name in needed if name not in heading]:
        raise ValueError(f"the heading lacks {', '.join(lacking)}")

    def parse(text: str) -> Line:
        values = next(csv.reader([text]))
        if len(values) != len(heading):
            raise ValueError(f"{len(values)} fields under {len(heading)} headings")
        return to_line(dict(zip(heading, values, strict=True)))

    return parse


def _count(fields: Mapping[str, Any], name: str) -> int:
    """A number of tokens: whole, above 0."""
    value = _given(fields, name)
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is no whole number")
    if value <= 0:
        raise ValueError(f"{name}={value} is not above 0")
    return value


def _time(fields: Mapping[str, Any], name: str) -> float:
    """A time, in whatever unit: finite, 0 or more."""
    value = _given(fields, name)
    try:
        time = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        time = math.nan
    if not 0 <= time < math.inf:
        raise ValueError(f"{name}={value!r} is no time: a number, 0 or more")
    return time


def _given(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ValueError(f"{name} is missing")
    return fields[name]


def _blocks(fields: Mapping[str, Any], input_tokens: int) -> tuple[int, ...]:
    ids = _given(fields, "hash_ids")
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError("hash_ids is no list of whole numbers")
    needed = -(-input_tokens // BLOCK)
    if len(ids) != needed:
        raise ValueError(f"{len(ids)} hash_ids, but {input_tokens} tokens are {needed} blocks of {BLOCK}")
    return tuple(ids)

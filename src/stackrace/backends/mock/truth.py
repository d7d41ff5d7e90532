"""What was really sent, and when."""

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

Marks = tuple[int, ...]
"""Tokens of each event that one send completes."""


class Record:
    """One request: when it had come and when each send left, in ns of the clock."""

    __slots__ = ("arrived", "marks", "seed", "sent", "status")

    def __init__(self, seed: int | None, arrived: int, status: int) -> None:
        self.seed = seed
        self.arrived = arrived
        self.status = status
        self.sent = array("q")
        self.marks: Iterable[Marks] = ()  # read once

    def events(self) -> Iterator[tuple[int, int]]:
        """Time and tokens of each event."""
        for at, marks in zip(self.sent, self.marks, strict=False):  # not all may have been sent
            for tokens in marks:
                yield at, tokens


class Truth:
    """The records since they were last asked for."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def record(self, seed: int | None, arrived: int, status: int) -> Record:
        """A new record, to be filled while the request is served."""
        record = Record(seed, arrived, status)
        self._records.append(record)
        return record

    def take(self) -> bytes:
        """JSON of all of them, which are then forgotten; a request in flight is told as far as it has come."""
        records, self._records = self._records, []
        return b'{"requests":[' + b",".join(orjson.dumps(_row(r)) for r in records) + b"]}"


def _row(record: Record) -> dict[str, Any]:
    events = list(record.events())
    return {
        "seed": record.seed,
        "arrived": record.arrived,
        "status": record.status,
        "sent": [at for at, _ in events],
        "tokens": [tokens for _, tokens in events],
    }

"""What was really sent, and when."""

from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import orjson

Marks = tuple[int, ...]
"""Tokens of each event that one send completes."""


@dataclass(slots=True)
class Record:
    """One request: when it had come, how it was answered, and what each of its sends completes."""

    seed: int | None
    arrived: int  # ns
    status: int
    marks: Iterable[Marks] = ()  # read once
    gone: int | None = None  # ns, when the client went away


class Log:
    """The time (ns) just before each send, and the order of the sender: two arrays that grow, or nothing."""

    def __init__(self, is_on: bool) -> None:
        self._times, self._orders = array("q"), array("q")
        nothing: Callable[[Any], object] = deque(maxlen=0).append  # no Python function is as quick
        self.time: Callable[[int], object] = self._times.append if is_on else nothing
        self.order: Callable[[int], object] = self._orders.append if is_on else nothing

    def take(self, orders: Iterable[int]) -> dict[int, list[int]]:
        """Times of the sends of these senders; all are forgotten."""
        times: dict[int, list[int]] = {order: [] for order in orders}
        for at, order in zip(self._times, self._orders, strict=True):
            if order in times:
                times[order].append(at)
        del self._times[:], self._orders[:]
        return times


class Truth:
    """The requests since it was last asked for."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._records: dict[int, Record] = {}

    def record(self, order: int, seed: int | None, arrived: int, status: int) -> Record:
        """A new record for the request that this sender answers."""
        self._records[order] = record = Record(seed, arrived, status)
        return record

    def take(self) -> bytes:
        """JSON of all of them, which are then forgotten; a request in flight is told as far as it has come."""
        records, self._records = self._records, {}
        times = self._log.take(records)
        return b'{"requests":[' + b",".join(_row(r, times[order]) for order, r in records.items()) + b"]}"


def _row(record: Record, times: list[int]) -> bytes:
    sent = times if record.gone is None else [at for at in times if at < record.gone]
    events = [(at, tokens) for at, marks in zip(sent, record.marks, strict=False) for tokens in marks]
    row = {
        "seed": record.seed,
        "arrived": record.arrived,
        "status": record.status,
        "sent": [at for at, _ in events],
        "tokens": [tokens for _, tokens in events],
    }
    return orjson.dumps(row)

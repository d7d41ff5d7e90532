"""The schedule: what is asked and when, frozen before the race, hashed, saved, replayed unchanged."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stackrace.harness.clock import SECOND
from stackrace.harness.errors import UsageError
from stackrace.harness.types import Arrival, Request, Sampling, Workload
from stackrace.workloads.arrivals import Recorded

_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("due", pa.int64()),  # nanoseconds after the start
        ("prompt", pa.list_(pa.int32())),
        ("output_tokens", pa.int64()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("top_k", pa.int64()),
        ("seed", pa.int64()),
        ("session", pa.int64()),
        ("turn", pa.int64()),
        ("think", pa.float64()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)


@dataclass(frozen=True)
class Schedule:
    """Requests and, for each, when it is due in nanoseconds after the start, ascending."""

    requests: tuple[Request, ...]
    due: tuple[int, ...]

    @property
    def is_immediate(self) -> bool:
        """Everything is due at the start: with a concurrency cap, a closed loop."""
        return not any(self.due)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over every value, independent of file formats and library versions."""
        digest = hashlib.sha256(b"stackrace schedule 2")
        digest.update(np.array(self.due, dtype="<i8").tobytes())
        for r in self.requests:
            sampling = (r.sampling.temperature, r.sampling.top_p, r.sampling.top_k, r.sampling.seed)
            shape = (r.id, r.output_tokens, sampling, r.session, r.turn, r.think, r.messages, len(r.prompt))
            digest.update(repr(shape).encode())
            digest.update(np.array(r.prompt, dtype="<i4").tobytes())
        return digest.hexdigest()

    @cached_property
    def sessions(self) -> list[list[int]]:
        """Positions of each session's turns, sessions in the order of their first; a request without one is one."""
        found: dict[object, list[int]] = {}
        for position, request in enumerate(self.requests):
            key = ("request", position) if request.session is None else ("session", request.session)
            found.setdefault(key, []).append(position)
        return [sorted(positions, key=lambda p: self.requests[p].turn or 0) for positions in found.values()]

    @cached_property
    def repeated_tokens(self) -> int:
        """Prompt tokens that continue a prefix which an earlier prompt has, too: what a perfect prefix cache saves.

        Each distinct prefix is new once, whichever prompt comes first, so neither does their order matter, nor is
        more to be compared than neighbours in sorted order.
        """
        prompts = sorted(np.array(r.prompt, dtype=">u4").tobytes() for r in self.requests)
        return sum(_common_prefix(a, b) for a, b in pairwise(prompts))

    def save(self, path: Path) -> None:
        """Write as parquet."""
        rows = zip(self.requests, self.due, strict=True)
        table = pa.Table.from_pylist([_row(request, due) for request, due in rows], schema=_SCHEMA)
        pq.write_table(table, path, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> "Schedule":
        """Read what `save` wrote; the hash is the same."""
        rows = pq.read_table(path, schema=_SCHEMA).to_pylist()
        return cls(tuple(_request(r) for r in rows), tuple(r["due"] for r in rows))


def draw(
    workload: Workload, arrival: Arrival, seed: int, max_requests: int | None, max_seconds: float | None
) -> Schedule:
    """Freeze a schedule: at most `max_requests`, none due at or after `max_seconds`.

    Prompts and arrivals come from streams of their own, so that another rate asks the same prompts. Sessions arrive,
    not requests: all turns of one are due with its first. `max_requests` may end the last session early.
    """
    prompts, times = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    pairs = _timed(workload.requests(prompts), None if isinstance(arrival, Recorded) else arrival(times))
    if max_seconds is not None:
        end = max_seconds * SECOND
        pairs = takewhile(lambda pair: pair[1] < end, pairs)
    kept = sorted(islice(pairs, max_requests), key=lambda pair: pair[1])
    if not kept:
        raise UsageError(f"no request is due within stop.seconds={max_seconds}: raise it or the rate")
    return Schedule(tuple(r for r, _ in kept), tuple(due for _, due in kept))


def _timed(requests: Iterator[Request], times: Iterator[float] | None) -> Iterator[tuple[Request, int]]:
    """Each request with its due time in nanoseconds: by `times`, or else by its own."""
    began: dict[int, int] = {}  # sessions, and when they are due
    for request in requests:
        if request.session in began:
            yield request, began[request.session]
            continue
        offset = _own_time(request) if times is None else next(times, None)
        if offset is None:
            return
        due = round(offset * SECOND)
        if request.session is not None:
            began[request.session] = due
        yield request, due


def _own_time(request: Request) -> float:
    if request.due is None:
        raise UsageError("arrival=recorded: this workload has no times of its own: choose another, as arrival=poisson")
    return request.due


def _common_prefix(a: bytes, b: bytes) -> int:
    """Tokens of four bytes that both begin with."""
    count = min(len(a), len(b)) // 4
    differs = np.frombuffer(a, ">u4", count) != np.frombuffer(b, ">u4", count)
    return int(differs.argmax()) if differs.any() else count


def _row(request: Request, due: int) -> dict[str, object]:
    s = request.sampling
    return {
        "id": request.id,
        "due": due,
        "prompt": request.prompt,
        "output_tokens": request.output_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k,
        "seed": s.seed,
        "session": request.session,
        "turn": request.turn,
        "think": request.think,
        "messages": request.messages and [{"role": role, "content": content} for role, content in request.messages],
    }


def _request(row: dict[str, Any]) -> Request:
    sampling = Sampling(row["temperature"], row["top_p"], row["top_k"], row["seed"])
    return Request(
        id=row["id"],
        prompt=tuple(row["prompt"]),
        output_tokens=row["output_tokens"],
        sampling=sampling,
        session=row["session"],
        turn=row["turn"],
        think=row["think"],
        messages=row["messages"] and tuple((m["role"], m["content"]) for m in row["messages"]),
    )

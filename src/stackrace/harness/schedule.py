"""The schedule: what is asked and when, frozen before the race, hashed, saved, replayed unchanged."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stackrace.harness.clock import SECOND
from stackrace.harness.errors import UsageError
from stackrace.harness.types import Arrival, Request, Sampling, Workload

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

    Prompts and arrivals come from streams of their own, so that another rate asks the same prompts.
    """
    prompts, times = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    pairs: Iterator[tuple[Request, int]] = (
        (request, round((request.due if request.due is not None else offset) * SECOND))
        for request, offset in zip(workload.requests(prompts), arrival(times), strict=False)
    )
    if max_seconds is not None:
        end = max_seconds * SECOND
        pairs = takewhile(lambda pair: pair[1] < end, pairs)
    kept = sorted(islice(pairs, max_requests), key=lambda pair: pair[1])
    if not kept:
        raise UsageError(f"no request is due within stop.seconds={max_seconds}: raise it or the rate")
    return Schedule(tuple(r for r, _ in kept), tuple(due for _, due in kept))


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

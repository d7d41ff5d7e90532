"""What the harness and its load generator's process tell each other, and how it is framed on a pipe."""

import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from stackrace.harness.load.driver import Capture
from stackrace.harness.schedule import Schedule
from stackrace.harness.types import Endpoint

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one worker is to do; seconds."""

    endpoint: Endpoint
    schedule: Path
    warmup: Schedule
    warmup_concurrency: int
    concurrency: int | None
    seconds: float | None
    drain: float
    connect_timeout: float
    request_timeout: float
    stall_timeout: float
    cores: tuple[int, ...]


class WarmedUp(NamedTuple):
    """The warm-up is over."""

    seconds: float
    failed: int
    first_error: str | None


class Started(NamedTuple):
    """The race is on; `start` is the clock's zero of this run."""

    start: int


class Tick(NamedTuple):
    """Where the race stands."""

    in_flight: int


class Health(NamedTuple):
    """How the worker itself fared while the clock ran; seconds."""

    loop_lag_p50: float
    loop_lag_p99: float
    loop_lag_max: float
    cpu_share: float
    reads: int
    seconds: float


Message = WarmedUp | Started | Tick | Health | Capture


def encode(message: Job | Message) -> bytes:
    """Length and pickle; both ends are processes of ours."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


def read(stream: IO[bytes]) -> Any:
    """The next message, None at the end of the stream. `stream` must be buffered, or a read may come up short."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return pickle.loads(stream.read(_LENGTH.unpack(head)[0]))

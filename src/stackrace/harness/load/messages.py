"""What the processes of a race tell each other, and how it is framed on a pipe.

    harness --Job, Round, Enough, Go--> workers --Cold, RoundDone, Ready, Started, Offsets, Tick, Parcel, Health-->
    parser --> harness

The parser turns each Capture in a Parcel into a Finished, and keeps each worker's Offsets; all else it passes on.
"""

import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from stackrace.harness.load.health import Health
from stackrace.harness.load.slots import SlotTable
from stackrace.harness.load.stamps import Offset
from stackrace.harness.schedule import Schedule
from stackrace.harness.types import Endpoint, Record

LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the load generator is to do; seconds."""

    endpoint: Endpoint
    schedule: Path
    sessions: int  # of the schedule
    concurrency: int | None
    seconds: float | None
    drain: float
    connect_timeout: float
    request_timeout: float
    stall_timeout: float
    workers: int
    cores: tuple[int, ...]  # the workers'
    parser_cores: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """One worker's part."""

    job: Job
    worker: int
    slots: SlotTable | None
    warms_up: bool  # it asks for rounds before it is ready


class Cold(NamedTuple):
    """A worker asks for the first round of the warm-up."""

    worker: int


class Round(NamedTuple):
    """To a worker that asked: warm up with these requests, so many at a time."""

    schedule: Schedule
    concurrency: int


class RoundDone(NamedTuple):
    """A round of the warm-up is over; the worker waits for another, or Enough."""

    requests: int
    seconds: float
    ttft: float | None  # median of those that brought a token, seconds from when each was sent
    tpot: float | None  # likewise, of those that brought a second chunk
    failed: int
    first_error: str | None


class Enough(NamedTuple):
    """To a worker that asked for a round: none follows."""


class Ready(NamedTuple):
    """A worker has built its requests, is done with the warm-up and has opened its connections."""

    worker: int


class Go(NamedTuple):
    """To every worker: the race starts at this nanosecond of CLOCK_MONOTONIC."""

    start: int


class Started(NamedTuple):
    """A worker is on its way; `start` is the clock's zero of this run."""

    worker: int
    start: int


class Offsets(NamedTuple):
    """Samples of the clocks' offset, the last one taken just now."""

    samples: list[Offset]


class Tick(NamedTuple):
    """Where a worker stands."""

    worker: int
    in_flight: int
    time: int  # ns of CLOCK_MONOTONIC, as below
    heard: int  # when a byte last came, or this worker's race began
    stalled: int | None  # when a request was last given up for silence


class Finished(NamedTuple):
    """A request has ended; its record's id is its position in the schedule."""

    record: Record
    stamped: bool  # by the kernel, every read of it


Message = Cold | RoundDone | Ready | Started | Tick | Health | Finished
"""What reaches the harness."""


def encode(message: object) -> bytes:
    """Length and pickle; both ends are processes of ours."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(body)) + body


def read(stream: IO[bytes]) -> Any:
    """The next message, None at the end of the stream. `stream` must be buffered, or a read may come up short."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    body = stream.read(LENGTH.unpack(head)[0])
    return pickle.loads(body)


class Unframer:
    """Messages from bytes that come in any pieces."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that `data` completes."""
        self._rest += data
        found, at = [], 0
        while len(self._rest) - at >= LENGTH.size:
            end = at + LENGTH.size + LENGTH.unpack_from(self._rest, at)[0]
            if len(self._rest) < end:
                break
            found.append(pickle.loads(memoryview(self._rest)[at + LENGTH.size : end].tobytes()))
            at = end
        del self._rest[:at]
        return found

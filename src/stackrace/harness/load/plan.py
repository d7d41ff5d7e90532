"""What one worker is to send and when: its share of a schedule, on the clock."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from stackrace.harness.clock import SECOND
from stackrace.harness.schedule import Schedule


class Start(NamedTuple):
    """A request that the schedule makes due: one by itself, or the first turn of a session."""

    position: int  # in the schedule
    ticket: int  # in the order of all workers' starts
    due: int


class Turn(NamedTuple):
    """A request that waits for the turn before it, and then `think` nanoseconds more."""

    position: int
    think: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Times are absolute nanoseconds of CLOCK_MONOTONIC, spans nanoseconds."""

    payloads: Mapping[int, bytes]  # by position
    starts: list[Start]  # due ascending
    following: Mapping[int, Turn]  # by the position of the turn before
    is_closed: bool  # due when a slot comes free
    cutoff: int | None  # nothing is sent from here on
    drain: int  # what is in flight at the cutoff is still waited for
    request_timeout: int  # from when it was let go
    stall_timeout: int  # without a byte


@dataclass(frozen=True)
class Share:
    """One worker's part of a schedule: every n-th session, a request without one being a session of one turn."""

    starts: list[Start]  # due: nanoseconds after the start of the race
    following: dict[int, Turn]

    @property
    def positions(self) -> list[int]:
        """What this worker sends."""
        return [s.position for s in self.starts] + [t.position for t in self.following.values()]

    @classmethod
    def of(cls, schedule: Schedule, worker: int, workers: int) -> "Share":
        """The share of worker number `worker` of `workers`."""
        starts, following = [], {}
        for ticket, positions in enumerate(schedule.sessions):
            if ticket % workers != worker:
                continue
            starts.append(Start(positions[0], ticket, schedule.due[positions[0]]))
            for before, position in pairwise(positions):
                following[before] = Turn(position, round(schedule.requests[position].think * SECOND))
        return cls(starts, following)

"""When the sends of one request are due."""

import random
from collections.abc import Iterator
from itertools import repeat

from stackrace.backends.mock.behaviour import Behaviour
from stackrace.harness.clock import SECOND


def nanoseconds(seconds: float) -> int:
    """Whole nanoseconds."""
    return round(seconds * SECOND)


def due_times(b: Behaviour, first: int, sends: int, stalls_at: int | None, rng: random.Random) -> Iterator[int]:
    """Nanoseconds of each send: `first`, then a gap apart; the pause comes before send number `stalls_at`."""
    gap = nanoseconds(b.gap)
    if b.jitter or stalls_at is not None:
        times = _uneven(b, first, sends, stalls_at, rng)
    else:
        times = iter(range(first, first + sends * gap, gap)) if gap else repeat(first, sends)
    return (-(-at // gap) * gap for at in times) if b.in_step else times


def _uneven(b: Behaviour, first: int, sends: int, stalls_at: int | None, rng: random.Random) -> Iterator[int]:
    at = float(first)
    for k in range(sends):
        at += nanoseconds(b.stall) if k == stalls_at else 0
        yield round(at)
        at += b.gap * (1 + b.jitter * rng.uniform(-1, 1)) * SECOND

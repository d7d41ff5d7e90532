"""Whether a process keeps what it should forget."""

import asyncio
import time
from typing import NamedTuple

import numpy as np
import psutil

EVERY = 0.25  # seconds
WARM_UP = 0.2  # of the time; allocators and caches fill in it
GROWTH = 10e6  # bytes from there to the end. Over 10^5 requests that is 125 bytes each, less than anything that a
# request could leave behind: its smallest objects (an id, a queue, a Timing) are larger.


class Growth(NamedTuple):
    """Bytes of resident memory, and bytes a second."""

    start: float  # the first sample
    warm: float  # where the line begins
    most: float
    end: float  # the last sample
    slope: float
    grown: float  # along the line, from the warm-up to the end


def fit(samples: list[tuple[float, float]]) -> Growth:
    """A straight line through (seconds, bytes) after the warm-up."""
    times, sizes = np.array(samples).T
    first, last = times[0], times[-1]
    warm = times >= first + WARM_UP * (last - first)
    slope, _ = np.polyfit(times[warm] - first, sizes[warm], 1) if sum(warm) > 1 else (0.0, 0.0)
    grown = slope * (last - times[warm][0])
    return Growth(sizes[0], sizes[warm][0], sizes.max(), sizes[-1], float(slope), float(grown))


async def watch(pid: int, samples: list[tuple[float, float]]) -> None:
    """Append the process's memory now and then, until cancelled."""
    process = psutil.Process(pid)
    while True:
        samples.append((time.monotonic(), process.memory_info().rss))
        await asyncio.sleep(EVERY)

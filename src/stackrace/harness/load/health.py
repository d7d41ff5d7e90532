"""What one worker sees of itself while the clock runs."""

import gc
import resource
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stackrace.harness.clock import SECOND, Alarms, now
from stackrace.harness.load import stamps

_HEARTBEAT = SECOND // 100
_SCHEDSTAT = Path("/proc/self/schedstat")


class Health(NamedTuple):
    """How a worker fared while the clock ran; seconds and shares. None: this system does not tell."""

    worker: int
    seconds: float
    loop_lag_p50: float
    loop_lag_p99: float
    loop_lag_max: float
    cpu_share: float  # of one core
    run_delay_share: float | None  # of the time, runnable but not on a core
    gc_collections: int
    gc_pause_max: float
    clock_step: float  # most that CLOCK_REALTIME moved against ours from one sample to the next
    clock_width: float  # how far apart the narrowest readings of the two clocks were, at worst


class Heart:
    """Beats every 10 ms and notes how late the loop let it; samples the offset of the clocks ten times a second."""

    def __init__(self, alarms: Alarms) -> None:
        self._alarms = alarms
        self._late: list[int] = []
        self._offsets = [stamps.sample_offset()]
        self._untold = list(self._offsets)
        self._collections = _Collections()
        self._since = now()
        self._next = self._since + _HEARTBEAT
        self._cpu, self._delay = _cpu_seconds(), _run_delay()
        self._asked, self._cpu_then = self._since, self._cpu
        alarms.at(self._next, self._beat)

    def new_offsets(self) -> list[stamps.Offset]:
        """Samples of the clocks' offset that were not told yet, one taken now among them."""
        self._sample()
        told, self._untold = self._untold, []
        return told

    def recent_cpu_share(self) -> float:
        """Of one core, since this was last asked."""
        then, self._asked = self._asked, now()
        cpu_then, self._cpu_then = self._cpu_then, _cpu_seconds()
        return (self._cpu_then - cpu_then) * SECOND / max(1, self._asked - then)

    def health(self, worker: int) -> Health:
        """Since the first beat."""
        seconds = (now() - self._since) / SECOND
        late = np.array(self._late or [0]) / SECOND
        p50, p99 = np.quantile(late, [0.5, 0.99], method="inverted_cdf")
        delay = _run_delay()
        return Health(
            worker=worker,
            seconds=seconds,
            loop_lag_p50=float(p50),
            loop_lag_p99=float(p99),
            loop_lag_max=float(late.max()),
            cpu_share=(_cpu_seconds() - self._cpu) / seconds,
            run_delay_share=None if delay is None or self._delay is None else (delay - self._delay) / seconds,
            gc_collections=self._collections.number,
            gc_pause_max=self._collections.longest,
            clock_step=stamps.largest_step(self._offsets),
            clock_width=max(o.width for o in self._offsets) / SECOND,
        )

    def stop(self) -> None:
        """Watch no longer for collections."""
        self._collections.stop()

    def _beat(self) -> None:
        self._late.append(now() - self._next)
        if len(self._late) % (stamps.SAMPLE_EVERY // _HEARTBEAT) == 0:
            self._sample()
        self._next += _HEARTBEAT  # never re-anchored: each beat that a long block swallowed is late by its own share
        self._alarms.at(self._next, self._beat)

    def _sample(self) -> None:
        offset = stamps.sample_offset()
        self._offsets.append(offset)
        self._untold.append(offset)


class _Collections:
    """Garbage collections and the longest of them, in seconds."""

    def __init__(self) -> None:
        self.number, self.longest = 0, 0.0
        self._began = 0
        gc.callbacks.append(self._on_collection)

    def stop(self) -> None:
        gc.callbacks.remove(self._on_collection)

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = now()
        else:
            self.number += 1
            self.longest = max(self.longest, (now() - self._began) / SECOND)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _run_delay() -> float | None:
    """Seconds that the main thread waited for a core, as the kernel counts (Linux)."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1]) / SECOND
    except (OSError, IndexError, ValueError):
        return None

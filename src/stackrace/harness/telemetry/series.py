"""One number of telemetry over time, and what it did in a window of the run."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from stackrace.harness.clock import SECOND
from stackrace.harness.observed import Window
from stackrace.harness.settling import Floats


class Series(NamedTuple):
    """Readings in order of time."""

    times: Floats  # seconds after the start
    values: Floats

    def within(self, window: Window) -> Floats:
        """The values read in the window."""
        return self.values[window.holds(self.times)]

    def around(self, window: Window) -> Floats:
        """Those, the last one before it and the first one after it."""
        first = max(int(np.searchsorted(self.times, window.begin, "right")) - 1, 0)
        last = int(np.searchsorted(self.times, window.end, "left")) + 1
        return self.values[first:last]

    def covers(self, window: Window) -> Window | None:
        """The part of the window that lies between the first and the last reading."""
        begin, end = max(window.begin, self.times[0]), min(window.end, self.times[-1])
        return Window(float(begin), float(end)) if end > begin else None

    def rise(self, window: Window) -> float:
        """By how much it rose from end to end of a window that it covers, interpolated between readings."""
        begin, end = np.interp([window.begin, window.end], self.times, self.values)
        return float(end - begin)

    def after_zero_at(self, times: Floats) -> "Series":
        """This series, with a value of 0 at those of the times that lie before its first reading."""
        before = times[times < self.times[0]]
        return Series(np.concatenate([before, self.times]), np.concatenate([np.zeros_like(before), self.values]))


def by_device(telemetry: pd.DataFrame, source: str, name: str) -> list[Series]:
    """The series of each device that has it; a source without devices has one at most."""
    rows = telemetry[(telemetry["source"] == source) & (telemetry["name"] == name)]
    groups = rows.groupby("device", dropna=False)
    return [Series(g["time"].to_numpy(np.float64) / SECOND, g["value"].to_numpy(np.float64)) for _, g in groups]


def reading_times(telemetry: pd.DataFrame, source: str) -> Floats:
    """When a source was read with success, in seconds."""
    times: Floats = np.unique(telemetry.loc[telemetry["source"] == source, "time"].to_numpy(np.float64)) / SECOND
    return times


def common_cover(series: list[Series], window: Window) -> Window | None:
    """The part of the window that all series cover; None without one."""
    part: Window | None = window
    for one in series:
        part = one.covers(part) if part is not None else None
    return part if series else None

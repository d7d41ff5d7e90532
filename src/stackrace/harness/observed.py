"""What a run's records say per request, as arrays: the ground that every metric stands on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from stackrace.harness.clock import SECOND
from stackrace.harness.settling import NONE, Floats, Settled, settled
from stackrace.harness.telemetry import samples

Mask = npt.NDArray[np.bool_]


class Window(NamedTuple):
    """A stretch of the run, in seconds after its start."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin

    def holds(self, times: Floats) -> Mask:
        """Which of the times (s, shape [n]) lie in the window, both ends included; NaN lies in none."""
        return (times >= self.begin) & (times <= self.end)


@dataclass(frozen=True)
class Observed:
    """The records and the telemetry of one run. Arrays have one entry a request, seconds, NaN where undefined."""

    records: pd.DataFrame
    slo: Mapping[str, float | None] = field(default_factory=dict)  # metric name -> limit in the metric's own unit
    telemetry: pd.DataFrame = field(default_factory=samples.empty, repr=False)

    def column(self, name: str) -> Floats:
        """A time column in seconds after the start of the run."""
        return self.count(name) / SECOND

    def count(self, name: str) -> Floats:
        """An integer column as floats, NaN where missing."""
        return self.records[name].to_numpy(dtype=np.float64, na_value=np.nan)

    @cached_property
    def censored(self) -> Mask:
        """In flight at the cutoff."""
        return self.records["censored"].to_numpy(dtype=np.bool_)

    @cached_property
    def failed(self) -> Mask:
        """Ended in an error."""
        return self.records["error"].notna().to_numpy() & ~self.censored

    @cached_property
    def sent(self) -> Mask:
        """Left the client."""
        return self.records["sent"].notna().to_numpy()

    @cached_property
    def ok(self) -> Mask:
        """Ended by themselves and brought at least one token."""
        return ~self.failed & ~self.censored & (self.tokens > 0)

    @cached_property
    def times(self) -> list[Floats]:
        """For each request the times of its chunks."""
        return [np.asarray(t, dtype=np.float64) / SECOND for t in self.records["chunk_times"]]

    @cached_property
    def counts(self) -> list[Floats]:
        """For each request the tokens of its chunks."""
        return [np.asarray(c, dtype=np.float64) for c in self.records["chunk_tokens"]]

    @cached_property
    def lateness(self) -> Floats:
        """How late each chunk was read, pooled over all requests, in seconds; only where the kernel stamped it."""
        late = [lateness for lateness in self.records["chunk_lateness"] if lateness is not None]
        return np.concatenate([np.asarray(v, dtype=np.float64) for v in late]) / SECOND if late else np.empty(0)

    @cached_property
    def coalesced(self) -> Mask:
        """For each chunk, pooled over all requests, whether it has a later one's time; only where that was told."""
        marks = [marks for marks in self.records["chunk_coalesced"] if marks is not None]
        return np.concatenate([np.asarray(v, dtype=np.bool_) for v in marks]) if marks else np.empty(0, dtype=np.bool_)

    @cached_property
    def tokens(self) -> Floats:
        """Tokens received, by the chunks."""
        return np.array([c.sum() for c in self.counts], dtype=np.float64)

    @cached_property
    def first_tokens(self) -> Floats:
        """Tokens in the first chunk."""
        return np.array([c[0] if len(c) else np.nan for c in self.counts])

    @cached_property
    def first(self) -> Floats:
        """Time of the first chunk with a token."""
        return np.array([t[0] if len(t) else np.nan for t in self.times])

    @cached_property
    def last(self) -> Floats:
        """Time of the last chunk with a token."""
        return np.array([t[-1] if len(t) else np.nan for t in self.times])

    @cached_property
    def whole(self) -> Window | None:
        """First due to last token; where no token came at all, to when the last request was given up."""
        ends = self.last if np.isfinite(self.last).any() else self.column("end")
        if not np.isfinite(ends).any():
            return None
        return _window(self.column("due").min(), np.nanmax(ends))

    @cached_property
    def settled(self) -> Settled:
        """When the warm-up was over, and by which rule."""
        due = self.column("due")
        if not self.ok.any():
            return Settled(None, NONE)
        return settled(due, self.column("end"), float(self.last[self.ok].min()), float(due.max()))

    @cached_property
    def steady(self) -> Window | None:
        """From the end of the warm-up to the last due: the load is on, and kept up; neither ramp-up nor drain."""
        begin = self.settled.begin
        return None if begin is None else _window(begin, float(self.column("due").max()))

    def tokens_in(self, window: Window) -> float:
        """Output tokens that arrived in the window, of every request, finished or not."""
        if not self.times:
            return 0.0
        times, counts = np.concatenate(self.times), np.concatenate(self.counts)
        return float(counts[window.holds(times)].sum())

    def mean_in_flight(self, window: Window) -> float:
        """Requests in flight (sent, and not ended), averaged over the time of the window."""
        return _mean_between(self.column("sent"), self.column("end"), window)


def busiest_second(times: Floats) -> float:
    """The most events (times in s, shape [n]) that came within one second."""
    if not len(times):
        return 0.0
    order = np.sort(times)
    return float((np.arange(len(order)) - np.searchsorted(order, order - 1.0)).max() + 1)


def _mean_between(begins: Floats, ends: Floats, window: Window) -> float:
    """How many of the intervals cover a moment of the window, on average; an interval with a NaN covers none."""
    covered = np.minimum(ends, window.end) - np.maximum(begins, window.begin)
    return float(np.nansum(np.maximum(covered, 0.0)) / window.seconds)


def _window(begin: float, end: float) -> Window | None:
    return Window(float(begin), float(end)) if end > begin else None

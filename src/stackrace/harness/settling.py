"""When a run has warmed up: a standard rule on how many requests are outstanding, and a plain one for short runs."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DETECTED, PLAIN, NEVER, BRIEF, NONE = "MSER-5", "first answer", "never settled", "too brief", "none"
UNSTEADY = {NEVER: "the load never settled", BRIEF: "shorter than a request takes"}
"""Why there is no window, by the rule that found none."""
BATCH = 5  # requests that come due in a bin, on average: the 5 of MSER-5
FEWEST = 20  # bins that the rule needs
_DIGITS = 3  # of a request: what differs by less is the client's lateness, or rounding


class Settled(NamedTuple):
    """When the warm-up was over, in seconds after the start; None where it never was. And by which rule."""

    begin: float | None
    rule: str


def settled(due: Floats, end: Floats, first: float, last: float) -> Settled:
    """By MSER-5 on the requests outstanding (due and not ended) until `last`, or at `first` where those are few.

    `first` is when the first ok request finished, before which nothing has settled. Few requests leave no window where
    one of them usually takes longer than that would be: it would show a moment of a wave.
    """
    if last <= first:
        return Settled(None, NONE)
    bins = len(due) // BATCH
    if bins < FEWEST:
        return Settled(None, BRIEF) if last - first < _usual(due, end) else Settled(first, PLAIN)
    edges = np.linspace(due.min(), last, bins + 1)
    earliest = int(np.searchsorted(edges, first, side="right")) - 1
    cut = mser(outstanding(due, end, edges), earliest)
    return Settled(None, NEVER) if cut is None else Settled(max(float(edges[cut]), first), DETECTED)


def mser(values: Floats, earliest: int = 0) -> int | None:
    """How many of the values to cut off the front so that the mean of the rest has the least standard error.

    The least of sum of squares about the mean / m^2 over the m values that remain, the cut being `earliest` or more
    and at most half; None where it is at half, since then the values may not have settled at all.
    """
    limit = len(values) // 2
    if earliest >= limit:
        return None
    values = np.round(values, _DIGITS)
    values = values - values[-1]
    left = np.arange(len(values), 0, -1)
    total, squares = (np.cumsum(v[::-1])[::-1] for v in (values, values**2))
    error = (squares - total**2 / left) / left**2
    cut = earliest + int(error[earliest : limit + 1].argmin())
    return None if cut == limit else cut


def outstanding(due: Floats, end: Floats, edges: Floats) -> Floats:
    """Requests due and not ended, averaged over the time between each two successive edges."""
    known = np.isfinite(due) & np.isfinite(end)
    mean: Floats = np.diff(_waited(due[known], edges) - _waited(end[known], edges)) / np.diff(edges)
    return mean


def _usual(due: Floats, end: Floats) -> float:
    """Seconds that a request takes, the median."""
    return float(np.nanmedian(end - due))


def _waited(times: Floats, at: Floats) -> Floats:
    """For each moment, the seconds since all the times before it, together."""
    ordered = np.sort(times)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    before = np.searchsorted(ordered, at)
    waited: Floats = before * at - sums[before]
    return waited

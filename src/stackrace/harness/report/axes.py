"""Axes: what x is, what each panel holds, and ranges that all panels of a chart share."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from stackrace.harness.report.numbers import exact
from stackrace.harness.report.points import Point
from stackrace.harness.report.style import axis

MANY_TICKS = 6
TALL = 10  # values further apart than this ratio start out on a logarithmic axis
CROWDED = 2.6  # decades
UNEVEN = 4  # so do places whose gaps differ by this ratio

Reading = Callable[[Point], float | None]


class Cut(NamedTuple):
    """One way to lay out points: what x is, and the facet that each panel holds."""

    name: str
    title: str
    x: Reading
    facet: Reading
    facet_title: Callable[[float], str]


def cuts(points: Sequence[Point]) -> list[Cut]:
    """Against load with a panel a context, and against context with a panel a load: those with something to see."""
    drawn = [p for p in points if p.plotted]
    loads = len({load(p) for p in drawn})
    contexts = len({context(p) for p in drawn})
    closed = any(p.setting.closed for p in points)
    by_load = Cut("load", "concurrency" if closed else "request rate (req/s)", load, context, _tokens)
    by_context = Cut("context", "input tokens", context, load, _in_flight if closed else _rate)
    if contexts < 2:
        return [by_load]
    return [by_load, by_context] if loads > 1 else [by_context]


def load(point: Point) -> float:
    """Requests per second or in flight."""
    return point.condition.load.value


def context(point: Point) -> float | None:
    """Input tokens."""
    return point.condition.context


def facets(points: Sequence[Point], cut: Cut) -> dict[float, list[Point]]:
    """The points of each panel, in order."""
    values = sorted({v for p in points if p.plotted and (v := cut.facet(p)) is not None and cut.x(p) is not None})
    return {value: [p for p in points if cut.facet(p) == value] for value in values}


def swept(places: Sequence[float], title: str) -> dict[str, Any]:
    """An x axis with its ticks at the places that were swept."""
    places = sorted(set(places))
    gaps = [b - a for a, b in pairwise(places)]
    log = len(gaps) > 1 and places[0] > 0 and max(gaps) >= UNEVEN * min(gaps)
    step = math.ceil(len(places) / MANY_TICKS)
    ticks = places[::-1][::step][::-1]
    return axis(
        type="log" if log else "linear",
        title={"text": title, "font": {"size": 12}, "standoff": 8},
        tickvals=ticks,
        ticktext=[exact(t) for t in ticks],
        range=_padded(places, log),
    )


def upright(values: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The y axis that holds all values, on either scale."""
    positive = [v for v in values if v > 0]
    if not positive:
        return {"linear": {"range": [0.0, 1.0]}}
    span = [math.log10(min(positive)) - 0.08, math.log10(max(positive)) + 0.08]
    ticks, text = decades(span)
    return {
        "linear": {"type": "linear", "range": [0.0, 1.08 * max(positive)], "tickformat": ","},
        "log": {"type": "log", "range": span, "tickvals": ticks, "ticktext": text},
    }


def decades(span: Sequence[float]) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic axis over a range of exponents: 1, 2, 5, 10, or powers of ten where those crowd."""
    low, high = span
    steps = (1, 2, 5) if high - low < CROWDED else (1,)
    places = [s * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    ticks = [p for p in places if low <= math.log10(p) <= high]
    return ticks, [exact(t) for t in ticks]


def first_scale(values: Sequence[float]) -> str:
    """The type of axis that a chart starts out with."""
    positive = [v for v in values if v > 0]
    return "log" if positive and max(positive) > TALL * min(positive) else "linear"


def _padded(places: Sequence[float], log: bool) -> list[float]:
    ends = [math.log10(p) for p in (places[0], places[-1])] if log else [places[0], places[-1]]
    pad = 0.06 * (ends[1] - ends[0]) or 0.5 * abs(ends[0]) or 1.0
    return [ends[0] - pad, ends[1] + pad]


def _tokens(value: float) -> str:
    return f"{exact(value)} input tokens"


def _rate(value: float) -> str:
    return f"{exact(value)} req/s"


def _in_flight(value: float) -> str:
    return f"{exact(value)} in flight"

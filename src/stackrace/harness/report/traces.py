"""Traces: a line through the median of the repeats, and a dot for every run, hollow where it is not valid."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from stackrace.harness.report.axes import Reading
from stackrace.harness.report.numbers import exact
from stackrace.harness.report.points import Point
from stackrace.harness.report.style import INK, Look
from stackrace.harness.report.tips import tip

Trace = dict[str, Any]
OPACITY = (1.0, 0.6, 0.4)


class Variant(NamedTuple):
    """One way to read a chart's metric: a percentile, or a window. `rank` 0 is drawn boldest."""

    name: str
    y: Reading
    rank: int = 0


class Placing(NamedTuple):
    """Where points stand on x, and, where that is not x itself, the order of the line, written beside them."""

    x: Reading
    order: Reading | None = None


def stack_traces(points: Sequence[Point], look: Look, variant: Variant, placing: Placing) -> list[Trace]:
    """The line and the dots of one stack's points in one panel."""
    drawn = [p for p in points if p.plotted and placing.x(p) is not None and variant.y(p) is not None]
    return [_line(points, look, variant, placing), _dots(drawn, look, variant, placing.x)] if drawn else []


def reference(at: Sequence[float], values: Sequence[float]) -> Trace:
    """A quiet dotted line to hold the others against."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(at),
        "y": list(values),
        "line": {"color": INK["faint"][0], "dash": "2px,3px", "width": 1.2},
        "hoverinfo": "skip",
        "meta": {"variant": None},
    }


def _line(points: Sequence[Point], look: Look, variant: Variant, placing: Placing) -> Trace:
    steps: dict[float, list[Point]] = defaultdict(list)
    for point in points:
        place = (placing.order or placing.x)(point)
        if place is not None:
            steps[place].append(point)
    places = sorted(steps)
    return {
        "type": "scatter",
        "mode": "lines+markers+text" if placing.order else "lines",
        "x": [_middle(steps[place], placing.x) if placing.order else place for place in places],
        "y": [_middle(steps[place], variant.y) for place in places],
        "line": {"color": look.colour, "dash": look.dash, "width": (2.2, 1.5, 1.2)[variant.rank]},
        "opacity": OPACITY[variant.rank],
        "hoverinfo": "skip",
        "meta": {"variant": variant.name},
        **(_labels(places) if placing.order else {}),
    }


def _labels(places: Sequence[float]) -> Trace:
    font = {"color": INK["text"][0], "size": 11, "shadow": INK["halo"][0]}
    room = {"size": 10, "opacity": 0}  # no marker, but the text keeps clear of where one would be
    return {"text": [exact(place) for place in places], "textposition": "top right", "textfont": font, "marker": room}


def _middle(points: Sequence[Point], read: Reading) -> float | None:
    """The median over valid repeats, over all that are drawn where none is valid; a gap where none is drawn."""
    drawn = [p for p in points if p.plotted]
    chosen = [p for p in drawn if p.valid] or drawn
    values = [v for p in chosen if (v := read(p)) is not None]
    return median(values) if values else None


def _dots(drawn: Sequence[Point], look: Look, variant: Variant, x: Reading) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [x(p) for p in drawn],
        "y": [variant.y(p) for p in drawn],
        "marker": {
            "color": look.colour,
            "symbol": [look.symbol + ("" if p.valid else "-open") for p in drawn],
            "size": (8, 5, 5)[variant.rank],
            "line": {"width": [0 if p.valid else 1.8 for p in drawn], "color": look.colour},
        },
        "opacity": OPACITY[variant.rank],
        "hoverinfo": "none",
        "customdata": [tip(p) for p in drawn],
        "meta": {"variant": variant.name},
    }

"""Tips: what the page shows beside the pointer, every main number of one point."""

from collections.abc import Iterator
from typing import TypedDict

from stackrace.harness.report.numbers import NONE, digits, exact
from stackrace.harness.report.points import Point
from stackrace.harness.settling import UNSTEADY
from stackrace.harness.summary import STEADY, Metric, metrics, quantile_name

TOLD = ("ttft", "tpot", "itl", "e2e", "interactivity", "output_throughput", "request_throughput", "goodput", "lag")
WINDOWS = ("whole", "steady")


class Tip(TypedDict):
    """Plain text; page.js builds elements of it."""

    title: str
    where: str
    outcome: str
    reasons: list[str]
    rows: list[tuple[str, str, str]]  # metric, statistics, unit
    counts: str


def tip(point: Point) -> Tip:
    """Every main number of a point, and whether it holds."""
    asked = f"{exact(point.condition.context)} in, {exact(point.setting.output_tokens)} out"
    failed, censored = (point.value(m, "run") or 0 for m in ("failed", "censored"))
    return Tip(
        title=point.stack,
        where=f"{point.condition.load.label} · {asked} · repeat {point.repeat}",
        outcome=point.verdict,
        reasons=list(point.reasons),
        rows=[*(_row(point, metrics()[m]) for m in TOLD if m in point.summary), *_state(point)],
        counts=f"{point.requests:,} requests, {failed:,.0f} failed, {censored:,.0f} cut off",
    )


def _state(point: Point) -> Iterator[tuple[str, str, str]]:
    """Whether the load can be sustained, as far as that was told, and where the steady window lies."""
    if point.sustainable is not None:
        yield "sustainable", "yes" if point.sustainable else "no: the queue kept growing", ""
    begin, end = (point.value(f"window_{side}", "steady") for side in ("begin", "end"))
    if begin is not None:
        yield "steady window", f"{digits(begin)} to {digits(end)} (from: {point.settled})", "s"
    elif point.settled in UNSTEADY:
        yield "steady window", f"{NONE} ({point.settled})", ""


def _row(point: Point, metric: Metric) -> tuple[str, str, str]:
    whole = [quantile_name(q) for q in metric.quantiles]
    wanted = [*whole, *(STEADY + name for name in dict.fromkeys([whole[0], whole[-1]]))] if whole else WINDOWS
    told = [f"{s.replace('_', ' ')} {digits(v)}" for s in wanted if (v := point.value(metric.name, s)) is not None]
    return metric.label, " · ".join(told) or NONE, metric.unit

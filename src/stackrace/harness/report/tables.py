"""Tables of points: the columns of the page, and the text that the command line prints after a sweep."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from stackrace.harness.report.numbers import digits, exact
from stackrace.harness.report.points import Point, by_setting, from_runs
from stackrace.harness.store import StoredRun
from stackrace.harness.summary import metrics

STATISTICS = {
    "ttft": ("p50", "p90", "p99"),
    "tpot": ("p50", "p90", "p99"),
    "e2e": ("p50", "p90", "p99"),
    "interactivity": ("p50", "p10"),
    "output_throughput": ("whole", "steady"),
    "request_throughput": ("whole",),
    "goodput": ("whole",),
    "failed": ("run",),
    "lag": ("p99",),
}
PRINTED = (("ttft", "p50"), ("ttft", "p90"), ("tpot", "p50"), ("output_throughput", "whole"), ("failed", "run"))


class Column(NamedTuple):
    """One metric and the statistics of it that some point has."""

    metric: str
    label: str
    unit: str
    help: str
    statistics: list[str]


def columns(points: Sequence[Point]) -> list[Column]:
    """The metrics that some of the points have."""
    known = metrics()
    found = {m: [s for s in all_ if any(p.value(m, s) is not None for p in points)] for m, all_ in STATISTICS.items()}
    return [Column(m, known[m].label, known[m].unit, known[m].help, stats) for m, stats in found.items() if stats]


def cell(point: Point, metric: str, statistic: str) -> str:
    """A number of a point as it is written: counts whole, the rest in three digits."""
    value = point.value(metric, statistic)
    return exact(value) if metrics()[metric].over == "run" else digits(value)


def outcome(point: Point) -> str:
    """How a point ended and whether its numbers hold, in one word."""
    return point.verdict if point.plotted else point.status


def text_table(runs: Iterable[StoredRun]) -> Table:
    """The closing table of a sweep: stacks beside each other at each point."""
    points = from_runs(runs)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for header in ("stack", "load", "tokens in/out", "repeat"):
        table.add_column(header, no_wrap=header != "stack", justify="left" if header == "stack" else "right")
    for header in ("TTFT p50", "p90 ms", "TPOT p50 ms", "output tok/s", "failed"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("validity", overflow="fold", ratio=1)
    for setting, held in by_setting(points).items():
        if len({p.setting for p in points}) > 1:
            table.add_row(Text(f"{setting.model}, {setting.workload}, {setting.arrival}", style="bold"))
        _add_rows(table, held)
    return table


def _add_rows(table: Table, points: Sequence[Point]) -> None:
    for point, following in zip(points, [*points[1:], None], strict=True):
        table.add_row(*_cells(point), end_section=following is None or following.condition != point.condition)


def _cells(point: Point) -> list[Text]:
    context, load = point.condition
    asked = f"{exact(context)} / {exact(point.setting.output_tokens)}"
    plain = [point.stack, load.label, asked, str(point.repeat), *(cell(point, m, s) for m, s in PRINTED)]
    style = {"valid": "green", "suspect": "yellow"}.get(outcome(point), "red")
    verdict = Text(outcome(point), style=style)
    verdict.append(": " + "; ".join(point.reasons) if point.reasons else "", style="dim")
    return [*map(Text, plain), verdict]

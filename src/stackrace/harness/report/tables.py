"""Tables of points: the columns of the page, and the text that the command line prints after a sweep."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from stackrace.harness.report.numbers import NONE, digits, exact
from stackrace.harness.report.points import Point, by_setting, from_runs
from stackrace.harness.settling import UNSTEADY
from stackrace.harness.store import StoredRun
from stackrace.harness.summary import metrics

STATISTICS = {
    "ttft": ("p50", "p90", "p99", "steady_p50", "steady_p99"),
    "tpot": ("p50", "p90", "p99", "steady_p50", "steady_p99"),
    "e2e": ("p50", "p90", "p99", "steady_p50", "steady_p99"),
    "interactivity": ("p50", "p10"),
    "output_throughput": ("whole", "steady"),
    "request_throughput": ("whole",),
    "goodput": ("whole",),
    "engine_batch": ("run",),
    "kv_cache_peak": ("run",),
    "gpu_power": ("run",),
    "energy_per_output_token": ("run",),
    "failed": ("run",),
    "lag": ("p99",),
}
PRINTED = {
    ("ttft", "p50"): "TTFT ms\np50",
    ("ttft", "p90"): "\np90",
    ("tpot", "p50"): "TPOT ms\np50",
    ("output_throughput", "whole"): "output\ntok/s",
    ("failed", "run"): "failed",
}
WIDE = 16  # columns for the name of a stack, beyond which it is folded


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
    is_count = value is not None and value.is_integer() and metrics()[metric].over == "run"
    return exact(value) if is_count else digits(value)


def outcome(point: Point) -> str:
    """How a point ended and whether its numbers hold, in one word."""
    return point.verdict if point.plotted else point.status


def text_table(runs: Iterable[StoredRun]) -> Table:
    """The closing table of a sweep, for 80 columns: stacks beside each other at each point, reasons below."""
    points = from_runs(runs)
    repeated = len({p.repeat for p in points}) > 1
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.caption_justify = "left"
    widest = max((len(p.stack) for p in points), default=0)
    table.add_column("stack", overflow="fold", min_width=min(widest, WIDE))
    for header in [_load_unit(points), "in/out\ntokens", *(["re-\npeat"] if repeated else []), *PRINTED.values()]:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("validity", no_wrap=True)
    settings = by_setting(points)
    for setting, held in settings.items():
        if len(settings) > 1:
            table.add_row(Text(f"{setting.model}, {setting.workload}, {setting.arrival}", style="bold"))
        for point, following in zip(held, [*held[1:], None], strict=True):
            last = following is None or following.condition != point.condition
            table.add_row(*_cells(point, repeated), end_section=last)
    table.caption = _reasons(points)
    return table


def found_table(results: Iterable[Mapping[str, Any]]) -> Table:
    """What searches found, one row each; below, why one ended that did not end by itself."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.caption_justify = "left"
    for header in ("stack", "highest", "answer", "shown\nto pass", "shown\nto fail", "points", "seconds"):
        table.add_column(header, justify="left" if header in ("stack", "highest") else "right")
    held = list(results)
    for result in held:
        low, high = (exact(result["answer"][side]) for side in ("low", "high"))
        unit = {"arrival.rate": "req/s", "concurrency": "in flight"}[result["over"]]
        counts = [str(len(result["log"])), f"{result['seconds']:.0f}"]
        table.add_row(*map(Text, [result["stack"], unit, _answer(result), low, high, *counts]))
    table.caption = Text("\n").join(Text(f"{r['stack']}: {r['ended']}") for r in held)
    return table


def _answer(result: Mapping[str, Any]) -> str:
    estimate, low, high = (result["answer"][name] for name in ("estimate", "low", "high"))
    if estimate is None:
        return NONE if high is None else f"< {exact(high)}"
    return exact(estimate) if high is not None else f"≥ {exact(low or estimate)}"


def _load_unit(points: Sequence[Point]) -> str:
    kinds = {p.condition.load.closed for p in points}
    return "in\nflight" if kinds == {True} else "req/s" if kinds == {False} else "req/s or\nin flight"


def _cells(point: Point, repeated: bool) -> list[Text]:
    context, load = point.condition
    asked = [f"{exact(context)}/{exact(point.setting.output_tokens)}", *([str(point.repeat)] if repeated else [])]
    verdict = Text(outcome(point), style=_style(outcome(point)))
    return [*map(Text, [point.stack, exact(load.value), *asked, *(cell(point, m, s) for m, s in PRINTED)]), verdict]


def _reasons(points: Sequence[Point]) -> Text | None:
    """Why points are not valid or did not end well, each reason once; and which have no steady window."""
    where: dict[tuple[str, str], list[str]] = defaultdict(list)
    for point in points:
        if point.reasons:
            where[outcome(point), "; ".join(point.reasons)].append(f"{point.stack} at {point.condition.load.label}")
    lines = [
        Text.assemble((word, _style(word)), f" {', '.join(dict.fromkeys(places))}: {reason}")
        for (word, reason), places in where.items()
    ]
    for rule, why in UNSTEADY.items():
        if without := [f"{p.stack} at {p.condition.load.label}" for p in points if p.settled == rule]:
            lines.append(Text(f"no steady window ({why}): {', '.join(dict.fromkeys(without))}"))
    return Text("\n").join(lines) if lines else None


def _style(word: str) -> str:
    return {"valid": "green", "suspect": "yellow"}.get(word, "red")

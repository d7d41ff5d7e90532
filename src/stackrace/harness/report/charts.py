"""The four charts of a setting, as small multiples with shared axes, and what is written around them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from stackrace.harness.report.axes import Cut, Reading, cuts, facets, first_scale, swept, upright
from stackrace.harness.report.numbers import exact
from stackrace.harness.report.points import Point
from stackrace.harness.report.statements import frontier_sentence, sentence
from stackrace.harness.report.style import Look, axis, layout
from stackrace.harness.report.traces import Placing, Trace, Variant, reference, stack_traces
from stackrace.harness.summary import Metric, metrics, quantile_name

FAR = 3  # a limit beyond this multiple of the largest value is left out of the range
Looks = dict[str, Look]


class Panel(NamedTuple):
    """One small multiple: a plotly figure and its words."""

    title: str
    description: str
    figure: dict[str, Any]


class View(NamedTuple):
    """One way to cut the points."""

    name: str
    label: str
    axes: dict[str, dict[str, Any]]  # of y, by scale
    panels: list[Panel]


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart and what is written around it."""

    name: str
    title: str
    direction: str
    statement: str
    notes: list[str]
    choices: dict[str, str]  # variant -> label, the first one shown at first
    scale: str
    views: list[View]


def charts(points: Sequence[Point], looks: Looks) -> list[Chart]:
    """TTFT, TPOT, output throughput, and throughput against interactivity, of the points of one setting."""
    return [
        _latency("ttft", points, looks),
        _latency("tpot", points, looks),
        _throughput(points, looks),
        _frontier(points, looks),
    ]


def _latency(metric: str, points: Sequence[Point], looks: Looks) -> Chart:
    m = metrics()[metric]
    asked = [quantile_name(q) for q in m.quantiles]
    shown = _present(points, m, asked)
    limits = sorted({p.slo[metric] * m.scale for p in points if metric in p.slo})
    variants = [Variant(n, _reading(m, n), rank) for rank, n in enumerate(asked) if n in shown]
    notes = [f"{m.label}: {m.help}.", *(f"Dotted: the SLO, {exact(limit)} {m.unit}." for limit in limits)]
    if len(shown) > 1:
        notes.append(f"Boldest {shown[0]}, fainter {' and '.join(shown[1:])}.")
    if missing := [n for n in asked if n not in shown]:
        notes.append(f"{' and '.join(missing)} left out: too few requests a run.")
    return Chart(
        name=metric,
        title=f"{m.label}, {m.unit}",
        direction=f"{m.better} is better",
        statement=sentence(points, metric, "p50"),
        notes=notes,
        choices=({"all": "all"} if len(shown) > 1 else {}) | {n: n for n in shown},
        scale=first_scale(_values(points, variants)),
        views=[_view(cut, points, looks, variants, m, limits) for cut in cuts(points)],
    )


def _throughput(points: Sequence[Point], looks: Looks) -> Chart:
    m = metrics()["output_throughput"]
    shown = _present(points, m, ["whole", "steady"])
    variants = [Variant(n, _reading(m, n)) for n in shown]
    notes = [f"{m.label.capitalize()}: {m.help}. Prompt tokens are not in it."]
    if not points[0].setting.closed and points[0].setting.output_tokens:
        notes.append("Dotted: what the schedules offered, their requests per second times the output tokens asked.")
    return Chart(
        name=m.name,
        title=f"{m.label.capitalize()}, {m.unit}",
        direction=f"{m.better} is better",
        statement=sentence(points, m.name, "whole"),
        notes=notes,
        choices={n: {"whole": "whole run", "steady": "steady window"}[n] for n in shown},
        scale="linear",
        views=[_view(cut, points, looks, variants, m, []) for cut in cuts(points)],
    )


def _frontier(points: Sequence[Point], looks: Looks) -> Chart:
    y, x = metrics()["output_throughput"], metrics()["interactivity"]
    variant = Variant("p50", _reading(y, "whole"))
    cut = cuts(points)[0]
    return Chart(
        name="frontier",
        title=f"{y.label.capitalize()} against {x.label}",
        direction="up and right is better",
        statement=frontier_sentence(points),
        notes=[f"{x.label.capitalize()}: {x.help}; p50 of a run. Numbers at the points: {cut.title}."],
        choices={},
        scale="linear",
        views=[_frontier_view(cut, points, looks, variant)],
    )


def _view(
    cut: Cut,
    points: Sequence[Point],
    looks: Looks,
    variants: Sequence[Variant],
    metric: Metric,
    limits: Sequence[float],
) -> View:
    values = _values(points, variants)
    if metric.name == "output_throughput":
        values += [offered for p in points if (offered := offered_tokens(p)) is not None]
    high = max(values, default=0.0)
    span = [*values, *(limit for limit in limits if limit <= FAR * high)]
    panels = []
    for value, held in facets(points, cut).items():
        x = swept([place for p in held if (place := cut.x(p)) is not None], cut.title)
        ends = [10**e if x["type"] == "log" else e for e in x["range"]]
        traces = [reference(ends, [limit, limit]) for limit in limits]
        traces += _offered(held, cut, metric) + _traces(held, looks, variants, Placing(cut.x))
        panels.append(_panel(cut.facet_title(value), f"{metric.label} against {cut.title}", traces, x, axis()))
    return View(cut.name, f"against {cut.title}", upright(span), panels)


def _frontier_view(cut: Cut, points: Sequence[Point], looks: Looks, variant: Variant) -> View:
    y, x = metrics()["output_throughput"], metrics()["interactivity"]
    drawn = [p for p in points if p.plotted]
    wide = 1.1 * max((v for p in drawn if (v := p.value(x.name, "p50")) is not None), default=1.0)
    panels = []
    for value, held in facets(points, cut).items():
        across = axis(range=[0, wide], title={"text": f"{x.label}, {x.unit}", "font": {"size": 12}, "standoff": 8})
        traces = _traces(held, looks, [variant], Placing(_reading(x, "p50"), order=cut.x))
        panels.append(_panel(cut.facet_title(value), f"{y.label} against {x.label}", traces, across, axis()))
    return View(cut.name, "", upright([1.05 * v for v in _values(points, [variant])]), panels)


def _traces(points: Sequence[Point], looks: Looks, variants: Sequence[Variant], placing: Placing) -> list[Trace]:
    """Faint percentiles first, so that the boldest lie on top."""
    return [
        trace
        for variant in sorted(variants, key=lambda v: -v.rank)
        for stack, look in looks.items()
        for trace in stack_traces([p for p in points if p.stack == stack], look, variant, placing)
    ]


def _offered(points: Sequence[Point], cut: Cut, metric: Metric) -> list[Trace]:
    """What open-loop schedules offered at each x, in output tokens per second: the draw, not the rate asked for."""
    if metric.name != "output_throughput":
        return []
    at: dict[float, list[float]] = defaultdict(list)
    for point in points:
        place, offered = cut.x(point), offered_tokens(point)
        if place is not None and offered is not None:
            at[place].append(offered)
    return [reference(sorted(at), [median(at[x]) for x in sorted(at)])] if at else []


def offered_tokens(point: Point) -> float | None:
    """Output tokens per second that an open loop asked for, None for a closed one."""
    rate, tokens = point.value("offered_rate", "run"), point.setting.output_tokens
    return rate * tokens if point.plotted and not point.setting.closed and rate and tokens else None


def _panel(title: str, what: str, traces: list[Trace], x: dict[str, Any], y: dict[str, Any]) -> Panel:
    return Panel(title, f"{what}, {title}", {"data": traces, "layout": layout(x, y)})


def _present(points: Sequence[Point], metric: Metric, statistics: Sequence[str]) -> list[str]:
    return [s for s in statistics if any(p.plotted and p.value(metric.name, s) is not None for p in points)]


def _values(points: Sequence[Point], variants: Sequence[Variant]) -> list[float]:
    return [v for p in points if p.plotted for variant in variants if (v := variant.y(p)) is not None]


def _reading(metric: Metric, statistic: str) -> Reading:
    return lambda point: point.value(metric.name, statistic)

"""The report: one self-contained HTML page about any number of runs, every number recomputed from raw records."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from stackrace import __version__
from stackrace.harness.errors import UsageError
from stackrace.harness.report.asked import differing
from stackrace.harness.report.charts import Chart, charts
from stackrace.harness.report.numbers import counted, digits, exact
from stackrace.harness.report.points import Point, Setting, by_setting, from_runs
from stackrace.harness.report.provenance import what_was_run
from stackrace.harness.report.statements import headline, unlike
from stackrace.harness.report.style import Look, dark_of, looks
from stackrace.harness.report.tables import cell, columns, outcome
from stackrace.harness.store import StoredRun, find_runs, read_run, write_atomically
from stackrace.harness.summary import metrics

TITLED = ("model.name", "workload.name", "arrival.name")
ASSETS = resources.files("stackrace.harness.report")
DIVISIONS = {"matched": "stacks with equal settings", "tuned": "each stack tuned"}


class Section(NamedTuple):
    """What may be compared: the points of one setting."""

    id: str
    title: str
    facts: list[str]
    answer: str
    remarks: list[str]
    charts: list[Chart]
    points: list[Point]


def build(paths: Sequence[Path], out: Path) -> Path:
    """Write the report of every run at or below the paths to `out`, and return it.

    UsageError where there is no run, or one that a newer stackrace wrote.
    """
    folders = dict.fromkeys(folder.resolve() for path in paths for folder in find_runs(path))
    if not folders:
        where = ", ".join(map(str, paths)) or "no path"
        raise UsageError(f"no run in {where}: run `stackrace bench` first, or give a folder that it wrote")
    kept: dict[Path, StoredRun] = {}
    points = from_runs(_read(folders, kept))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, _render(points, kept).encode())
    return out


def _read(folders: Iterable[Path], kept: dict[Path, StoredRun]) -> Iterator[StoredRun]:
    """The runs one by one, each kept without its records."""
    for folder in folders:
        run = read_run(folder)
        kept[folder] = replace(run, records=run.records.iloc[:0])
        yield run


def _render(points: Sequence[Point], runs: Mapping[Path, StoredRun]) -> str:
    styles = looks(sorted({p.stack for p in points}))
    settings = by_setting(points)
    named = differing(s.fixed for s in settings)
    sections = [_section(f"s{i}", s, named, held, styles) for i, (s, held) in enumerate(settings.items())]
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template.filters.update(digits=digits, exact=exact, cell=cell, outcome=outcome)
    return template.from_string(_asset("page.html")).render(
        css=_asset("page.css"),
        js=_asset("page.js"),
        plotly=Markup(get_plotlyjs()),
        data=_embedded(_data(sections)),
        looks=styles,
        sections=sections,
        span=_span(runs.values()),
        outcomes=Counter(outcome(p) for p in points),
        total=counted(len(points), "point"),
        columns=columns(points),
        groups=what_was_run([(p, runs[p.folder]) for p in points]),
        glossary=[metrics()[c.metric] for c in columns(points)],
        version=__version__,
    )


def _section(id: str, setting: Setting, named: set[str], points: list[Point], styles: dict[str, Look]) -> Section:
    drawn = any(p.plotted for p in points)
    return Section(
        id=id,
        title=f"{setting.model}, {setting.workload}",
        facts=_facts(setting, named),
        answer=headline(points),
        remarks=_remarks(points),
        charts=charts(points, styles) if drawn else [],
        points=points,
    )


def _facts(setting: Setting, named: set[str]) -> list[str]:
    """What the points of a setting share, and the configuration (the keys `named`) that sets it apart from others."""
    arrival = "closed loop" if setting.closed else f"{setting.arrival} arrivals"
    facts = [arrival, f"{exact(setting.output_tokens)} output tokens", f"on {setting.machine}"]
    facts += [DIVISIONS[setting.division]] if setting.division in DIVISIONS else []
    facts += [] if setting.cap is None else [f"at most {setting.cap:,} in flight"]
    return facts + [f"{key}={value}" for key, value in setting.fixed if key in named and key not in TITLED]


def _remarks(points: Sequence[Point]) -> list[str]:
    """What a reader must know before believing the charts."""
    hollow = [p for p in points if p.plotted and not p.valid]
    undrawn = [p for p in points if not p.plotted]
    mixed = unlike(points)
    remarks = []
    if hollow:
        remarks.append(
            f"{counted(len(hollow), 'point')} not valid: drawn hollow, the reason on hover and in the table."
        )
    if undrawn:
        remarks.append(f"{counted(len(undrawn), 'point')} without a result: only in the table, with the error.")
    if mixed:
        remarks.append(f"{counted(mixed, 'shared point')} where stacks were sent different requests: not compared.")
    if any(p.repeat != points[0].repeat for p in points):
        remarks.append("Every dot is one repeat; lines join the medians of the valid ones.")
    elif len({p.stack for p in points if p.valid}) > 1:
        remarks.append("One repeat of every point: what is said here holds for this run.")
    return remarks


def _data(sections: Sequence[Section]) -> dict[str, Any]:
    """What page.js draws: figures by the id of the chart, whose tips are places in one list."""
    tips: dict[bytes, int] = {}
    figures = {
        f"{section.id}-{chart.name}": {
            "scale": chart.scale,
            "choice": next(iter(chart.choices), "all"),
            "views": {
                v.name: {"axes": v.axes, "panels": [_told_once(p.figure, tips) for p in v.panels]} for v in chart.views
            },
        }
        for section in sections
        for chart in section.charts
    }
    return {"dark": dark_of(), "tips": [orjson.loads(t) for t in tips], "figures": figures}


def _told_once(figure: dict[str, Any], tips: dict[bytes, int]) -> dict[str, Any]:
    """The figure with its tips replaced by their places in `tips`, which grows."""
    places = [
        [tips.setdefault(orjson.dumps(t), len(tips)) for t in trace.get("customdata", [])] for trace in figure["data"]
    ]
    data = [{**trace, "customdata": at} if at else trace for trace, at in zip(figure["data"], places, strict=True)]
    return {**figure, "data": data}


def _embedded(data: object) -> Markup:
    """JSON that no string in it can break out of a <script> with."""
    text = orjson.dumps(data).decode()
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _span(runs: Iterable[StoredRun]) -> str:
    """When it was run: first to last day, UTC."""
    days = sorted(str(run.meta["started_at"])[:10] for run in runs if run.meta.get("started_at"))
    return "" if not days else days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _asset(name: str) -> Markup:
    return Markup(ASSETS.joinpath(name).read_text(encoding="utf-8"))

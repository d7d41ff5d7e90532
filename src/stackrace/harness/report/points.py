"""Points: what a run was asked, how it ended and every number of it, recomputed from its raw records."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from stackrace.harness.grounds import other_answers
from stackrace.harness.report.asked import Leaves, common_mean, compares_models, fixed, plain
from stackrace.harness.report.numbers import exact
from stackrace.harness.settling import NONE
from stackrace.harness.store import StoredRun
from stackrace.harness.summary import Summary, metrics, parse_slo, steadiness, summarize
from stackrace.harness.validity import judge

UNKNOWN = "unknown"
OTHER = "computes something else"
"""Beside the name of a stack, wherever it is shown, whose answers are not those of its weights."""
UNFINISHED = {
    "killed": "the harness died before the point was over",
    "interrupted": "interrupted before the point was over",
    "running": "still running",
}


class Load(NamedTuple):
    """How hard a point was pushed: requests per second, or requests kept in flight."""

    closed: bool
    value: float

    @property
    def label(self) -> str:
        """4 req/s, or 16 in flight."""
        return f"{exact(self.value)} {'in flight' if self.closed else 'req/s'}"


class Setting(NamedTuple):
    """What must be the same for points to share a chart."""

    model: str
    workload: str
    arrival: str
    closed: bool
    cap: int | None  # of requests in flight, where the rate is what was swept
    output_tokens: float | None
    division: str  # matched or tuned
    machine: str
    fixed: Leaves  # of the configuration


class Condition(NamedTuple):
    """What must be the same, besides the setting, for stacks to be compared."""

    context: float | None  # input tokens
    load: Load


@dataclass(frozen=True, slots=True)
class Point:
    """One run, as charts and tables need it."""

    folder: Path
    stack: str
    setting: Setting
    condition: Condition
    repeat: int
    status: str
    verdict: str  # valid, suspect, invalid or unknown
    reasons: tuple[str, ...]  # why it is not valid, or did not end well
    sustainable: bool | None  # None: too short to tell, or a closed loop
    settled: str  # the rule that the steady window begins by
    summary: Summary
    slo: Mapping[str, float]  # metric -> limit in seconds
    requests: int
    schedule: str | None
    fingerprint: str | None
    lengths: tuple[str, str]  # how long prompts and outputs were asked to be

    @property
    def plotted(self) -> bool:
        """Whether it ended well enough to be drawn."""
        return self.status == "ok"

    @property
    def valid(self) -> bool:
        """Whether its numbers may be claimed."""
        return self.plotted and self.verdict == "valid"

    def value(self, metric: str, statistic: str) -> float | None:
        """A number in the metric's shown unit, None where it is undefined or underpowered."""
        value = self.summary.get(metric, {}).get(statistic)
        return None if value is None else value * metrics()[metric].scale


def from_runs(runs: Iterable[StoredRun]) -> list[Point]:
    """Runs as points: grouped by setting and condition, so that stacks stand beside each other."""
    return sorted(_told_apart(_same_lengths([_point(run) for run in runs])), key=_order)


def by_setting(points: Iterable[Point]) -> dict[Setting, list[Point]]:
    """Points that may share a chart."""
    groups: dict[Setting, list[Point]] = defaultdict(list)
    for point in points:
        groups[point.setting].append(point)
    return dict(groups)


def _point(run: StoredRun) -> Point:
    asked: dict[str, Any] = run.meta.get("point") or {}
    slo = (run.config or {}).get("slo") or {}
    summary = summarize(run.records, slo, run.telemetry) if len(run.records) else {}
    load = _load(asked, summary, len(run.records))
    validity = _validity(run, summary)
    return Point(
        folder=run.folder,
        stack=_stack(run.config or {}, asked) + (f" ({OTHER})" if other_answers(run.meta) else ""),
        setting=_setting(run, asked, load.closed),
        condition=Condition(_number(asked.get("input_tokens")), load),
        repeat=int(asked.get("repeat") or 0),
        status=run.status,
        verdict=str(validity.get("verdict") or UNKNOWN),
        reasons=_reasons(run, validity),
        sustainable=validity.get("sustainable"),
        settled=steadiness(run.records)["rule"] if summary else NONE,
        summary=summary,
        slo={name: limit for name, limit in parse_slo(slo).items() if limit is not None},
        requests=len(run.records),
        schedule=(run.meta.get("schedule") or {}).get("hash"),
        fingerprint=(run.meta.get("backend") or {}).get("fingerprint"),
        lengths=_lengths(run.config or {}, asked),
    )


def _stack(config: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    stack = str(asked.get("stack") or UNKNOWN)
    return f"{asked.get('model') or UNKNOWN} on {stack}" if compares_models(config) else stack


def _setting(run: StoredRun, asked: Mapping[str, Any], closed: bool) -> Setting:
    cap = asked.get("concurrency")
    return Setting(
        model="several models" if compares_models(run.config or {}) else str(asked.get("model") or UNKNOWN),
        workload=str(asked.get("workload") or UNKNOWN),
        arrival=str(asked.get("arrival") or UNKNOWN),
        closed=closed,
        cap=None if closed or cap is None else int(cap),
        output_tokens=_number(asked.get("output_tokens")),
        division=str(asked.get("division") or UNKNOWN),
        machine=_machine(run.meta.get("provenance") or {}),
        fixed=fixed(run.config or {}),
    )


def _lengths(config: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[str, str]:
    """What they were drawn from: `lengths`, and how the workload makes use of them, or comes by its own."""
    lengths, workload = config.get("lengths") or {}, config.get("workload") or {}
    use = {key: value for key, value in workload.items() if key not in ("input_lengths", "output_lengths")}
    prompt, output = (plain([lengths.get(n) or asked.get(f"{n}_tokens"), use]) for n in ("input", "output"))
    return prompt, output


def _load(asked: Mapping[str, Any], summary: Summary, requests: int) -> Load:
    """What was asked; else (a trace) the rate that the schedule came to; else (all at once) the number of requests."""
    if asked.get("rate") is not None:
        return Load(False, float(asked["rate"]))
    if asked.get("concurrency") is not None:
        return Load(True, float(asked["concurrency"]))
    offered = summary.get("offered_rate", {}).get("run")
    return Load(True, requests) if offered is None else Load(False, float(f"{offered:.3g}"))


def _machine(provenance: Mapping[str, Any]) -> str:
    """GPUs where there are any, else the CPU."""
    gpus = [str(g.get("name", UNKNOWN)) if isinstance(g, Mapping) else str(g) for g in provenance.get("gpus") or []]
    if gpus:
        return ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    return str((provenance.get("cpu") or {}).get("model") or UNKNOWN)


def _validity(run: StoredRun, summary: Summary) -> Mapping[str, Any]:
    """Judged anew, by every ground known today; what was stored, where the thresholds were not."""
    if summary and "validity" in run.config:
        return judge(run.records, summary, run.config, run.meta).as_dict()
    return run.meta.get("validity") or {}


def _reasons(run: StoredRun, validity: Mapping[str, Any]) -> tuple[str, ...]:
    ending = [run.meta.get("error"), UNFINISHED.get(run.status)]
    if run.status == "ok" and not validity:
        ending.append("its validity was never judged")
    return tuple(str(reason) for reason in [*ending, *(validity.get("reasons") or [])] if reason)


def _same_lengths(points: Sequence[Point]) -> list[Point]:
    """Points whose lengths were drawn from one distribution, all named by one mean: draws differ a little."""
    prompts: dict[str, list[float]] = defaultdict(list)
    outputs: dict[str, list[float]] = defaultdict(list)
    for p in points:
        prompts[p.lengths[0]] += [p.condition.context] if p.condition.context is not None else []
        outputs[p.lengths[1]] += [p.setting.output_tokens] if p.setting.output_tokens is not None else []
    return [
        replace(
            p,
            condition=p.condition._replace(context=common_mean(prompts[p.lengths[0]])),
            setting=p.setting._replace(output_tokens=common_mean(outputs[p.lengths[1]])),
        )
        for p in points
    ]


def _told_apart(points: Sequence[Point]) -> list[Point]:
    """Stacks of one name but several fingerprints (versions, flags, commits), each named by its own."""
    seen: dict[str, set[str]] = defaultdict(set)
    for point in points:
        if point.fingerprint:
            seen[point.stack].add(point.fingerprint)
    return [
        replace(p, stack=f"{p.stack} [{(p.fingerprint or UNKNOWN)[:7]}]") if len(seen[p.stack]) > 1 else p
        for p in points
    ]


def _order(point: Point) -> tuple[Any, ...]:
    context, load = point.condition
    setting = tuple(str(part) for part in point.setting)
    return setting, context or 0.0, load.value, point.stack, point.repeat, str(point.folder)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)

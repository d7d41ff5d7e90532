"""Summaries: every metric of conf/metric/ computed from a run's records and telemetry."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any

import numpy as np
import pandas as pd
import yaml

from stackrace.harness.errors import UsageError, require
from stackrace.harness.metrics import JUDGED
from stackrace.harness.observed import Observed
from stackrace.harness.settling import Floats
from stackrace.harness.telemetry import samples

Stats = dict[str, float]
Summary = dict[str, Stats]
STEADY = "steady_"
"""What the statistics of requests due in the steady window begin with."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One file of conf/metric/: what to compute and how to show it.

    `over` says what the function yields: samples one a request, shown over successful ones (`requests`) or over all
    that were sent (`sent`); samples pooled over `chunks`; one number for each of the `windows`; one for the `run`.
    """

    name: str
    compute: Callable[..., Any]
    over: str
    label: str
    unit: str
    scale: float  # SI value x scale = shown value
    better: str  # lower, higher or neither
    help: str
    quantiles: tuple[float, ...]


@functools.cache
def metrics() -> dict[str, Metric]:
    """Every metric by name."""
    folder = resources.files("stackrace.conf").joinpath("metric")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name[:-5]: _metric(f.name[:-5], yaml.safe_load(f.read_text())) for f in files}


def summarize(
    records: pd.DataFrame, slo_ms: Mapping[str, float | None], telemetry: pd.DataFrame | None = None
) -> Summary:
    """metric -> statistic -> SI value; a statistic that is undefined or underpowered is absent.

    `slo_ms` is the config's `slo` group: `<metric>_ms` -> limit. `telemetry` is None where there is none.
    """
    run = Observed(records, parse_slo(slo_ms), samples.empty() if telemetry is None else telemetry)
    return {name: stats for name, m in metrics().items() if (stats := _stats(m, run))}


def steadiness(records: pd.DataFrame) -> dict[str, Any]:
    """The steady window for run.json: `begin` and `end` in seconds, None where there is none, and the `rule`."""
    run = Observed(records)
    begin, end = run.steady or (None, None)
    return {"begin": begin, "end": end, "rule": run.settled.rule}


def parse_slo(slo_ms: Mapping[str, float | None]) -> dict[str, float | None]:
    """`ttft_ms: 500` -> `ttft: 0.5`. UsageError on a name that no request can be judged by."""
    slo: dict[str, float | None] = {}
    for key, limit in slo_ms.items():
        name = key.removesuffix("_ms")
        if name not in JUDGED or name == key:
            known = ", ".join(f"{n}_ms" for n in JUDGED)
            raise UsageError(f"slo.{key} is not something a request can be judged by: use one of {known}")
        if limit is not None:
            require(f"slo.{key}", limit, (int, float), lambda v: v > 0, "milliseconds above 0, or null")
        slo[name] = None if limit is None else limit / 1000
    return slo


def quantile(values: Floats, q: float) -> float | None:
    """The nearest-rank q-quantile of finite `values`, None where fewer than 1 / min(q, 1 - q) samples carry it."""
    n = len(values)
    if n * min(q, 1 - q) < 1 - 1e-9:
        return None
    return float(np.sort(values)[math.ceil(q * n - 1e-9) - 1])


def quantile_name(q: float) -> str:
    """0.99 -> p99."""
    return f"p{q * 100:g}"


def _metric(name: str, fields: dict[str, Any]) -> Metric:
    module, function = fields.pop("_target_").rsplit(".", 1)
    compute = getattr(import_module(module), function)
    return Metric(name=name, compute=compute, **{**fields, "quantiles": tuple(fields["quantiles"])})


def _stats(metric: Metric, run: Observed) -> Stats:
    if metric.over == "windows":
        windows = {"whole": run.whole, "steady": run.steady}
        values = {name: metric.compute(run, w) for name, w in windows.items() if w is not None}
    elif metric.over == "run":
        values = {"run": metric.compute(run)}
    else:
        values = _distribution(metric, run)
    return {name: value for name, value in values.items() if value is not None}


def _distribution(metric: Metric, run: Observed) -> dict[str, float | None]:
    values = metric.compute(run)
    if metric.over == "chunks":
        return _quantiles(metric, values)
    if metric.over == "sent":
        return _quantiles(metric, values[run.sent])
    whole = _quantiles(metric, values[run.ok])
    if run.steady is None:
        return whole
    steady = _quantiles(metric, values[run.ok & run.steady.holds(run.column("due"))])
    return whole | {f"{STEADY}{name}": value for name, value in steady.items()}


def _quantiles(metric: Metric, values: Floats) -> dict[str, float | None]:
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    quantiles = {quantile_name(q): quantile(values, q) for q in metric.quantiles}
    return {"n": float(len(values)), "mean": float(values.mean()), **quantiles, "max": float(values.max())}

"""Whether a point can be trusted: valid, suspect or invalid, with the reasons in words."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from stackrace.harness.observed import Mask, Observed, Window
from stackrace.harness.summary import Summary

VERDICTS = ("valid", "suspect", "invalid")


class Finding(NamedTuple):
    """One quantity that a threshold judges; `words` has a place for the value."""

    name: str
    value: float | None
    words: str


@dataclass(frozen=True)
class Validity:
    """A verdict and why."""

    verdict: str
    reasons: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


def judge(records: pd.DataFrame, summary: Summary, config: Mapping[str, Any], meta: Mapping[str, Any]) -> Validity:
    """Hold a point against the `validity` thresholds of its own configuration.

    `config` and `meta` are config.yaml and run.json: an old run is judged by every ground that is known today.
    """
    run = Observed(records)
    verdict, reasons = 0, []
    for finding in _findings(run, summary, config, meta):
        grade = _grade(finding.value, config["validity"].get(finding.name, {}))
        if grade and finding.value is not None:
            verdict = max(verdict, grade)
            reasons.append(finding.words.format(finding.value))
    for reason in _plain_reasons(run, meta):
        verdict = max(verdict, 1)
        reasons.append(reason)
    if not run.ok.any():
        verdict = 2
        reasons.append("no request succeeded")
    return Validity(VERDICTS[verdict], reasons)


def _grade(value: float | None, limits: Mapping[str, float | None]) -> int:
    suspect, invalid = limits.get("suspect"), limits.get("invalid")
    if value is not None and invalid is not None and value > invalid:
        return 2
    return int(value is not None and suspect is not None and value > suspect)


def _findings(run: Observed, summary: Summary, config: Mapping[str, Any], meta: Mapping[str, Any]) -> Iterator[Finding]:
    lag, client = summary.get("lag", {}), meta.get("load_generator", {})
    worst, where = (lag["p99"], "at p99") if "p99" in lag else (lag.get("max"), "at worst")
    yield Finding("lag_p99", worst, f"the client sent {{:.4f}} s late {where}")
    yield Finding("loop_lag_p99", client.get("loop_lag_p99"), "the client's loop was {:.4f} s late at p99")
    yield Finding("cpu_share", client.get("cpu_share"), "the client used {:.0%} of its core")
    yield Finding("error_share", _share(run.failed, ~run.censored), "{:.1%} of the requests failed")
    yield Finding("wrong_lengths", _share(_has_wrong_length(run), run.ok), "{:.1%} of the answers have wrong lengths")
    beyond = _cached_beyond(run, _repeated_tokens(run, config, meta))
    yield Finding("cached_share", beyond, "{:.1%} of the prompt tokens came from a prefix cache, unasked")
    yield Finding("queue_growth", _queue_growth(run), "the queue kept growing: {:.1f} times as long at the end")


def _plain_reasons(run: Observed, meta: Mapping[str, Any]) -> Iterator[str]:
    cores = meta.get("provenance", {}).get("cores", {})
    if set(cores.get("load_generator", ())) & set(cores.get("engine", ())):
        yield "the load generator had no core of its own"
    if "text" in set(run.records["token_source"].dropna()):
        yield "tokens were counted by text, since the server sends neither ids nor running usage"


def _share(some: Mask, of: Mask) -> float | None:
    return float((some & of).sum() / of.sum()) if of.any() else None


def _has_wrong_length(run: Observed) -> Mask:
    """Another number of tokens than asked, by usage or by the chunks; a count that was never told is no fault."""
    asked_in, asked_out = run.count("asked_prompt_tokens"), run.count("asked_output_tokens")
    told_in, told_out = run.count("prompt_tokens"), run.count("output_tokens")
    wrong_in = np.isfinite(told_in) & (told_in != asked_in)
    wrong_out = np.isfinite(told_out) & (told_out != asked_out)
    wrong: Mask = wrong_in | wrong_out | (run.tokens != asked_out)
    return wrong


def _repeated_tokens(run: Observed, config: Mapping[str, Any], meta: Mapping[str, Any]) -> float:
    """Prompt tokens that the schedule repeats on purpose; for a run that did not count them, what its setting says."""
    counted = meta.get("schedule", {}).get("repeated_tokens")
    if counted is not None:
        return float(counted)
    has_told = np.isfinite(run.count("cached_tokens"))
    return float(config["workload"].get("shared_prefix", 0.0) * run.count("asked_prompt_tokens")[has_told].sum())


def _cached_beyond(run: Observed, repeated: float) -> float | None:
    """Share of prompt tokens that a prefix cache served beyond the `repeated` ones."""
    cached = run.count("cached_tokens")
    told = np.isfinite(cached)
    if not told.any():
        return None
    return float((cached[told].sum() - repeated) / run.count("asked_prompt_tokens")[told].sum())


def _queue_growth(run: Observed) -> float | None:
    """How many times as many requests were outstanding in the last fifth of the arrivals as in the middle one.

    Looked at from the first finished request on, when the system has filled, and only if that lasts for 20 arrivals
    and five times as long as the first of them took; else None. None also unless the number rose from each fifth to the
    next, which a steady queue does once in 120 times and an overloaded one always. Both are taken one request
    larger, so that a queue of a few is not called growing.
    """
    due = run.column("due")
    if not run.ok.any():
        return None
    filled = Window(float(run.last[run.ok].min()), float(due.max()))
    fifths = [Window(a, b) for a, b in pairwise(np.linspace(*filled, 6).tolist())]
    early = fifths[0].holds(due)
    if filled.holds(due).sum() < 20 or not early.any():
        return None
    if filled.seconds < 5 * np.median((run.column("end") - due)[early]):
        return None
    outstanding = [run.mean_outstanding(fifth) for fifth in fifths]
    is_rising = all(a < b for a, b in pairwise(outstanding))
    return (outstanding[4] + 1) / (outstanding[2] + 1) if is_rising else None

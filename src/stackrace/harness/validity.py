"""Whether a point can be trusted: valid, suspect or invalid, with the reasons in words."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from stackrace.harness.messages import Health
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


def judge(
    records: pd.DataFrame,
    summary: Summary,
    health: Health | None,
    shared_prefix: float,
    is_open: bool,
    has_own_core: bool,
    thresholds: Mapping[str, Mapping[str, float | None]],
) -> Validity:
    """Hold a finished point against the `validity` thresholds of the configuration."""
    run = Observed(records)
    verdict, reasons = 0, []
    for finding in _findings(run, summary, health, shared_prefix, is_open):
        grade = _grade(finding.value, thresholds[finding.name])
        if grade and finding.value is not None:
            verdict = max(verdict, grade)
            reasons.append(finding.words.format(finding.value))
    for reason in _plain_reasons(run, has_own_core):
        verdict = max(verdict, 1)
        reasons.append(reason)
    if not run.ok.any():
        verdict = 2
        reasons.append("no request succeeded")
    return Validity(VERDICTS[verdict], reasons)


def _grade(value: float | None, limits: Mapping[str, float | None]) -> int:
    if value is None:
        return 0
    suspect, invalid = limits["suspect"], limits["invalid"]
    if invalid is not None and value > invalid:
        return 2
    return 1 if suspect is not None and value > suspect else 0


def _findings(
    run: Observed, summary: Summary, health: Health | None, shared_prefix: float, is_open: bool
) -> Iterator[Finding]:
    lag = summary.get("lag", {})
    yield Finding("lag_p99", lag.get("p99", lag.get("max")), "the client sent {:.4f} s late at p99")
    if health is not None:
        yield Finding("loop_lag_p99", health.loop_lag_p99, "the client's loop was {:.4f} s late at p99")
        yield Finding("cpu_share", health.cpu_share, "the client used {:.0%} of its core")
    judged = ~run.censored
    yield Finding("error_share", _share(run.failed, judged), "{:.1%} of the requests failed")
    yield Finding("wrong_lengths", _share(_has_wrong_length(run), run.ok), "{:.1%} of the answers have wrong lengths")
    yield Finding("cached_share", _cached_beyond(run, shared_prefix), "{:.1%} of the prompts came from a prefix cache")
    if is_open:
        yield Finding("queue_growth", _queue_growth(run), "the queue kept growing: {:.1f} times as long at the end")


def _plain_reasons(run: Observed, has_own_core: bool) -> Iterator[str]:
    if not has_own_core:
        yield "the load generator had no core of its own"
    sources = set(run.records["token_source"].dropna())
    if "text" in sources:
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


def _cached_beyond(run: Observed, shared_prefix: float) -> float | None:
    """Share of prompt tokens that a prefix cache served beyond what the workload shares."""
    cached = run.count("cached_tokens")
    asked = run.count("asked_prompt_tokens")
    told = np.isfinite(cached)
    if not told.any():
        return None
    return float((cached[told].sum() - shared_prefix * asked[told].sum()) / asked[told].sum())


def _queue_growth(run: Observed) -> float | None:
    """How many times as many requests were in flight in the last fifth of the arrivals as in the middle one.

    None unless the number rose from each fifth to the next, which a steady queue does once in 120 times and an
    overloaded one always. Both are taken one request larger, so that a queue of a few is not called growing.
    """
    due = run.column("due")
    begin, end = float(due.min()), float(due.max())
    if len(due) < 20 or end <= begin:
        return None
    fifths = [run.mean_in_flight(Window(a, b)) for a, b in pairwise(np.linspace(begin, end, 6).tolist())]
    is_rising = all(a < b for a, b in pairwise(fifths))
    return (fifths[4] + 1) / (fifths[2] + 1) if is_rising else None

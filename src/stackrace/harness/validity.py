"""Whether a point can be trusted: valid, suspect or invalid, with the reasons in words."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from stackrace.harness.growth import Growth, growth
from stackrace.harness.observed import Mask, Observed
from stackrace.harness.summary import Summary

VERDICTS = ("valid", "suspect", "invalid")
CLIENT = {"lag_p99", "loop_lag_p99", "cpu_share"}
"""Thresholds on the client: passed by far, a point says nothing about the server."""
OTHER_WORK = {"wrong_lengths", "cached_share"}
"""Thresholds on what was done: passed by far, it was not what was asked."""


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
    invalid: list[str]  # names of the thresholds that were passed by so much
    sustainable: bool | None  # the load, in an open loop; None: too short to tell

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


def judge(records: pd.DataFrame, summary: Summary, config: Mapping[str, Any], meta: Mapping[str, Any]) -> Validity:
    """Hold a point against the `validity` thresholds of its own configuration.

    `config` and `meta` are config.yaml and run.json: an old run is judged by every ground that is known today.
    """
    run, limits = Observed(records), config["validity"]
    grown = _growth(run, config)
    graded = [(f, _grade(f.value, limits.get(f.name, {}))) for f in _findings(run, summary, config, meta, grown)]
    told = [(grade, f.words.format(f.value)) for f, grade in graded if grade]
    told += [(1, reason) for reason in _plain_reasons(run, meta)]
    told += [] if run.ok.any() else [(2, "no request succeeded")]
    limit = limits.get("queue_growth", {}).get("suspect")
    return Validity(
        verdict=VERDICTS[max((grade for grade, _ in told), default=0)],
        reasons=[reason for _, reason in told],
        invalid=[f.name for f, grade in graded if grade == 2],
        sustainable=None if grown is None or limit is None else grown.sustainable(limit),
    )


def _growth(run: Observed, config: Mapping[str, Any]) -> Growth | None:
    """None for a closed loop, whose queue cannot grow."""
    is_closed = str(config.get("arrival", {}).get("_target_", "")).endswith(".Immediate")
    return None if is_closed else growth(run)


def _grade(value: float | None, limits: Mapping[str, float | None]) -> int:
    suspect, invalid = limits.get("suspect"), limits.get("invalid")
    if value is not None and invalid is not None and value > invalid:
        return 2
    return int(value is not None and suspect is not None and value > suspect)


def _findings(
    run: Observed, summary: Summary, config: Mapping[str, Any], meta: Mapping[str, Any], grown: Growth | None
) -> Iterator[Finding]:
    lag = summary.get("lag", {})
    worst, where = (lag["p99"], "at p99") if "p99" in lag else (lag.get("max"), "at worst")
    yield Finding("lag_p99", worst, f"the client sent {{:.4f}} s late {where}")
    yield Finding("loop_lag_p99", _worst(meta, "loop_lag_p99"), "the client's loop was {:.4f} s late at p99")
    yield Finding("cpu_share", _worst(meta, "cpu_share"), "the client used {:.0%} of its core")
    yield Finding("error_share", _share(run.failed, ~run.censored), "{:.1%} of the requests failed")
    yield Finding("wrong_lengths", _share(_has_wrong_length(run), run.ok), "{:.1%} of the answers have wrong lengths")
    beyond = _cached_beyond(run, _repeated_tokens(run, config, meta))
    yield Finding("cached_share", beyond, "{:.1%} of the prompt tokens came from a prefix cache, unasked")
    rose = grown.end if grown is not None and grown.is_rising else None
    yield Finding("queue_growth", rose, "unsustainable: the queue kept growing, {:.1f} times as long at the end")


def _worst(meta: Mapping[str, Any], name: str) -> float | None:
    """Of all workers; older runs had one, and told of it without a list."""
    client = meta.get("load_generator", {})
    told = [w[name] for w in client.get("workers", [client]) if w.get(name) is not None]
    return max(told, default=None)


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

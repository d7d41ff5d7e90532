"""What a point can be doubted for: a late client, other work than was asked, a GPU held back, a queue that grows."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from stackrace.harness.growth import Growth, growth
from stackrace.harness.observed import Mask, Observed, busiest_second
from stackrace.harness.summary import Summary

CLIENT = {
    "lag_p99",
    "rate_missed",
    "loop_lag_p99",
    "receive_lag_p99",
    "coalesced_share",
    "cpu_share",
    "run_delay_share",
    "gc_pause",
    "calibrated_load",
}
"""Thresholds on the client: passed by far, a point says nothing about the server."""
OTHER_WORK = {"wrong_lengths", "cached_share", "equivalence"}
"""Grounds on what was done: passed by far, it was not what was asked."""
_FEWEST = 20  # requests that a rate is taken from


class Finding(NamedTuple):
    """One quantity that a threshold judges; `words` has a place for the value."""

    name: str
    value: float | None
    words: str


def growth_of(run: Observed, config: Mapping[str, Any]) -> Growth | None:
    """None for a closed loop, whose queue cannot grow."""
    is_closed = str(config.get("arrival", {}).get("_target_", "")).endswith(".Immediate")
    return None if is_closed else growth(run)


def findings(
    run: Observed, summary: Summary, config: Mapping[str, Any], meta: Mapping[str, Any], grown: Growth | None
) -> Iterator[Finding]:
    """Every quantity that a threshold of conf's `validity` may judge; `grown` is what `growth_of` gives."""
    yield from _of_the_client(run, summary, config, meta)
    yield _warmup(meta.get("warmup") or {})
    yield Finding("error_share", _share(run.failed, ~run.censored), "{:.1%} of the requests failed")
    yield Finding("wrong_lengths", _share(_has_wrong_length(run), run.ok), "{:.1%} of the answers have wrong lengths")
    beyond = _cached_beyond(run, _repeated_tokens(run, config, meta))
    yield Finding("cached_share", beyond, "{:.1%} of the prompt tokens came from a prefix cache, unasked")
    throttled = summary.get("throttled", {}).get("run")
    yield Finding(
        "throttled", throttled, "heat or the power brake held the GPU's clocks down in {:.1%} of the readings"
    )
    rose = grown.end if grown is not None and grown.is_rising else None
    yield Finding("queue_growth", rose, "unsustainable: the queue kept growing, {:.1f} times as long at the end")


def _warmup(told: Mapping[str, Any]) -> Finding:
    """How much latencies still changed when the warm-up ran into its limit; None if it did not, or none was judged."""
    if told.get("settled") is not False:  # older runs do not say
        return Finding("warmup_change", None, "")
    rounds, limit = len(told["rounds"]), told["ended"]
    words = f"the warm-up had not settled after {rounds} rounds ({limit})"
    if told["change"] is None:
        return Finding("warmup_change", np.inf, f"{words}: too few to tell")
    return Finding("warmup_change", told["change"], words + ": latency changed by {:.0%} in the last one")


def _of_the_client(
    run: Observed, summary: Summary, config: Mapping[str, Any], meta: Mapping[str, Any]
) -> Iterator[Finding]:
    (lag, where), (late, when) = _tail(summary, "lag"), _tail(summary, "receive_lag")
    yield Finding("lag_p99", lag, f"the client sent {{:.4f}} s late {where}")
    yield Finding("rate_missed", _rate_missed(run), "the client sent {:.1%} slower than the schedule let it")
    yield Finding("loop_lag_p99", _worst(meta, "loop_lag_p99"), "the client's loop was {:.4f} s late at p99")
    yield Finding("receive_lag_p99", late, f"the client read what had come {{:.4f}} s late {when}")
    is_late = late is None or late > (config["validity"].get("receive_lag_p99", {}).get("suspect") or 0.0)
    blurred = summary.get("coalesced", {}).get("run") if is_late else None
    yield Finding("coalesced_share", blurred, "{:.1%} of the chunks have a later one's time, the client being late")
    yield Finding("cpu_share", _worst(meta, "cpu_share"), "the client used {:.0%} of its core")
    yield Finding("run_delay_share", _worst(meta, "run_delay_share"), "the client waited {:.1%} of the time for a core")
    yield Finding("gc_pause", _worst(meta, "gc_pause_max"), "the client collected garbage for {:.4f} s")
    yield Finding("clock_step", _worst(meta, "clock_step"), "the system's clock was moved by {:.6f} s")
    yield Finding("calibrated_load", _load(run, meta), "{:.0%} of the events that this machine's client can take came")


def _tail(summary: Summary, name: str) -> tuple[float | None, str]:
    """p99, or the maximum where there are too few samples; and which it is."""
    stats = summary.get(name, {})
    return (stats["p99"], "at p99") if "p99" in stats else (stats.get("max"), "at worst")


def _rate_missed(run: Observed) -> float | None:
    """How much slower requests were sent than they were due and had their slots, as a share."""
    sent = np.sort(run.column("sent")[run.sent])
    let_go = np.sort(np.maximum(run.column("due"), run.column("slot"))[run.sent])
    if len(sent) < _FEWEST or let_go[-1] <= let_go[0]:
        return None
    return float(1 - (let_go[-1] - let_go[0]) / (sent[-1] - sent[0]))


def _load(run: Observed, meta: Mapping[str, Any]) -> float | None:
    """Chunks in the busiest second, as a share of what calibration found the workers to keep up with."""
    limits = (meta.get("calibration") or {}).get("limits", {})
    client = meta.get("load_generator", {})
    limit: float | None = limits.get("events_per_s", {}).get(client.get("stamps"))
    if not limit or not run.times:
        return None
    return busiest_second(np.concatenate(run.times)) / (limit * len(client["workers"]))


def _worst(meta: Mapping[str, Any], name: str) -> float | None:
    """Of all workers; older runs had one, and told of it without a list."""
    client = meta.get("load_generator", {})
    told = [w[name] for w in client.get("workers", [client]) if w.get(name) is not None]
    return max(told, default=None)


def plain_reasons(run: Observed, meta: Mapping[str, Any]) -> Iterator[str]:
    """What makes a point suspect without a threshold."""
    cores = meta.get("provenance", {}).get("cores", {})
    if set(cores.get("load_generator", ())) & set(cores.get("engine", ())):
        yield "the load generator had no core of its own"
    if "text" in set(run.records["token_source"].dropna()):
        yield "tokens were counted by text, since the server sends neither ids nor running usage"
    check = meta.get("equivalence") or {}
    if check.get("verdict") == "failed":
        yield str(check["words"])


def other_answers(meta: Mapping[str, Any]) -> str | None:
    """That the stack computes something else than its weights say, by the check of its launch; None if it does not."""
    found = meta.get("equivalence") or {}
    return str(found["words"]) if found.get("verdict") == "differs" else None


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
    """Share of prompt tokens that a prefix cache served beyond the `repeated` ones; None if the server tells of none.

    Some servers tell nothing of a request that had none from it (SGLang), so what one does not tell counts as none.
    """
    cached = run.count("cached_tokens")
    if not np.isfinite(cached).any():
        return None
    return float((np.nansum(cached) - repeated) / run.count("asked_prompt_tokens").sum())

"""What a configuration asked for, as far as points must share it to be drawn in one chart."""

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

SIZES = ("tokens", "mean", "median", "low", "high")
"""What says how long prompts are; anything else says how their lengths are spread."""

Leaves = tuple[tuple[str, str], ...]


def fixed(config: Mapping[str, Any]) -> Leaves:
    """Every leaf that a sweep over stacks, loads, contexts and repeats leaves alone, as sorted `key, value` pairs."""
    model, workload, arrival, lengths = (config.get(n) or {} for n in ("model", "workload", "arrival", "lengths"))
    kept = {
        "model": {} if compares_models(config) else {k: v for k, v in model.items() if k in ("name", "seed", "config")},
        "workload": {k: v for k, v in workload.items() if k not in ("input_lengths", "output_lengths")},
        "arrival": {k: v for k, v in arrival.items() if k != "rate"},
        "lengths.input": {k: v for k, v in (lengths.get("input") or {}).items() if k not in SIZES},
        "lengths.output": lengths.get("output") or {},
    }
    return tuple(sorted((key, plain(value)) for key, value in flat(kept).items()))


def compares_models(config: Mapping[str, Any]) -> bool:
    """Whether models were raced against each other, rather than stacks that serve one of them."""
    return bool(config.get("compare_models"))


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        leaves |= flat(inner, f"{name}.") if isinstance(inner, Mapping) and inner else {name: inner}
    return leaves


def plain(value: Any) -> str:
    """A value in one line: equal values, equal lines."""
    if isinstance(value, str):
        return value
    return orjson.dumps(value, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS).decode()


def differing(all_leaves: Iterable[Leaves]) -> set[str]:
    """The keys that not all of them agree on."""
    every = [dict(leaves) for leaves in all_leaves]
    keys = {key for leaves in every for key in leaves}
    return {key for key in keys if len({leaves.get(key) for leaves in every}) > 1}


def common_mean(means: Iterable[float]) -> float | None:
    """One name for draws of the same lengths: their mean, in three digits unless it is one whole number for all."""
    held = list(means)
    if not held:
        return None
    mean = sum(held) / len(held)
    return held[0] if min(held) == max(held) == round(mean) else float(f"{mean:.3g}")

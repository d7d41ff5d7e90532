"""The metrics of docs/metrics.md that telemetry gives, over the `whole` window; None where it was not told.

Of several GPUs the values are added up, but for shares, of which the highest counts.
"""

from collections.abc import Callable

import numpy as np

from stackrace.harness.observed import Observed, Window
from stackrace.harness.settling import Floats
from stackrace.harness.telemetry.gpu import POWER_CAP, THROTTLED
from stackrace.harness.telemetry.series import Series, by_device, common_cover, reading_times

_FEWEST = 5  # readings in the window that a mean is taken from


def energy_per_output_token(run: Observed) -> float | None:
    """Joules of the GPUs / output tokens that arrived, both in the part of the window that energy readings cover."""
    energy, covered = _energy(run)
    if covered is None or not run.tokens_in(covered):
        return None
    return sum(one.rise(covered) for one in energy) / run.tokens_in(covered)


def energy_covered(run: Observed) -> float | None:
    """Share of the window that lies between the first and the last energy reading."""
    energy, covered = _energy(run)
    if not energy or run.whole is None:
        return None
    return covered.seconds / run.whole.seconds if covered is not None else 0.0


def gpu_power(run: Observed) -> float | None:
    """Mean of the power readings, in watts."""
    return _mean(run, "gpu", "power")


def gpu_memory(run: Observed) -> float | None:
    """Highest reading of the memory in use, in bytes."""
    return _highest(run, "gpu", "memory_used")


def throttled(run: Observed) -> float | None:
    """Share of the readings at which heat or the power brake held a GPU's clocks down."""
    return _share_with(run, THROTTLED)


def power_capped(run: Observed) -> float | None:
    """Share of the readings at which the ordinary power limit held a GPU's clocks down."""
    return _share_with(run, POWER_CAP)


def engine_batch(run: Observed) -> float | None:
    """Mean of the readings of the requests that the engine runs."""
    return _mean(run, "gauges", "requests_running")


def kv_cache_peak(run: Observed) -> float | None:
    """Highest reading of the share of the KV cache in use."""
    return _highest(run, "gauges", "kv_cache_usage")


def kv_cache_capacity(run: Observed) -> float | None:
    """Tokens that the engine's KV cache holds, by its own word."""
    return _highest(run, "gauges", "kv_cache_capacity")


def preemptions(run: Observed) -> float | None:
    """Preemptions from the last reading before the window to the first one after it."""
    return _counted(run, "preemptions")


def prefix_hits(run: Observed) -> float | None:
    """Prompt tokens found in the prefix cache / those looked for, as the engine counts them."""
    hits, queries = _counted(run, "prefix_cache_hits"), _counted(run, "prefix_cache_queries")
    return hits / queries if hits is not None and queries else None


def engine_cpu(run: Observed) -> float | None:
    """CPU seconds of the engine's processes per second: cores in use."""
    spent = by_device(run.telemetry, "processes", "cpu_seconds")
    covered = common_cover(spent, run.whole) if run.whole is not None else None
    return None if covered is None else sum(one.rise(covered) for one in spent) / covered.seconds


def engine_memory(run: Observed) -> float | None:
    """Highest reading of the resident memory of the engine's processes, in bytes."""
    return _highest(run, "processes", "rss")


def _energy(run: Observed) -> tuple[list[Series], Window | None]:
    energy = by_device(run.telemetry, "gpu", "energy")
    return energy, None if run.whole is None else common_cover(energy, run.whole)


def _mean(run: Observed, source: str, name: str) -> float | None:
    """Undefined where a device has too few readings in the window."""
    return _over_devices(run, source, name, Series.within, lambda v: float(v.mean()) if len(v) >= _FEWEST else None)


def _highest(run: Observed, source: str, name: str) -> float | None:
    return _over_devices(run, source, name, Series.around, lambda v: float(v.max()))


def _counted(run: Observed, name: str) -> float | None:
    """By how much a counter of the engine's rose. It stood at 0 where a page was read and did not have it yet."""
    counters = by_device(run.telemetry, "gauges", name)
    if run.whole is None or not counters:
        return None
    counter = counters[0].after_zero_at(reading_times(run.telemetry, "gauges"))
    values = counter.around(run.whole)
    return float(values[-1] - values[0]) if len(values) > 1 else None


def _share_with(run: Observed, bits: int) -> float | None:
    if run.whole is None:
        return None
    reasons = [one.around(run.whole) for one in by_device(run.telemetry, "gpu", "clock_reasons")]
    return max((float((r.astype(np.int64) & bits != 0).mean()) for r in reasons), default=None)


def _over_devices(
    run: Observed,
    source: str,
    name: str,
    part: Callable[[Series, Window], Floats],
    of: Callable[[Floats], float | None],
) -> float | None:
    """`of` a part of each device's readings, added up; None if one has none."""
    if run.whole is None:
        return None
    values = [of(part(one, run.whole)) for one in by_device(run.telemetry, source, name)]
    told = [value for value in values if value is not None]
    return sum(told) if told and len(told) == len(values) else None

"""The engine's own gauges and counters, from its /metrics in Prometheus' text format, under names common to all."""

import contextlib
import http.client
import urllib.error
import urllib.request
from collections import defaultdict
from math import prod

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from stackrace.backends.asking import NO_PROXY
from stackrace.backends.gauges import InLabels, Names
from stackrace.harness.errors import TelemetryError
from stackrace.harness.telemetry.source import Reading
from stackrace.harness.types import Endpoint

_SHARES = {"kv_cache_usage"}  # of which several engines' sum would mean nothing


class Gauges:
    """What one engine tells at `/metrics`."""

    name = "gauges"

    def __init__(self, endpoint: Endpoint, names: Names, timeout: float) -> None:
        """`names` maps common names to the engine's; `timeout` in seconds. TelemetryError without a name."""
        if not names:
            raise TelemetryError("this stack names none")
        self._names = names
        self._timeout = timeout
        self._request = urllib.request.Request(f"{endpoint.url.rstrip('/')}/metrics", headers=dict(endpoint.headers))

    def read(self) -> list[Reading]:
        """The numbers that are there; counters and counts are summed over labels, shares are the highest."""
        found = parse(self._text(), self._names)
        if not found:
            raise TelemetryError(f"/metrics has none of {', '.join(_of_series(self._names).values())}")
        return [Reading(name, value) for name, value in found.items()]

    def _text(self) -> str:
        try:
            with NO_PROXY.open(self._request, timeout=self._timeout) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as e:
            e.close()
            raise TelemetryError(f"HTTP {e.code}") from None
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise TelemetryError(f"{type(e).__name__}: {getattr(e, 'reason', e)}") from None


def parse(text: str, names: Names) -> dict[str, float]:
    """Common name -> value, for those of `names` that the text has. TelemetryError if it is not Prometheus' format."""
    series = _of_series(names)
    wanted = tuple(f"{name}{end}" for name in set(series.values()) for end in "{ ")
    lines = "\n".join(line for line in text.splitlines() if line.startswith(wanted))  # a whole page takes 10 ms
    values: dict[str, list[float]] = defaultdict(list)
    try:
        for family in text_string_to_metric_families(lines + "\n"):
            for sample in family.samples:
                for name in (common for common, theirs in series.items() if theirs == sample.name):
                    values[name] += _values(names[name], sample)
    except ValueError as e:
        raise TelemetryError(f"/metrics cannot be read: {e}") from None
    return {name: max(found) if name in _SHARES else sum(found) for name, found in values.items() if found}


def _of_series(names: Names) -> dict[str, str]:
    return {common: told.name if isinstance(told, InLabels) else told for common, told in names.items()}


def _values(told: str | InLabels, sample: Sample) -> list[float]:
    """One, or none where labels do not hold it (yet)."""
    if not isinstance(told, InLabels):
        return [float(sample.value)]
    for labels in told.labels:
        with contextlib.suppress(KeyError, ValueError):
            return [prod(float(sample.labels[label]) for label in labels)]
    return []

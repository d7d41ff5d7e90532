"""Which sources of telemetry a stack has."""

from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from stackrace.backends.base import Backend
from stackrace.harness.errors import TelemetryError
from stackrace.harness.telemetry.gauges import Gauges
from stackrace.harness.telemetry.gpu import GPUs, nvml
from stackrace.harness.telemetry.processes import Processes
from stackrace.harness.telemetry.source import Source
from stackrace.harness.types import Endpoint

_SLOWEST = 1.0  # seconds that an answer is waited for: the numbers are taken for those of half-way


def sources(backend: Backend, endpoint: Endpoint) -> dict[str, Callable[[], Source]]:
    """What opens each source of a running engine, by its name."""
    return {
        "gpu": lambda: _gpus(backend, endpoint),
        "processes": lambda: _processes(endpoint),
        "gauges": lambda: Gauges(endpoint, backend.gauges(), _SLOWEST),
    }


def _gpus(backend: Backend, endpoint: Endpoint) -> GPUs:
    if not backend.uses_gpu():
        raise TelemetryError("this stack uses none")
    if not _is_here(endpoint):
        raise TelemetryError("the engine runs on another machine")
    return GPUs(nvml(), backend.visible_gpus())


def _processes(endpoint: Endpoint) -> Processes:
    if endpoint.pid is None:
        raise TelemetryError("the engine was not launched by us")
    return Processes(endpoint.pid)


def _is_here(endpoint: Endpoint) -> bool:
    host = urlsplit(endpoint.url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

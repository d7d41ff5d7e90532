"""GPUs by NVML: power, energy, clocks, heat, use, memory, and why the clocks are lower than they could be."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from stackrace.harness.errors import TelemetryError
from stackrace.harness.host import visible
from stackrace.harness.telemetry.source import Reading

REASONS = {
    "gpu_idle": 0x1,
    "applications_clocks_setting": 0x2,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake_slowdown": 0x80,
    "display_clock_setting": 0x100,
}
"""Bits of the reading `clock_reasons`, as NVML's nvmlClocksEventReason… numbers them."""
POWER_CAP = REASONS["sw_power_cap"]
THROTTLED = REASONS["sw_thermal_slowdown"] | REASONS["hw_thermal_slowdown"] | REASONS["hw_power_brake_slowdown"]

_FIELDS: dict[str, Callable[[Any, Any], float]] = {
    "power": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,  # W
    "energy": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,  # J since the driver was loaded
    "sm_clock": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM) * 1e6,  # Hz
    "memory_clock": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM) * 1e6,
    "temperature": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),  # degrees Celsius
    "utilisation": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,  # share
    "memory_used": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,  # bytes
    "clock_reasons": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
}


class GPUs:
    """The GPUs that an engine may use."""

    name = "gpu"

    def __init__(self, nvml: Any, visible: str | None) -> None:
        """`nvml` is the module pynvml, `visible` the engine's CUDA_VISIBLE_DEVICES. TelemetryError without a GPU."""
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._gpus = _visible(nvml, visible)
        except nvml.NVMLError as e:
            raise TelemetryError(f"NVML: {e}") from None
        if not self._gpus:
            raise TelemetryError("no GPU that the engine may use")

    def read(self) -> list[Reading]:
        """Every field that each GPU supports."""
        try:
            return [reading for index, gpu in self._gpus.items() for reading in self._of(index, gpu)]
        except self._nvml.NVMLError as e:
            raise TelemetryError(f"NVML: {e}") from None

    def _of(self, index: int, gpu: Any) -> Iterator[Reading]:
        unsupported = (self._nvml.NVML_ERROR_NOT_SUPPORTED, self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        for name, ask in _FIELDS.items():
            try:
                yield Reading(name, float(ask(self._nvml, gpu)), index)
            except self._nvml.NVMLError as e:
                if e.value not in unsupported:
                    raise


def nvml() -> ModuleType:
    """The module pynvml. TelemetryError where it is not installed."""
    try:
        import pynvml
    except ImportError:
        raise TelemetryError("nvidia-ml-py is not installed") from None
    module: ModuleType = pynvml
    return module


def _visible(nvml: Any, setting: str | None) -> dict[int, Any]:
    """Handles by NVML's numbers."""
    gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return {index: gpus[index] for index in visible([nvml.nvmlDeviceGetUUID(gpu) for gpu in gpus], setting)}

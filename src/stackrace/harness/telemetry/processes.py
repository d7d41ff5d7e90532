"""The engine's processes: their CPU time, their memory, their number."""

import psutil

from stackrace.harness.errors import TelemetryError
from stackrace.harness.telemetry.source import Reading


class Processes:
    """Everything that descends from the engine's guardian, which itself does not count."""

    name = "processes"

    def __init__(self, guardian: int) -> None:
        """`guardian` is its process id. TelemetryError if it has ended."""
        self._spent: dict[psutil.Process, float] = {}  # those that have ended stay, so that the sum never falls
        try:
            self._guardian = psutil.Process(guardian)
        except psutil.NoSuchProcess:
            raise TelemetryError("the engine has ended") from None

    def read(self) -> list[Reading]:
        """`cpu_seconds` since each began; `rss` in bytes, in which shared pages count once a process; `processes`."""
        try:
            engine = self._guardian.children(recursive=True)
        except psutil.NoSuchProcess:
            raise TelemetryError("the engine has ended") from None
        sizes = [size for process in engine if (size := self._look_at(process)) is not None]
        return [
            Reading("cpu_seconds", sum(self._spent.values())),
            Reading("rss", float(sum(sizes))),
            Reading("processes", float(len(sizes))),
        ]

    def _look_at(self, process: psutil.Process) -> int | None:
        """Note its CPU time and return its resident bytes; None if it has just ended."""
        try:
            with process.oneshot():
                times = process.cpu_times()
                size = int(process.memory_info().rss)
        except psutil.NoSuchProcess:
            return None
        self._spent[process] = times.user + times.system
        return size

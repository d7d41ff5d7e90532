"""The engine's processes: their CPU time, their memory, their number."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from stackrace.harness.errors import TelemetryError
from stackrace.harness.telemetry.source import Reading


class Processes:
    """Everything that descends from the engine's guardian, which itself does not count."""

    name = "processes"

    def __init__(self, guardian: int) -> None:
        """`guardian` is its process id. TelemetryError if it has ended."""
        self._spent: dict[psutil.Process, float] = {}  # those that have ended stay, so that the sum never falls
        with _told():
            self._guardian = psutil.Process(guardian)

    def read(self) -> list[Reading]:
        """`cpu_seconds` since each began; `rss` in bytes, in which shared pages count once a process; `processes`."""
        with _told():
            engine = self._guardian.children(recursive=True)
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


@contextmanager
def _told() -> Iterator[None]:
    """What psutil cannot read, a process that is not ours to look at for one, is a source that is absent."""
    try:
        yield
    except psutil.NoSuchProcess:
        raise TelemetryError("the engine has ended") from None
    except psutil.Error as e:
        raise TelemetryError(f"the engine's processes cannot be read: {type(e).__name__} {e}".strip()) from None

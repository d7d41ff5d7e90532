"""Reads every source of telemetry at an interval, on the run's clock, each in a thread of its own."""

import threading
from collections.abc import Callable, Mapping, Sequence

from stackrace.harness.clock import SECOND, now
from stackrace.harness.errors import TelemetryError
from stackrace.harness.telemetry.samples import Sample
from stackrace.harness.telemetry.source import Source

_PATIENCE = 3.0  # seconds that the last reading of a source is waited for: one that goes on, and one more


class Sampler:
    """Samples from when it is made until `stop`. No source can delay another, nor whoever made it."""

    def __init__(self, sources: Mapping[str, Callable[[], Source]], interval: float) -> None:
        """`sources` open each source by its name, or raise TelemetryError; `interval` in seconds."""
        self._readers: list[_Reader] = []
        self._closed: dict[str, str] = {}
        for name, begin in sources.items():
            try:
                self._readers.append(_Reader(begin(), interval))
            except TelemetryError as e:
                self._closed[name] = str(e)

    def sample(self) -> None:
        """Have every source read now, besides its turn."""
        for reader in self._readers:
            reader.wake()

    def stop(self) -> None:
        """Have every source read a last time, and return when they have, after 3 s at the latest."""
        for reader in self._readers:
            reader.end()
        deadline = now() + round(_PATIENCE * SECOND)
        for reader in self._readers:
            reader.join(max(0.0, (deadline - now()) / SECOND))

    @property
    def samples(self) -> Sequence[Sample]:
        """What was read so far."""
        return [sample for reader in self._readers for sample in tuple(reader.samples)]

    @property
    def sources(self) -> dict[str, str]:
        """Each source by its name: `ok`, or in words what was wrong with it."""
        return {**{reader.source: reader.state for reader in self._readers}, **self._closed}


class _Reader(threading.Thread):
    """Reads one source."""

    def __init__(self, source: Source, interval: float) -> None:
        super().__init__(name=f"telemetry {source.name}", daemon=True)
        self.source = source.name
        self.samples: list[Sample] = []
        self._read = source.read
        self._interval = round(interval * SECOND)
        self._tried = self._failed = 0
        self._first_error = ""
        self._due = now()
        self._wake = threading.Event()
        self._is_ending = False
        self.start()

    def wake(self) -> None:
        """Read now."""
        self._wake.set()

    def end(self) -> None:
        """Read once more and end."""
        self._is_ending = True
        self._wake.set()

    @property
    def state(self) -> str:
        """`ok`, or what was wrong."""
        if not self._failed:
            return "ok"
        if self._failed == self._tried:
            return self._first_error
        return f"{self._failed} of {self._tried} readings failed, the first: {self._first_error}"

    def run(self) -> None:
        """Read at multiples of the interval, those left out that a slow reading took."""
        ended = False
        while not ended:
            self._wake.wait(max(0, self._due - now()) / SECOND)
            self._wake.clear()
            ended = self._is_ending
            self._sample()
            while self._due <= now():
                self._due += self._interval

    def _sample(self) -> None:
        began = now()
        self._tried += 1
        try:
            readings = self._read()
        except TelemetryError as e:
            self._failed += 1
            self._first_error = self._first_error or str(e)
            return
        time = (began + now()) // 2
        self.samples += [Sample(time, self.source, r.device, r.name, r.value) for r in readings]

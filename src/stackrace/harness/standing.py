"""Where a point stands while it runs, for whoever watches."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from stackrace.harness.clock import SECOND, now
from stackrace.harness.types import Record

_RECENT = 5 * SECOND
_MOST_CHUNKS = 100_000  # that the display's rate is taken from


@dataclass
class Standing:
    """Where a point stands, for whoever watches."""

    phase: str = "starting engine"
    total: int = 0
    in_flight: int = 0
    done: int = 0
    failed: int = 0
    start: int | None = None
    ttft: list[float] = field(default_factory=list)  # seconds
    _tokens: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_MOST_CHUNKS))  # time, tokens

    def add(self, finished: Record) -> None:
        """Count a finished request."""
        self.done += 1
        self.failed += finished.error is not None
        if finished.chunk_times:
            self.ttft.append((finished.chunk_times[0] - finished.due) / SECOND)
            self._tokens += zip(finished.chunk_times, finished.chunk_tokens, strict=True)

    def tokens_per_second(self) -> float:
        """Output tokens of finished requests over the last seconds."""
        if self.start is None:
            return 0.0
        time = now() - self.start
        recent = sum(tokens for at, tokens in self._tokens if at > time - _RECENT)
        return recent / max(min(time, _RECENT) / SECOND, 1e-9)

    def median_ttft(self) -> float | None:
        """Seconds."""
        return float(np.median(self.ttft)) if self.ttft else None

"""At most so many requests are served at a time."""

from collections import deque
from typing import Protocol


class Waiting(Protocol):
    """Whoever asks for a place."""

    arrived: int  # ns
    is_over: bool  # it went away while it waited

    def begin(self, start: int) -> None:
        """It has a place from `start` (ns) on."""


class Places:
    """First come, first served."""

    def __init__(self, places: int | None) -> None:
        self._free = places
        self._queue: deque[Waiting] = deque()

    def ask(self, who: Waiting) -> None:
        """Begin, now or when a place comes free."""
        if self._free == 0:
            self._queue.append(who)
            return
        if self._free is not None:
            self._free -= 1
        who.begin(who.arrived)

    def leave(self, at: int) -> None:
        """A place came free at `at` (ns), however late that is noticed: the next one begins then."""
        while self._queue:
            who = self._queue.popleft()
            if not who.is_over:
                who.begin(max(at, who.arrived))
                return
        if self._free is not None:
            self._free += 1

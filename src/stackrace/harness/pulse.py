"""Whether the engine still lives: a hang is told from a slow request, a broken engine from a refusal."""

from stackrace.backends.running import Engine
from stackrace.harness.clock import SECOND, now
from stackrace.harness.errors import EngineDied, EngineHangs
from stackrace.harness.load.messages import Tick
from stackrace.harness.types import Record

_STREAK = 8  # requests that failed in succession, after which the engine itself is asked
_PAUSE = 5 * SECOND  # between two times that it is
_PATIENCE = 5.0  # seconds


class Pulse:
    """Watches over the engine of one point, by what the workers and the records tell."""

    def __init__(self, engine: Engine, workers: int, stall: float) -> None:
        self._engine = engine
        self._workers = workers
        self._stall = stall
        self._ticks: dict[int, Tick] = {}
        self._failed = 0  # in succession
        self._asked = 0  # ns

    @property
    def in_flight(self) -> int:
        """Requests of all workers, as they last told."""
        return sum(tick.in_flight for tick in self._ticks.values())

    def note(self, record: Record) -> None:
        """A request has ended."""
        self._failed = self._failed + 1 if record.error else 0

    def check(self, tick: Tick | None) -> None:
        """Raise EngineDied if it has exited or broken, EngineHangs if it sends nothing any more."""
        if tick is not None:
            self._ticks[tick.worker] = tick
        self._engine.check_alive()
        if self.is_silent():
            silence = f"no token for {self._stall:g} s (timeouts.stall)"
            raise EngineHangs(f"{silence}: {self._engine.name} hangs{self._engine.last_words()}")
        if self._failed >= _STREAK and now() - self._asked > _PAUSE:
            self._ask()

    def check_at_the_end(self) -> None:
        """Like `check`, once nothing is in flight any more."""
        self._engine.check_alive()
        if self._failed:
            self._ask()

    def is_silent(self) -> bool:
        """A request was given up for silence, and no worker had heard from any other in all that time.

        Judged once every worker has told how it stood after that.
        """
        stalled = max((tick.stalled for tick in self._ticks.values() if tick.stalled is not None), default=None)
        if stalled is None or len(self._ticks) < self._workers:
            return False
        ticks = self._ticks.values()
        return min(t.time for t in ticks) >= stalled and stalled - max(t.heard for t in ticks) > self._stall * SECOND

    def _ask(self) -> None:
        fault = self._engine.fault(_PATIENCE)
        self._asked = now()
        self._engine.check_alive()
        if fault is not None:
            words = self._engine.last_words()
            raise EngineDied(f"{self._engine.name} has not exited, but is broken: {fault}{words}")

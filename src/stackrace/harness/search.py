"""The highest level of load that meets a target: a bracket by doubling and halving, then bisection in log space.

Pure: what a measurement is, the caller knows. The same measurements give the same search.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

from stackrace.harness.levels import FAILS, OPEN, PASSES, Level, Measurement

_STEP = 2.0  # of the bracket
_DIGITS = 4  # of a level that is not a whole number

Measure = Callable[[float, int], Measurement]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Where to look and when to stop; `low` <= `start` <= `high`."""

    low: float
    high: float
    start: float
    target: float  # attainment, a share
    confidence: float  # of the interval of a level's attainment that decides
    precision: float  # of the answer: it lies between two levels no further apart than this share
    repeats: int  # measurements, at least, of the levels that the answer lies between
    max_repeats: int  # of a level that is not decided before
    max_points: int  # in all
    whole: bool  # levels are whole numbers


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement of the log."""

    level: float
    repeat: int
    measurement: Measurement


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found. `low` is the highest level shown to pass, `high` the lowest shown to fail; None: none was."""

    estimate: float | None
    low: float | None
    high: float | None
    ended: str  # why the search was over
    is_complete: bool  # it ended by itself, with an answer as precise as the measurements allow
    levels: list[Level]  # ascending
    log: list[Step]


class _Stop(Exception):
    """Why the search ends before its time."""


class Search:
    """One search; `answer` may be asked at any time."""

    def __init__(self, rules: Rules, measure: Measure) -> None:
        self._rules = rules
        self._measure = measure
        self._levels: dict[float, Level] = {}
        self._log: list[Step] = []
        self._ended, self._is_complete = "not over", False

    def run(self) -> Answer:
        """Measure until the answer is there, or cannot be had."""
        try:
            while (level := self._next()) is not None:
                self._take(level)
        except _Stop as why:
            self._ended = str(why)
            return self.answer()
        self._is_complete, self._ended = True, self._how_it_ended()
        return self.answer()

    def answer(self) -> Answer:
        """What is known so far."""
        low, high = self._shown()
        ordered = [self._levels[v] for v in sorted(self._levels)]
        return Answer(self._estimate(), low, high, self._ended, self._is_complete, ordered, list(self._log))

    def _take(self, value: float) -> None:
        rules, level = self._rules, self._levels.setdefault(value, Level(value))
        if len(self._log) >= rules.max_points:
            raise _Stop(f"search.max_points={rules.max_points} are measured: raise it for a better answer")
        measurement = self._measure(value, len(level.measured))
        self._log.append(Step(value, len(level.measured), measurement))
        level.measured.append(measurement)
        if measurement.fault is not None and [m.fault is not None for m in level.measured[-2:]] == [True, True]:
            whose = "the client, not the server, is the limit" if measurement.is_client else "no fair measurement"
            raise _Stop(f"{whose}: {measurement.fault} at {value:g}")
        if self._is_done(value) and self._verdict(value) == OPEN and level.share == 1:
            judged, target = level.pooled[1], rules.target
            raise _Stop(
                f"{judged} requests at {value:g} all met the SLOs, too few to show {target:.4g}: measure longer"
            )

    def _next(self) -> float | None:
        """The level to measure now; None: the answer is there."""
        if not self._levels:
            return self._rules.start
        for value, level in self._levels.items():
            if not level.held:
                return value
        passing, failing = self._leaning(True), self._leaning(False)
        low, high = max(passing, default=None), min(failing, default=None)
        if low is None or high is None:
            return self._beyond(low, high)
        if low < high and not self._is_narrow(low, high):
            return self._middle(low, high)
        open_ones = [v for v in (low, high) if not self._is_done(v)]
        return min(open_ones, key=lambda v: len(self._levels[v].held)) if open_ones else self._refine()

    def _beyond(self, low: float | None, high: float | None) -> float | None:
        """No bracket yet: on to twice the highest or half of the lowest, as far as the limits."""
        rules = self._rules
        if low is not None:
            return low if low >= rules.high and not self._is_done(low) else self._above(low)
        assert high is not None
        return high if high <= rules.low and not self._is_done(high) else self._below(high)

    def _refine(self) -> float | None:
        """Between what is shown to pass and to fail lie levels that stay undecided: close in on them from both ends."""
        undecided = [v for v in self._levels if self._is_done(v) and self._verdict(v) == OPEN]
        if not undecided:
            return None
        low, high = self._shown()
        first, last = min(undecided), max(undecided)
        beneath = self._unfinished(low or 0.0, first)
        above = self._unfinished(last, high or float("inf"))
        if beneath or above:
            return beneath[-1] if beneath else above[0]
        if low is None or not self._is_narrow(low, first):
            closer = self._below(first) if low is None else self._between(low, first)
            if closer is not None:
                return closer
        if high is None:
            return self._above(last)
        return None if self._is_narrow(last, high) else self._between(last, high)

    def _unfinished(self, low: float, high: float) -> list[float]:
        return sorted(v for v in self._levels if low < v < high and not self._is_done(v))

    def _between(self, low: float, high: float) -> float | None:
        return self._middle(low, high) if low < high else None

    def _above(self, value: float) -> float | None:
        higher = min(self._rounded(value * _STEP), self._rules.high)
        return higher if higher > value else None

    def _below(self, value: float) -> float | None:
        lower = max(self._rounded(value / _STEP), self._rules.low)
        return lower if lower < value else None

    def _middle(self, low: float, high: float) -> float:
        middle = self._rounded(sqrt(low * high))
        return min(max(middle, low + 1), high - 1) if self._rules.whole else middle

    def _rounded(self, value: float) -> float:
        return float(round(value)) if self._rules.whole else float(f"{value:.{_DIGITS}g}")

    def _is_narrow(self, low: float, high: float) -> bool:
        return high <= low * (1 + self._rules.precision) or (self._rules.whole and high - low <= 1)

    def _is_done(self, value: float) -> bool:
        """Measured often enough, and decided or as often as allowed."""
        n = len(self._levels[value].held)
        return n >= self._rules.repeats and (self._verdict(value) != OPEN or n >= self._rules.max_repeats)

    def _verdict(self, value: float) -> str:
        return self._levels[value].verdict(self._rules.target, self._rules.confidence)

    def _leaning(self, passing: bool) -> list[float]:
        rules = self._rules
        held = {v: level for v, level in self._levels.items() if level.held}
        return [v for v, level in held.items() if level.leans_to_pass(rules.target, rules.confidence) == passing]

    def _shown(self) -> tuple[float | None, float | None]:
        """The highest level that passes, below all that fail; the lowest that fails, above all that pass."""
        passing, failing = ([v for v in self._levels if self._verdict(v) == which] for which in (PASSES, FAILS))
        low = max((v for v in passing if v < min(failing, default=float("inf"))), default=None)
        high = min((v for v in failing if v > max(passing, default=0.0)), default=None)
        return low, high

    def _estimate(self) -> float | None:
        """The middle, in log space, of the best guess; of whole numbers the highest that passes by it."""
        low, high = max(self._leaning(True), default=None), min(self._leaning(False), default=None)
        if low is None or high is None or self._rules.whole:
            return low
        return float(f"{sqrt(low * high):.{_DIGITS}g}")

    def _how_it_ended(self) -> str:
        low, high = self._leaning(True), self._leaning(False)
        if not high:
            return f"every level passed, up to search.high={self._rules.high:g}"
        if not low:
            return f"every level failed, down to search.low={self._rules.low:g}"
        if any(self._is_done(v) and self._verdict(v) == OPEN for v in self._levels):
            return f"what lies between stays undecided after {self._rules.max_repeats} repeats"
        return "as precise as asked"

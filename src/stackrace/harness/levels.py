"""What repeated measurements say about one level of load: it passes, it fails, or that is still open."""

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

PASSES, FAILS, OPEN = "passes", "fails", "undecided"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One point. With a `fault` it says nothing about the server."""

    attained: int  # requests that met every SLO
    judged: int  # of these
    sustainable: bool | None
    fault: str | None = None
    is_client: bool = False  # the fault is the client's


class Bounds(NamedTuple):
    """An interval of shares."""

    low: float
    high: float


def wilson(hits: int, of: int, confidence: float) -> Bounds:
    """Wilson's score interval for a share; all of 0 to 1 where nothing was counted."""
    if not of:
        return Bounds(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = hits / of, z * z / of
    middle = share + weight / 2
    spread = z * (share * (1 - share) / of + weight / of / 4) ** 0.5
    return Bounds((middle - spread) / (1 + weight), (middle + spread) / (1 + weight))


@dataclass(slots=True)
class Level:
    """One level and all its measurements, those with a fault included."""

    value: float
    measured: list[Measurement] = field(default_factory=list)

    @property
    def held(self) -> list[Measurement]:
        """The measurements that count."""
        return [m for m in self.measured if m.fault is None]

    @property
    def unsustainable(self) -> int:
        """How many of them had a queue that kept growing."""
        return sum(m.sustainable is False for m in self.held)

    @property
    def pooled(self) -> tuple[int, int]:
        """Attained and judged of the others, together."""
        kept = [m for m in self.held if m.sustainable is not False]
        return sum(m.attained for m in kept), sum(m.judged for m in kept)

    @property
    def share(self) -> float | None:
        """Attainment over all that count, whether the queue grew or not; None where nothing was judged."""
        judged = sum(m.judged for m in self.held)
        return sum(m.attained for m in self.held) / judged if judged else None

    def verdict(self, target: float, confidence: float) -> str:
        """Fails where most of it was unsustainable; else as far as the interval of the attainment decides."""
        if 2 * self.unsustainable >= len(self.held):
            return FAILS if 2 * self.unsustainable > len(self.held) else OPEN
        low, high = wilson(*self.pooled, confidence)
        return PASSES if low >= target else FAILS if high < target else OPEN

    def leans_to_pass(self, target: float, confidence: float) -> bool:
        """The verdict, or the better guess where it is open."""
        verdict = self.verdict(target, confidence)
        if verdict != OPEN or 2 * self.unsustainable == len(self.held):
            return verdict == PASSES
        attained, judged = self.pooled
        return judged > 0 and attained / judged >= target

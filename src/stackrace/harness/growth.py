"""Whether a queue kept growing: what tells a load that a server can sustain from one that it cannot."""

from typing import NamedTuple

import numpy as np

from stackrace.harness.observed import Observed
from stackrace.harness.settling import Floats, outstanding

FIFTHS = 5
_ARRIVALS = 20  # after the first answer, for a verdict
_SPANS = 5  # times as long as the first requests took must they last


class Growth(NamedTuple):
    """Requests outstanding in the fifths of the arrivals, one added to each so that a queue of a few is not growth."""

    end: float  # the last fifth / the middle one
    half: float  # the last two / the first two
    is_rising: bool  # each fifth has more than the one before; a steady queue does that once in 120 times

    def sustainable(self, limit: float) -> bool | None:
        """False: it grew all the way, by more than `limit`. True: by no more, at either place. Else None."""
        if self.is_rising and self.end > limit:
            return False
        return True if max(self.end, self.half) <= limit else None


def growth(run: Observed) -> Growth | None:
    """Of an open loop's records; None without an answer, or where what follows the first is too short to tell."""
    if not run.ok.any():
        return None
    return growth_from(run.column("due"), run.column("end"), float(run.last[run.ok].min()))


def growth_from(due: Floats, end: Floats, first: float) -> Growth | None:
    """Of requests due and ended then, from the first answer on, when the server has filled. Seconds."""
    last, filling = float(due.max()), due <= first
    if (~filling).sum() < _ARRIVALS or last - first < _SPANS * np.median((end - due)[filling]):
        return None
    fifths = 1 + outstanding(due, end, np.linspace(first, last, FIFTHS + 1))
    return Growth(
        end=float(fifths[4] / fifths[2]),
        half=float(fifths[3:].sum() / fifths[:2].sum()),
        is_rising=bool((np.diff(fifths) > 0).all()),
    )

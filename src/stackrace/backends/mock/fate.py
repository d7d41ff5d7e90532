"""What befalls one request, drawn when it arrives."""

import random
from dataclasses import dataclass

from stackrace.backends.mock.behaviour import Behaviour


@dataclass(frozen=True, slots=True)
class Fate:
    """Sends before which something happens, None where it does not; and draws for whatever is drawn later."""

    stalls_at: int | None
    cut_at: int | None
    malformed_at: int | None
    rng: random.Random


def draw(b: Behaviour, sends: int, rng: random.Random) -> Fate:
    """The fate of a request that is answered in so many sends."""
    middle = sends // 2
    stalls = rng.random() < b.stall_share
    cut = rng.random() < b.cut_share
    malformed = rng.random() < b.malformed_share
    return Fate(
        stalls_at=max(1, middle) if stalls else None,
        cut_at=middle if cut else None,
        malformed_at=middle if malformed else None,
        rng=random.Random(rng.random()) if b.jitter or b.split_share else rng,
    )

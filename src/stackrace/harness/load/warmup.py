"""One round of the warm-up, as a worker runs it: closed loop, parsed at once, reduced to two medians."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from stackrace.harness.clock import SECOND
from stackrace.harness.load.driver import Capture
from stackrace.harness.load.messages import RoundDone
from stackrace.harness.load.received import Journal, Received, hand_out
from stackrace.harness.load.response import parse


def outcome(captures: list[Capture], journal: Journal, seconds: float) -> RoundDone:
    """What a round that took so long showed; the journal is empty afterwards."""
    received: defaultdict[int, Received] = defaultdict(Received)
    hand_out(journal.take(len(journal)), received)
    ttft, tpot, errors = list[float](), list[float](), list[str]()
    for capture in captures:
        got = received[capture.position]
        answer = parse(got.data)
        if error := answer.error or capture.error:
            errors.append(error)
        elif answer.chunk_reads and capture.sent is not None:
            first, last = (got.stamps[answer.chunk_reads[i]] for i in (0, -1))
            ttft.append((first - capture.sent) / SECOND)
            if later := sum(answer.chunk_tokens[1:]):
                tpot.append((last - first) / later / SECOND)
    return RoundDone(len(captures), seconds, _median(ttft), _median(tpot), len(errors), errors[0] if errors else None)


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return float(np.median(known)) if known else None

"""How far what the load generator says is from what the mock knows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stackrace.harness.clock import SECOND
from stackrace.harness.load.health import Health
from stackrace.harness.observed import busiest_second
from stackrace.harness.settling import Floats
from stackrace.harness.summary import quantile
from stackrace.harness.types import Record


class Spread(NamedTuple):
    """Of a sample, in seconds; None where it is too small to say."""

    p50: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, seconds: Floats) -> "Spread":
        """Nearest ranks."""
        if not len(seconds):
            return cls(None, None, None)
        return cls(quantile(seconds, 0.5), quantile(seconds, 0.99), float(seconds.max()))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a trial: seconds, shares and numbers. An error is what was said less what was true."""

    requests: int
    failed: int
    events: int  # with tokens, that the mock sent
    lost: int  # of them: those of requests whose chunks or tokens are others than it sent
    events_per_s: float  # that it really sent, in its busiest second
    kernel: Spread  # error of receive times, as recorded
    user: Spread  # what it would be by the user-space stamps
    coalesced: float  # share of the chunks that have a later one's time
    served: float | None  # reported p99 of TTFT less the mock's own, from when it had the request
    ttft: float | None  # error of the reported p99, from due on
    tpot: float | None
    itl: float | None
    lag: Spread
    sent_per_s: float | None  # requests
    body: Spread  # from the first byte of a request to its last
    loop_lag_p99: float  # the worst worker's, as all below
    cpu_share: float
    run_delay_share: float | None
    stamped: bool  # by the kernel, all of it


class _Pair:
    """One request as recorded beside what was sent; arrays over its events, seconds after the start."""

    def __init__(self, record: Record, truth: Mapping[str, Any], start: int) -> None:
        sent = truth["sent"]
        self.served = (sent[0] - truth["arrived"]) / SECOND
        self.due = record.due / SECOND
        self.times = np.array(record.chunk_times) / SECOND
        self.true = (np.array(sent) - start) / SECOND
        self.error = self.times - self.true
        self.lateness = np.array(record.chunk_lateness or [0] * len(sent)) / SECOND
        self.coalesced = np.array(record.chunk_coalesced)
        self.rest = sum(record.chunk_tokens[1:])  # tokens that TPOT counts


def compare(
    records: Sequence[Record], truth: Sequence[Any], start: int, health: Sequence[Health], stamped: bool
) -> Outcome:
    """Records (their seeds as ids, times after `start`) against the mock's truth (absolute nanoseconds)."""
    known = {t["seed"]: t for t in truth}
    right = [r for r in records if r.id in known and r.chunk_tokens == known[r.id]["tokens"] and r.chunk_tokens]
    pairs = [_Pair(r, known[r.id], start) for r in right]
    events = sum(len(t["sent"]) for t in truth)
    several = [p for p in pairs if p.rest]
    sent = np.array(sorted(r.sent for r in records if r.sent is not None)) / SECOND
    whole = [r for r in records if r.sent is not None and r.body_sent is not None]
    delays = [h.run_delay_share for h in health if h.run_delay_share is not None]
    return Outcome(
        requests=len(records),
        failed=sum(r.error is not None for r in records),
        events=events,
        lost=events - sum(len(p.true) for p in pairs),
        events_per_s=busiest_second(_pool(p.true for p in pairs)),
        kernel=Spread.of(_pool(p.error for p in pairs)),
        user=Spread.of(_pool(p.error + p.lateness for p in pairs)),
        coalesced=float(_pool(p.coalesced for p in pairs).mean()) if pairs else 0.0,
        served=_difference([p.times[0] - p.due for p in pairs], [p.served for p in pairs]),
        ttft=_difference([p.times[0] - p.due for p in pairs], [p.true[0] - p.due for p in pairs]),
        tpot=_difference(*([np.ptp(t) / p.rest for t, p in zip(ts, several, strict=True)] for ts in _both(several))),
        itl=_difference(*(_pool(map(np.diff, ts)) for ts in _both(several))),
        lag=Spread.of(np.array([(r.sent or 0) - max(r.due, r.slot) for r in whole]) / SECOND),
        sent_per_s=_rate(sent),
        body=Spread.of(np.array([(r.body_sent or 0) - (r.sent or 0) for r in whole]) / SECOND),
        loop_lag_p99=max(h.loop_lag_p99 for h in health),
        cpu_share=max(h.cpu_share for h in health),
        run_delay_share=max(delays, default=None),
        stamped=stamped,
    )


def _both(pairs: Sequence[_Pair]) -> tuple[list[Floats], list[Floats]]:
    return [p.times for p in pairs], [p.true for p in pairs]


def _difference(said: Iterable[float], true: Iterable[float]) -> float | None:
    """Of the two p99."""
    p99 = [quantile(np.array(list(values)), 0.99) for values in (said, true)]
    return None if p99[0] is None or p99[1] is None else p99[0] - p99[1]


def _rate(times: Floats) -> float | None:
    return float((len(times) - 1) / np.ptp(times)) if len(times) > 1 and np.ptp(times) > 0 else None


def _pool(parts: Iterable[Floats]) -> Floats:
    found = list(parts)
    return np.concatenate(found) if found else np.empty(0)

"""The metrics of docs/metrics.md: pure functions of the records, each named by one file in conf/metric/.

A function takes an `Observed` and returns samples (one a request, or pooled over chunks), of which quantiles are
printed; or it takes a window besides and returns one number. SI units; undefined is NaN in samples, None for a number.
"""

import numpy as np

from stackrace.harness.observed import Mask, Observed, Window
from stackrace.harness.settling import Floats

_SHORT_GAP = 50e-6  # seconds


def ttft(run: Observed) -> Floats:
    """First chunk with a token - due, in seconds: what a user waits for, the client's queue included."""
    return run.first - run.column("due")


def ttft_service(run: Observed) -> Floats:
    """First chunk with a token - sent, in seconds."""
    return run.first - run.column("sent")


def tpot(run: Observed) -> Floats:
    """(last token - first token) / (n - tokens in the first chunk), in seconds; undefined where that divisor is 0."""
    rest = run.tokens - run.first_tokens
    return np.divide(run.last - run.first, rest, out=np.full_like(rest, np.nan), where=rest > 0)


def interactivity(run: Observed) -> Floats:
    """1 / TPOT: tokens per second that one user sees."""
    seconds = tpot(run)
    return np.divide(1.0, seconds, out=np.full_like(seconds, np.nan), where=seconds > 0)


def itl(run: Observed) -> Floats:
    """Gaps between chunks in seconds, pooled over all successful requests."""
    return _pool([np.diff(t) for t, ok in zip(run.times, run.ok, strict=True) if ok])


def itl_token(run: Observed) -> Floats:
    """Gaps between chunks divided by the tokens that the later chunk brought, in seconds, pooled."""
    zipped = zip(run.times, run.counts, run.ok, strict=True)
    return _pool([np.diff(t) / c[1:] for t, c, ok in zipped if ok])


def stall(run: Observed) -> Floats:
    """The longest gap between two chunks of a request, in seconds."""
    return np.array([np.diff(t).max() if len(t) > 1 else np.nan for t in run.times])


def e2e(run: Observed) -> Floats:
    """Last token - due, in seconds."""
    return run.last - run.column("due")


def lag(run: Observed) -> Floats:
    """sent - max(due, slot), in seconds: how late the client itself was."""
    return run.column("sent") - np.maximum(run.column("due"), run.column("slot"))


def receive_lag(run: Observed) -> Floats:
    """User-space stamp - the kernel's, in seconds, pooled over all chunks: how late the client read them."""
    return run.lateness


def coalesced(run: Observed) -> float | None:
    """Share of the chunks that came in one read with a later one of their stream, and have its time."""
    return float(run.coalesced.mean()) if len(run.coalesced) else None


def short_gaps(run: Observed) -> float | None:
    """Share of the gaps between chunks that are under 50 us: sent together, or read together."""
    gaps = itl(run)
    return float((gaps < _SHORT_GAP).mean()) if len(gaps) else None


def queued(run: Observed) -> Floats:
    """slot - due, in seconds: the wait for the concurrency cap, a result and no fault."""
    return run.column("slot") - run.column("due")


def output_throughput(run: Observed, window: Window) -> float:
    """Output tokens per second, counted when they arrived, whether their request finished or not."""
    return run.tokens_in(window) / window.seconds


def input_throughput(run: Observed, window: Window) -> float:
    """Prompt tokens per second, counted when their first output token arrived."""
    return float(run.count("asked_prompt_tokens")[window.holds(run.first)].sum() / window.seconds)


def total_throughput(run: Observed, window: Window) -> float:
    """Prompt and output tokens per second."""
    return input_throughput(run, window) + output_throughput(run, window)


def request_throughput(run: Observed, window: Window) -> float:
    """Successful requests per second, counted when their last token arrived."""
    return float((window.holds(run.last) & run.ok).sum() / window.seconds)


def goodput(run: Observed, window: Window) -> float | None:
    """Requests due in the window that met every SLO, per second; undefined without an SLO."""
    good, _ = judged(run, window)
    return good / window.seconds if _limits(run) else None


def attainment(run: Observed, window: Window) -> float | None:
    """Share of the requests due in the window that met every SLO; undefined without an SLO."""
    good, of = judged(run, window)
    return good / of if _limits(run) and of else None


def judged(run: Observed, window: Window) -> tuple[int, int]:
    """How many of the requests due in the window met every SLO, and how many are judged at all."""
    good, all_ = _verdicts(run, window)
    return int(good.sum()), int(all_.sum())


def window_begin(run: Observed, window: Window) -> float:
    """When the window begins, in seconds after the start of the run."""
    return window.begin


def window_end(run: Observed, window: Window) -> float:
    """When the window ends, in seconds after the start of the run."""
    return window.end


def offered_rate(run: Observed) -> float | None:
    """Requests per second that the schedule asked for: (n - 1) / (last due - first due)."""
    return _spacing_rate(run.column("due"))


def achieved_rate(run: Observed) -> float | None:
    """Requests per second that were sent: (n - 1) / (last sent - first sent)."""
    return _spacing_rate(run.column("sent"))


def batch(run: Observed) -> float | None:
    """Requests in flight, averaged over time from first due to last token."""
    return None if run.whole is None else run.mean_in_flight(run.whole)


def failed(run: Observed) -> float:
    """Number of requests that failed."""
    return float(run.failed.sum())


def censored(run: Observed) -> float:
    """Number of requests still in flight at the cutoff."""
    return float(run.censored.sum())


def _limits(run: Observed) -> dict[str, float]:
    return {name: limit for name, limit in run.slo.items() if limit is not None}


def _verdicts(run: Observed, window: Window) -> tuple[Mask, Mask]:
    """Per request due in the window: met every SLO; is judged at all.

    A failure misses. A censored request is judged only if it is already past an SLO. A metric that is undefined for
    a request is not judged.
    """
    due = run.column("due")
    missed = run.failed.copy()
    for name, limit in _limits(run).items():
        missed |= np.where(run.censored, _so_far(run, name), JUDGED[name](run)) > limit
    here = window.holds(due)
    return here & run.ok & ~missed, here & (~run.censored | missed)


def _so_far(run: Observed, name: str) -> Floats:
    """The least that a metric of a request still in flight can become, in seconds; NaN where it may yet shrink."""
    end = run.column("end")
    if name == "tpot":
        return np.full(len(run.records), np.nan)
    if name == "e2e":
        return end - run.column("due")
    if name == "stall":
        return np.fmax(stall(run), end - run.last)
    since = run.column("due" if name == "ttft" else "sent")
    return np.fmin(run.first, end) - since


def _spacing_rate(times: Floats) -> float | None:
    times = times[np.isfinite(times)]
    spread = np.ptp(times) if len(times) else 0.0
    return float((len(times) - 1) / spread) if spread > 0 else None


def _pool(parts: list[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.empty(0)


JUDGED = {"ttft": ttft, "ttft_service": ttft_service, "tpot": tpot, "stall": stall, "e2e": e2e}
"""What an SLO can limit: one value a request. On ITL, limit a request's longest gap (`stall`)."""

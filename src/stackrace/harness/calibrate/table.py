"""A calibration for people: one line a rung, and what follows."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from stackrace.harness.calibrate.ladder import Rung, is_the_mocks_limit
from stackrace.harness.calibrate.outcome import Spread

COLUMNS = (
    "ladder",
    "workers",
    "load",
    "sent a second",
    "kernel stamp, ms",
    "user stamp, ms",
    "coalesced",
    "TTFT / TPOT / ITL p99, ms",
    "lag, ms",
    "CPU",
    "",
)
_UNITS = {"events": "/s", "in step": " streams", "requests": "/s"}


def cells(rung: Rung) -> tuple[str, ...]:
    """One row; errors as p50 / p99 / max."""
    o = rung.outcome
    rate = o.sent_per_s if rung.ladder in ("requests", "connections") else o.events_per_s
    return (
        rung.ladder,
        str(rung.workers),
        _load(rung),
        "-" if rate is None else f"{rate:,.0f}",
        _spread(o.kernel) if o.stamped else "not stamped",
        _spread(o.user),
        f"{o.coalesced:.1%}",
        " / ".join(_ms(v) for v in (o.ttft, o.tpot, o.itl)),
        _spread(o.lag),
        f"{o.cpu_share:.0%}",
        _remark(rung),
    )


def rich_table(rungs: Iterable[Rung]) -> Table:
    """All of them; the caption says what the numbers are."""
    caption = "errors are p50 / p99 / max, the load generator against a server that knows when it sent what"
    table = Table(*COLUMNS, box=None, caption=caption, caption_justify="left")
    for rung in rungs:
        table.add_row(*cells(rung))
    return table


def line(rung: Rung) -> str:
    """One rung while the others are still to come; errors at p99, or at most where there are too few for that."""
    o, workers = rung.outcome, "1 worker" if rung.workers == 1 else f"{rung.workers} workers"
    kernel = f"{_worst(o.kernel)} ms by kernel stamps, " if o.stamped else ""
    words = [f"{kernel}{_worst(o.user)} ms by user-space ones", f"CPU {o.cpu_share:.0%}", _remark(rung)]
    return f"{rung.ladder} {_load(rung)}, {workers}: receive times within {', '.join(filter(None, words))}"


def in_words(found: Mapping[str, Any]) -> str:
    """What one worker keeps up with."""
    limits, right = found["limits"], found["right"]
    events = limits["events_per_s"]
    return (
        f"one worker keeps receive times right to {right['kernel'] * 1000:g} ms (p99) "
        f"up to {_number(events['kernel'])} events/s by kernel stamps, "
        f"to {right['user'] * 1000:g} ms up to {_number(events['user'])} by user-space ones; "
        f"it sends {_number(limits['requests_per_s'])} requests/s no later than {right['lag'] * 1000:g} ms (p99)"
    )


def _load(rung: Rung) -> str:
    return f"{rung.load:,.0f}{_UNITS.get(rung.ladder, '')}"


def _remark(rung: Rung) -> str:
    if not rung.is_whole:
        return f"{rung.outcome.failed} requests failed, {rung.outcome.lost} events lost"
    return "the mock's limit" if is_the_mocks_limit(rung) else ""


def _spread(s: Spread) -> str:
    return " / ".join(map(_ms, s))


def _worst(s: Spread) -> str:
    return _ms(s.max if s.p99 is None else s.p99)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.3f}"


def _number(limit: float | None) -> str:
    return "no rung of" if limit is None else f"{limit:,.0f}"

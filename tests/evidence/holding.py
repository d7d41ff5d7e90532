"""Streams in step, an open loop of 2,000 requests a second, a server that stops, 10,000 streams, long requests."""

import numpy as np
from evidence.page import ms, table

from stackrace.harness import host
from stackrace.harness.calibrate import trial as lab_of
from stackrace.harness.calibrate.ladder import in_step as streams_in_step
from stackrace.harness.calibrate.trial import Asked, Lab, ask

LADDER = {"stream_rate": 50, "seconds": 6, "ramp": 1}


def in_step(lab):
    """256 and 1,024 streams of 50 tokens a second each."""
    rows = []
    for streams in (256, 1024):
        o = lab.trial(streams_in_step(LADDER, streams))
        errors = [ms(o.ttft), ms(o.tpot), ms(o.itl), " / ".join(map(ms, o.user))]
        rows.append([f"{streams:,} in step, 50 tokens/s each", o.failed, o.lost, *errors])
    head = ["streams", "failed", "lost", "TTFT p99 error", "TPOT p99 error", "ITL p99 error", "user stamps would be"]
    return table(head, rows)


def open_loop(lab, seconds=30):
    """Poisson, 2,000 requests a second."""
    due = np.cumsum(np.random.default_rng(0).exponential(1 / 2000, 2000 * seconds)).tolist()
    o = lab.trial(Asked(mock={"ttft": 0.01, "gap": 0.01}, schedule=ask(len(due), 1, due)))
    row = [f"{o.requests:,}", o.failed, f"{o.sent_per_s:,.0f}", *map(ms, o.lag), f"{o.cpu_share:.0%}"]
    return table(["requests", "failed", "sent a second", "lag p50", "lag p99", "lag max", "CPU"], [row])


def freeze(lab, cap):
    """A server that answers within 60 ms at 100 requests a second, but for 5 s from the third on."""
    due = (np.arange(1200) / 100).tolist()
    mock = {"ttft": 0.05, "gap": 0.002, "freeze_after": 3.0, "freeze": 5.0, "seed": cap or 0}  # a launch of its own
    asked = Asked(mock=mock, schedule=ask(len(due), 6, due), concurrency=cap)
    endpoint = lab.start(mock)
    lab_of.truth_of(endpoint)
    records = [r for r in lab.race(asked, endpoint).records if r.chunk_times]
    ttft, service, sent = (
        np.array([f(r) / 1e9 for r in records])
        for f in (lambda r: r.chunk_times[0] - r.due, lambda r: r.chunk_times[0] - r.sent, lambda r: r.sent)
    )
    lag = np.array([(r.sent - max(r.due, r.slot)) / 1e9 for r in records])
    later = sent > 8.05  # sent after the server went on
    row = ["none" if cap is None else cap, len(records), *(f"{v.max():.3f}" for v in (ttft, service))]
    return [*row, f"{ttft[later].max():.3f}", f"{service[later].max():.3f}", ms(np.abs(ttft - service - lag).max(), 6)]


def large(lab):
    """10,000 streams at once; prompts of 128k tokens; outputs of 50k."""
    rows = []
    due = np.linspace(0, 8, 10000, endpoint=False).tolist()
    trials = {
        "10,000 streams open at once": Asked(mock={"ttft": 9.0, "gap": 0.5}, schedule=ask(10000, 5, due)),
        "128k-token prompts, 4 a second": Asked(
            mock={"ttft": 0.05, "gap": 0.01}, schedule=ask(40, 50, (np.arange(40) / 4).tolist(), prompt_tokens=131072)
        ),
        "50k-token outputs, 8 at 2,000 tokens/s": Asked(
            mock={"ttft": 0.05, "gap": 0.0005}, schedule=ask(8, 50000, [0.0] * 8)
        ),
    }
    for name, asked in trials.items():
        o = lab.trial(asked)
        spreads = [" / ".join(map(ms, s)) for s in (o.kernel, o.lag, o.body)]
        rows.append([name, o.requests, o.failed, f"{o.events:,}", o.lost, *spreads, f"{o.cpu_share:.0%}"])
    return table(
        ["load", "requests", "failed", "events", "lost", "receive error", "lag", "sending a body", "CPU"], rows
    )


def main():
    """Markdown of all four."""
    with Lab(host.split_cores(1, None)) as lab:
        head = ["cap", "ok", "TTFT max", "ttft_service max", "TTFT max of those sent after it", "ttft_service of those"]
        frozen = table([*head, "TTFT - service - lag, ms"], [freeze(lab, cap) for cap in (64, None)])
        parts = [
            ("In step (errors in ms)", in_step(lab)),
            ("Open loop, 2,000 requests a second for 30 s (ms)", open_loop(lab)),
            ("A server that stops answering for 5 s (s; capped, requests wait for a slot meanwhile)", frozen),
            ("Many and long (ms, p50 / p99 / max)", large(lab)),
        ]
    return "\n\n".join(f"{title}:\n\n{body}" for title, body in parts)

"""The load generator's process: python -m stackrace.harness.load.worker, a job on stdin, captures on stdout.

It sends, stamps and passes on; it parses nothing. When stdin closes, it gives up what is in flight and ends.
"""

import asyncio
import gc
import os
import resource
import sys
from bisect import bisect_right
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from stackrace.harness import host
from stackrace.harness.clock import SECOND, Alarms, now
from stackrace.harness.load import messages
from stackrace.harness.load.connections import Connections
from stackrace.harness.load.driver import Capture, Driver, Plan
from stackrace.harness.load.messages import Health, Job, Message, Started, Tick, WarmedUp
from stackrace.harness.load.request import request_bytes
from stackrace.harness.load.response import parse
from stackrace.harness.schedule import Schedule

_HEARTBEAT = SECOND // 100
_TICK = SECOND // 4
_HEAD_START = SECOND // 20


class Heart:
    """Beats every 10 ms and notes how late the loop let it."""

    def __init__(self, alarms: Alarms) -> None:
        self._alarms = alarms
        self._late: list[int] = []
        self._next = now() + _HEARTBEAT
        self._cpu, self._since = _cpu_seconds(), now()
        alarms.at(self._next, self._beat)

    def health(self, reads: int) -> Health:
        """Since the first beat."""
        seconds = (now() - self._since) / SECOND
        late = np.array(self._late or [0]) / SECOND
        p50, p99 = np.quantile(late, [0.5, 0.99], method="inverted_cdf")
        busy = (_cpu_seconds() - self._cpu) / seconds
        return Health(float(p50), float(p99), float(late.max()), busy, reads, seconds)

    def _beat(self) -> None:
        self._late.append(now() - self._next)
        self._next += _HEARTBEAT  # never re-anchored: each beat that a long block swallowed is late by its own share
        self._alarms.at(self._next, self._beat)


async def work(job: Job, tell: Callable[[Message], None], stop: "asyncio.Future[None]") -> None:
    """Warm up, then run the schedule, telling captures as they come; `stop` ends it early."""
    schedule = Schedule.load(job.schedule)
    payloads = [request_bytes(job.endpoint, r) for r in schedule.requests]
    alarms = Alarms(asyncio.get_running_loop())
    connections = Connections(job.endpoint.url, job.connect_timeout)
    await connections.resolve()
    if job.warmup.requests and not stop.done():
        await _warm_up(job, alarms, connections, tell, stop)
    gc.collect()
    gc.freeze()
    gc.disable()
    await connections.keep_ready(_connections_at_start(schedule, job.concurrency))
    start = now() + _HEAD_START
    plan = _plan(job, schedule, payloads, start)
    reads = 0

    def on_end(capture: Capture) -> None:
        nonlocal reads
        reads += len(capture.reads)
        tell(capture)

    driver = Driver(plan, alarms, connections, on_end)
    tell(Started(start))
    heart = Heart(alarms)
    _keep_ticking(driver, alarms, tell)
    await _run_until(driver, stop)
    tell(heart.health(reads))
    alarms.close()
    connections.close()


async def _warm_up(
    job: Job,
    alarms: Alarms,
    connections: Connections,
    tell: Callable[[Message], None],
    stop: "asyncio.Future[None]",
) -> None:
    begin = now()
    payloads = [request_bytes(job.endpoint, r) for r in job.warmup.requests]
    plan = Plan(
        payloads=payloads,
        due=[begin] * len(payloads),
        is_closed=True,
        concurrency=job.warmup_concurrency,
        cutoff=None,
        drain=0,
        request_timeout=_ns(job.request_timeout),
        stall_timeout=_ns(job.stall_timeout),
    )
    captures: list[Capture] = []
    await _run_until(Driver(plan, alarms, connections, captures.append), stop)
    errors = [parse(c.reads).error or c.error for c in captures]
    told = [e for e in errors if e]
    tell(WarmedUp((now() - begin) / SECOND, len(told), told[0] if told else None))


def _plan(job: Job, schedule: Schedule, payloads: list[bytes], start: int) -> Plan:
    return Plan(
        payloads=payloads,
        due=[start + due for due in schedule.due],
        is_closed=schedule.is_immediate and job.concurrency is not None,
        concurrency=job.concurrency,
        cutoff=None if job.seconds is None else start + _ns(job.seconds),
        drain=_ns(job.drain),
        request_timeout=_ns(job.request_timeout),
        stall_timeout=_ns(job.stall_timeout),
    )


def _connections_at_start(schedule: Schedule, concurrency: int | None) -> int:
    return min(bisect_right(schedule.due, SECOND), concurrency or len(schedule.due))


async def _run_until(driver: Driver, stop: "asyncio.Future[None]") -> None:
    running = asyncio.ensure_future(driver.run())
    await asyncio.wait([running, stop], return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        driver.abort()
    await running


def _keep_ticking(driver: Driver, alarms: Alarms, tell: Callable[[Message], None]) -> None:
    def tick() -> None:
        tell(Tick(driver.in_flight))
        alarms.at(now() + _TICK, tick)

    tick()


def _ns(seconds: float) -> int:
    return round(seconds * SECOND)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Outbox:
    """Messages to the parent, written when the pipe takes them, so that the loop never blocks."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def tell(self, message: Message) -> None:
        self._transport.write(messages.encode(message))


class _Closing(asyncio.Protocol):
    """Resolves a future when the pipe it reads from, or writes to, is closed."""

    def __init__(self, closed: "asyncio.Future[None]") -> None:
        self._closed = closed

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(None)


async def _serve_parent(job: Job, out: IO[bytes]) -> None:
    loop = asyncio.get_running_loop()
    stop, flushed, broken = loop.create_future(), loop.create_future(), loop.create_future()
    loop.set_exception_handler(lambda _, context: _break(broken, context))
    await loop.connect_read_pipe(lambda: _Closing(stop), sys.stdin)
    transport, _ = await loop.connect_write_pipe(lambda: _Closing(flushed), out)
    working = asyncio.ensure_future(work(job, _Outbox(transport).tell, stop))
    await asyncio.wait([working, broken], return_when=asyncio.FIRST_COMPLETED)
    if broken.done():
        broken.result()
    await working
    transport.close()  # writes what is left first
    await flushed


def _break(broken: "asyncio.Future[None]", context: dict[str, Any]) -> None:
    """A callback failed: a race that goes on without it would be wrong in silence."""
    if not broken.done():
        broken.set_exception(context.get("exception") or RuntimeError(context["message"]))


def main() -> None:
    """Entry point."""
    host.die_with_parent()
    host.raise_open_files()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may write between the messages
    job: Job = messages.read(sys.stdin.buffer)  # nothing follows it, so nothing is lost in the buffer
    host.pin(job.cores)
    import uvloop

    uvloop.run(_serve_parent(job, out))


if __name__ == "__main__":
    main()

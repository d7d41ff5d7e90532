"""One worker's process: python -m stackrace.harness.load.worker, a WorkerJob and Go on stdin, messages on stdout.

It sends, stamps and passes on; it parses nothing. When stdin closes, it gives up what is in flight and ends.
"""

import asyncio
import gc
import os
import sys
from bisect import bisect_right
from collections.abc import Callable
from typing import IO, Any

from stackrace.harness import host
from stackrace.harness.clock import SECOND, Alarms, now
from stackrace.harness.load import messages
from stackrace.harness.load.connections import Connections
from stackrace.harness.load.driver import Capture, Driver
from stackrace.harness.load.health import Heart
from stackrace.harness.load.messages import (
    Cold,
    Enough,
    Go,
    Job,
    Offsets,
    Ready,
    Round,
    RoundDone,
    Started,
    Tick,
    WorkerJob,
)
from stackrace.harness.load.outbox import Outbox
from stackrace.harness.load.plan import Plan, Share
from stackrace.harness.load.readiness import Readiness
from stackrace.harness.load.received import Journal
from stackrace.harness.load.request import request_bytes
from stackrace.harness.load.slots import Slots, SlotTable
from stackrace.harness.load.warmup import outcome
from stackrace.harness.schedule import Schedule

_TICK = SECOND // 4
_BUSY = 0.5  # share of a core


class Worker:
    """One share of a race."""

    def __init__(self, task: WorkerJob, out: asyncio.WriteTransport, orders: "Orders") -> None:
        self._task, self._job = task, task.job
        self._orders = orders
        self._go, self._stop = orders.go, orders.stop
        self._alarms = Alarms(asyncio.get_running_loop())
        self._journal = Journal()
        self._outbox = Outbox(out, self._alarms, self._journal)
        self._tell = self._outbox.tell
        self._readiness = Readiness(asyncio.get_running_loop())
        self._connections = Connections(self._job.endpoint.url, self._job.connect_timeout)

    async def work(self) -> None:
        """Warm up, be ready, then run the share, telling captures as they come; `stop` ends it early."""
        job, schedule = self._job, Schedule.load(self._job.schedule)
        share = Share.of(schedule, self._task.worker, job.workers)
        payloads = {p: request_bytes(job.endpoint, schedule.requests[p]) for p in share.positions}
        await self._connections.resolve()
        if self._task.warms_up:
            await self._warm_up()
        is_closed = schedule.is_immediate and job.concurrency is not None
        del schedule
        gc.collect()
        gc.freeze()
        gc.disable()
        at_start = self._connections_at_start(share)
        await self._connections.keep_ready(at_start)
        self._tell(Ready(self._task.worker))
        # another worker may warm up for longer than servers leave idle connections open
        staying_ready = asyncio.ensure_future(self._connections.stay_ready(self._alarms, lambda: at_start))
        await self._orders.wait_for(self._go)
        staying_ready.cancel()
        if not self._stop.done():
            await self._race(_plan(job, share, payloads, is_closed, self._go.result(), job.seconds))
        self._alarms.close()
        self._readiness.close()
        self._connections.close()

    async def _race(self, plan: Plan) -> None:
        slots = Slots(self._task.slots, self._task.worker) if self._task.slots else None
        driver = self._driver(plan, slots, self._journal, self._tell)
        self._tell(Started(self._task.worker, self._go.result()))
        heart = Heart(self._alarms)
        self._outbox.keep_shipping()
        self._keep_ticking(driver, heart)
        await self._run_until_stopped(driver)
        health = heart.health(self._task.worker)
        heart.stop()
        self._outbox.drain()
        self._tell(Offsets(heart.new_offsets()))
        self._tell(health)

    async def _warm_up(self) -> None:
        """Rounds as the harness orders them, until it has enough."""
        self._tell(Cold(self._task.worker))
        while (order := await self._orders.next_round()) is not None:
            self._tell(await self._round(order))

    async def _round(self, order: Round) -> RoundDone:
        begin, schedule = now(), order.schedule
        share = Share.of(schedule, 0, 1)
        payloads = {p: request_bytes(self._job.endpoint, r) for p, r in enumerate(schedule.requests)}
        table = SlotTable.make(order.concurrency, len(schedule.sessions), 1)
        journal, captures = Journal(), list[Capture]()
        plan = _plan(self._job, share, payloads, True, begin, None)
        await self._run_until_stopped(self._driver(plan, Slots(table, 0), journal, captures.append))
        table.close()
        return outcome(captures, journal, (now() - begin) / SECOND)

    def _driver(self, plan: Plan, slots: Slots | None, journal: Journal, on_end: Callable[[Capture], None]) -> Driver:
        return Driver(plan, slots, self._alarms, self._readiness, self._connections, journal, on_end)

    def _connections_at_start(self, share: Share) -> int:
        soon = bisect_right(share.starts, SECOND, key=lambda start: start.due)
        cap = self._job.concurrency
        return soon if cap is None else min(soon, -(-cap // self._job.workers))

    async def _run_until_stopped(self, driver: Driver) -> None:
        running = asyncio.ensure_future(driver.run())
        await asyncio.wait([running, self._stop], return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            driver.abort()
        await running

    def _keep_ticking(self, driver: Driver, heart: Heart) -> None:
        def tick() -> None:
            self._tell(Offsets(heart.new_offsets()))
            heard = self._journal.last or self._go.result()
            self._tell(Tick(self._task.worker, driver.in_flight, now(), heard, driver.stalled))
            self._readiness.is_sparing = heart.recent_cpu_share() > _BUSY
            self._alarms.at(now() + _TICK, tick)

        self._alarms.at(now() + _TICK, tick)


def _plan(
    job: Job, share: Share, payloads: dict[int, bytes], is_closed: bool, start: int, seconds: float | None
) -> Plan:
    return Plan(
        payloads=payloads,
        starts=[s._replace(due=start + s.due) for s in share.starts],
        following=share.following,
        is_closed=is_closed,
        cutoff=None if seconds is None else start + _ns(seconds),
        drain=_ns(job.drain),
        request_timeout=_ns(job.request_timeout),
        stall_timeout=_ns(job.stall_timeout),
    )


def _ns(seconds: float) -> int:
    return round(seconds * SECOND)


class Orders(asyncio.Protocol):
    """What the harness says: rounds of the warm-up, `go` with the start, and `stop` when it closes the pipe."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.go: asyncio.Future[int] = loop.create_future()
        self.stop: asyncio.Future[None] = loop.create_future()
        self._rounds: asyncio.Queue[Round | Enough] = asyncio.Queue()
        self._unframer = messages.Unframer()

    async def next_round(self) -> Round | None:
        """None when there have been enough, or it is time to stop."""
        waiting = asyncio.ensure_future(self._rounds.get())
        await self.wait_for(waiting)
        order = waiting.result() if waiting.done() and not self.stop.done() else None
        waiting.cancel()
        return order if isinstance(order, Round) else None

    async def wait_for(self, order: "asyncio.Future[Any]") -> None:
        """Return when it is done, or it is time to stop."""
        either: list[asyncio.Future[Any]] = [order, self.stop]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    def data_received(self, data: bytes) -> None:
        """Some bytes of messages."""
        for message in self._unframer.feed(data):
            if isinstance(message, Round | Enough):
                self._rounds.put_nowait(message)
            elif isinstance(message, Go) and not self.go.done():
                self.go.set_result(message.start)

    def eof_received(self) -> None:
        """The harness closed its end: stop."""
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """As good as closed."""
        if not self.stop.done():
            self.stop.set_result(None)


class _Flushed(asyncio.Protocol):
    """Resolves a future when the pipe it writes to is closed."""

    def __init__(self, closed: "asyncio.Future[None]") -> None:
        self._closed = closed

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(None)


async def _serve_harness(task: WorkerJob, out: IO[bytes]) -> None:
    loop = asyncio.get_running_loop()
    orders, flushed, broken = Orders(), loop.create_future(), loop.create_future()
    loop.set_exception_handler(lambda _, context: _break(broken, context))
    await loop.connect_read_pipe(lambda: orders, sys.stdin)
    transport, _ = await loop.connect_write_pipe(lambda: _Flushed(flushed), out)
    working = asyncio.ensure_future(Worker(task, transport, orders).work())
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
    task: WorkerJob = messages.read(sys.stdin.buffer)  # nothing follows before Cold or Ready, so nothing is lost
    host.pin((task.job.cores[task.worker % len(task.job.cores)],))
    import uvloop

    uvloop.run(_serve_harness(task, out))


if __name__ == "__main__":
    main()

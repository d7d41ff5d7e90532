"""The schedule driver: sends each request when it is due, or when its slot comes free, and never sooner."""

import asyncio
import functools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from stackrace.harness.clock import SECOND, Alarms, now
from stackrace.harness.load.client import Exchange
from stackrace.harness.load.connections import Connection, Connections
from stackrace.harness.load.response import Read

_UPKEEP = SECOND // 4
_AHEAD = SECOND  # connections are opened this long before they are needed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule on the clock. Times are absolute nanoseconds of CLOCK_MONOTONIC."""

    payloads: list[bytes]
    due: list[int]  # ascending
    is_closed: bool  # due when a slot comes free
    concurrency: int | None
    cutoff: int | None  # nothing is sent from here on
    drain: int  # nanoseconds that what is in flight at the cutoff is still waited for
    request_timeout: int  # nanoseconds from when it was let go
    stall_timeout: int  # nanoseconds without a byte


class Capture(NamedTuple):
    """One request as the driver leaves it, unparsed. Times are absolute nanoseconds."""

    position: int
    due: int
    slot: int
    sent: int | None
    body_sent: int | None
    end: int
    reconnected: int
    censored: bool
    error: str | None
    reads: list[Read]


@dataclass(slots=True, eq=False)
class _Flight:
    position: int
    due: int
    slot: int
    exchange: Exchange | None = None
    sent: int | None = None  # the first send()
    reconnected: int = 0
    censored: bool = False


class Driver:
    """Runs one plan; `on_end` gets every capture as its request ends."""

    def __init__(self, plan: Plan, alarms: Alarms, connections: Connections, on_end: Callable[[Capture], None]) -> None:
        self._plan = plan
        self._alarms = alarms
        self._connections = connections
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[int, int | None]] = deque()  # position and due time; None: due when its slot is free
        self._flights: set[_Flight] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._next = 0  # first request that is not due yet
        self._stopped = False
        self._over: asyncio.Future[None] = self._loop.create_future()

    @property
    def in_flight(self) -> int:
        """Requests that were let go and have not ended."""
        return len(self._flights)

    async def run(self) -> None:
        """Return when every request has ended, or the drain after the cutoff is over."""
        plan = self._plan
        self._alarms.at(plan.due[0], self._on_due)
        if plan.cutoff is not None:
            self._alarms.at(plan.cutoff, self._stop_sending)
            self._alarms.at(plan.cutoff + plan.drain, self.abort)
        chores = [asyncio.create_task(self._expire_late_ones()), asyncio.create_task(self._keep_connections_ready())]
        try:
            await asyncio.wait([self._over, *chores], return_when=asyncio.FIRST_COMPLETED)
            for chore in chores:
                if chore.done():  # only by failing
                    chore.result()
        finally:
            for chore in chores:
                chore.cancel()

    def abort(self) -> None:
        """End now: what is in flight, or due and waiting for a slot, is censored."""
        self._stop_sending()
        for flight in list(self._flights):
            flight.censored = True
            if flight.exchange is None:
                self._land(flight, None)
            else:
                flight.exchange.give_up(None)
        self._finish_if_over()

    def _on_due(self) -> None:
        plan, time = self._plan, now()
        while not self._stopped and self._next < len(plan.due) and plan.due[self._next] <= time:
            position = self._next
            self._next += 1
            due = None if plan.is_closed else plan.due[position]
            if self._has_slot():
                self._let_go(position, plan.due[position], plan.due[position])
            else:
                self._waiting.append((position, due))
        if not self._stopped and self._next < len(plan.due):
            self._alarms.at(plan.due[self._next], self._on_due)

    def _has_slot(self) -> bool:
        return self._plan.concurrency is None or len(self._flights) < self._plan.concurrency

    def _let_go(self, position: int, due: int, slot: int) -> None:
        flight = _Flight(position, due, slot)
        self._flights.add(flight)
        self._send(flight)

    def _send(self, flight: _Flight) -> None:
        connection = self._connections.take()
        if connection is None:
            task = self._loop.create_task(self._open_and_send(flight))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
            return
        self._start(flight, connection)

    async def _open_and_send(self, flight: _Flight) -> None:
        try:
            connection = await self._connections.open()
        except OSError as e:  # TimeoutError is one
            if flight in self._flights:
                self._land(flight, f"cannot connect: {type(e).__name__}: {e}")
            return
        if flight not in self._flights:
            connection.close()
            return
        self._start(flight, connection)

    def _start(self, flight: _Flight, connection: Connection) -> None:
        on_end = functools.partial(self._on_exchange_end, flight)
        flight.exchange = Exchange(self._plan.payloads[flight.position], self._loop, on_end)
        flight.exchange.start(connection)

    def _on_exchange_end(self, flight: _Flight, exchange: Exchange) -> None:
        connection = exchange.connection
        if exchange.is_reusable and connection is not None:
            self._connections.give_back(connection)
        is_stale = exchange.is_reset and connection is not None and connection.used
        flight.sent = exchange.sent if flight.sent is None else flight.sent
        if is_stale and not flight.reconnected and not flight.censored:
            flight.reconnected += 1
            flight.exchange = None
            self._send(flight)
            return
        self._land(flight, exchange.error)

    def _land(self, flight: _Flight, error: str | None) -> None:
        self._flights.discard(flight)
        e = flight.exchange
        end = e.end if e and e.end is not None else now()
        self._fill_slots(end)  # first: what follows takes time, and is the client's
        self._on_end(
            Capture(
                position=flight.position,
                due=flight.due,
                slot=flight.slot,
                sent=flight.sent,
                body_sent=e.body_sent if e else None,
                end=end,
                reconnected=flight.reconnected,
                censored=flight.censored,
                error=error,
                reads=e.reads if e else [],
            )
        )
        self._finish_if_over()

    def _fill_slots(self, freed: int) -> None:
        """Let go what waits. A slot is free from when its last request ended, however late we notice."""
        while self._waiting and not self._stopped and self._has_slot():
            position, due = self._waiting.popleft()
            slot = max(freed, due or 0)
            self._let_go(position, slot if due is None else due, slot)

    def _stop_sending(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        time = now()
        for position, due in self._waiting:
            if due is not None:  # it was due, and never got a slot
                self._on_end(Capture(position, due, time, None, None, time, 0, True, None, []))
        self._waiting.clear()
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        is_all_due = self._stopped or self._next == len(self._plan.due)
        if is_all_due and not self._waiting and not self._flights and not self._over.done():
            self._over.set_result(None)

    async def _expire_late_ones(self) -> None:
        while True:
            await self._alarms.sleep_until(now() + _UPKEEP)
            self._expire(now())

    async def _keep_connections_ready(self) -> None:
        while True:
            await self._alarms.sleep_until(now() + _UPKEEP)
            await self._connections.keep_ready(self._connections_needed(now()))

    def _connections_needed(self, time: int) -> int:
        """How many requests come due within the next second, as far as the cap lets them go."""
        if self._stopped:
            return 0
        coming = bisect_right(self._plan.due, time + _AHEAD) - self._next
        cap = self._plan.concurrency
        return max(0, coming if cap is None else min(coming, cap - len(self._flights)))

    def _expire(self, time: int) -> None:
        plan = self._plan
        for flight in list(self._flights):
            if flight.exchange is None:
                continue
            quiet_since = flight.exchange.last_activity or time
            if time - quiet_since > plan.stall_timeout:
                flight.exchange.give_up(f"no byte for {plan.stall_timeout / SECOND:g} s (timeouts.stall)")
            elif time - flight.slot > plan.request_timeout:
                flight.exchange.give_up(f"not done after {plan.request_timeout / SECOND:g} s (timeouts.request)")

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
from stackrace.harness.load.plan import Plan, Start
from stackrace.harness.load.readiness import Readiness
from stackrace.harness.load.received import Journal
from stackrace.harness.load.slots import Slots

_UPKEEP = SECOND // 4
_AHEAD = SECOND  # connections are opened this long before they are needed


class Capture(NamedTuple):
    """How one request went; what it received stands in the journal. Times are absolute nanoseconds."""

    position: int
    due: int
    slot: int
    sent: int | None
    body_sent: int | None
    end: int
    reconnected: int
    censored: bool
    error: str | None


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
    """Runs one plan; `on_end` gets every capture as its request ends.

    A slot belongs to a session from its first turn to the end of its last one.
    """

    def __init__(
        self,
        plan: Plan,
        slots: Slots | None,
        alarms: Alarms,
        readiness: Readiness,
        connections: Connections,
        journal: Journal,
        on_end: Callable[[Capture], None],
    ) -> None:
        self._plan = plan
        self._slots = slots
        self._alarms = alarms
        self._readiness = readiness
        self._connections = connections
        self._journal = journal
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._dues = [start.due for start in plan.starts]
        self._waiting: deque[Start] = deque()  # due, or in a closed loop whenever its slot comes free
        self._flights: set[_Flight] = set()
        self._thinking: dict[int, int] = {}  # position of a turn that will be due -> when
        self._opening: set[asyncio.Task[None]] = set()
        self._next = 0  # first start that is not due yet
        self._stopped = False
        self.stalled: int | None = None  # when a request was last given up for silence (ns)
        self._over: asyncio.Future[None] = self._loop.create_future()

    @property
    def in_flight(self) -> int:
        """Requests that were let go and have not ended."""
        return len(self._flights)

    async def run(self) -> None:
        """Return when every request has ended, or the drain after the cutoff is over."""
        plan = self._plan
        if self._slots is not None:
            self._loop.add_reader(self._slots.wake_file, self._on_wake)
        if plan.starts:
            self._alarms.at(plan.starts[0].due, self._on_due)
        if plan.cutoff is not None:
            self._alarms.at(plan.cutoff, self._stop_sending)
            self._alarms.at(plan.cutoff + plan.drain, self.abort)
        ready = self._connections.stay_ready(self._alarms, lambda: self._connections_needed(now()))
        chores = [asyncio.create_task(self._expire_late_ones()), asyncio.create_task(ready)]
        self._finish_if_over()
        try:
            await asyncio.wait([self._over, *chores], return_when=asyncio.FIRST_COMPLETED)
            for chore in chores:
                if chore.done():  # only by failing
                    chore.result()
        finally:
            for chore in chores:
                chore.cancel()
            if self._slots is not None:
                self._loop.remove_reader(self._slots.wake_file)

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
        starts, time = self._plan.starts, now()
        while not self._stopped and self._next < len(starts) and starts[self._next].due <= time:
            self._waiting.append(starts[self._next])
            self._next += 1
        self._fill_slots()
        if not self._stopped and self._next < len(starts):
            self._alarms.at(starts[self._next].due, self._on_due)

    def _on_wake(self) -> None:
        assert self._slots is not None
        self._slots.calm()
        self._fill_slots()

    def _fill_slots(self) -> None:
        """Let go what waits. A slot is free from when its last request ended, however late we notice."""
        while self._waiting and not self._stopped:
            start = self._waiting[0]
            freed = 0 if self._slots is None else self._slots.free_since(start.ticket)
            if freed is None:
                return
            self._waiting.popleft()
            slot = max(freed, start.due)
            self._let_go(start.position, slot if self._plan.is_closed else start.due, slot)

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
        flight.exchange = Exchange(
            self._plan.payloads[flight.position],
            flight.position,
            self._loop,
            self._readiness,
            self._journal,
            functools.partial(self._on_exchange_end, flight),
        )
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
        is_broken = error is not None or flight.censored or (e is not None and e.is_refused)
        self._go_on(flight.position, end, is_broken)  # first: what follows takes time, and is the client's
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
            )
        )
        if is_broken and not self._stopped:
            self._give_up_session(flight.position, end)
        self._finish_if_over()

    def _go_on(self, position: int, end: int, is_broken: bool) -> None:
        """The session's next turn, or, where there is none, the next one in its slot."""
        turn = self._plan.following.get(position)
        if turn is not None and not is_broken and not self._stopped:
            self._thinking[turn.position] = end + turn.think
            self._alarms.at(end + turn.think, functools.partial(self._on_thought, turn.position))
        elif self._slots is not None:
            self._slots.release(end)
            self._fill_slots()

    def _on_thought(self, position: int) -> None:
        due = self._thinking.pop(position, None)
        if due is not None:
            self._let_go(position, due, due)

    def _give_up_session(self, position: int, time: int) -> None:
        """The turns after one that failed have nothing to answer to: they fail with it, unsent."""
        error = "not asked: an earlier turn of its session failed"
        turn = self._plan.following.get(position)
        while turn is not None:
            self._on_end(Capture(turn.position, time, time, None, None, time, 0, False, error))
            turn = self._plan.following.get(turn.position)

    def _stop_sending(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        time = now()
        if not self._plan.is_closed:  # these were due, and never got a slot
            for start in self._waiting:
                self._on_end(Capture(start.position, start.due, time, None, None, time, 0, True, None))
        self._waiting.clear()
        self._thinking.clear()
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        is_all_due = self._stopped or self._next == len(self._plan.starts)
        is_idle = not self._waiting and not self._flights and not self._thinking
        if is_all_due and is_idle and not self._over.done():
            self._over.set_result(None)

    async def _expire_late_ones(self) -> None:
        while True:
            await self._alarms.sleep_until(now() + _UPKEEP)
            self._expire(now())

    def _connections_needed(self, time: int) -> int:
        """How many requests come due within the next second, as far as the cap lets them go."""
        if self._stopped:
            return 0
        coming = bisect_right(self._dues, time + _AHEAD) - self._next
        turns = sum(due <= time + _AHEAD for due in self._thinking.values())
        if self._slots is not None:
            coming = min(coming, self._slots.cap - len(self._flights) - len(self._thinking))
        return max(0, coming) + turns

    def _expire(self, time: int) -> None:
        plan = self._plan
        for flight in list(self._flights):
            if flight.exchange is None:
                continue
            quiet_since = flight.exchange.last_activity or time
            if time - quiet_since > plan.stall_timeout:
                self.stalled = time
                flight.exchange.give_up(f"no byte for {plan.stall_timeout / SECOND:g} s (timeouts.stall)")
            elif time - flight.slot > plan.request_timeout:
                flight.exchange.give_up(f"not done after {plan.request_timeout / SECOND:g} s (timeouts.request)")

"""Sends requests, many at a time, and judges every answer; the first fault ends it."""

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field

from soak.fault import Fault, must
from soak.judge import check_error
from soak.memory import watch
from soak.requests import PAUSE, Leave, Maker, Request
from soak.wire import PATIENCE, Reply, Wire

SHOWN = 2000  # bytes of what was sent and came that a fault tells


@dataclass
class Tally:
    """What has happened so far."""

    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and status, or how it ended
    tokens: int = 0  # of whole answers
    choices: int = 0  # in whole answers
    left: int = 0  # choices whose client may have gone before the end
    seconds: float = 0.0
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, bytes

    @property
    def requests(self) -> int:
        """How many have ended."""
        return self.statuses.total()

    def count(self, status: str) -> int:
        """Requests of any kind that ended so."""
        return sum(count for (_, found), count in self.statuses.items() if found == status)


@dataclass
class Driver:
    """Clients of one server, each with one request at a time and, where it can, one connection for many."""

    port: int
    maker: Maker
    requests: int  # it ends after so many
    seconds: float  # or after so long
    tally: Tally = field(default_factory=Tally)
    _next: int = 0

    async def run(self, pid: int, concurrency: int) -> None:
        """Drive until the end; `pid`: whose memory is watched. Fault: the first one found."""
        start = time.monotonic()
        watching = asyncio.create_task(watch(pid, self.tally.memory))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._client(start + self.seconds))
        except* Fault as faults:
            raise faults.exceptions[0] from None
        finally:
            watching.cancel()
            self.tally.seconds = time.monotonic() - start

    async def _client(self, deadline: float) -> None:
        wire: Wire | None = None
        while self._next < self.requests and time.monotonic() < deadline:
            request = self.maker.make(self._next)
            self._next += 1
            if request.manner == "slow" and wire:
                wire.leave(False)
                wire = None
            wire = await self._one(request, wire)
        if wire:
            wire.leave(False)

    async def _one(self, request: Request, wire: Wire | None) -> Wire | None:
        """One request; returns the connection, if it is good for another."""
        reply: Reply | None = None
        is_good = False
        try:
            async with asyncio.timeout(PATIENCE):
                wire = wire or await Wire.open(self.port, request.manner == "slow")
                reply = await perform(request, wire)
                self._judge(request, reply)
            is_good = request.manner == "whole" and reply is not None and reply.headers.get("connection") != "close"
        except Exception as error:
            raise Fault(describe(request, reply, error)) from error
        finally:
            if wire and not is_good:
                wire.leave(False)
        return wire if is_good else None

    def _judge(self, request: Request, reply: Reply | None) -> None:
        status = str(reply.status) if reply else "closed"
        if isinstance(request.manner, Leave):
            status = "left"
            self.tally.left += len(request.asked.choices) if request.asked else 0
        elif reply is None:
            must(request.manner == "cut", "the connection was closed without an answer")
        elif reply.status == 429:
            check_error(reply, 429)
        else:
            self.tally.tokens += request.check(reply)
            self.tally.choices += len(request.asked.choices) if request.asked else 0
        self.tally.statuses[request.kind, status] += 1


async def perform(request: Request, wire: Wire) -> Reply | None:
    """Send, and read the answer; None: there is none, or nobody waited for it."""
    match request.manner:
        case Leave() as leave:
            await _leave(request.data, leave, wire)
            return None
        case "cut":
            with contextlib.suppress(ConnectionError):  # the server may close at the first wrong byte
                await wire.send(request.data)
                wire.end()
                return await wire.reply()
            return None
        case "slow":
            await wire.send(request.data)
            return await wire.reply(PAUSE)
        case "last":
            with contextlib.suppress(ConnectionError):  # a body that is refused half-way
                await wire.send(request.data)
        case _:
            await wire.send(request.data)
    return await wire.reply()


async def _leave(data: bytes, leave: Leave, wire: Wire) -> None:
    await wire.send(data[: leave.sent])
    got = 0
    while got < leave.read and (piece := await wire.some(leave.read - got)):
        got += len(piece)
    await asyncio.sleep(leave.wait)
    wire.leave(leave.reset)


def describe(request: Request, reply: Reply | None, error: Exception) -> str:
    """Everything that is needed to look into a fault."""
    what = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
    came = "nothing" if reply is None else f"{reply.status} {reply.headers} {reply.body[:SHOWN]!r}"
    return f"request {request.number} ({request.kind}): {what}\nsent: {request.data[:SHOWN]!r}\ncame: {came}"

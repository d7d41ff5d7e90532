"""Servers of a few lines, which misbehave on purpose, and the driver run against them in this process."""

import asyncio
import contextlib
import socket
import threading
from collections import defaultdict

from stackrace.harness.clock import Alarms, now
from stackrace.harness.load.connections import Connections
from stackrace.harness.load.driver import Driver
from stackrace.harness.load.plan import Plan, Start
from stackrace.harness.load.readiness import Readiness
from stackrace.harness.load.received import Journal, Received, hand_out
from stackrace.harness.load.request import request_bytes
from stackrace.harness.load.slots import Slots, SlotTable
from stackrace.harness.types import Endpoint, Request, Sampling

_EVENTS = b'data: {"choices": [{"token_ids": [1], "text": "a"}]}\n\ndata: [DONE]\n\n'


STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(_EVENTS), _EVENTS)
)


@contextlib.contextmanager
def scripted(handle):
    """A server that gives each accepted connection, with its number, to `handle` in a thread of its own."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept():
        with contextlib.suppress(OSError):
            for number in range(1000):
                connection, _ = server.accept()
                threading.Thread(target=serve, args=(connection, number), daemon=True).start()

    def serve(connection, number):
        with connection, contextlib.suppress(OSError):
            handle(connection, number)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.getsockname()[1]}", "m")
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def receive_request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            raise OSError("closed")
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(next(v for k, v in (line.split(b": ") for line in head.split(b"\r\n")[1:]) if k == b"Content-Length"))
    while len(body) < length:
        body += connection.recv(65536)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def drive(endpoint, n, concurrency, on_end):
    """Drive n requests in this process; returns the captures and, by position, what was received."""
    captures, journal, received = [], Journal(), defaultdict(Received)

    def keep(capture):
        captures.append(capture)
        on_end(capture)

    async def run():
        alarms, start = Alarms(asyncio.get_running_loop()), now()
        request = Request(0, (5, 6), 1, Sampling(0.0, 1.0, 0, 0))
        table = SlotTable.make(concurrency, n, 1)
        plan = Plan(
            payloads=dict.fromkeys(range(n), request_bytes(endpoint, request)),
            starts=[Start(i, i, start) for i in range(n)],
            following={},
            is_closed=True,
            cutoff=None,
            drain=0,
            request_timeout=10**10,
            stall_timeout=10**10,
        )
        connections = Connections(endpoint.url, 5.0)
        readiness = Readiness(asyncio.get_running_loop())
        await Driver(plan, Slots(table, 0), alarms, readiness, connections, journal, keep).run()
        readiness.close()
        table.close()
        alarms.close()
        connections.close()

    asyncio.run(run())
    hand_out(journal.take(len(journal)), received)
    return captures, received

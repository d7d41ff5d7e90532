"""The epoll under the client: what it costs the connection, and what it tells of."""

import asyncio
import socket
import struct
import sys
import threading
import time

import pytest

from stackrace.harness.load.readiness import Readiness

EVENTS = 60
SEGMENTS_SENT = struct.Struct("@136xI")  # tcpi_segs_out of struct tcp_info


def segments_sent(sock):
    return SEGMENTS_SENT.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SEGMENTS_SENT.size))[0]


def send_events(listener):
    connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(EVENTS):
            connection.sendall(bytes(250))
            time.sleep(0.004)


async def read_all(address, is_sparing):
    """Reads of a stream of events and the packets that they cost."""
    readiness = Readiness(asyncio.get_running_loop())
    readiness.is_sparing = is_sparing
    over = asyncio.get_running_loop().create_future()
    sizes = []
    with socket.create_connection(address) as sock:
        sock.setblocking(False)
        before = segments_sent(sock)

        def read():
            sizes.append(len(sock.recv(4096)))
            if not sizes[-1] and not over.done():
                over.set_result(segments_sent(sock) - before)

        readiness.watch(sock, read)
        packets = await asyncio.wait_for(over, 10)
        readiness.ignore(sock.fileno())
    readiness.close()
    return sizes, packets


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="counts packets by Linux's TCP_INFO: run it on Linux")
@pytest.mark.parametrize(("is_sparing", "least", "most"), [(False, 0.85, 1.1), (True, 0.3, 0.7)])
def test_a_busy_client_acknowledges_every_other_event(is_sparing, least, most):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=send_events, args=(listener,))
        server.start()
        sizes, packets = asyncio.run(read_all(listener.getsockname(), is_sparing))
        server.join()
    assert sum(sizes) == EVENTS * 250
    assert least * EVENTS < packets < most * EVENTS


def test_a_stream_that_is_ignored_is_told_of_no_more():
    async def run():
        readiness = Readiness(asyncio.get_running_loop())
        told = []
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            readiness.watch(ours, lambda: told.append(ours.recv(10)))
            theirs.send(b"a")
            await asyncio.sleep(0.02)
            readiness.ignore(ours.fileno())
            theirs.send(b"b")
            await asyncio.sleep(0.02)
        readiness.close()
        return told

    assert asyncio.run(run()) == [b"a"]

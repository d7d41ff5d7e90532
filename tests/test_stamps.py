"""Receive times: the kernel's, on our clock, whatever the client was busy with."""

import pickle
import time

import numpy as np
import pytest
from scripted import drive, receive_request, scripted

from stackrace.harness.clock import now
from stackrace.harness.load import stamps
from stackrace.harness.load.driver import Capture
from stackrace.harness.load.messages import Offsets, Started
from stackrace.harness.load.parser import Parser, record
from stackrace.harness.load.received import Received
from stackrace.harness.load.stamps import Offset

pytestmark = pytest.mark.alone

MS = 1_000_000
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def event(k):
    data = b'data: {"choices": [{"token_ids": [%d], "text": "a"}]}\n\n' % k
    return b"%x\r\n%b\r\n" % (len(data), data)


def timespec(*nanoseconds):
    return np.array([divmod(t, 10**9) for t in nanoseconds], dtype=np.int64).tobytes()


def test_a_clock_that_drifts_is_followed_between_the_samples():
    day = 1_700_000_000 * 10**9
    offsets = [Offset(0, day, 50), Offset(100 * MS, day + 10_000, 60), Offset(200 * MS, day + 10_000, 50)]
    ours = np.array([0, 50 * MS, 100 * MS, 150 * MS, 300 * MS])
    kernel = timespec(day, day + 50 * MS + 5_000, *(day + t + 10_000 for t in (100 * MS, 150 * MS, 300 * MS)))
    found, stamped = stamps.on_our_clock(kernel, ours + 7 * MS, offsets)
    assert np.abs(found - ours).max() <= 1
    assert stamped.all()
    assert stamps.largest_step(offsets) == pytest.approx(10e-6)


def test_a_read_without_a_stamp_keeps_the_user_space_one():
    offsets = [Offset(0, 1_000 * 10**9, 50)]
    found, stamped = stamps.on_our_clock(timespec(1_000 * 10**9 + 400) + stamps.NO_STAMP, np.array([500, 900]), offsets)
    assert found.tolist() == [400, 900]
    assert stamped.tolist() == [True, False]


def test_a_stamp_is_never_later_than_the_read():
    found, _ = stamps.on_our_clock(timespec(10**9 + 900), np.array([500]), [Offset(0, 10**9, 50)])
    assert found.tolist() == [500]


def capture_of(*pieces):
    received = Received()
    received.data += pieces
    received.stamps.extend(range(100, 100 + len(pieces)))
    received.kernel += [bytes(16)] * len(pieces)
    return Capture(0, 0, 0, 0, 0, 200, 0, False, None, received)


def test_chunks_of_one_read_are_marked_but_for_the_last():
    finished, stamped = record(capture_of(HEAD + event(1), event(2) + event(3) + event(4), event(5) + END), 0, [])
    assert finished.chunk_times == [100, 101, 101, 101, 102]
    assert finished.chunk_coalesced == [False, True, True, False, False]
    assert finished.chunk_lateness is None
    assert not stamped


def test_what_was_received_survives_its_way_to_the_parser():
    before = capture_of(HEAD, event(1), b"", END).received
    after = pickle.loads(pickle.dumps(before))
    assert (after.data, after.stamps, b"".join(after.kernel)) == (before.data, before.stamps, b"".join(before.kernel))


def test_captures_wait_for_the_clocks_after_them():
    parser = Parser()
    assert list(parser.take(Started(0, 50))) == [Started(0, 50)]
    assert list(parser.take(Offsets([Offset(0, 0, 1)]))) == []
    assert list(parser.take(capture_of(HEAD + event(1), END))) == []
    (finished,) = parser.take(Offsets([Offset(500, 0, 1)]))
    assert finished.record.chunk_times == [50]
    assert list(parser.finish()) == []


def test_a_busy_client_is_late_and_says_by_how_much_but_its_times_are_right():
    """The loop is held up for 60 ms when the first request ends; the other streams' events come meanwhile."""
    sent, offsets = {}, [stamps.sample_offset()]

    def handle(connection, number):
        receive_request(connection)
        connection.sendall(HEAD)
        time.sleep(0.008 + 0.004 * number)
        sent[number] = now()
        connection.sendall(event(number))
        time.sleep(0.15 if number else 0)
        connection.sendall(END)

    with scripted(handle) as endpoint:
        captures = drive(endpoint, 10, concurrency=10, on_end=lambda capture: time.sleep(0.06))
    offsets.append(stamps.sample_offset())
    finished = [record(capture, 0, offsets) for capture in captures]
    assert all(f.stamped for f in finished)
    error = np.array([f.record.chunk_times[0] - sent[f.record.output_ids[0]] for f in finished])
    assert error.min() >= 0
    assert np.median(error) < 1 * MS
    assert max(f.record.chunk_lateness[0] for f in finished) > 20 * MS  # user space would have been that wrong

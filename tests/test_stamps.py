"""Receive times: the kernel's, on our clock, whatever the client was busy with."""

import pickle
import time
from collections import defaultdict

import numpy as np
import pytest
from scripted import drive, receive_request, scripted

from stackrace.harness.clock import now
from stackrace.harness.load import stamps
from stackrace.harness.load.driver import Capture
from stackrace.harness.load.messages import Offsets, Started
from stackrace.harness.load.outbox import Parcel
from stackrace.harness.load.parser import Parser, record
from stackrace.harness.load.received import Journal, Received, hand_out
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


CAPTURE = Capture(0, 0, 0, 0, 0, 200, 0, False, None)


def journal_of(*pieces, position=0):
    journal = Journal()
    for stamp, piece in enumerate(pieces, start=100):
        journal.positions.append(position)
        journal.stamps.append(stamp)
        journal.kernel.append(bytes(16))
        journal.data.append(piece)
    return journal


def test_chunks_of_one_read_are_marked_but_for_the_last():
    received = defaultdict(Received)
    hand_out(journal_of(HEAD + event(1), event(2) + event(3) + event(4), event(5) + END).take(9), received)
    finished, stamped = record(CAPTURE, received[0], 0, [])
    assert finished.chunk_times == [100, 101, 101, 101, 102]
    assert finished.chunk_coalesced == [False, True, True, False, False]
    assert finished.chunk_lateness is None
    assert not stamped


def test_each_request_gets_what_was_read_for_it_whatever_the_parcels():
    pieces = {7: [HEAD, event(1), END], 8: [HEAD + event(2), b"", END]}
    journal = Journal()
    for i in range(3):
        for position in pieces:
            one = journal_of(pieces[position][i], position=position)
            for column in ("positions", "stamps", "kernel", "data"):
                getattr(journal, column).extend(getattr(one, column))
    journal.stamps[:] = range(10, 16)
    received = defaultdict(Received)
    while journal:
        hand_out(pickle.loads(pickle.dumps(journal.take(4))), received)
    assert {position: r.data for position, r in received.items()} == pieces
    assert (received[7].stamps, received[8].stamps) == ([10, 12, 14], [11, 13, 15])
    assert received[8].kernel == [bytes(16)] * 3


def test_captures_wait_for_the_clocks_after_them():
    parser = Parser()
    assert list(parser.take(Started(0, 50))) == [Started(0, 50)]
    assert list(parser.take(Offsets([Offset(0, 0, 1)]))) == []
    journal = journal_of(HEAD + event(1), END)
    assert list(parser.take(Parcel(journal.take(1), []))) == []
    assert list(parser.take(Parcel(journal.take(1), [CAPTURE]))) == []
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
        captures, received = drive(endpoint, 10, concurrency=10, on_end=lambda capture: time.sleep(0.06))
    offsets.append(stamps.sample_offset())
    finished = [record(capture, received[capture.position], 0, offsets) for capture in captures]
    assert all(f.stamped for f in finished)
    error = np.array([f.record.chunk_times[0] - sent[f.record.output_ids[0]] for f in finished])
    assert error.min() >= 0
    assert np.median(error) < 1 * MS
    assert max(f.record.chunk_lateness[0] for f in finished) > 20 * MS  # user space would have been that wrong

"""A worker's way out: no capture before its reads, each once, nothing while the loop is late."""

import pickle

import pytest

from stackrace.harness.clock import SECOND
from stackrace.harness.load import outbox as module
from stackrace.harness.load.driver import Capture
from stackrace.harness.load.messages import LENGTH, Tick, Unframer
from stackrace.harness.load.outbox import Outbox, Parcel
from stackrace.harness.load.received import Journal


class Pipe:
    """Takes everything."""

    def __init__(self):
        self.written = []

    def write(self, data):
        assert LENGTH.unpack_from(data)[0] == len(data) - LENGTH.size
        self.written.append(data)

    def messages(self):
        return Unframer().feed(b"".join(self.written))


class Clock:
    """Alarms that are let go by hand."""

    def __init__(self):
        self.next = None

    def at(self, when, callback):
        self.next = when, callback

    def ring(self):
        when, callback = self.next
        callback()
        return when


def capture(position):
    return Capture(position, 0, 0, 0, 0, 0, 0, False, None)


@pytest.fixture
def out():
    pipe, alarms, journal = Pipe(), Clock(), Journal()
    return pipe, alarms, journal, Outbox(pipe, alarms, journal)


def read(journal, positions):
    for position in positions:
        journal.positions.append(position)
        journal.stamps.append(position)
        journal.kernel.append(bytes(16))
        journal.data.append(b"%d" % position)


def ring_in_time(alarms, monkeypatch):
    when = alarms.next[0]
    monkeypatch.setattr(module, "now", lambda: when)
    alarms.ring()


def test_a_capture_never_leaves_before_its_last_read(out, monkeypatch):
    pipe, alarms, journal, outbox = out
    outbox.keep_shipping()
    for position in range(200):
        read(journal, [position] * 20)
        outbox.tell(capture(position))
    for _ in range(20):
        ring_in_time(alarms, monkeypatch)
    parcels = pipe.messages()
    assert all(isinstance(p, Parcel) for p in parcels)
    assert max(len(p.reads.sizes) for p in parcels) < 2000  # packing one must not hold up the loop
    seen, ended = [], []
    for parcel in parcels:
        seen += parcel.reads.positions
        ended += [c.position for c in parcel.captures]
        assert all(seen.count(position) == 20 for position in ended)
    assert seen == [p for p in range(200) for _ in range(20)]
    assert ended == list(range(200))
    assert len(journal) == 0


def test_a_loop_that_is_late_ships_nothing_until_it_is_not(out, monkeypatch):
    pipe, alarms, journal, outbox = out
    outbox.keep_shipping()
    read(journal, [1])
    due = alarms.next[0]
    monkeypatch.setattr(module, "now", lambda: due + SECOND // 100)
    alarms.ring()
    assert pipe.written == []
    ring_in_time(alarms, monkeypatch)
    assert [list(p.reads.positions) for p in pipe.messages()] == [[1]]


def test_a_loop_that_is_always_late_ships_when_much_is_kept(out, monkeypatch):
    pipe, alarms, journal, outbox = out
    monkeypatch.setattr(module, "_MOST_READS", 10)
    outbox.keep_shipping()
    read(journal, range(10))
    due = alarms.next[0]
    monkeypatch.setattr(module, "now", lambda: due + SECOND // 100)
    alarms.ring()
    assert len(pipe.messages()) == 1


def test_other_messages_go_at_once_and_at_the_end_everything(out):
    pipe, _, journal, outbox = out
    read(journal, range(3000))
    outbox.tell(capture(2999))
    tick = Tick(0, 1, 2, 3, None)
    outbox.tell(tick)
    assert pipe.messages() == [tick]
    outbox.drain()
    parcels = pipe.messages()[1:]
    assert [n for p in parcels for n in p.reads.positions] == list(range(3000))
    assert [c.position for p in parcels for c in p.captures] == [2999]


def test_what_was_taken_is_let_go_of_and_what_was_not_stays_in_order():
    journal, taken = Journal(), []
    for _ in range(50):
        read(journal, range(len(taken) + len(journal), len(taken) + len(journal) + 7))
        taken += journal.take(3).positions
        assert len(journal.data) <= 2 * len(journal) + 3
    assert len(taken) == 150
    assert pickle.loads(pickle.dumps(journal.take(1000))).positions.tolist() == list(range(150, 350))
    assert taken == list(range(150))

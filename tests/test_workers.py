"""Several workers are one load generator: one schedule, one cap, one clock."""

import asyncio
import gc
import os
import signal
from unittest.mock import Mock

import numpy as np
import pytest

from stackrace.harness.clock import now
from stackrace.harness.errors import LoadGeneratorDied
from stackrace.harness.load import connections
from stackrace.harness.load.messages import WorkerJob
from stackrace.harness.load.plan import Share
from stackrace.harness.load.slots import Slots, SlotTable
from stackrace.harness.load.worker import Orders, Worker
from stackrace.harness.schedule import Schedule
from stackrace.harness.types import Endpoint, Request, Sampling

pytestmark = pytest.mark.alone

MS = 1_000_000


def cores():
    return tuple(sorted(os.sched_getaffinity(0)))


@pytest.fixture
def truth(mock_engine):
    return mock_engine("backend.ttft=0.02", "backend.gap=0.005")


def test_every_session_is_in_one_share_and_every_request_in_some():
    turns = [(0, 0), (None, None), (1, 0), (0, 1), (1, 1), (0, 2), (None, None)]
    requests = tuple(
        Request(i, (5,), 1, Sampling(0.0, 1.0, 0, i), session=s, turn=t, think=0.25) for i, (s, t) in enumerate(turns)
    )
    schedule = Schedule(requests, (0, 10, 20, 0, 20, 0, 30))
    shares = [Share.of(schedule, w, 2) for w in range(2)]
    assert sorted(p for s in shares for p in s.positions) == list(range(7))
    assert [(s.position, s.ticket, s.due) for s in shares[0].starts] == [(0, 0, 0), (2, 2, 20)]
    assert [(s.position, s.ticket, s.due) for s in shares[1].starts] == [(1, 1, 10), (6, 3, 30)]
    assert {k: (t.position, t.think) for k, t in shares[0].following.items()} == {
        0: (3, 250 * MS),
        3: (5, 250 * MS),
        2: (4, 250 * MS),
    }


def test_a_slot_goes_to_the_lowest_ticket_whoever_freed_it():
    table = SlotTable.make(cap=2, tickets=6, workers=2)
    one, other = Slots(table, 0), Slots(table, 1)
    assert [one.free_since(0), other.free_since(1), one.free_since(2), other.free_since(3)] == [0, 0, None, None]
    other.release(700)
    assert one.free_since(2) == 700
    assert other.free_since(3) is None
    assert os.read(one.wake_file, 10) == b"!"  # ticket 2 is one's: it is told
    one.release(900)
    assert other.free_since(3) == 900
    assert os.read(other.wake_file, 10) == b"!"
    one.release(950)  # ticket 4 is its own: nobody has to be woken
    with pytest.raises(BlockingIOError):
        os.read(one.wake_file, 10)
    for slots in (one, other):
        slots.close()
    table.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_cap_holds_over_all_workers_first_come_first_served(truth, load, ask, workers):
    records, health = load(truth, ask(60, 5), concurrency=8, workers=workers, cores=cores())
    assert sorted(h.worker for h in health) == list(range(workers))
    assert len(records) == 60
    assert all(r.error is None and sum(r.chunk_tokens) == 5 for r in records)
    times = [(r.sent, 1) for r in records] + [(r.end, -1) for r in records]
    assert max(np.cumsum([step for _, step in sorted(times)])) == 8
    slots = [r.slot for r in records[8:]]
    assert sorted(slots) == sorted(r.end for r in records)[:52]  # to the nanosecond
    assert slots == sorted(slots) or workers > 1  # two workers may notice in another order than it happened


@pytest.mark.parametrize("workers", [3])
def test_results_do_not_depend_on_how_many_workers_there_are(truth, load, ask, workers):
    due = np.cumsum(np.random.default_rng(1).exponential(0.01, 80)).tolist()
    alone, _ = load(truth, ask(80, 9, due), cores=cores())
    together, _ = load(truth, ask(80, 9, due), workers=workers, cores=cores())
    for one, other in zip(alone, together, strict=True):
        assert (one.id, one.due, one.slot) == (other.id, other.due, other.slot)
        assert one.output_ids == other.output_ids
        assert one.chunk_tokens == other.chunk_tokens
    for records in (alone, together):
        ttft = np.array([r.chunk_times[0] - r.sent for r in records])
        tpot = np.array([(r.chunk_times[-1] - r.chunk_times[0]) / 8 for r in records])
        assert np.median(ttft) == pytest.approx(20 * MS, abs=0.5 * MS)
        assert np.median(tpot) == pytest.approx(5 * MS, abs=0.1 * MS)


def test_workers_start_within_a_millisecond(truth, load, ask):
    lateness = []
    for _ in range(3):
        records, _ = load(truth, ask(2, 1), workers=2, cores=cores())  # one request each, due at the start
        lateness.append(max(r.sent for r in records) - min(r.sent for r in records))
    assert min(lateness) < 1 * MS  # the best of three: another process may hold a core


def test_a_worker_that_waits_for_anothers_warm_up_keeps_its_connections_fresh(ask, job, monkeypatch):
    """Servers close what has idled for 5 s; here a connection is old after 0.4 s, and the warm-up takes 1.5."""
    monkeypatch.setattr(connections, "MAX_IDLE", 400 * MS)
    opened = {}

    async def serve(reader, writer):
        opened[writer] = now()
        await reader.read()
        del opened[writer]
        writer.close()

    async def wait_through_a_warm_up():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            asked = job(Endpoint(f"http://127.0.0.1:{port}", "m"), ask(8, 1), workers=2)
            task = WorkerJob(job=asked, worker=1, slots=None, warms_up=False)
            orders = Orders()
            working = asyncio.create_task(Worker(task, Mock(), orders).work())
            await asyncio.sleep(1.5)
            while len(opened) != 4:  # while some are renewed
                await asyncio.sleep(0.01)
            ages = [now() - time for time in opened.values()]
            orders.eof_received()
            await working
        return ages

    try:
        ages = asyncio.run(wait_through_a_warm_up())
    finally:
        gc.unfreeze()
        gc.enable()
    assert max(ages) < (400 + 250 + 100) * MS  # looked at four times a second


def test_more_workers_than_requests_is_no_fault(truth, load, ask):
    records, health = load(truth, ask(1, 2), workers=3, cores=cores())
    assert [r.error for r in records] == [None]
    assert len(health) == 3


def test_a_worker_that_dies_ends_the_race_with_a_word(truth, load, ask):
    from stackrace.harness.load.generator import LoadGenerator

    killed = []
    tick = LoadGenerator._check

    def kill_one(self):
        if not killed:
            killed.append(self._workers[1].pid)
            os.kill(self._workers[1].pid, signal.SIGKILL)
            self._workers[1].wait()
        tick(self)

    LoadGenerator._check = kill_one
    try:
        with pytest.raises(LoadGeneratorDied, match="ended with -9"):
            load(truth, ask(200, 100), concurrency=2, workers=2, cores=cores())
    finally:
        LoadGenerator._check = tick
    assert killed

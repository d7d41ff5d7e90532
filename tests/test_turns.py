"""Multi-turn sessions: a turn waits for the one before it, and a slot belongs to the session."""

import pytest
from scripted import STREAM, receive_request, scripted

from stackrace.harness.schedule import Schedule
from stackrace.harness.types import Request, Sampling

MS = 1_000_000


def sessions(number, turns, think, due=None):
    """Requests of `number` sessions, session by session."""
    requests = tuple(
        Request(s * turns + t, (5, 6), 2, Sampling(0.0, 1.0, 0, 0), session=s, turn=t, think=think * (t > 0))
        for s in range(number)
        for t in range(turns)
    )
    return Schedule(requests, tuple(round(1e9 * (due or [0] * number)[r.session]) for r in requests))


def by_session(records, turns):
    return [records[i : i + turns] for i in range(0, len(records), turns)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_turn_is_due_when_the_one_before_it_ended_and_the_user_has_thought(mock_engine, load, workers):
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.005")
    records, _ = load(endpoint, sessions(3, 3, 0.03, due=[0.0, 0.01, 0.02]), workers=workers)
    assert len(records) == 9
    for first, second, third in by_session(records, 3):
        assert second.due == second.slot == first.end + 30 * MS
        assert third.due == third.slot == second.end + 30 * MS
        assert min(r.sent - r.due for r in (first, second, third)) >= 0
    assert [s[0].due for s in by_session(records, 3)] == [0, 10 * MS, 20 * MS]


def test_a_slot_is_the_sessions_until_its_last_turn(mock_engine, load):
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.0")
    records, _ = load(endpoint, sessions(4, 2, 0.02), concurrency=2)
    spans = [(s[0].sent, s[-1].end) for s in by_session(records, 2)]
    ends = sorted(end for _, end in spans)
    assert [s[0].slot for s in by_session(records, 2)[2:]] == ends[:2]
    assert all(s[1].due == s[0].end + 20 * MS for s in by_session(records, 2))


def test_the_turns_after_a_failed_one_fail_with_it_unsent(load):
    def handle(connection, number):
        for answer in (STREAM, b"HTTP/1.1 500 -\r\nContent-Length: 0\r\n\r\n"):
            receive_request(connection)
            connection.sendall(answer)

    with scripted(handle) as endpoint:
        records, _ = load(endpoint, sessions(1, 4, 0.0), concurrency=1)
    assert [r.error for r in records[:2]] == [None, "HTTP 500: "]
    assert [r.error for r in records[2:]] == ["not asked: an earlier turn of its session failed"] * 2
    assert [r.sent for r in records[2:]] == [None, None]


def test_a_turn_that_is_not_due_before_the_end_is_not_asked(mock_engine, load):
    endpoint = mock_engine("backend.ttft=0.01", "backend.gap=0.0")
    records, _ = load(endpoint, sessions(1, 3, 0.4), seconds=0.6)
    assert [r.id for r in records] == [0, 1]
    assert all(r.error is None and not r.censored for r in records)

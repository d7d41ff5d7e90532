"""A hang is silence on every stream of every worker, in all the time that a request was given."""

import pytest

from stackrace.backends.running import Attached
from stackrace.harness.errors import EngineDied, EngineHangs
from stackrace.harness.load.messages import Tick
from stackrace.harness.pulse import Pulse
from stackrace.harness.types import Endpoint, Record

S = 1_000_000_000


class Told(Attached):
    """An engine whose fault is set."""

    found = None
    asked = 0

    def fault(self, timeout):
        self.asked += 1
        return self.found


@pytest.fixture
def engine():
    return Told("x", Endpoint("http://x", "m"))


def tick(worker, time, heard, stalled=None):
    return Tick(worker, 1, round(time * S), round(heard * S), None if stalled is None else round(stalled * S))


def test_a_request_that_stalls_while_others_go_on_is_no_hang(engine):
    pulse = Pulse(engine, 1, stall=10)
    pulse.check(tick(0, 20.3, heard=15, stalled=20.2))
    with pytest.raises(EngineHangs, match=r"no token for 10 s \(timeouts.stall\): x hangs"):
        pulse.check(tick(0, 25.3, heard=15, stalled=25.1))


def test_nothing_is_judged_before_every_worker_has_told(engine):
    pulse = Pulse(engine, 2, stall=10)
    pulse.check(tick(0, 20.2, heard=10, stalled=20.2))
    pulse.check(tick(1, 20.1, heard=10))  # before the first one's request was given up
    pulse.check(tick(1, 20.3, heard=20.2))  # and then something came
    assert pulse.in_flight == 2
    pulse.check(tick(0, 30.4, heard=10, stalled=30.2))
    with pytest.raises(EngineHangs):
        pulse.check(tick(1, 30.4, heard=20.1))


def test_an_engine_is_asked_after_a_streak_of_failures_only(engine):
    engine.found = "HTTP 500: dead"
    pulse, failed, fine = Pulse(engine, 1, stall=10), Record(0, 0, 0, error="x"), Record(1, 0, 0)
    for record in [failed] * 7 + [fine] + [failed] * 7:
        pulse.note(record)
        pulse.check(None)
    assert not engine.asked
    pulse.note(failed)
    with pytest.raises(EngineDied, match="x has not exited, but is broken: HTTP 500: dead"):
        pulse.check(None)


def test_one_that_answers_is_not_asked_again_at_once(engine):
    pulse = Pulse(engine, 1, stall=10)
    for _ in range(20):
        pulse.note(Record(0, 0, 0, error="HTTP 429"))
        pulse.check(None)
    assert engine.asked == 1


def test_the_last_request_tells_too(engine):
    pulse = Pulse(engine, 1, stall=10)
    pulse.check_at_the_end()
    assert not engine.asked
    pulse.note(Record(0, 0, 0, error="x"))
    engine.found = "ConnectionResetError"
    with pytest.raises(EngineDied):
        pulse.check_at_the_end()

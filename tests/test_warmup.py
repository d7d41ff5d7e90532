"""The warm-up: rounds until latencies settle, none of which asks what another one did."""

import pytest
from test_validity import healthy, table

from stackrace.backends.running import Attached
from stackrace.harness.errors import EngineError
from stackrace.harness.load.messages import RoundDone
from stackrace.harness.point import plan
from stackrace.harness.summary import summarize
from stackrace.harness.types import Endpoint
from stackrace.harness.validity import judge
from stackrace.harness.warmup import WarmUp


@pytest.fixture
def warm_up(compose):
    """`warm_up("warmup.requests=4", ..., engine=...)` -> the warm-up of a point over the mock."""

    def make(*overrides, engine=None):
        lengths = [] if "lengths=uniform" in overrides else ["lengths.input.tokens=20", "lengths.output.tokens=9"]
        point = plan(compose("backend=mock", *lengths, *overrides))
        return WarmUp(point, point.schedule().requests, engine or launched())

    return make


def launched():
    return Attached("x", Endpoint("http://x", "m", {"Authorization": "Bearer s3cret"}))


def done(ttft=0.1, tpot=0.01, failed=0, error=None):
    return RoundDone(8, 1.0, ttft, tpot, failed, error)


def run(warm, *rounds):
    """Tell rounds until it has had enough; returns how many it wanted and all prompts that it asked."""
    order, prompts = warm.next_round(None), []
    for count, told in enumerate(rounds, 1):
        prompts += [r.prompt for r in order.schedule.requests]
        if (order := warm.next_round(told)) is None:
            return count, prompts
    return None, prompts


def test_rounds_go_on_until_both_latencies_change_by_less_than_the_tolerance(warm_up):
    warm = warm_up()
    falling = [done(5.0), done(0.5), done(0.2, 0.02), done(0.19, 0.01), done(0.18, 0.0101), done()]
    assert run(warm, *falling)[0] == 5
    told = warm.as_dict()
    assert (told["ended"], told["settled"]) == ("settled", True)
    assert told["change"] == pytest.approx(0.01 / 0.19)
    assert [r["ttft"] for r in told["rounds"]] == [5.0, 0.5, 0.2, 0.19, 0.18]


def test_a_rise_is_a_change_too_and_what_is_within_the_slack_is_none(warm_up):
    assert run(warm_up(), done(0.1), done(0.2), done(0.2))[0] == 3
    assert run(warm_up(), done(0.1, 0.0001), done(0.1, 0.0005))[0] == 2
    assert run(warm_up(), done(0.1, None), done(0.1, None))[0] == 2  # one token: no TPOT to judge


def test_no_prompt_comes_twice_nor_in_the_race(warm_up, compose):
    engine = launched()
    prompts = [p for n in (1, 2) for p in run(warm_up(engine=engine), *[done(n * k) for k in (5, 4, 3, 3)])[1]]
    race = plan(compose("backend=mock", "lengths.input.tokens=20")).schedule()
    asked = prompts + [r.prompt for r in race.requests]
    assert len({p[:4] for p in asked}) == len(asked) > 100 + 4 * 8


def test_a_round_has_the_lengths_of_the_race_and_its_concurrency(warm_up):
    drawn = ["lengths=uniform", "stop.requests=20", "warmup.output_tokens=24"]
    for load, in_flight, size in [
        (["arrival=immediate", "concurrency=12"], 12, 12),
        (["arrival=immediate", "concurrency=50"], 20, 20),
        (["arrival=immediate", "concurrency=12", "warmup.concurrency=3"], 3, 8),
        (["arrival=immediate", "concurrency=2"], 2, 8),
        (["arrival.rate=4"], 8, 8),
        (["arrival.rate=4", "concurrency=3"], 3, 8),
    ]:
        warm = warm_up(*drawn, *load)
        order = warm.next_round(None)
        assert (order.concurrency, len(order.schedule.requests)) == (in_flight, size)
        again = warm.next_round(done())
        lengths = [[(len(r.prompt), r.output_tokens) for r in o.schedule.requests] for o in (order, again)]
        assert lengths[0] == lengths[1]
        assert len(set(lengths[0])) > 1
        assert max(n for _, n in lengths[0]) <= 24


def test_turns_are_asked_by_themselves_without_thinking(warm_up):
    order = warm_up("workload=sessions", "stop.requests=20").next_round(None)
    assert len(order.schedule.sessions) == 8
    assert not any(r.think for r in order.schedule.requests)


def test_a_launch_that_has_settled_at_these_lengths_does_the_least(warm_up):
    engine = launched()
    assert run(warm_up("arrival.rate=2", engine=engine), done(9), done(1), done(1))[0] == 3
    again = warm_up("arrival.rate=4", engine=engine)
    assert run(again, done(1))[0] == 1
    assert again.as_dict()["ended"] == "warm already"
    assert again.as_dict()["settled"] is True
    assert run(warm_up("lengths.input.tokens=30", engine=engine), done(), done())[0] == 2
    assert run(warm_up("warmup.rounds.least=3", engine=engine), done(9), done(5), done(1))[0] == 3


def test_limits_end_it_and_make_the_point_suspect(warm_up):
    restless = [done(2.0**-k) for k in range(20)]
    engine = launched()
    warm = warm_up("warmup.rounds.most=4", engine=engine)
    assert run(warm, *restless)[0] == 4
    found = verdict(warm)
    assert found.verdict == "suspect"
    words = "the warm-up had not settled after 4 rounds (warmup.rounds.most): latency changed by 50% in the last one"
    assert found.reasons == [words]
    assert run(warm_up("warmup.rounds.most=4", engine=engine), *restless)[0] == 4  # tried again, as it is not warm
    brief = warm_up("warmup.seconds=0.000001")
    assert run(brief, *restless)[0] == 1
    assert "after 1 rounds (warmup.seconds): too few to tell" in verdict(brief).reasons[0]


def test_without_a_tolerance_nothing_is_judged(warm_up):
    warm = warm_up("warmup.tolerance=null", "warmup.rounds.least=3")
    assert run(warm, done(9), done(5), done(1))[0] == 3
    assert (warm.as_dict()["ended"], warm.as_dict()["settled"]) == ("fixed", None)
    assert verdict(warm).verdict == "valid"


def test_failures_are_told_and_only_nothing_but_failures_is_an_error(warm_up):
    warm = warm_up()
    assert run(warm, done(failed=7, error="HTTP 500: s3cret"), done(), done())[0] == 2
    assert (warm.as_dict()["failed"], warm.as_dict()["first_error"]) == (7, "HTTP 500: ***")
    with pytest.raises(EngineError, match=r"every request of the warm-up failed, the first with: HTTP 500: \*\*\*"):
        run(warm_up(), done(None, None, failed=8, error="HTTP 500: s3cret"))


def verdict(warm):
    frame = table.frame(healthy())
    config = {"validity": {"warmup_change": {"suspect": 0.0, "invalid": None}}, "workload": {}}
    return judge(frame, summarize(frame, {}), config, {"warmup": warm.as_dict()})

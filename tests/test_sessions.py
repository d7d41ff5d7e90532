"""Sessions: prompts that grow by the scheduled answer and a new question, due with their session, frozen."""

from itertools import groupby, pairwise

import numpy as np
import pytest
from test_workloads import common_prefix

from stackrace.harness import schedule
from stackrace.harness.errors import UsageError
from stackrace.harness.schedule import Schedule
from stackrace.harness.types import Request, Sampling
from stackrace.workloads import think
from stackrace.workloads.arrivals import Constant, Immediate
from stackrace.workloads.lengths import Fixed, Uniform
from stackrace.workloads.sessions import Sessions


def sessions(**changes):
    settings = {
        "turns": Fixed(tokens=3),
        "input_lengths": Fixed(tokens=20),
        "output_lengths": Fixed(tokens=5),
        "system_tokens": 8,
        "think": think.Fixed(seconds=1.5),
        "vocab_size": 512,
        "first_token": 4,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 5,
    }
    return Sessions(**{**settings, **changes})


def drawn(workload, requests=12, arrival=None, seed=0):
    return schedule.draw(workload, arrival or Constant(rate=2.0), seed, requests, None)


def by_session(found):
    return [list(turns) for _, turns in groupby(found.requests, key=lambda r: r.session)]


def test_a_prompt_is_the_one_before_the_scheduled_answer_and_a_new_question():
    talks = by_session(drawn(sessions()))
    assert len(talks) == 4
    for talk in talks:
        assert [len(r.prompt) for r in talk] == [8 + 20, 8 + 20 + 5 + 20, 8 + 20 + 5 + 20 + 5 + 20]
        assert all(common_prefix(a.prompt, b.prompt) == len(a.prompt) for a, b in pairwise(talk))
        assert [(r.turn, r.think, r.output_tokens) for r in talk] == [(0, 0.0, 5), (1, 1.5, 5), (2, 1.5, 5)]
    assert {common_prefix(a[0].prompt, b[0].prompt) for a, b in pairwise(talks)} == {8}


def test_what_sessions_repeat_is_counted():
    # a session: 28 of the second prompt and 53 of the third; and 8 of the system prompt for all sessions but one
    assert drawn(sessions()).repeated_tokens == 4 * (28 + 53) + 3 * 8
    assert drawn(sessions(turns=Fixed(tokens=1), system_tokens=0)).repeated_tokens == 0


def test_sessions_arrive_and_their_turns_are_due_with_the_first():
    found = drawn(sessions())
    assert found.due == (0,) * 3 + (500_000_000,) * 3 + (1_000_000_000,) * 3 + (1_500_000_000,) * 3
    assert [r.turn for r in found.requests] == [0, 1, 2] * 4
    assert drawn(sessions(), arrival=Immediate()).is_immediate


def test_the_number_of_requests_is_kept_and_the_last_session_ends_early():
    assert [len(talk) for talk in by_session(drawn(sessions(), requests=8))] == [3, 3, 2]


def test_the_seconds_are_those_of_the_arrivals():
    found = schedule.draw(sessions(), Constant(rate=2.0), 0, None, 1.0)
    assert [len(talk) for talk in by_session(found)] == [3, 3]


def test_lengths_turns_and_think_times_are_drawn():
    workload = sessions(
        turns=Uniform(low=1, high=4), output_lengths=Uniform(low=1, high=9), think=think.Exponential(mean=2.0)
    )
    talks = by_session(drawn(workload, requests=4000))
    assert {len(talk) for talk in talks} == {1, 2, 3, 4}
    for talk in talks:
        for a, b in pairwise(talk):
            assert len(b.prompt) - len(a.prompt) - 20 == a.output_tokens
    times = np.array([r.think for talk in talks for r in talk[1:]])
    assert abs(times.mean() - 2.0) < 5 * 2.0 / np.sqrt(len(times))
    assert {r.think for talk in talks for r in talk[:1]} == {0.0}


def test_sessions_are_frozen(tmp_path):
    found = drawn(sessions(think=think.Exponential(mean=0.1)))
    found.save(tmp_path / "schedule.parquet")
    loaded = Schedule.load(tmp_path / "schedule.parquet")
    assert loaded == found
    assert loaded.hash == found.hash == drawn(sessions(think=think.Exponential(mean=0.1))).hash
    assert found.hash != drawn(sessions(think=think.Exponential(mean=0.2))).hash


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sessions(system_tokens=-1), r"workload\.system_tokens=-1: must be"),
        (lambda: think.Fixed(seconds=-1), r"workload\.think\.seconds=-1: must be"),
        (lambda: think.Exponential(mean=float("inf")), r"workload\.think\.mean=inf: must be"),
        (lambda: drawn(sessions(input_lengths=Fixed(tokens=2))), "cannot make session 0 unique.*at least 3"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def naive(prompts):
    return sum(max((common_prefix(p, q) for q in prompts[:i]), default=0) for i, p in enumerate(prompts))


def test_repeated_tokens_are_the_longest_common_prefixes_with_any_earlier_prompt():
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompts = [tuple(rng.integers(0, 3, rng.integers(1, 8)).tolist()) for _ in range(rng.integers(1, 12))]
        prompts = [tuple(t * 70_001 for t in p) for p in prompts]  # ids of more than two bytes
        requests = tuple(Request(i, p, 1, Sampling(0.0, 1.0, 0, 0)) for i, p in enumerate(prompts))
        assert Schedule(requests, (0,) * len(prompts)).repeated_tokens == naive(prompts)
        backwards = requests[::-1]
        assert Schedule(backwards, (0,) * len(prompts)).repeated_tokens == naive(prompts)


@pytest.mark.parametrize(("n", "length"), [(1000, 2_000), (100, 128_000)])
def test_long_prompts_are_counted_quickly(n, length):
    import time

    shared = tuple(range(length // 2))
    requests = tuple(Request(i, (*shared, i, *shared[1:]), 1, Sampling(0.0, 1.0, 0, 0)) for i in range(n))
    start = time.monotonic()
    assert Schedule(requests, (0,) * n).repeated_tokens == (n - 1) * length // 2
    assert time.monotonic() - start < 10  # about 1 s

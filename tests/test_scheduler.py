"""The scheduler and its page pool, without a model."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackrace.backends.mla.cache import PAGE, PagePool
from stackrace.backends.mla.scheduler import Scheduler, Sequence, Work
from stackrace.harness.types import Sampling

GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)


def sequence(id: str, prompt: int, output: int) -> Sequence:
    return Sequence(id, [7] * prompt, output, GREEDY, frozenset())


def advance(scheduler: Scheduler) -> list[Work]:
    """What the engine does, with a model that always says 7."""
    work = scheduler.schedule()
    for item, count in work:
        item.num_computed += count
        if item.num_uncomputed == 0:
            item.tokens.append(7)
            if item.finish_reason():
                scheduler.finish(item)
    return work


@dataclass(frozen=True)
class Event:
    step: int
    prompt: int
    output: int
    abort_after: int | None


EVENTS = st.lists(
    st.builds(
        Event,
        step=st.integers(0, 30),
        prompt=st.integers(1, 200),
        output=st.integers(1, 20),
        abort_after=st.none() | st.integers(0, 15),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, max_sequences=st.integers(1, 6), extra=st.integers(0, 80), num_pages=st.integers(4, 12))
def test_invariants(events: list[Event], max_sequences: int, extra: int, num_pages: int) -> None:
    budget = max_sequences + extra
    pool = PagePool(num_pages)
    scheduler = Scheduler(pool, max_sequences, budget)
    events = sorted(events, key=lambda event: event.step)
    sequences = {str(number): sequence(str(number), e.prompt, e.output) for number, e in enumerate(events)}
    admitted: list[str] = []
    aborted: set[str] = set()
    step = 0
    while step <= 50 or scheduler.running or scheduler.waiting:
        for number, event in enumerate(events):
            if event.step == step:
                scheduler.submit(sequences[str(number)])
            if event.abort_after is not None and event.step + event.abort_after == step:
                scheduler.abort(str(number))
                aborted.add(str(number))
        busy = bool(scheduler.running or scheduler.waiting)
        before = {s.id for s in scheduler.running}
        decoding = {s.id for s in scheduler.running if s.num_uncomputed == 1}
        work = advance(scheduler)
        assert bool(work) == busy  # never stuck
        assert sum(item.num_tokens for item in work) <= budget
        assert len(work) <= max_sequences
        assert decoding <= {item.sequence.id for item in work}  # decoding never waits
        counts = [item.num_tokens for item in work]
        assert all(count > 0 for count in counts)
        assert counts == sorted(counts, key=lambda count: count > 1)
        admitted += sorted({item.sequence.id for item in work} - before - set(admitted), key=int)
        held = [page for s in scheduler.running for page in s.pages]
        assert len(held) == len(set(held))
        assert len(held) + pool.num_free == num_pages
        assert all(len(s.pages) * PAGE >= s.num_computed for s in scheduler.running)
        step += 1
        assert step < 20_000
    assert pool.num_free == num_pages
    assert admitted == sorted(admitted, key=int)  # first come, first served
    for id, done in sequences.items():
        assert id in aborted or done.num_output == done.max_tokens


def test_decoding_goes_before_prompts_and_prompts_in_turn() -> None:
    scheduler = Scheduler(PagePool(100), max_sequences=8, max_tokens=64)
    for id, prompt in (("a", 10), ("b", 100), ("c", 20)):
        scheduler.submit(sequence(id, prompt, 5))
    assert [(w.sequence.id, w.num_tokens) for w in advance(scheduler)] == [("a", 10), ("b", 54)]
    assert [(w.sequence.id, w.num_tokens) for w in advance(scheduler)] == [("a", 1), ("b", 46), ("c", 17)]
    assert [(w.sequence.id, w.num_tokens) for w in advance(scheduler)] == [("a", 1), ("b", 1), ("c", 3)]


def test_nobody_overtakes_the_first_in_line() -> None:
    scheduler = Scheduler(PagePool(4), max_sequences=8, max_tokens=512)
    scheduler.submit(sequence("large", 3 * PAGE, 1))
    scheduler.submit(sequence("larger", 4 * PAGE, 1))
    scheduler.submit(sequence("small", 1, 1))
    assert [w.sequence.id for w in advance(scheduler)] == ["large"]
    assert [w.sequence.id for w in advance(scheduler)] == ["larger"]
    assert [w.sequence.id for w in advance(scheduler)] == ["small"]


def test_the_last_output_token_needs_no_room() -> None:
    assert sequence("x", PAGE, 1).pages_needed == 1
    assert sequence("x", PAGE, 2).pages_needed == 2


@pytest.mark.parametrize(("stop", "expected"), [(frozenset({7}), "stop"), (frozenset[int](), "length")])
def test_finish_reasons(stop: frozenset[int], expected: str) -> None:
    done = Sequence("x", [1], 1, GREEDY, stop)
    done.tokens.append(7)
    assert done.finish_reason() == expected


def test_an_ongoing_sequence_has_no_finish_reason() -> None:
    ongoing = Sequence("x", [1], 2, GREEDY, frozenset({8}))
    ongoing.tokens.append(7)
    assert ongoing.finish_reason() is None

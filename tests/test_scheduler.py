"""The scheduler and its pages under any traffic, with a model that remembers in its pages what it has read."""

from dataclasses import dataclass, field
from functools import cache

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from stackrace.backends.mla.cache import PAGE, num_pages_for
from stackrace.backends.mla.engine import Engine
from stackrace.backends.mla.pages import PagePool
from stackrace.backends.mla.runner import Sampled, completes
from stackrace.backends.mla.scheduler import Scheduler, Work
from stackrace.backends.mla.sequence import Sampling, Sequence

GREEDY = Sampling(temperature=0, seed=0)
VOCABULARY = 5
SEED = 17  # the context before the first token


def follow(context: int, token: int) -> int:
    """What a context becomes with one token more."""
    return (context * 1_000_003 + token + 1) % (2**61 - 1)


@cache
def alone(prompt: tuple[int, ...], count: int, stop: frozenset[int]) -> list[int]:
    """The tokens a request must get: each depends on all before it."""
    context, output = SEED, []
    for token in prompt:
        context = follow(context, token)
    while len(output) < count and not (output and output[-1] in stop):
        output.append(context % VOCABULARY)
        context = follow(context, output[-1])
    return output


class PagedModel:
    """Stands for a runner: writes each position's context into its page, and reads the one before from there."""

    def __init__(self, num_pages: int) -> None:
        self.rows = [[-1] * PAGE for _ in range(num_pages)]

    def run(self, work: list[Work]) -> list[Sampled]:
        for item in work:
            self.compute(item)
        ready = [item.sequence for item in work if completes(item)]
        return [Sampled(s, self.row(s, len(s.tokens) - 1) % VOCABULARY, None) for s in ready]

    def compute(self, work: Work) -> None:
        sequence, count = work
        for position in range(sequence.num_computed, sequence.num_computed + count):
            before = self.row(sequence, position - 1) if position else SEED
            page = self.rows[sequence.pages[position // PAGE]]
            page[position % PAGE] = follow(before, sequence.tokens[position])

    def row(self, sequence: Sequence, position: int) -> int:
        return self.rows[sequence.pages[position // PAGE]][position % PAGE]


def build(num_pages: int, max_sequences: int, budget: int, reuse: bool = False) -> Engine:
    scheduler = Scheduler(PagePool(num_pages), max_sequences, budget, reuse)
    return Engine(scheduler, PagedModel(num_pages))  # type: ignore[arg-type]


def sequence(id: str, prompt: int, output: int) -> Sequence:
    return Sequence(id, [2] * prompt, output, GREEDY, frozenset())


@dataclass(frozen=True)
class Arrival:
    step: int
    kinds: tuple[int, ...]  # of its first pages: prompts have them in common, also behind different ones
    own: tuple[int, ...]
    output: int
    stop: frozenset[int]
    abort_after: int | None
    reset: bool  # the prefix cache is emptied when it arrives

    @property
    def prompt(self) -> tuple[int, ...]:
        pages = [(kind + position // 7) % VOCABULARY for kind in self.kinds for position in range(PAGE)]
        return (*pages, *self.own) or (0,)


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 12),
        kinds=st.lists(st.integers(0, 1), max_size=3).map(tuple),
        own=st.just(()) | st.lists(st.integers(0, VOCABULARY - 1), max_size=40).map(tuple),
        output=st.integers(1, 3 * PAGE),
        stop=st.sampled_from([frozenset(), frozenset(), frozenset({3})]),
        abort_after=st.none() | st.integers(0, 40),
        reset=st.sampled_from([False] * 9 + [True]),
    ),
    min_size=3,
    max_size=14,
)


@dataclass
class Watch:
    """What must hold after every step."""

    engine: Engine
    num_pages: int
    max_sequences: int
    budget: int
    outputs: dict[str, list[int]] = field(default_factory=dict)

    def step(self) -> None:
        scheduler = self.engine.scheduler
        was_idle = self.engine.idle
        decoding = {s.id for s in scheduler.running if s.num_uncomputed == 1}
        preemptions = scheduler.num_preemptions
        counts: list[int] = []
        self.engine.observers[:] = [lambda step: counts.append(step.num_tokens)]
        computed = {s.id: s.num_computed for s in scheduler.running}
        for token in self.engine.step():
            self.outputs.setdefault(token.id, []).append(token.token)
        assert bool(counts) != was_idle  # never stuck
        assert sum(counts) <= self.budget
        assert len(scheduler.running) <= self.max_sequences
        now = {s.id: s.num_computed for s in scheduler.running}
        behind = [id for id in decoding & now.keys() if now[id] != computed[id] + 1]
        assert len(behind) <= scheduler.num_preemptions - preemptions  # whoever decodes waits for no prompt
        self.pages()
        self.order()

    def pages(self) -> None:
        pool, running = self.engine.scheduler.pool, self.engine.scheduler.running
        assert all(not s.pages for s in self.engine.scheduler.waiting)
        held = [page for s in running for page in s.pages]
        assert len(set(held)) + pool.num_free == self.num_pages
        for s in running:
            assert len(set(s.pages)) == len(s.pages) >= num_pages_for(s.num_computed)
            shared = [index for index, page in enumerate(s.pages) if held.count(page) > 1]
            assert all((index + 1) * PAGE <= s.num_computed for index in shared)  # nobody writes to them

    def order(self) -> None:
        """Ids are in the order of arrival."""
        scheduler = self.engine.scheduler
        ids = [int(s.id) for s in (*scheduler.running, *scheduler.waiting)]
        assert ids == sorted(ids)


@settings(max_examples=200, deadline=None)
@given(
    arrivals=ARRIVALS,
    max_sequences=st.integers(1, 8),
    extra=st.integers(0, 400),
    spare=st.sampled_from([0, 0, 1, 2, 6]),
    reuse=st.booleans(),
)
def test_any_traffic(arrivals: list[Arrival], max_sequences: int, extra: int, spare: int, reuse: bool) -> None:
    arrivals = sorted(arrivals, key=lambda arrival: arrival.step)
    num_pages = max([num_pages_for(len(a.prompt) + a.output - 1) for a in arrivals], default=1) + spare
    engine = build(num_pages, max_sequences, max_sequences + extra, reuse)
    watch = Watch(engine, num_pages, max_sequences, max_sequences + extra)
    aborted: set[str] = set()
    step = 0
    while step <= 75 or not engine.idle:
        for number, arrival in enumerate(arrivals):
            if arrival.step == step:
                engine.submit(Sequence(str(number), arrival.prompt, arrival.output, GREEDY, arrival.stop))
                if arrival.reset:
                    engine.reset_prefix_cache()
            if arrival.abort_after is not None and arrival.step + arrival.abort_after == step:
                engine.abort(str(number))
                aborted.add(str(number))
        watch.step()
        step += 1
        assert step < 20_000
    assert engine.scheduler.pool.num_free == num_pages
    for number, arrival in enumerate(arrivals):
        expected = alone(arrival.prompt, arrival.output, arrival.stop)
        output = watch.outputs.get(str(number), [])
        assert output == expected[: len(output)]
        assert len(output) == len(expected) or str(number) in aborted
    stats = engine.stats
    event(f"preempted: {stats.total_preemptions > 0}, found: {stats.total_prefix_hits > 0}")


def tokens_of(engine: Engine) -> list[tuple[str, int]]:
    """Who computes how many tokens in the next step."""
    work: list[tuple[str, int]] = []
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: [work.append((s.id, n)) or Work(s, n) for s, n in schedule()]  # type: ignore
    engine.step()
    engine.scheduler.schedule = schedule  # type: ignore[method-assign]
    return work


def test_decoding_goes_before_prompts_and_prompts_in_turn() -> None:
    engine = build(100, max_sequences=8, budget=64)
    for id, prompt in (("a", 10), ("b", 100), ("c", 20)):
        engine.submit(sequence(id, prompt, 5))
    assert tokens_of(engine) == [("a", 10), ("b", 54)]
    assert tokens_of(engine) == [("a", 1), ("b", 46), ("c", 17)]
    assert tokens_of(engine) == [("a", 1), ("b", 1), ("c", 3)]


def test_nobody_overtakes_the_first_in_line() -> None:
    engine = build(4, max_sequences=8, budget=512)
    engine.submit(sequence("large", 3 * PAGE, 1))
    engine.submit(sequence("larger", 4 * PAGE, 1))
    engine.submit(sequence("small", 1, 1))
    assert [tokens_of(engine) for _ in range(3)] == [[("large", 192)], [("larger", 256)], [("small", 1)]]


def test_the_last_to_come_is_preempted_and_computed_again_with_what_it_had_said() -> None:
    engine = build(3, max_sequences=2, budget=256)
    engine.submit(sequence("first", PAGE - 1, 4))
    engine.submit(sequence("last", 2 * PAGE - 4, 4))
    assert tokens_of(engine) == [("first", 63), ("last", 124)]
    assert tokens_of(engine) == [("first", 1), ("last", 1)]
    assert tokens_of(engine) == [("first", 1)]  # its second page is the last one's
    assert engine.stats.total_preemptions == 1
    assert [s.id for s in engine.scheduler.waiting] == ["last"]
    assert tokens_of(engine) == [("first", 1)]
    assert tokens_of(engine) == [("last", 126)]  # 124 of the prompt and 2 of the output


def test_full_pages_are_found_again_but_the_last_token_is_computed() -> None:
    engine = build(20, max_sequences=2, budget=1024, reuse=True)
    for id, prompt, computed, cached in (
        ("a", 3 * PAGE, 192, 0),
        ("b", 3 * PAGE, 64, 128),
        ("c", 3 * PAGE + 1, 1, 192),
    ):
        request = sequence(id, prompt, 1)
        engine.submit(request)
        assert tokens_of(engine) == [(id, computed)]
        assert request.num_cached == cached
    assert engine.stats.total_prefix_queries == 9 * PAGE + 1
    assert engine.stats.total_prefix_hits == 5 * PAGE
    engine.reset_prefix_cache()
    engine.submit(sequence("d", 3 * PAGE, 1))
    assert tokens_of(engine) == [("d", 192)]


def test_pages_nobody_can_find_are_taken_first_then_the_ones_free_for_longest() -> None:
    pool = PagePool(5)
    a, b, c, d, e = pool.take(5)
    for page in (b, c, d):
        pool.publish(page, bytes([page]))
    pool.give_back([d])
    pool.give_back([b, c])
    pool.give_back([a])
    assert pool.find([bytes([b]), bytes([c]), b"?", bytes([d])]) == [b, c]
    assert pool.take(2) == [a, d]  # a has no content; of the others d is free for longest
    assert pool.find([bytes([d])]) == []
    pool.share([c])
    assert pool.num_free == 1
    pool.give_back([c])
    assert pool.take(2) == [b, c]
    assert pool.num_free == 0
    assert e not in (a, b, c, d)


def test_the_last_output_token_needs_no_room() -> None:
    engine = build(1, max_sequences=1, budget=64)
    engine.submit(sequence("x", PAGE - 1, 2))
    assert [tokens_of(engine), tokens_of(engine)] == [[("x", 63)], [("x", 1)]]
    assert engine.stats.total_preemptions == 0


@pytest.mark.parametrize(("stop", "expected"), [(frozenset({7}), "stop"), (frozenset[int](), "length")])
def test_finish_reasons(stop: frozenset[int], expected: str) -> None:
    done = Sequence("x", [1], 1, GREEDY, stop)
    done.tokens.append(7)
    assert done.finish_reason() == expected


def test_an_ongoing_sequence_has_no_finish_reason() -> None:
    ongoing = Sequence("x", [1], 2, GREEDY, frozenset({8}))
    ongoing.tokens.append(7)
    assert ongoing.finish_reason() is None

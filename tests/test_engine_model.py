"""The engine against itself: the same numbers and tokens whatever the batch, the chunks, the cache or its reuse."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from engine_kit import GREEDY, YARN, build, generate, logits, make, prompt

from stackrace.backends.mla.engine import Engine, TokenEvent
from stackrace.backends.mla.sequence import Sampling, Sequence

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("lite"), {"rope_scaling": YARN})


@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_chunks_and_steps_give_the_same_logits(lite: Path, attention: str) -> None:
    engine = build(lite, attention, dtype="float64")
    tokens = prompt(200, seed=2)
    whole = logits(engine, tokens, [200])[-1]
    for chunks in ([64, 64, 64, 8], [1] * 200, [199, 1], [2, 127, 1, 70]):
        assert (logits(engine, tokens, chunks)[-1] - whole).abs().max() <= 1e-9 * whole.abs().max()


def test_both_caches_give_the_same_logits(lite: Path) -> None:
    tokens = prompt(200, seed=3)
    chunks = [100, *[1] * 20, 70, *[1] * 10]
    mla, mha = (logits(build(lite, attention, dtype="float64"), tokens, chunks) for attention in ("mla", "mha"))
    assert (mla - mha).abs().max() <= 1e-9 * mla.abs().max()


def test_greedy_tokens_depend_on_nothing_but_the_prompt(lite: Path) -> None:
    prompts = [prompt(length, seed=length) for length in (1, 3, 64, 65, 130, 200, 17, 33, 90, 128)]
    alone = [generate(build(lite, "mla", budget=512), [p], 12)[0] for p in prompts]
    assert len({tuple(tokens) for tokens in alone}) == len(prompts)
    for attention in ("mla", "mha"):
        for budget in (8, 50, 512):
            assert generate(build(lite, attention, budget), prompts, 12) == alone


def test_bfloat16_stays_close(lite: Path) -> None:
    tokens = prompt(100, seed=4)
    exact = torch.log_softmax(logits(build(lite, "mla"), tokens, [90, *[1] * 10]), -1)
    for attention in ("mla", "mha"):
        rounded = torch.log_softmax(logits(build(lite, attention, dtype="bfloat16"), tokens, [90, *[1] * 10]), -1)
        assert (exact - rounded).abs().mean() < 0.06


def test_sampling_follows_the_seed_whatever_the_batch(lite: Path) -> None:
    def run(budget: int, company: int) -> list[int]:
        engine = build(lite, "mla", budget)
        hot = Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=7)
        engine.submit(Sequence("hot", prompt(20, seed=5), 16, hot, frozenset()))
        for index in range(company):
            engine.submit(Sequence(str(index), prompt(30 + index, seed=index), 10, GREEDY, frozenset()))
        tokens = []
        while not engine.idle:
            tokens += [event.token for event in engine.step() if event.id == "hot"]
        return tokens

    assert run(64, 0) == run(64, 0) == run(9, 5)


def test_abort_frees_pages_mid_flight(lite: Path) -> None:
    engine = build(lite, "mla")
    pool = engine.scheduler.pool
    for index in range(10):  # more than may run at once
        engine.submit(Sequence(str(index), prompt(40, seed=index), 100, GREEDY, frozenset()))
    for _ in range(3):
        engine.step()
    assert pool.num_free < pool.num_pages
    for index in range(10):
        engine.abort(str(index))
    assert engine.idle
    assert pool.num_free == pool.num_pages
    assert engine.step() == []


PAGE_BYTES = 64 * 3 * 576 * 4  # of `lite` in float32
MIXED = [GREEDY, Sampling(seed=5), Sampling(seed=6, top_p=0.9, top_k=40, temperature=1.2, frequency_penalty=0.4)]


def serve(engine: Engine, sequences: list[Sequence]) -> dict[str, list[TokenEvent]]:
    for sequence in sequences:
        engine.submit(sequence)
    events: dict[str, list[TokenEvent]] = {sequence.id: [] for sequence in sequences}
    while not engine.idle:
        for event in engine.step():
            events[event.id].append(event)
    return events


def crowd(**told: int) -> list[Sequence]:
    """Requests with prefixes in common, drawn in several ways."""
    common = prompt(150, seed=1)
    prompts = [common[: 30 * index] + prompt(20 + index, seed=index) for index in range(6)]
    return [Sequence(str(i), p, 70, MIXED[i % 3], frozenset(), **told) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_neither_preemption_nor_reuse_changes_a_token(lite: Path, attention: str, reuse: bool) -> None:
    alone = [serve(build(lite, attention, 512), [sequence])[sequence.id] for sequence in crowd()]
    page = PAGE_BYTES if attention == "mla" else 64 * 3 * 4 * 320 * 4
    tight = {"kv_cache_memory_bytes": 8 * page, "enable_prefix_caching": reuse}
    engine = build(lite, attention, 50, **tight)
    assert [[e.token for e in events] for events in serve(engine, crowd()).values()] == [
        [e.token for e in events] for events in alone
    ]
    assert engine.stats.total_preemptions > 0
    assert (engine.stats.total_prefix_hits > 0) == reuse
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages == 8


def test_logprobs_are_those_of_a_full_forward_pass(lite: Path) -> None:
    """transformers over prompt and output at once, against ours told in chunks, preempted, and from shared pages."""
    theirs = transformers.DeepseekV2ForCausalLM.from_pretrained(lite, dtype=torch.float32, attn_implementation="eager")
    plain = build(lite, "mla", 512)
    tight = build(lite, "mha", 30, kv_cache_memory_bytes=8 * 64 * 3 * 4 * 320 * 4, enable_prefix_caching=True)
    serve(tight, crowd())  # fills the prefix cache
    for engine in (plain, tight):
        asked = crowd(num_logprobs=3, num_prompt_logprobs=2)
        events = serve(engine, asked)
        for sequence in asked:
            with torch.inference_mode():
                logit_TV = theirs(torch.tensor([sequence.tokens])).logits[0]
            expected_TV = torch.log_softmax(logit_TV.double(), dim=-1)
            first, *rest = events[sequence.id]
            told = [*(first.prompt_logprobs or []), *(e.logprobs for e in events[sequence.id] if e.logprobs)]
            assert len(told) == len(sequence.tokens) - 1
            assert all(event.prompt_logprobs is None for event in rest)
            for position, (found, row_V) in enumerate(zip(told, expected_TV, strict=False)):
                num_top = 2 if position < len(sequence.prompt) - 1 else 3
                assert found.token == sequence.tokens[position + 1]
                assert found.logprob == pytest.approx(row_V[found.token].item(), abs=1e-3)
                assert len(found.top) == num_top
                top = [value for _, value in found.top]
                assert top == pytest.approx(row_V.topk(num_top).values.tolist(), abs=1e-3)
                assert found.rank >= 1 + (row_V > row_V[found.token] + 2e-3).sum()
                assert found.rank <= 1 + (row_V > row_V[found.token] - 2e-3).sum()
    assert tight.stats.total_preemptions > 0


def test_a_seeded_request_is_the_same_alone_and_in_company_with_penalties(lite: Path) -> None:
    settings = MIXED[2]

    def last() -> Sequence:
        return Sequence("x", prompt(40, seed=3), 30, settings, frozenset())

    alone = serve(build(lite, "mla", 512), [last()])["x"]
    company = serve(build(lite, "mla", 40), [*crowd(), last()])["x"]
    assert [event.token for event in company] == [event.token for event in alone]
    unpenalised = Sequence("x", prompt(40, seed=3), 30, replace(settings, frequency_penalty=0), frozenset())
    assert [e.token for e in serve(build(lite, "mla", 512), [unpenalised])["x"]] != [e.token for e in alone]


def test_a_prompt_preempted_while_it_is_told_is_told_once(lite: Path) -> None:
    """The first one's output takes the page that the second one's half-read prompt holds."""
    engine = build(lite, "mla", 20, kv_cache_memory_bytes=4 * PAGE_BYTES)
    first = Sequence("first", prompt(60, seed=1), 20, GREEDY, frozenset())
    second = Sequence("second", prompt(170, seed=2), 2, GREEDY, frozenset(), num_prompt_logprobs=0)
    told = serve(engine, [first, second])["second"][0].prompt_logprobs
    assert engine.stats.total_preemptions > 0
    assert [found.token for found in told or []] == second.prompt[1:]

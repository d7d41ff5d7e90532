"""A long prompt arrives among running streams: what it may delay them by, in steps and in the processor's time."""

import time
from pathlib import Path

import pytest
from engine_kit import GREEDY, YARN, build, make, prompt

from stackrace.backends.mla.engine import Engine, Step
from stackrace.backends.mla.sequence import Sequence

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("one_thread")]

LONG = 4096
STREAMS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("mixed"), {"rope_scaling": YARN, "num_hidden_layers": 2})


def arrive(path: Path, attention: str, budget: int) -> tuple[list[Step], list[float], list[set[str]]]:
    """The steps that hold a part of the prompt, the processor time of each (s), and the streams they gave a token."""
    engine: Engine = build(path, attention, budget, max_model_len=LONG + 64, kv_cache_memory_bytes=120_000_000)
    for index in range(STREAMS):
        engine.submit(Sequence(str(index), prompt(20, index), 200, GREEDY, frozenset()))
    for _ in range(3):
        engine.step()
    steps: list[Step] = []
    engine.observers.append(steps.append)
    engine.submit(Sequence("long", prompt(LONG, 9), 1, GREEDY, frozenset()))
    seconds, told = [], []
    while "long" not in (told[-1] if told else set()):
        start = time.thread_time()
        told.append({event.id for event in engine.step()})
        seconds.append(time.thread_time() - start)
        assert len(told) < 200
    return steps, seconds, told


@pytest.mark.parametrize(("attention", "most"), [("mha", 3), ("mla", 6)])
def test_no_stream_waits_for_more_than_the_budgets_share(path: Path, attention: str, most: float) -> None:
    budget = 256
    (whole,), (stall,), _ = arrive(path, attention, LONG + STREAMS)
    assert whole.num_tokens == LONG + STREAMS
    steps, seconds, told = arrive(path, attention, budget)
    streams = {str(index) for index in range(STREAMS)}
    assert all(streams <= ids for ids in told)  # every stream gets a token in every step,
    assert all(step.num_tokens <= budget for step in steps)  # which computes no more than the budget
    assert len(steps) == -(-LONG // (budget - STREAMS))
    share = (budget - STREAMS) / LONG
    longest = max(seconds)
    print(
        f"{attention}: {stall * 1e3:.0f} ms at once; at {budget} tokens a step {longest * 1e3:.0f} ms at most, "
        f"{longest / stall:.1%} for {share:.1%} of the prompt"
    )
    # the last chunk attends to twice the context of the average one; latents are expanded anew for each chunk
    assert longest <= most * share * stall

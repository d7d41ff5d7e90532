"""A checkpoint with its judge and its questions, our engine asked without a server, and faults to plant in it."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from engine_kit import GREEDY, published

from stackrace.backends import checkpoint
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla import runner
from stackrace.backends.mla.engine import Engine, TokenEvent
from stackrace.backends.mla.sequence import Sequence
from stackrace.harness.verify import judge
from stackrace.harness.verify.answers import Answers, Told
from stackrace.harness.verify.naming import Names
from stackrace.harness.verify.questions import Questions, draw
from stackrace.harness.verify.reference import Judged
from stackrace.harness.verify.settings import Settings, parse
from stackrace.harness.verify.verdict import Equivalence, compare

SHORT = yaml.safe_load((Path(checkpoint.__file__).parents[1] / "conf" / "verify" / "short.yaml").read_text())
SETTINGS = parse(SHORT | {"longest": 256, "prefixes": 14, "exact": [64, 65, 600], "greedy_tokens": 16})
CPU = torch.device("cpu")


class World(NamedTuple):
    """A checkpoint and what is right of it."""

    weights: checkpoint.Checkpoint
    questions: Questions
    judged: Judged


def world(folder: Path, changes: dict[str, Any], settings: Settings = SETTINGS) -> World:
    weights = checkpoint.make(published("tiny") | changes, folder / "model", 0, 1 << 30, "cpu")
    questions = draw(settings, Names(weights.path).usable(weights), 1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "NUDGES", 1)  # rounding is tried out in evidence/rounding.py
        return World(weights, questions, Judged(judge.answers(weights, questions, CPU)))


def answered(
    world: World, plant: Callable[[Engine], object], attention: str = "mla", dtype: str = "bfloat16"
) -> Answers:
    """What our engine says, all questions at once, with a fault planted in it."""
    settings = engines.Settings(world.weights.path, attention, dtype, "cpu", 8, 512, 1024, 100_000_000, False)
    engine = engines.build(settings, world.weights)
    plant(engine)
    asked = world.questions

    def sequence(name: str, prompt: tuple[int, ...], tokens: int) -> Sequence:
        return Sequence(name, list(prompt), tokens, GREEDY, frozenset(), num_logprobs=asked.logprobs)

    greedy = [sequence(f"g{i}", p, asked.greedy_tokens) for i, p in enumerate(asked.prompts)]
    prefixes = [sequence(f"p{i}", p, 1) for i, p in enumerate(asked.prefixes)]
    events: dict[str, list[TokenEvent]] = {s.id: [] for s in [*greedy, *prefixes]}
    for each in [*greedy, *prefixes]:
        engine.submit(each)
    while not engine.idle:
        for event in engine.step():
            events[event.id].append(event)
    steps = [[told(e) for e in events[s.id]] for s in greedy]
    return Answers([told(events[s.id][0]) for s in prefixes], [[e.token for e in events[s.id]] for s in greedy], steps)


def told(event: TokenEvent) -> Told:
    assert event.logprobs is not None
    return dict(event.logprobs.top)


def verdict(world: World, plant: Callable[[Engine], object], **how: str) -> Equivalence:
    found = compare(world.judged, answered(world, plant, **how), world.questions, SETTINGS)
    assert found.worst is not None
    print(f"{plant.__name__} {how}: {found.mean:.4f} {found.worst[0]} {found.decoding:.4f} {found.limits}")  # pytest -s
    return found


def nothing(engine: Engine) -> None:
    pass


def layers(engine: Engine) -> Any:
    return engine.runner._model.layers


def with_config(engine: Engine, change: Callable[[Any], Any]) -> None:
    for layer in layers(engine):
        layer.attention.config = change(layer.attention.config)


def without_mscale(engine: Engine) -> None:
    with_config(engine, lambda c: dataclasses.replace(c, softmax_scale=c.kv.qk_width**-0.5))


def half_split(engine: Engine) -> None:
    with_config(engine, lambda c: dataclasses.replace(c, rope=dataclasses.replace(c.rope, interleaved=False)))


def swapped_experts(engine: Engine) -> None:
    experts = layers(engine)[-1].mlp
    for weight in (experts.gate_up_proj, experts.down_proj):
        weight[[0, 1]] = weight[[1, 0]]


@contextmanager
def lost_page(monkeypatch: pytest.MonkeyPatch, *where: str) -> Iterator[Callable[[Engine], object]]:
    """The second page of a context is read from where the first one lies; with "once" all pages of one sequence."""
    table, slots = runner._table, runner._slots
    lost: dict[str, str] = {}

    def lost_table(sequences: Any) -> Any:
        return [[pages[0], pages[0], *pages[2:]] if len(pages) > 1 else pages for pages in table(sequences)]

    def lost_slots(sequence: Sequence, start: int, stop: int) -> torch.Tensor:
        found = slots(sequence, start, stop)
        is_context = start == 0 and stop > 64 and sequence.num_computed > 0
        if is_context and "once" in where:
            is_lost = len(sequence.prompt) > 512 and sequence.id == lost.setdefault("id", sequence.id)
            return found[:64].repeat(stop // 64 + 1)[:stop] if is_lost else found
        return torch.cat([found[:64], found[: stop - 64][:64], found[128:]]) if is_context else found

    with monkeypatch.context() as patch:
        if "decode" in where:
            patch.setattr(runner, "_table", lost_table)
        if "chunk" in where:
            patch.setattr(runner, "_slots", lost_slots)
        yield nothing

"""What the model says to a fixed set of prompts, computed without a server."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from stackrace.backends import checkpoint
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla import sequence as sequences
from stackrace.backends.mla.cache import PAGE

HORIZON = 16  # output tokens that are computed for each prompt
CHOICES = 3  # sampled choices of it
FIRST = 8  # ids below are special, or a role's in the chat template
ROLES = {"system": 4, "user": 5, "assistant": 6}
NOISE = 1e-5  # relative change of the weights under which a known token must stay: about 100 roundings
TRIALS = 5

Fields = dict[str, Any]

SETTINGS: dict[str, Fields] = {
    "greedy": {"temperature": 0},
    "punished": {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "nucleus": {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 11},
    "min_p": {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 500},
}


class Prompt(NamedTuple):
    """Token ids, and the conversation that the chat template turns into them."""

    ids: list[int]
    messages: list[dict[str, str]] | None = None


class Told(NamedTuple):
    """Output tokens and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


Key = tuple[int, str, int]  # prompt, setting, choice


@dataclass(frozen=True)
class Book:
    """Prompts, and what must be answered to them."""

    prompts: list[Prompt]
    told: dict[Key, Told]  # as far as rounding cannot change it
    likely: list[list[float]]  # log-probabilities of each prompt's tokens but the first
    tokenizer: Tokenizer
    vocab: int

    def known(self, prompt: int, setting: str, choice: int) -> Told:
        """What a choice of a request must say; greedy ones are all the same."""
        return self.told[prompt, setting, choice if "seed" in SETTINGS[setting] else 0]

    def text_after(self, prompt: Sequence[int], tokens: Sequence[int], skip_special: bool) -> str:
        """What the output tokens add to the prompt's text."""
        before: str = self.tokenizer.decode(list(prompt), skip_special_tokens=skip_special)
        whole: str = self.tokenizer.decode([*prompt, *tokens], skip_special_tokens=skip_special)
        assert whole.startswith(before)
        return whole[len(before) :]


def words(ids: Sequence[int]) -> str:
    """The text of ids that are not special."""
    return " ".join(f"t{token}" for token in ids)


def write_prompts(count: int, vocab: int) -> list[Prompt]:
    """Short ones, ones about to fill a page, shared beginnings, equal second pages after different first ones."""
    rng = random.Random(count)

    def ids(length: int) -> list[int]:
        return [rng.randrange(FIRST, vocab) for _ in range(length)]

    heads, middle, system = [ids(PAGE), ids(PAGE)], ids(PAGE), ids(PAGE + 6)
    found: list[Prompt] = []
    for number in range(count):
        match number % 8:
            case 0:
                found.append(Prompt(ids(rng.randint(1, 20))))
            case 1 | 2:
                found.append(Prompt(ids(rng.randint(PAGE - 10, PAGE))))
            case 3 | 4:
                found.append(Prompt(heads[number // 2 % 2] + middle + ids(rng.randint(1, 20))))
            case 5:
                found.append(Prompt(ids(rng.randint(150, 300))) if number % 16 == 5 else Prompt(ids(2 * PAGE - 5)))
            case 6:
                found.append(_chat([("user", ids(rng.randint(1, 20)))]))
            case _:
                found.append(_chat([("system", system), ("user", ids(5)), ("assistant", ids(9)), ("user", ids(7))]))
    return found


def _chat(turns: list[tuple[str, list[int]]]) -> Prompt:
    tokens = [1]
    for role, ids in turns:
        tokens += [ROLES[role], *ids, 2]
    return Prompt([*tokens, ROLES["assistant"]], [{"role": role, "content": words(ids)} for role, ids in turns])


def compute(path: Path, count: int) -> Book:
    """The book of `count` prompts, from an engine that batches otherwise and caches keys and values, not latents."""
    settings = engines.Settings(path, "mha", "float32", "cpu", 64, 1024, 1024, 1 << 27, False)
    engine = engines.build(settings, checkpoint.check(path))
    vocab = engine.runner._model.config.vocab_size
    prompts = write_prompts(count, vocab)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them wait for one another where cores are shared
    try:
        told, likely = _ask(engine, prompts)
        told = _firm(engine, prompts, told)
    finally:
        torch.set_num_threads(threads)
    return Book(prompts, told, likely, Tokenizer.from_file(str(path / "tokenizer.json")), vocab)


def _firm(engine: engines.Engine, prompts: Sequence[Prompt], told: dict[Key, Told]) -> dict[Key, Told]:
    """What slightly changed weights say as well: the rest might be changed by rounding."""
    weights = list(engine.runner._model.parameters())
    originals = [weight.clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRIALS):
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original * (1 + NOISE * torch.randn(original.shape, generator=generator)))
        others, _ = _ask(engine, prompts)
        told = {key: _common(said, others[key]) for key, said in told.items()}
    return told


def _common(first: Told, second: Told) -> Told:
    pairs = zip(first.tokens, second.tokens, strict=False)
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Told(first.tokens[:count], first.logprobs[:count])


def _ask(engine: engines.Engine, prompts: Sequence[Prompt]) -> tuple[dict[Key, Told], list[list[float]]]:
    keys: dict[str, Key] = {}
    for setting, fields in SETTINGS.items():
        for index, choice in product(range(len(prompts)), range(CHOICES if "seed" in fields else 1)):
            id = f"{setting} {index} {choice}"
            keys[id] = index, setting, choice
            sampling = sequences.Sampling(**fields | {"seed": fields.get("seed", 0) + choice})
            tell = 0 if setting == "greedy" else None
            engine.submit(sequences.Sequence(id, prompts[index].ids, HORIZON, sampling, frozenset(), 0, tell))
    told = {key: Told([], []) for key in keys.values()}
    likely: list[list[float]] = [[] for _ in prompts]
    while not engine.idle:
        for event in engine.step():
            key = keys[event.id]
            assert event.logprobs
            told[key].tokens.append(event.token)
            told[key].logprobs.append(event.logprobs.logprob)
            if event.prompt_logprobs is not None:
                likely[key[0]] = [item.logprob for item in event.prompt_logprobs]
    return told, likely

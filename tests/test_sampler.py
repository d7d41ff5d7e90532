"""Sampling against the exact distribution of each option, worked out term by term in plain Python."""

import math
import random
from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import accumulate
from statistics import NormalDist

import pytest
import torch

from stackrace.backends.mla.sampler import penalise, sample, token_logprobs
from stackrace.backends.mla.sequence import Sampling, Sequence

DRAWS = 100_000
LOGITS = [4 * math.sin(3.0 * index) + 0.1 * index for index in range(24)]
PROMPT, OUTPUT = [1, 5, 5, 9, 13], [5, 7, 7, 7, 13]
PLAIN = Sampling(seed=0)


def exact(settings: Sampling, prompt: Many[int] = (), output: Many[int] = ()) -> list[float]:
    """The distribution that the options mean, in vLLM's order: penalties, temperature, min-p, top-k, top-p."""
    logits = list(LOGITS)
    for token in {*prompt, *output}:
        factor = settings.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token, count in Counter(output).items():
        logits[token] -= settings.frequency_penalty * count + settings.presence_penalty
    weights = [math.exp(logit / settings.temperature) for logit in logits]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    order = [token for token in order if weights[token] >= settings.min_p * max(weights)]
    order = order[: settings.top_k or None]
    total = sum(weights[token] for token in order)
    before = accumulate((weights[token] / total for token in order), initial=0.0)
    kept = [token for token, mass in zip(order, before, strict=False) if mass < settings.top_p]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


def counts(settings: Sampling, draws: list[float], prompt: Many[int] = (), output: Many[int] = ()) -> list[int]:
    row_V = torch.tensor(LOGITS)
    if settings.penalises:
        row_V = penalise(row_V, settings, prompt, output)
    found = Counter(sample(row_V.expand(len(draws), -1), [settings] * len(draws), draws))
    return [found[token] for token in range(len(LOGITS))]


def is_distributed(found: list[int], expected: list[float]) -> bool:
    """χ² test at one in a million; tokens expected fewer than 5 times are taken together, impossible ones forbidden."""
    if any(count and not chance for count, chance in zip(found, expected, strict=True)):
        return False
    total = sum(found)
    cells = [(count, total * chance) for count, chance in zip(found, expected, strict=True) if chance]
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    if rare:
        cells.append((sum(count for count, _ in rare), sum(mean for _, mean in rare)))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    if freedom == 0:
        return found == [round(total * chance) for chance in expected]
    z = NormalDist().inv_cdf(1 - 1e-6)  # Wilson and Hilferty's approximation of the quantile
    return statistic < freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


CASES = {
    "plain": PLAIN,
    "cold": replace(PLAIN, temperature=0.6),
    "hot": replace(PLAIN, temperature=2.5),
    "top-k": replace(PLAIN, top_k=5),
    "top-k 1": replace(PLAIN, top_k=1),
    "top-p": replace(PLAIN, top_p=0.8),
    "top-p small": replace(PLAIN, top_p=1e-9),
    "min-p": replace(PLAIN, min_p=0.07),
    "min-p and top-p": replace(PLAIN, temperature=1.7, min_p=0.05, top_p=0.9),
    "all cuts": replace(PLAIN, temperature=1.3, top_k=9, top_p=0.85, min_p=0.02),
    "repetition": replace(PLAIN, repetition_penalty=1.7),
    "presence": replace(PLAIN, presence_penalty=1.5),
    "frequency": replace(PLAIN, frequency_penalty=0.8),
    "rewards": replace(PLAIN, repetition_penalty=0.8, presence_penalty=-1.0, frequency_penalty=-0.5),
    "everything": Sampling(0, 1.4, 12, 0.95, 0.01, 1.2, 0.4, 0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_every_option_draws_from_its_exact_distribution(name: str) -> None:
    settings = CASES[name]
    rng = random.Random(name)
    found = counts(settings, [rng.random() for _ in range(DRAWS)], PROMPT, OUTPUT)
    expected = exact(settings, PROMPT, OUTPUT)
    assert is_distributed(found, expected)
    others = [other for other in CASES.values() if exact(other, PROMPT, OUTPUT) != expected]
    assert not any(is_distributed(found, exact(other, PROMPT, OUTPUT)) for other in others)


def test_one_draw_of_each_of_many_seeds_is_as_good_as_many_of_one() -> None:
    draws = [random.Random(seed).random() for seed in range(DRAWS)]
    assert is_distributed(counts(PLAIN, draws), exact(PLAIN))


def test_the_test_sees_a_small_fault() -> None:
    rng = random.Random(0)
    found = counts(replace(PLAIN, temperature=1.03), [rng.random() for _ in range(DRAWS)])
    assert not is_distributed(found, exact(PLAIN))


def test_penalties_decide_greedily_too() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    greedy = Sampling(seed=0, temperature=0)
    for changes, expected in (
        ({}, 0),
        ({"repetition_penalty": 1.1}, 1),
        ({"presence_penalty": 0.05}, 0),
        ({"presence_penalty": 0.2}, 1),
        ({"frequency_penalty": 0.04}, 0),
        ({"frequency_penalty": 0.06}, 1),  # said twice
    ):
        settings = replace(greedy, **changes)
        assert sample(penalise(logits, settings, [2], [0, 0]).unsqueeze(0), [settings], [0.0]) == [expected]


def test_a_prompt_is_penalised_for_repetition_alone() -> None:
    settings = Sampling(seed=0, repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0)
    found = penalise(torch.tensor([4.0, -4.0, 4.0, 4.0]), settings, [0, 0, 1], [2, 2])
    assert found.tolist() == [2.0, -8.0, 4.0 / 2 - 2 - 1, 4.0]


def test_each_row_is_sampled_by_its_own_settings() -> None:
    greedy, hot = Sampling(seed=0, temperature=0), Sampling(seed=0)
    logits = torch.tensor([[0.0, 1.0, 0.0]]).expand(3, -1)
    assert sample(logits, [hot, greedy, hot], [0.999999, 0.0, 0.0]) == [2, 1, 1]


def test_extreme_settings_give_tokens() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, float("-inf")]])
    for settings in (replace(PLAIN, temperature=1e-300), replace(PLAIN, temperature=1e30), replace(PLAIN, min_p=1.0)):
        for draw in (0.0, 1 - 2**-53):
            (token,) = sample(logits, [settings], [draw])
            assert token in ((0, 1, 2) if settings.temperature > 1 else (0,))


def test_logprobs_are_those_of_a_softmax() -> None:
    row = torch.tensor(LOGITS)
    total = math.log(sum(map(math.exp, LOGITS)))
    order = sorted(range(len(LOGITS)), key=lambda token: -LOGITS[token])
    for told in token_logprobs(row.expand(24, -1), list(range(24)), 3):
        assert told.logprob == pytest.approx(LOGITS[told.token] - total, abs=1e-5)
        assert told.rank == order.index(told.token) + 1
        assert [token for token, _ in told.top] == order[:3]
        assert [value for _, value in told.top] == pytest.approx([LOGITS[t] - total for t in order[:3]], abs=1e-5)
    assert token_logprobs(row.unsqueeze(0), [3], 0)[0].top == []


def test_every_seed_draws_its_own_numbers() -> None:
    seeds = [-(2**63), -2, -1, 0, 1, 2, 2**63 - 1]
    draws = {Sequence("x", [1], 1, Sampling(seed=seed), frozenset()).rng.random() for seed in seeds}
    assert len(draws) == len(seeds)


def test_no_more_tokens_are_told_than_there_are() -> None:
    (told,) = token_logprobs(torch.tensor([[0.0, 1.0, 2.0]]), [0], 20)
    assert [token for token, _ in told.top] == [2, 1, 0]

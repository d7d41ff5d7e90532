"""The judge: our engine's model in float32, one sequence at a time: python -m stackrace.harness.verify.judge ASKED.

Its cache holds every head's keys and values, and prompts are read whole: neither absorbed decoding nor chunks nor other
sequences' pages stand between it and the textbook. tests/test_verify.py holds it to transformers.
"""

import gc
import itertools
import json
import os
import sys
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from stackrace.backends import checkpoint as checkpoints
from stackrace.backends.checkpoint import Checkpoint
from stackrace.backends.mla import cache, weights
from stackrace.backends.mla.config import Grouped, parse
from stackrace.backends.mla.model import Model
from stackrace.backends.mla.runner import Runner
from stackrace.backends.mla.scheduler import Work
from stackrace.backends.mla.sequence import Sampling, Sequence
from stackrace.harness.errors import UsageError
from stackrace.harness.verify.questions import Questions, Tokens

Array = npt.NDArray[Any]

TOPS = 64  # tokens kept of each greedy step
NUDGES, SHORT = 4, 256  # further ways to round that are tried, after prefixes of so many tokens at most
_GREEDY = Sampling(seed=0, temperature=0.0)
_ROOM = 1.1  # times the weights: activations, and the keys and values of one sequence


class Judge:
    """The model in one type on `device`, ready to be asked about `questions`."""

    def __init__(self, checkpoint: Checkpoint, questions: Questions, device: torch.device, dtype: torch.dtype) -> None:
        """Weights are converted one tensor at a time. UsageError: a model that is not supported, or too large."""
        config = parse(checkpoint.config)
        _check_room(checkpoint, device, dtype)
        kind = "gqa" if isinstance(config.kv, Grouped) else "mha"
        model = Model(config, kind, questions.longest, dtype, device)
        weights.load(checkpoint, model.destinations())
        self._questions, self._model, self._embed = questions, model, model.embed
        self._pages = cache.num_pages_for(max(map(len, questions.prompts)) + questions.greedy_tokens)  # of one prompt
        together = self._pages * len(questions.prompts)
        caches = cache.allocate(config, kind, max(together, cache.num_pages_for(questions.longest)), dtype, device)
        self._runner = Runner(model, caches, device)

    def after(self, prefixes: Many[Tokens]) -> Array:
        """Log-probabilities of whatever follows each prefix, [prefixes, vocabulary]."""
        asked = (self._sequence(prefix, range(cache.num_pages_for(len(prefix)))) for prefix in prefixes)
        return np.stack([self._next([sequence])[0].cpu().numpy() for sequence in asked])

    def nudge(self, seed: int) -> None:
        """What tokens are looked up as, each number one bfloat16 up or down: all that follows is rounded otherwise."""
        up = torch.randint(2, self._embed.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
        moved = self._embed * (1 + (2 * up - 1).to(self._embed.device) * 2**-8)
        self._model.embed = torch.nn.Parameter(moved.to(self._embed.dtype), requires_grad=False)

    def outputs(self) -> dict[str, Array]:
        """Of each prompt and greedy step the token in `outputs`, and the likeliest in `tops` and `likely`."""
        pages = (range(first, first + self._pages) for first in itertools.count(0, self._pages))
        sequences = list(map(self._sequence, self._questions.prompts, pages))
        first = torch.cat([self._next([sequence]) for sequence in sequences])
        tops, likely = zip(*self._decode(sequences, first), strict=True)
        outputs = np.array([s.tokens[len(s.prompt) :] for s in sequences])
        return {"outputs": outputs, "tops": np.stack(tops, axis=1), "likely": np.stack(likely, axis=1)}

    def _sequence(self, prompt: Many[int], pages: range) -> Sequence:
        sequence = Sequence(str(pages.start), prompt, self._questions.greedy_tokens, _GREEDY, frozenset())
        sequence.pages = list(pages)
        return sequence

    def _next(self, sequences: Many[Sequence]) -> Tensor:
        """Log-probabilities of what follows each; several only where each has one token to compute."""
        work = [Work(sequence, sequence.num_uncomputed) for sequence in sequences]
        logits = self._runner.logits(work)
        for sequence, count in work:
            sequence.num_computed += count
        return torch.log_softmax(logits, dim=-1)

    def _decode(self, sequences: Many[Sequence], following: Tensor) -> list[tuple[Array, Array]]:
        """Step by step what was likeliest, [prompts, TOPS] each."""
        steps = []
        for step in range(self._questions.greedy_tokens):
            following = self._next(sequences) if step else following
            likely, tops = torch.topk(following, min(TOPS, following.shape[-1]), dim=-1)
            steps.append((tops.cpu().numpy(), likely.cpu().numpy()))
            for sequence, token in zip(sequences, tops[:, 0].tolist(), strict=True):
                sequence.tokens.append(token)
        return steps


def _check_room(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("verify.device=cuda: torch sees no GPU here; give verify.device=cpu")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    needed = _ROOM * dtype.itemsize * checkpoint.num_parameters
    if needed > free:
        raise UsageError(
            f"{checkpoint.path.name} takes {needed / 1e9:.1f} GB in float32, {device} has {free / 1e9:.1f} GB free: "
            "give another verify.device"
        )


def answers(checkpoint: Checkpoint, questions: Questions, device: torch.device) -> dict[str, Array]:
    """`after` and `outputs` in float32, and |what bfloat16 changes|.

    That is `noise` [prefixes, its likeliest tokens], and `roundings`, the means over those tokens, after short prefixes
    also with embeddings nudged: what rounding may do, an expert chosen otherwise included.
    """
    prefixes = questions.prefixes
    exact = Judge(checkpoint, questions, device, torch.float32)
    right = {"after": exact.after(prefixes), **exact.outputs()}
    del exact  # and its memory given back, before the next one asks what is free
    gc.collect()
    torch.cuda.empty_cache()
    rounded = Judge(checkpoint, questions, device, torch.bfloat16)
    noise = changed(rounded.after(prefixes), right["after"], questions)
    roundings, short = [noise], [i for i, prefix in enumerate(prefixes) if len(prefix) <= SHORT]
    for seed in range(NUDGES if short else 0):
        rounded.nudge(seed)
        roundings.append(changed(rounded.after([prefixes[i] for i in short]), right["after"][short], questions))
    return {**right, "noise": noise, "roundings": np.concatenate(roundings).mean(axis=-1)}


def changed(rounded: Array, right: Array, questions: Questions) -> Array:
    """Of the tokens that are likeliest after rounding, [prefixes, logprobs]."""
    named = np.argsort(-rounded, axis=-1)[:, : questions.logprobs]
    difference: Array = np.abs(np.take_along_axis(rounded, named, -1) - np.take_along_axis(right, named, -1))
    return difference


def save(path: Path, arrays: dict[str, Array]) -> None:
    """All of it or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
    partial.replace(path)


def main(argv: list[str]) -> int:
    """Answer what the file named says and keep it where it says; 1, with a last line that says why, if that fails."""
    asked = json.loads(Path(argv[0]).read_bytes())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("highest")
    try:
        checkpoint = checkpoints.check(Path(asked["checkpoint"]))
        save(Path(asked["out"]), answers(checkpoint, Questions(**asked["questions"]), torch.device(asked["device"])))
    except (UsageError, torch.OutOfMemoryError) as e:
        print(" ".join(str(e).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

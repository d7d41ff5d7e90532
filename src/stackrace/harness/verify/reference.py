"""What answers are held against: the judge's, computed once and kept, or those of another stack."""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stackrace.backends import guardian
from stackrace.backends.base import source_hash
from stackrace.backends.checkpoint import Checkpoint
from stackrace.harness.errors import StackraceError
from stackrace.harness.verify.answers import Answers, Told
from stackrace.harness.verify.questions import Questions

Floats = npt.NDArray[np.float64]
_SOURCE = Path(__file__).parents[2]
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


class NoJudge(StackraceError):
    """The judge could not compute what answers are held against; one line."""


class Reference(ABC):
    """The right answers, or what is taken for them."""

    by: str  # whose they are
    noise: Floats | None = None  # |difference| that rounding to bfloat16 makes, [prefixes, likeliest tokens]
    roundings: Floats | None = None  # means of the same after prefixes, in several ways to round

    @abstractmethod
    def after(self, prefix: int, tokens: Sequence[int]) -> Floats:
        """Log-probabilities of these tokens after this prefix."""

    @abstractmethod
    def output(self, prompt: int) -> list[int]:
        """The greedy continuation."""

    @abstractmethod
    def at_step(self, prompt: int, step: int, tokens: Sequence[int]) -> Floats:
        """Log-probabilities of these tokens at a step of it, those not known being as likely as the least known."""

    def behind(self, prompt: int, step: int, token: int) -> float:
        """How far this token is behind the one that was taken, in log-probability."""
        best, other = self.at_step(prompt, step, [self.output(prompt)[step], token])
        return float(best - other)


class Judged(Reference):
    """The judge's: whole distributions after prefixes, the likeliest tokens at greedy steps."""

    by = "the judge"

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Arrays as `judge.answers` gives them."""
        self._after, self._outputs, self._tops, self._likely = (
            arrays[name] for name in ("after", "outputs", "tops", "likely")
        )
        self.noise, self.roundings = arrays["noise"].astype(float), arrays["roundings"].astype(float)

    def after(self, prefix: int, tokens: Sequence[int]) -> Floats:
        """Of any token of the vocabulary."""
        return self._after[prefix, list(tokens)].astype(float)

    def output(self, prompt: int) -> list[int]:
        """In float32."""
        return list(map(int, self._outputs[prompt]))

    def at_step(self, prompt: int, step: int, tokens: Sequence[int]) -> Floats:
        """Known are `judge.TOPS` tokens."""
        known = dict(zip(self._tops[prompt, step].tolist(), self._likely[prompt, step].tolist(), strict=True))
        return _or_least(known, tokens)


class Peer(Reference):
    """Another stack's, where no judge is to be had: known are only the tokens that it named."""

    def __init__(self, name: str, answers: Answers) -> None:
        self.by = name
        self._answers = answers

    def after(self, prefix: int, tokens: Sequence[int]) -> Floats:
        """A token that it did not name is taken to be as likely as the least that it named."""
        return _or_least(self._answers.prefixes[prefix], tokens)

    def output(self, prompt: int) -> list[int]:
        """As it said."""
        return self._answers.outputs[prompt]

    def at_step(self, prompt: int, step: int, tokens: Sequence[int]) -> Floats:
        """The same of a step."""
        return _or_least(self._answers.steps[prompt][step], tokens)


def _or_least(known: Told, tokens: Sequence[int]) -> Floats:
    least = min(known.values())
    return np.array([known.get(token, least) for token in tokens])


def place(folder: Path, checkpoint: Checkpoint, questions: Questions) -> Path:
    """Where the judge's answers are kept: by weights, questions, and what computes them."""
    sources = source_hash(_SOURCE / "backends" / "mla", _SOURCE / "kernels", Path(__file__).with_name("judge.py"))
    return folder / f"{checkpoint.identity}-{questions.hash}-{sources}.npz"


def obtain(
    path: Path, checkpoint: Checkpoint, questions: Questions, device: str, cores: Sequence[int], timeout: float
) -> Judged:
    """The judge's answers, from `path` (`place`) if they are there, else computed in a process of its own on `cores`.

    Raises NoJudge, with one line that says why.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _compute(path, checkpoint, questions, device, cores, timeout)
    try:
        with np.load(path) as arrays:
            return Judged({name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise NoJudge(f"{path} cannot be read ({e}): delete it") from None


def _compute(
    path: Path, checkpoint: Checkpoint, questions: Questions, device: str, cores: Sequence[int], timeout: float
) -> None:
    with tempfile.TemporaryDirectory(prefix="judge-") as folder, Path(folder, "log").open("w+b") as log:
        asked = {"checkpoint": str(checkpoint.path.resolve()), "device": device, "out": str(path.resolve())}
        Path(folder, "asked.json").write_text(json.dumps({**asked, "questions": questions.as_dict()}))
        command = [sys.executable, "-m", "stackrace.harness.verify.judge", str(Path(folder, "asked.json"))]
        process = subprocess.Popen(
            guardian.words(_GRACE, cores, command),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise NoJudge(f"the judge did not finish within verify.timeout={timeout:g} s") from None
        finally:
            _end(process)
        if code != 0:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise NoJudge(f"the judge cannot: {lines[-1] if lines else f'exit code {code}'}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The guardian ends the judge when the pipe closes."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()

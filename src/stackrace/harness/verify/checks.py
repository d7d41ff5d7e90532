"""Checks of equivalence, one a launch: the judge answers first, while no engine holds the memory, then the stack."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from stackrace.backends import checkpoint as checkpoints
from stackrace.backends.base import Backend
from stackrace.backends.running import Engine
from stackrace.harness.verify.answers import Answers, BadAnswer, NoAnswer, ask
from stackrace.harness.verify.naming import Names
from stackrace.harness.verify.questions import Questions, draw
from stackrace.harness.verify.reference import Judged, NoJudge, obtain, place
from stackrace.harness.verify.settings import Settings, parse
from stackrace.harness.verify.verdict import Equivalence, compare, failed, not_judged

FOLDER = "references"  # below the results
NOTHING_LOADED = "no checkpoint is known, so there is nothing to hold it to"


class Exam(NamedTuple):
    """What one stack is asked, and where the right answers are."""

    settings: Settings
    checkpoint: checkpoints.Checkpoint
    questions: Questions
    names: Names
    reference: Path


def prepare(backend: Backend, config: Mapping[str, Any]) -> Exam | None:
    """The exam for a stack; None for one that loads no checkpoint."""
    if backend.checkpoint is None:
        return None
    settings, checkpoint = parse(config["verify"]), checkpoints.check(Path(backend.checkpoint))
    names = Names(checkpoint.path)
    questions = draw(settings, names.usable(checkpoint), backend.max_model_len)
    path = place(Path(config["results"], FOLDER), checkpoint, questions)
    return Exam(settings, checkpoint, questions, names, path)


class Checks:
    """The judge's answers as far as they were needed, and the verdicts on launches."""

    def __init__(self) -> None:
        self._exams: dict[str, Exam | None] = {}
        self._judged: dict[Path, Judged | NoJudge] = {}
        self._verdicts: WeakKeyDictionary[Engine, dict[Path, Equivalence]] = WeakKeyDictionary()

    def exam(self, backend: Backend, config: Mapping[str, Any]) -> Exam | None:
        """Like `prepare`, which reads checkpoint and tokenizer, once for all points that ask for the same."""
        key = json.dumps([backend.checkpoint, backend.max_model_len, config["results"], config["verify"]])
        if key not in self._exams:
            self._exams[key] = prepare(backend, config)
        return self._exams[key]

    def judge(self, exam: Exam, cores: Sequence[int], make_room: Callable[[], object]) -> Judged | NoJudge:
        """The right answers, or why there are none; `make_room` is called before they are computed."""
        if exam.reference not in self._judged:
            if not exam.reference.exists():
                make_room()
            self._judged[exam.reference] = _obtained(exam, cores)
        return self._judged[exam.reference]

    def verdict(self, exam: Exam | None, engine: Engine) -> Equivalence:
        """That on a running engine, asked once; `judge` came before."""
        if exam is None:
            return not_judged(NOTHING_LOADED)
        judged = self._judged[exam.reference]
        if isinstance(judged, NoJudge):
            return not_judged(str(judged))
        known = self._verdicts.setdefault(engine, {})
        if exam.reference not in known:
            answers = answered(exam, engine)
            known[exam.reference] = answers if isinstance(answers, Equivalence) else _compared(exam, judged, answers)
        return known[exam.reference]


def answered(exam: Exam, engine: Engine) -> Answers | Equivalence:
    """Its answers, or that it cannot be judged for want of them. Raises EngineDied if it did."""
    try:
        return ask(engine.endpoint, exam.questions, exam.settings, exam.names)
    except NoAnswer as e:
        engine.check_alive()
        return failed(str(e)) if isinstance(e, BadAnswer) else not_judged(str(e))


def _compared(exam: Exam, judged: Judged, answers: Answers) -> Equivalence:
    return compare(judged, answers, exam.questions, exam.settings)


def _obtained(exam: Exam, cores: Sequence[int]) -> Judged | NoJudge:
    settings = exam.settings
    try:
        return obtain(exam.reference, exam.checkpoint, exam.questions, settings.device, cores, settings.timeout)
    except NoJudge as e:
        return e
    except OSError as e:
        return NoJudge(f"the judge cannot: {e}")

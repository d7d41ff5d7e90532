"""`stackrace verify`: launches stacks one after the other and holds their answers against what is right."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from stackrace.backends.base import Backend
from stackrace.backends.running import Engine
from stackrace.harness import host
from stackrace.harness.composing import composed
from stackrace.harness.errors import EngineError, UsageError
from stackrace.harness.point import build_backend
from stackrace.harness.store import write_atomically
from stackrace.harness.verify import table
from stackrace.harness.verify.answers import Answers
from stackrace.harness.verify.checks import NOTHING_LOADED, Checks, Exam, answered, prepare
from stackrace.harness.verify.reference import NoJudge, Peer, Reference
from stackrace.harness.verify.verdict import EQUAL, Equivalence, compare, not_judged

_GIVEN = {"verify": "full", "sweep": "verify"}  # what a user need not say


class Stack(NamedTuple):
    """One of those that are to be compared."""

    backend: Backend
    cores: host.Cores
    exam: Exam | None
    folder: Path  # of the results


def verify(overrides: Sequence[str]) -> int:
    """Check each stack of `backend=a,b`; returns 0 if all are equal, else 1, and 130 if interrupted.

    Writes results/<sweep>/equivalence.json. UsageError for whatever could not be launched, before anything is.
    """
    stacks = [_stack(config) for config in configs(overrides)]
    notes, console = Console(stderr=True), Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    examiner = _Examiner(notes)
    found: dict[str, Equivalence] = {}
    try:
        for stack in stacks:
            found[stack.backend.name] = examiner.examine(stack)
    except KeyboardInterrupt:
        notes.print("interrupted")
        return 130
    finally:
        _write(stacks[0].folder, found)
    console.print(table.of(found))
    console.print(f"numbers: {stacks[0].folder / 'equivalence.json'}", highlight=False, soft_wrap=True)
    return 0 if all(e.verdict == EQUAL for e in found.values()) else 1


def configs(overrides: Sequence[str]) -> list[DictConfig]:
    """One composed configuration a stack. UsageError for what does not compose, or names a stack twice."""
    asked = [o for o in overrides if o.startswith("backend=")]
    others = [o for o in overrides if o not in asked]
    named = {o.split("=")[0] for o in others}
    others += [f"{name}={value}" for name, value in _GIVEN.items() if name not in named]
    stacks = asked[-1].removeprefix("backend=").split(",") if asked else ["mla", "mla_mha"]
    found = [composed("bench", [*others, f"backend={stack}"]) for stack in stacks]
    if len({cfg.backend.name for cfg in found}) < len(found):
        raise UsageError(f"backend={','.join(stacks)}: two of them have one name; name each once")
    return found


def _stack(cfg: DictConfig) -> Stack:
    if cfg.get("verify") is None:
        raise UsageError("verify=none: nothing would be asked; give verify=short or verify=full")
    backend, cores = build_backend(cfg)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return Stack(backend, cores, prepare(backend, config), Path(cfg.results, cfg.sweep))


class _Examiner:
    """Stacks one by one; where no judge is to be had, each is held to the first one of the same weights."""

    def __init__(self, notes: Console) -> None:
        self._notes = notes
        self._checks = Checks()
        self._peers: dict[Path, Peer] = {}

    def examine(self, stack: Stack) -> Equivalence:
        if stack.exam is None:
            return not_judged(NOTHING_LOADED)
        self._say(
            f"{stack.backend.name}: {stack.exam.checkpoint.path.name}, {len(stack.exam.questions.prefixes)} prefixes"
        )
        judged = self._checks.judge(stack.exam, stack.cores.engine, lambda: self._say("computing what is right"))
        if isinstance(judged, NoJudge):
            self._say(f"no judge, so stacks are compared with each other: {judged}")
        try:
            engine = stack.backend.start(_launched(stack), stack.cores.engine)
        except EngineError as e:
            return not_judged(str(e).splitlines()[0])
        try:
            return self._compared(stack.exam, engine)
        except EngineError as e:
            return not_judged(str(e).splitlines()[0])
        finally:
            engine.stop()

    def _compared(self, exam: Exam, engine: Engine) -> Equivalence:
        judged = self._checks.judge(exam, (), lambda: None)
        if not isinstance(judged, NoJudge):
            return self._checks.verdict(exam, engine)
        answers = answered(exam, engine)
        return answers if isinstance(answers, Equivalence) else self._held_to_a_peer(exam, engine.name, answers)

    def _held_to_a_peer(self, exam: Exam, name: str, answers: Answers) -> Equivalence:
        peer: Reference | None = self._peers.get(exam.reference)
        if peer is not None:
            return compare(peer, answers, exam.questions, exam.settings)
        self._peers[exam.reference] = Peer(name, answers)
        return not_judged("no judge; the others are held to it")

    def _say(self, line: str) -> None:
        self._notes.print(line, markup=False, highlight=False, soft_wrap=True)


def _launched(stack: Stack) -> Path:
    return stack.folder / "engines" / f"{stack.backend.name}-{stack.backend.fingerprint()}"


def _write(folder: Path, found: dict[str, Equivalence]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: equivalence.as_dict() for name, equivalence in found.items()}
    write_atomically(folder / "equivalence.json", orjson.dumps(told, option=orjson.OPT_INDENT_2))

"""What was run, and on what: every distinct fact once, with the number of runs it holds for."""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
import yaml

from stackrace.harness.report.asked import flat, plain
from stackrace.harness.report.points import Point
from stackrace.harness.store import StoredRun

Run = tuple[Point, StoredRun]


class Fact(NamedTuple):
    """Something that was so in `runs` of the runs."""

    text: str
    runs: int


class Group(NamedTuple):
    """Facts under one heading, and the gist of them."""

    title: str
    gist: str
    facts: list[Fact]


def what_was_run(runs: Sequence[Run]) -> list[Group]:
    """Stacks, checkpoints, machines, software, schedules and configuration; groups without facts left out."""
    stacks = _by_stack(runs).items()
    held = [run.meta.get("provenance") or {} for _, run in runs]
    machines = sorted({point.setting.machine for point, _ in runs})
    groups = [
        *(Group(f"Stack: {stack}", _versions(own), _backends(own)) for stack, own in stacks),
        Group("Checkpoint", _either(p.get("checkpoint") for p in held), _distinct(held, "checkpoint")),
        Group("Machine", "; ".join(machines), _distinct(held, "gpus", "cpu", "memory_bytes", "platform", "cores")),
        Group("Software", _code(held), _distinct(held, "stackrace", "git", "python", "packages")),
        Group("Equivalence", *_equivalence(runs)),
        Group("Schedules", *_schedules(runs)),
        Group("Configuration", *_configuration(runs)),
    ]
    return [group for group in groups if group.facts]


def _by_stack(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: r[0].stack):
        groups[run[0].stack].append(run)
    return dict(groups)


def _backends(runs: Sequence[Run]) -> list[Fact]:
    return _counted([_backend(run.meta.get("backend") or {}, run.config or {}) for _, run in runs])


def _backend(launched: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    command = launched.get("command")
    facts = {name: launched[name] for name in ("version", "fingerprint", "environment") if launched.get(name)}
    facts |= flat(config.get("backend") or {}, "backend.")
    return "\n".join(part for part in (shlex.join(map(str, command)) if command else "", _text(facts)) if part)


def _versions(runs: Sequence[Run]) -> str:
    return _either((run.meta.get("backend") or {}).get("version") for _, run in runs)


def _code(provenances: Sequence[Mapping[str, Any]]) -> str:
    commits = [p["git"] for p in provenances if p.get("git")]
    return _either(f"commit {str(c.get('commit'))[:7]}{' with changes' if c.get('dirty') else ''}" for c in commits)


def _either(values: Iterable[Any]) -> str:
    return " or ".join(dict.fromkeys(plain(v) for v in values if v is not None))


def _distinct(provenances: Sequence[Mapping[str, Any]], *names: str) -> list[Fact]:
    return _counted([_text({n: p[n] for n in names if p.get(n) is not None}) for p in provenances])


def _counted(texts: Sequence[str]) -> list[Fact]:
    return [Fact(text, texts.count(text)) for text in dict.fromkeys(texts) if text]


def _schedules(runs: Sequence[Run]) -> tuple[str, list[Fact]]:
    """Each schedule, and the stacks that it was replayed to."""
    lines: dict[str, list[str]] = defaultdict(list)
    for point, run in runs:
        schedule = run.meta.get("schedule") or {}
        if schedule.get("hash"):
            seed = (run.config or {}).get("seed")
            line = f"{str(schedule['hash'])[:12]}  {schedule.get('requests', '?')} requests, seed {seed}"
            lines[line].append(point.stack)
    text = "\n".join(f"{line}: {', '.join(dict.fromkeys(stacks))}" for line, stacks in lines.items())
    return f"{len(lines):,} replayed", [Fact(text, len(runs))] if lines else []


def _equivalence(runs: Sequence[Run]) -> tuple[str, list[Fact]]:
    """What each stack's answers were found to be, launch by launch; nothing where nobody asked."""
    found = [(point, run.meta["equivalence"]) for point, run in runs if run.meta.get("equivalence")]
    verdicts = dict.fromkeys(f"{point.stack}: {held['verdict']}" for point, held in found)
    return ", ".join(verdicts), _counted([f"{point.stack}: {held['words']}" for point, held in found])


def _configuration(runs: Sequence[Run]) -> tuple[str, list[Fact]]:
    """The resolved configuration besides the stacks', values that the runs do not share listed as alternatives."""
    every = [_without_backend(run) for _, run in runs]
    keys = dict.fromkeys(key for one in every for key in one)
    values = {key: list({plain(one.get(key)): one.get(key) for one in every}.values()) for key in keys}
    swept = [key for key, held in values.items() if len(held) > 1]
    text = _text({key: {"swept": held} if key in swept else held[0] for key, held in values.items()})
    return f"swept: {', '.join(swept)}" if swept else "", [Fact(text, len(runs))] if text else []


def _without_backend(run: StoredRun) -> dict[str, Any]:
    return flat({key: value for key, value in (run.config or {}).items() if key != "backend"})


def _text(value: Mapping[str, Any]) -> str:
    if not value:
        return ""
    known = orjson.loads(orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS))
    return yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None).strip()

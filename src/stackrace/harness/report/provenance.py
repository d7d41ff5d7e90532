"""What was run, and on what: every distinct fact once, with the number of runs it holds for."""

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson
import yaml

from stackrace.harness.report.points import Point
from stackrace.harness.store import StoredRun

Run = tuple[Point, StoredRun]


class Fact(NamedTuple):
    """Something that was so in `runs` of the runs."""

    text: str
    runs: int


class Group(NamedTuple):
    """Facts under one heading."""

    title: str
    facts: list[Fact]


def what_was_run(runs: Sequence[Run]) -> list[Group]:
    """Stacks, their configuration, checkpoints, machines, software and schedules; groups without facts left out."""
    groups = [Group(f"Stack: {stack}", _stack(held)) for stack, held in _by_stack(runs).items()]
    groups += [
        Group("Checkpoint", _distinct(runs, "checkpoint")),
        Group("Machine", _distinct(runs, "gpus", "cpu", "memory_bytes", "platform", "cores")),
        Group("Software", _distinct(runs, "stackrace", "git", "python", "packages")),
        Group("Schedules", [Fact(_schedules(runs), len(runs))] if _schedules(runs) else []),
    ]
    groups += [
        Group(f"Configuration: {stack}", [Fact(_config(held), len(held))]) for stack, held in _by_stack(runs).items()
    ]
    return [group for group in groups if group.facts]


def _by_stack(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: r[0].stack):
        groups[run[0].stack].append(run)
    return dict(groups)


def _stack(runs: Sequence[Run]) -> list[Fact]:
    return _counted([_backend(run.meta.get("backend") or {}) for _, run in runs])


def _backend(backend: Mapping[str, Any]) -> str:
    command = backend.get("command")
    facts = {name: backend[name] for name in ("version", "fingerprint", "environment") if backend.get(name)}
    return "\n".join(part for part in (shlex.join(map(str, command)) if command else "", _text(facts)) if part)


def _distinct(runs: Sequence[Run], *names: str) -> list[Fact]:
    provenances = [run.meta.get("provenance") or {} for _, run in runs]
    return _counted([_text({n: p[n] for n in names if p.get(n) is not None}) for p in provenances])


def _counted(texts: Sequence[str]) -> list[Fact]:
    return [Fact(text, texts.count(text)) for text in dict.fromkeys(texts) if text]


def _schedules(runs: Sequence[Run]) -> str:
    """Which point replayed which schedule."""
    lines: dict[str, list[str]] = defaultdict(list)
    for point, run in runs:
        schedule = run.meta.get("schedule") or {}
        if schedule.get("hash"):
            seed = (run.config or {}).get("seed")
            line = f"{str(schedule['hash'])[:12]}  {schedule.get('requests', '?')} requests, seed {seed}"
            lines[line].append(point.stack)
    return "\n".join(f"{line}: {', '.join(dict.fromkeys(stacks))}" for line, stacks in lines.items())


def _config(runs: Sequence[Run]) -> str:
    """One stack's resolved configuration, values that its runs do not share listed as alternatives."""
    flat = [_flat(run.config or {}) for _, run in runs]
    merged = {}
    for key in dict.fromkeys(key for one in flat for key in one):
        values = list({orjson.dumps(one.get(key), default=str): one.get(key) for one in flat}.values())
        merged[key] = values[0] if len(values) == 1 else {"swept": values}
    return _text(merged)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        flat |= _flat(inner, f"{name}.") if isinstance(inner, Mapping) and inner else {name: inner}
    return flat


def _text(value: Mapping[str, Any]) -> str:
    plain = orjson.loads(orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS))
    return (
        yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None).strip()
        if plain
        else ""
    )

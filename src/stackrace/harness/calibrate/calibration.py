"""What a calibration found: kept in a file, and given to every later run on the same machine."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from stackrace.backends.base import source_hash
from stackrace.harness import host
from stackrace.harness.calibrate.ladder import Rung, limits
from stackrace.harness.calibrate.outcome import Spread
from stackrace.harness.store import write_atomically


def machine() -> dict[str, str]:
    """What a calibration is good for: this processor, kernel and Python, and the load generator as it is."""
    return {
        "cpu": host.cpu_model(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_generator": source_hash(Path(__file__).parents[1] / "load"),
    }


def save(path: Path, rungs: Sequence[Rung], right: Mapping[str, float], command: str) -> dict[str, Any]:
    """Write calibration.json and return it."""
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "machine": machine(),
        "right": dict(right),
        "limits": limits(rungs, right),
        "rungs": [asdict(r) for r in rungs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, orjson.dumps(found, option=orjson.OPT_INDENT_2, default=Spread._asdict))
    return found


def load(path: Path) -> dict[str, Any] | None:
    """Date, machine, limits of the calibration at `path`; None where there is none for this machine."""
    try:
        found = orjson.loads(path.read_bytes())
        if found["machine"] == machine():
            return {name: found[name] for name in ("date", "machine", "right", "limits")}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None

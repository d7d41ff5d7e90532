"""Where the environments of installed engines lie."""

from pathlib import Path

from stackrace.harness.errors import UsageError


def find(name: str, engines: Path) -> Path:
    """The interpreter of the environment `name`. UsageError, with the remedy, where there is none."""
    python = engines / name / "bin" / "python"
    if not python.exists():
        raise UsageError(f"no environment {engines / name}: stackrace engine install {name}, or set backend.python")
    return python

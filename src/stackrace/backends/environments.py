"""The engines' environments: which lists there are, and where an environment that was made from one lies."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stackrace.harness.errors import UsageError

ENGINES = Path("engines")  # where they go unless another folder is named
PINS = Path(__file__).with_name("pins")
READY = "ready"  # written last; holds the digest of the list


class Recipe(NamedTuple):
    """How an engine's environment is made."""

    name: str
    module: str  # that it must be able to import
    python: str  # 3.11
    bytes: int  # that it takes on disk
    needs_gpu: bool
    first: str | None  # package that is installed before the others, with its requirements


def section(name: str) -> dict[str, dict[str, Any]]:
    """A part of pins/engines.yaml: `install` or `bundle`."""
    content: dict[str, dict[str, Any]] = yaml.safe_load((PINS / "engines.yaml").read_text())[name]
    return content


def recipes() -> dict[str, Recipe]:
    """Every engine that can be installed, by its name."""
    return {name: Recipe(name, **fields) for name, fields in section("install").items()}


def recipe(name: str) -> Recipe:
    """How the engine of that name is made. UsageError: there is no such."""
    known = recipes()
    if name not in known:
        raise UsageError(f"no engine {name!r}: choose one of {', '.join(known)}")
    return known[name]


def pins(name: str) -> list[str]:
    """The lines of pins/<name>.txt that name a package, `torch==2.13.0`."""
    lines = (line.strip() for line in (PINS / f"{name}.txt").read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def digest(name: str) -> str:
    """Sixteen hex digits of what the list pins; its comments do not count."""
    return hashlib.sha256("\n".join(sorted(pins(name))).encode()).hexdigest()[:16]


def python_of(folder: Path) -> Path:
    """The environment's interpreter, a link not to be followed: Python finds its packages by where the link lies."""
    return folder.absolute() / "bin" / "python"


def is_ready(name: str, folder: Path) -> bool:
    """Whether the environment was installed whole, from the list as it is now."""
    marker = folder / READY
    return marker.is_file() and marker.read_text().strip() == digest(name) and python_of(folder).exists()


def find(name: str, engines: Path) -> Path:
    """The interpreter of the environment `engines`/`name`.

    UsageError, with the command that makes it, where it is missing, unfinished or of an older list.
    """
    recipe(name)
    folder = engines / name
    if is_ready(name, folder):
        return python_of(folder)
    fault = "is of another list of packages" if (folder / READY).exists() else "is not installed"
    into = "" if engines == ENGINES else f" --into {folder}"
    raise UsageError(f"{folder}: {name} {fault}: stackrace engine install {name}{into}")

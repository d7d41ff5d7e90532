"""`stackrace engine`: environments for the stacks that are not ours, here or on a machine without a network."""

import sys
from pathlib import Path

from stackrace.backends import bundle as bundles
from stackrace.backends import environments, fitness
from stackrace.backends.environments import ENGINES
from stackrace.backends.install import install as fill


def install(name: str, into: Path | None, python: str | None) -> None:
    """Make, finish or update the environment of an engine; default: engines/<name>. Tells its progress."""
    if environments.recipe(name).needs_gpu and fitness.lacks_driver():
        print(f"stackrace: warning: no NVIDIA driver here: {name} can be installed, but not started", file=sys.stderr)
    fill(name, into or ENGINES / name, python, _say)


def bundle(name: str, out: Path) -> None:
    """Write an engine's packages to `out`, in parts, for a machine without a network."""
    parts = bundles.bundle(name, out, _say)
    size = sum(part.stat().st_size for part in parts)
    _say(f"{out}: {len(parts)} parts of {name}, {size / 1e6:,.1f} MB, and unpack.sh, which says how it is used")


def _say(text: str) -> None:
    print(text, flush=True)

"""What was run on what: the part of run.json that lets somebody else repeat it."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import stackrace
from stackrace.harness import host
from stackrace.harness.point import Point, gpus_of

_PACKAGES = ("aiohttp", "hydra-core", "numpy", "pandas", "safetensors", "tokenizers", "torch", "triton", "uvloop")


def provenance(point: Point) -> dict[str, Any]:
    """Code, packages, machine, placement and seeds of a point; nothing of it is secret."""
    return {
        "stackrace": stackrace.__version__,
        "git": _git(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: v for name in _PACKAGES if (v := _version(name))},
        "platform": platform.platform(),
        "cpu": {"model": host.cpu_model(), "cores": psutil.cpu_count()},
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus_of(point.backend),
        "cores": point.cores._asdict(),
        "seed": point.config["seed"],
        "checkpoint": point.weights,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and whether anything differs from it; None outside a checkout."""
    commit = host.said("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(host.said("git", "-C", str(folder), "status", "--porcelain"))}

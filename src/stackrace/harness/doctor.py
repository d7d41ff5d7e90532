"""`stackrace doctor`: what this machine can run, and what is missing for the rest, with the remedy."""

import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Column, Table

from stackrace.backends import environments, fitness
from stackrace.backends.environments import ENGINES
from stackrace.harness import host
from stackrace.harness.calibrate import calibration

_GIB = 1 << 30
_ATTACH = "stackrace bench backend=external backend.url=http://HOST:PORT backend.model=NAME"


class Finding(NamedTuple):
    """One line of the doctor's report. `is_needed`: without it, not even the demo runs."""

    what: str
    is_fine: bool
    found: str
    remedy: str
    is_needed: bool = False


def examine() -> int:
    """Print a table; returns 1 if something is missing that everything needs, else 0."""
    findings = list(_findings())
    table = Table("", "for", "found", Column("remedy", overflow="fold"), box=None)
    for f in findings:
        mark = "[green]ok[/green]" if f.is_fine else "[red]no[/red]" if f.is_needed else "[yellow]--[/yellow]"
        table.add_row(mark, f.what, f.found, "" if f.is_fine else f.remedy)
    Console().print(table, highlight=False)
    return int(any(f.is_needed and not f.is_fine for f in findings))


def _findings() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python 3.11 or newer", sys.version_info >= (3, 11), found, "install a newer Python", True)
    yield _package("torch", "engine mla on a CPU", "make install", True)
    yield _cores()
    memory = psutil.virtual_memory().available
    yield Finding("the demo's memory", memory > 2 * _GIB, f"{memory / _GIB:.1f} GiB free", "free 2 GiB", True)
    yield Finding(
        "timestamps and pinning", sys.platform == "linux", sys.platform, "use Linux: elsewhere times are coarser"
    )
    yield _calibration()
    yield _engine("vLLM", "vllm")
    yield _engine("SGLang", "sglang")
    yield _gpu()


def _calibration() -> Finding:
    found = calibration.load(Path("results", "calibration.json"))
    words = "none for this machine in results/" if found is None else f"of {found['date']}"
    return Finding("the client's own error", found is not None, words, "stackrace calibrate, on an idle machine")


def _package(name: str, what: str, remedy: str, is_needed: bool = False) -> Finding:
    try:
        return Finding(what, True, f"{name} {version(name)}", remedy, is_needed)
    except PackageNotFoundError:
        return Finding(what, False, f"no {name}", remedy, is_needed)


def _cores() -> Finding:
    n = len(host.usable_cores())
    return Finding(
        "valid points", n > 1, f"{n} usable cores", "2 or more: the load generator needs one of its own, else suspect"
    )


def _engine(title: str, name: str) -> Finding:
    """An environment of `stackrace engine install`, for a GPU or a CPU, or else a command of the user's own."""
    folders = {each: ENGINES / each for each in (name, f"{name}-cpu")}
    found = [str(folder) for each, folder in folders.items() if environments.is_ready(each, folder)]
    begun = [f"{folder} is unfinished or of an older list" for folder in folders.values() if folder.exists()]
    path = shutil.which(name)
    words = ", ".join(found) or path or ", ".join(begun) or f"none in {ENGINES}/"
    fits = f"{name}-cpu" if fitness.lacks_driver() else name
    remedy = f"stackrace engine install {fits}, or race one that runs already, here or elsewhere: {_ATTACH}"
    return Finding(title, bool(found or path), words, remedy)


def _gpu() -> Finding:
    path = shutil.which("nvidia-smi")
    return Finding("GPU engines", path is not None, path or "no nvidia-smi", "run on a machine with an NVIDIA GPU")

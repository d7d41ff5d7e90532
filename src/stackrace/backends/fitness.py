"""Whether this machine can take an engine's environment: its platform, its Pythons, its disk."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from stackrace.backends.environments import Recipe
from stackrace.harness.errors import UsageError


def check_platform(name: str) -> None:
    """UsageError anywhere but on Linux and x86_64: there are no other wheels."""
    here = f"{sys.platform} {platform.machine()}"
    if here != "linux x86_64":
        raise UsageError(f"engine {name}: its list is for Linux on x86_64, this is {here}: race it with external")


def lacks_driver() -> bool:
    """Whether no NVIDIA driver is found."""
    return not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists())


def find_python(recipe: Recipe, asked: str | None) -> str:
    """A Python of the version that the list is for: the one asked for, ours, or any on PATH. UsageError: none."""
    wanted = f"python{recipe.python}"
    if asked:
        found = version_of(asked)
        if found != recipe.python:
            told = f"is Python {found}" if found else "does not run, or has no venv"
            raise UsageError(f"--python {asked} {told}: {recipe.name} needs Python {recipe.python}")
        return asked
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    for candidate in (sys.executable, *(str(Path(folder, wanted)) for folder in folders)):
        if version_of(candidate) == recipe.python:
            return candidate
    raise UsageError(f"{recipe.name} needs Python {recipe.python}: no {wanted} on PATH runs: give --python PATH")


def version_of(python: str) -> str | None:
    """3.11, or None where it does not run or cannot make an environment; a wrapper may be there without its Python."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_disk(recipe: Recipe, folder: Path) -> None:
    """UsageError where less is free than the environment still needs."""
    there = sum(f.lstat().st_size for f in folder.rglob("*"))
    missing, free = recipe.bytes - there, shutil.disk_usage(folder).free
    if free < missing:
        needs, has = f"{missing / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"
        raise UsageError(f"{folder}: {recipe.name} needs {needs} and {has} are free: free some, or give another --into")

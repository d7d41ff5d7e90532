"""An environment of its own for an engine: made from a complete pinned list, gone on with after a kill."""

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from stackrace.backends import environments
from stackrace.backends.environments import READY, Recipe, python_of
from stackrace.backends.fitness import check_disk, check_platform, find_python, version_of
from stackrace.backends.piping import INSTALL, run
from stackrace.harness.errors import UsageError

LOG = "install.log"
IDENTITY = "engine"  # file that says which engine this folder is for, and from which list
_STEPS = 5  # how often the number of packages is told

Say = Callable[[str], object]


def install(name: str, folder: Path, python: str | None, say: Say) -> None:
    """Leave a whole environment in `folder`: made, finished, made anew, or as it is.

    `python` is a path or a command; None: any of the engine's version that is found. `say` is told the progress.
    UsageError: this machine, its disk or its Pythons will not do, or somebody else is at it. InstallFailed: pip did.
    """
    recipe = environments.recipe(name)
    check_platform(name)
    if environments.is_ready(name, folder):
        say(f"{name} is there already: {python_of(folder)}")
        return
    base = find_python(recipe, python)
    with _only_one(folder):
        _check_folder(name, folder)
        check_disk(recipe, folder)
        _prepare(recipe, folder, base, say)
        _fill(recipe, folder, say)
        (folder / READY).write_text(environments.digest(name) + "\n")
    say(f"{name} is ready: {python_of(folder)}")


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"{folder}: {e.strerror}: give another --into") from None
    lock = os.open(folder, os.O_RDONLY)
    try:
        _claim(lock, folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
    finally:
        os.close(lock)


def _claim(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{folder} is being installed by another process: wait for it") from None


def _check_folder(name: str, folder: Path) -> None:
    """Only what is empty or ours is written to."""
    identity = folder / IDENTITY
    owner = identity.read_text().split()[0] if identity.exists() else None
    if owner not in (None, name):
        raise UsageError(f"{folder} holds the engine {owner}: give another --into for {name}")
    if owner is None and any(folder.iterdir()):
        raise UsageError(f"{folder} is neither empty nor an engine's environment: give another --into")


def _prepare(recipe: Recipe, folder: Path, base: str, say: Say) -> None:
    """An environment with a pip that runs; begun anew where it was for another list or another Python."""
    identity = f"{recipe.name} {environments.digest(recipe.name)}\n"
    path = folder / IDENTITY
    is_same = path.exists() and path.read_text() == identity
    if is_same and _has_pip(folder) and version_of(str(python_of(folder))) == recipe.python:
        say(f"{recipe.name}: goes on in {folder}")
        _mend(folder)
        return
    say(f"{recipe.name}: a new environment in {folder}, with {base}")
    path.write_text(identity)  # first, so that what a kill leaves is known to be ours
    _clear(folder)
    run([base, "-m", "venv", str(folder.absolute())], folder / LOG)


def _clear(folder: Path) -> None:
    (folder / READY).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != IDENTITY:
            entry.unlink()


def _has_pip(folder: Path) -> bool:
    if not python_of(folder).exists():
        return False
    done = subprocess.run([python_of(folder), "-m", "pip", "--version"], capture_output=True, check=False)
    return done.returncode == 0


def _mend(folder: Path) -> None:
    """Forget packages that a kill left half installed: RECORD is what pip writes last."""
    for info in folder.glob("lib/python*/site-packages/*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(info)


def _fill(recipe: Recipe, folder: Path, say: Say) -> None:
    pins = environments.pins(recipe.name)
    for pin in (pin for pin in pins if pin.partition("==")[0] == recipe.first):
        say(f"{recipe.name}: {pin}, with what it requires")
        run([str(python_of(folder)), *INSTALL, pin], folder / LOG)
    listed = str(environments.PINS / f"{recipe.name}.txt")
    tell = _progress(recipe.name, len(pins), say)
    run([str(python_of(folder)), *INSTALL, "--no-deps", "-r", listed], folder / LOG, tell)
    lacks = f"the list brings no module {recipe.module}"
    code = f"import importlib.util, sys; sys.exit(None if importlib.util.find_spec({recipe.module!r}) else {lacks!r})"
    run([str(python_of(folder)), "-c", code], folder / LOG)


def _progress(name: str, total: int, say: Say) -> Callable[[str], None]:
    """What hears pip's lines and tells how far it is."""
    count = 0

    def hear(line: str) -> None:
        nonlocal count
        if line.startswith(("Collecting ", "Requirement already satisfied")):
            count += 1
            if count % max(1, total // _STEPS) == 0 and count < total:
                say(f"{name}: {count} of {total} packages")
        elif line.startswith("Installing collected packages"):
            say(f"{name}: all {total} packages are here, installing")

    return hear

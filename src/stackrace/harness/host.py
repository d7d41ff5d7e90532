"""This machine: its cores and how processes are placed on them, what it is, and dying with one's parent."""

import contextlib
import ctypes
import functools
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stackrace.harness.errors import UsageError

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"  # the variable that says which of the machine's GPUs a process may use
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Cores(NamedTuple):
    """Who runs where: the load generator on cores of its own, the engine on the rest."""

    load_generator: tuple[int, ...]
    engine: tuple[int, ...]

    @property
    def are_apart(self) -> bool:
        """The load generator has cores that nothing else of ours uses."""
        return not set(self.load_generator) & set(self.engine)


def split_cores(load_generator: int, engine: int | None) -> Cores:
    """The last `load_generator` usable cores, and `engine` (None: all) of the others.

    With a single core both share it, and the run says so. UsageError where fewer cores are there than asked.
    """
    usable = usable_cores()
    if len(usable) == 1:
        return Cores(usable, usable)
    if load_generator + (engine or 1) > len(usable):
        raise UsageError(
            f"hardware.load_generator_cores={load_generator} and hardware.engine_cores={engine or 1} need more than "
            f"the {len(usable)} cores that this process may use: lower them"
        )
    rest = usable[:-load_generator]
    return Cores(usable[-load_generator:], rest[-engine:] if engine else rest)


@functools.cache
def usable_cores() -> tuple[int, ...]:
    """Cores that this process could run on when it was first asked, before it pinned itself."""
    if sys.platform == "linux":
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def pin(cores: tuple[int, ...]) -> None:
    """Run this process and its future children on `cores` only, where the system can."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, cores)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however it dies (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def lower_priority() -> None:
    """Leave every core to whoever else wants it, at once where the system can (Linux)."""
    with contextlib.suppress(OSError):  # Linux weighs sessions against each other before it looks at their processes
        Path("/proc/self/autogroup").write_text("19")
    try:  # niceness alone may keep a core for a slice, 3 ms
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):  # not Linux, or a sandbox that has no such thing
        os.nice(19)


def adopt_orphans() -> None:
    """Make descendants whose parent died children of this process, so that none can slip away (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def raise_open_files() -> None:
    """Allow as many sockets as the system permits."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def gpus(setting: str | None) -> tuple[dict[str, str], ...]:
    """Of each GPU that CUDA_VISIBLE_DEVICES=`setting` leaves, what nvidia-smi says; empty without a driver.

    Its `name`, driver, memory and limits. Of all of them where the setting names slices of GPUs (MIG).
    """
    fields = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
    told = said("nvidia-smi", f"--query-gpu=uuid,{','.join(fields)}", "--format=csv,noheader")
    rows = [[word.strip() for word in line.split(",")] for line in (told or "").splitlines()]
    kept = visible([uuid for uuid, *_ in rows], None if setting and "MIG-" in setting else setting)
    return tuple(dict(zip(fields, rows[index][1:], strict=False)) for index in kept)


def visible(uuids: Sequence[str], setting: str | None) -> list[int]:
    """Numbers of the GPUs that CUDA_VISIBLE_DEVICES=`setting` leaves; None leaves all.

    Numbers are the driver's: CUDA's too, unless cards differ and CUDA_DEVICE_ORDER is not PCI_BUS_ID. Prefixes of UUIDs
    count, and as in CUDA the list ends at what cannot be found.
    """
    if setting is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for word in map(str.strip, setting.split(",")):
        index = next((i for i, uuid in enumerate(uuids) if word and (word == str(i) or uuid.startswith(word))), None)
        if index is None:
            break
        found.append(index)
    return found


def said(*command: str) -> str | None:
    """What a command printed, None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)

"""What serving stacks in environments of their own have in common: an interpreter, common settings, their own words."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stackrace.backends import environments
from stackrace.backends.base import Backend, flags
from stackrace.backends.checkpoint import Checkpoint
from stackrace.backends.running import Placement
from stackrace.harness.errors import UsageError, require
from stackrace.harness.host import VISIBLE_GPUS

_LONGEST_PROBE = 180  # seconds, of an import on a cold disk
_COUNTS = ("kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size")
_VERSIONS = """
import json
from importlib.metadata import distributions
print(json.dumps({d.metadata["Name"]: d.version for d in distributions()}))
"""
_INHERITED = ("VLLM_", "SGLANG_", "SGL_", "CUDA_", "NCCL_", "TORCH", "TRITON_", "OMP_", "MKL_", "FLASHINFER_")
_PARSE = """
import argparse, runpy, sys
start, module, *words = sys.argv[1:]
parse = argparse.ArgumentParser.parse_args
def parse_and_end(parser, args=None, namespace=None):
    parse(parser, args, namespace)
    sys.exit(0)
argparse.ArgumentParser.parse_args = parse_and_end
sys.argv = [module, *words]
if start == "-m":
    runpy.run_module(module, run_name="__main__", alter_sys=True)
else:
    runpy.run_path(module, run_name="__main__")
sys.exit("it did not read its command line as we expected: backend.check_flags=false goes without")
"""

Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Installed(Backend):
    """A serving stack that lives in an environment of its own.

    `python` is where that is: null for what `stackrace engine install` made, an interpreter, a folder with
    bin/python, or the words of a command that python's arguments can follow (a container's).
    """

    environment_name: str  # as `stackrace engine install` calls it
    engines: str  # folder of those environments
    python: str | tuple[str, ...] | None
    dtype: str
    kv_cache_memory_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    tensor_parallel_size: int
    attention_backend: str | None  # the engine's own name for it; null: the engine chooses
    enable_prefix_caching: bool
    flags: Mapping[str, Any]  # further ones of the engine's, in its own words
    check_flags: bool  # have the engine's parser read the command line before anything runs

    packages: ClassVar[tuple[str, ...]]  # names under which the engine may be installed
    versions_tried: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        for name in _COUNTS:
            require(f"backend.{name}", getattr(self, name), int, lambda v: v > 0, "a whole number above 0")
        for name in ("enable_prefix_caching", "check_flags"):
            require(f"backend.{name}", getattr(self, name), bool, lambda v: True, "true or false")

    @abstractmethod
    def options(self) -> Options:
        """The common settings in the engine's own flags, less those that every engine calls alike."""

    @abstractmethod
    def start_words(self) -> tuple[str, str]:
        """What python runs: -m and a module, or -u and a script."""

    def check(self) -> None:
        """The environment is there and holds the engine."""
        super().check()
        self.version()

    def check_weights(self, weights: Checkpoint) -> None:
        """The engine's own parser takes every flag; some follow from the weights."""
        if self.check_flags:
            nowhere = Placement(folder=Path.cwd(), cores=(0,), port=self.port or 8000)
            self._ask(_PARSE, *self.start_words(), *self._arguments(nowhere))

    def command(self, at: Placement) -> list[str]:
        """The server, with our flags and then those that the yaml adds or replaces."""
        return [*self.interpreter(), *self.start_words(), *self._arguments(at)]

    def interpreter(self) -> list[str]:
        """Words that python's arguments follow. UsageError where there is no such environment."""
        if self.python is None:
            return [str(environments.find(self.environment_name, Path(self.engines)))]
        if not isinstance(self.python, str):
            return list(self.python)
        inside = Path(self.python, "bin", "python")
        found = str(inside.absolute()) if inside.exists() else shutil.which(self.python)
        if found is None:
            raise UsageError(f"backend.python={self.python}: neither an interpreter nor a folder with bin/python")
        return [str(Path(found).absolute())]  # not resolved: a virtual environment is known by its link

    @property
    def is_contained(self) -> bool:
        """Where python is the words of a command."""
        return self.python is not None and not isinstance(self.python, str)

    def environment(self) -> dict[str, str]:
        """Nothing of our own environment's packages; what it would inherit that changes engines is told, too."""
        inherited = {name: value for name, value in os.environ.items() if name.startswith(_INHERITED)}
        return {**inherited, "PYTHONPATH": "", **super().environment()}

    def fingerprint(self) -> str:
        """With the variables that it inherits, but for which of a machine's GPUs it has."""
        variables = {n: v for n, v in self.environment().items() if n.startswith(_INHERITED) and n != VISIBLE_GPUS}
        text = json.dumps([super().fingerprint(), variables], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def version(self) -> str:
        """The engine's and torch's, as its environment tells. UsageError where it does not hold the engine."""
        found: dict[str, str] = json.loads(self._ask(_VERSIONS))
        engine = [f"{name} {found[name]}" for name in self.packages if name in found]
        if not engine:
            where = " ".join(self.interpreter())
            raise UsageError(f"no {self.packages[0]} in the environment of {where}: {self._remedy()}")
        everything = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]
        return ", ".join([*engine, f"torch {found.get('torch')}", f"{len(found)} packages {everything}"])

    def kv_bytes(self) -> int:
        """Of one of the cache's numbers: the cache is kept in the weights' type."""
        return 4 if self.dtype == "float32" else 2

    def _arguments(self, at: Placement) -> list[str]:
        alike = {"served_model_name": self.model, "host": "127.0.0.1", "port": at.port, "dtype": self.dtype}
        ours = alike | {"attention_backend": self.attention_backend} | self.options()
        further = {k.replace("-", "_"): v for k, v in self.flags.items()}
        for name, value in further.items():
            if value is False and name not in ours:
                flag = name.replace("_", "-")
                raise UsageError(f"backend.flags.{flag}=false adds nothing: write no-{flag}: true, or leave it out")
        return flags(ours | {k: json.dumps(v) if isinstance(v, dict) else v for k, v in further.items()})

    def _ask(self, program: str, *arguments: str) -> str:
        """What a program printed in the engine's environment. UsageError with its last words if it failed."""
        environment = tuple(sorted(self.environment().items()))
        code, said = _run((*self.interpreter(), "-c", program, *arguments), environment)
        if code:
            words = " ".join(said.strip().splitlines()[-1:])
            tried = ", ".join(self.versions_tried)
            raise UsageError(f"backend {self.name}: {words or f'exit code {code}'} (tried with {tried})")
        return said

    def _remedy(self) -> str:
        return f"stackrace engine install {self.environment_name}, or set backend.python"


@functools.cache
def _run(command: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> tuple[int, str]:
    """Exit code, and stdout's last line or, after a failure, all that it said."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **dict(environment)},
            capture_output=True,
            text=True,
            timeout=_LONGEST_PROBE,
            check=False,
        )
    except OSError as e:
        return 127, f"cannot start {command[0]}: {e.strerror}"
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]} did not answer within {_LONGEST_PROBE} s"
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr or done.stdout)

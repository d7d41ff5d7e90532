"""What a stack is: a command line, an environment and a few paths."""

import hashlib
import json
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from stackrace.backends.checkpoint import Checkpoint
from stackrace.backends.gauges import Names
from stackrace.backends.running import Engine, Placement
from stackrace.harness.errors import UsageError, require
from stackrace.harness.host import VISIBLE_GPUS
from stackrace.harness.types import Endpoint

_NO_IDENTITY = (
    *("port", "host", "api_key_env", "checkpoint", "startup_timeout", "stop_grace", "shutdown_timeout"),
    *("engines", "python", "launcher", "check_flags"),
)


@dataclass(frozen=True, kw_only=True)
class Backend(ABC):
    """A stack. Subclasses say how it is started; starting, waiting, watching and stopping are the same for all."""

    name: str
    model: str  # the name that requests ask for
    checkpoint: str | None  # folder with the weights, where it loads any
    max_model_len: int | None  # prompt and output together, where it is limited
    port: int  # 0: any free one
    startup_timeout: float  # seconds
    stop_grace: float  # seconds between SIGTERM and SIGKILL
    env: Mapping[str, str]
    extra_body: Mapping[str, Any]  # further fields of every request
    omit: tuple[str, ...]  # fields that this stack refuses
    omit_in_chat: tuple[str, ...]  # and those that it refuses in chats

    reset_path: ClassVar[str | None] = None  # a POST there empties its prefix cache

    @abstractmethod
    def command(self, at: Placement) -> list[str]:
        """The command line that starts it."""

    @abstractmethod
    def version(self) -> str:
        """Version of the engine, for our own code with a hash of its sources: what makes an old result stale."""

    def check(self) -> None:
        """Raise a UsageError if it cannot be started on this machine; called before anything runs."""
        require("backend.port", self.port, int, lambda v: 0 <= v < 65536, "a port, or 0 for any free one")
        for name in ("startup_timeout", "stop_grace"):
            seconds = getattr(self, name)
            require(f"backend.{name}", seconds, (int, float), lambda v: v > 0, "a number of seconds above 0")

    def check_weights(self, weights: Checkpoint) -> None:  # noqa: B027 (most stacks take any)
        """Raise a UsageError if it cannot serve this checkpoint; called before anything runs."""

    def check_port(self) -> None:
        """Raise a UsageError if the port that was asked for is taken; called while none of our engines runs."""
        if self.port and not _is_free(self.port):
            raise UsageError(f"backend.port={self.port} is in use: stop what listens there, or set backend.port=0")

    @property
    def is_contained(self) -> bool:
        """Its processes are started by a container's daemon, not by its command."""
        return False

    @property
    def has_prefix_cache(self) -> bool:
        """It keeps what it computed for one prompt for another that begins alike."""
        return bool(getattr(self, "enable_prefix_caching", False))

    def headers(self) -> dict[str, str]:
        """Headers that requests must carry; secrets, so they stay in memory."""
        return {}

    def endpoint(self, url: str) -> Endpoint:
        """Where it listens, with the headers, secrets among them."""
        return Endpoint(url, self.model, self.headers(), self.extra_body, self.omit, self.omit_in_chat)

    def environment(self) -> dict[str, str]:
        """Variables besides those of the harness; kept with the run."""
        # safe path: `python -m` must not put a folder called kernels/ before Hugging Face's package
        own = {name: str(value) for name, value in self.env.items()}
        return {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **own}

    def gauges(self) -> Names:
        """Common name (`stackrace.backends.gauges`) -> what its /metrics calls it; empty where it has no /metrics."""
        return {}

    def uses_gpu(self) -> bool:
        """Whether it may use the GPUs of its machine."""
        return True

    def visible_gpus(self) -> str | None:
        """The engine's CUDA_VISIBLE_DEVICES; None: it may use all."""
        return self.environment().get(VISIBLE_GPUS, os.environ.get(VISIBLE_GPUS))

    def fingerprint(self) -> str:
        """Hash of everything that makes it this engine: settings and version, but neither port nor paths.

        Its weights have an identity of their own.
        """
        settings = {k: v for k, v in asdict(self).items() if k not in _NO_IDENTITY}
        text = json.dumps([self.version(), settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def start(self, folder: Path, cores: tuple[int, ...]) -> Engine:
        """Launch it and wait for a real token.

        Raises EngineDied or EngineTimeout; then nothing is left running.
        """
        self.check_port()
        at = Placement(folder=folder.resolve(), cores=cores, port=self.port or _free_port())
        endpoint = self.endpoint(f"http://127.0.0.1:{at.port}")
        words, variables = self.command(at), self.environment()
        engine = Engine(self.name, words, variables, at, self.stop_grace, endpoint, self.is_contained)
        try:
            engine.wait_for_token(self.startup_timeout)
        except BaseException:
            engine.stop()
            raise
        return engine


def check_variables(names: Iterable[str | None]) -> None:
    """Raise a UsageError unless every environment variable that is named has a value."""
    for name in filter(None, names):
        if not os.environ.get(name):
            raise UsageError(f"the environment variable {name} is not set: export it, or change the backend")


def bearer(variable: str | None) -> dict[str, str]:
    """The header that carries the key in this environment variable; none without one."""
    return {"Authorization": f"Bearer {os.environ[variable]}"} if variable else {}


def source_hash(*folders_and_files: Path) -> str:
    """Hash of the Python sources given, so that a result is stale once the code that made it changed."""
    digest = hashlib.sha256()
    for root in folders_and_files:
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(f"{path.relative_to(root.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def flags(options: Mapping[str, Any]) -> list[str]:
    """`{max_num_seqs: 8, sizes: [1, 2], eager: true, x: null}` -> `--max-num-seqs 8 --sizes 1 2 --eager`."""
    words = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
    return words


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

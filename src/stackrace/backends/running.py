"""A running engine: its process, its log, its first token, its end."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from stackrace.backends import asking, guardian
from stackrace.harness.errors import EngineDied, EngineError, EngineTimeout
from stackrace.harness.types import Endpoint

_POLL = 0.1
_LOG_LINES = 20
_LONGEST_END = 120  # seconds from SIGKILL to when the kernel has let go of a process and its GPU memory
_LONGEST_RESET = 10  # seconds: what was given up a moment ago may still be running


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an engine is to run: decided by the harness, the same for every stack."""

    folder: Path  # its working directory and its log
    cores: tuple[int, ...]
    port: int


class Engine:
    """A running engine, watched over by a guardian process."""

    warm: set[object]  # shapes of requests at which this launch's latencies have settled
    rounds: int  # of warm-ups that it has been asked

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        at: Placement,
        grace: float,
        endpoint: Endpoint,
        is_contained: bool = False,
    ) -> None:
        """Start `command` with `environment` added to ours; `grace` is the time between SIGTERM and SIGKILL (s).

        `is_contained`: the command has its processes started by another one, a container's daemon.
        """
        at.folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.command = command
        self.log = at.folder / "server.log"
        self._grace, self._is_contained = grace, is_contained
        self.warm, self.rounds = set(), 0
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._guardian = subprocess.Popen(
                guardian.words(grace, at.cores, command),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=at.folder,
                env={**os.environ, guardian.VARIABLE: json.dumps(dict(environment))},
                start_new_session=True,
            )
        self.endpoint = replace(endpoint, pid=self._guardian.pid)

    def check_alive(self) -> None:
        """Raise EngineDied, with the tail of the log, if it has exited."""
        code = self._guardian.poll()
        if code is not None:
            raise EngineDied(f"{self.name} {ending(code)}{self.last_words()}")

    def wait_for_token(self, timeout: float) -> None:
        """Return when it has generated a token. Raises EngineDied, or EngineTimeout after `timeout` seconds.

        Whoever else listens at its port, having been there first, is not asked.
        """
        deadline = time.monotonic() + timeout
        while not (self.listens() and asking.has_token(self.endpoint, deadline - time.monotonic())):
            self.check_alive()
            if time.monotonic() > deadline:
                raise EngineTimeout(
                    f"{self.name} gave no token within backend.startup_timeout={timeout:g} s"
                    + (self.last_words() or f": is there a server at {self.endpoint.url}?")
                )
            time.sleep(_POLL)

    def empty_cache(self, path: str) -> None:
        """Empty its prefix cache by a POST to `path`. EngineError if it will not, though nothing is in flight."""
        deadline = time.monotonic() + _LONGEST_RESET
        while (refusal := asking.refused(self.endpoint, path)) is not None:
            self.check_alive()
            if time.monotonic() > deadline:
                raise EngineError(f"{self.name} does not empty its prefix cache: {self.endpoint.scrub(refusal)}")
            time.sleep(_POLL)

    def listens(self) -> bool:
        """Whether a process of it listens at its port; True where the system does not tell."""
        if self._is_contained:
            return True
        port = urlsplit(self.endpoint.url).port
        try:
            family = psutil.Process(self._guardian.pid).children(recursive=True)
        except psutil.Error:
            return True
        return any(_listens(process, port) for process in family)

    def fault(self, timeout: float) -> str | None:
        """What shows that it is broken, though it has not exited; None if nothing does. Asks it for a token."""
        return asking.fault_of(self.endpoint, timeout)

    def last_words(self) -> str:
        """`; its last lines: ...` to end a message with, empty where it has printed none."""
        tail = self.log_tail()
        return f"; its last lines:\n{tail}" if tail else ""

    def log_tail(self) -> str:
        """The last lines that it has printed since it was launched."""
        with self.log.open("rb") as log:
            log.seek(self._log_from)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-_LOG_LINES:])

    def stop(self) -> None:
        """End it; returns when no process of it is left."""
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        try:
            self._guardian.wait(self._grace + _LONGEST_END)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()


class Attached(Engine):
    """An engine that somebody else runs: never launched nor stopped."""

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        self.name = name
        self.command = []
        self.endpoint = endpoint
        self.log = Path(os.devnull)
        self._log_from = 0
        self.warm, self.rounds = set(), 0

    def check_alive(self) -> None:
        """Nothing of ours to look at."""

    def listens(self) -> bool:
        """Somebody will."""
        return True

    def stop(self) -> None:
        """Not ours to stop."""


def ending(code: int) -> str:
    """How a process ended, by its exit code: beyond 128 stands a signal, as a shell tells it."""
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return f"exited with {code}"
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _listens(process: psutil.Process, port: int | None) -> bool:
    try:
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections("tcp"))
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True

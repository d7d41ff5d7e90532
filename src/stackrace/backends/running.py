"""A running engine: its process, its log, its first token, its end."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from stackrace.harness.errors import EngineDied, EngineError, EngineTimeout
from stackrace.harness.types import Endpoint

_POLL = 0.1
_LOG_LINES = 20


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
    ) -> None:
        """Start `command` with `environment` added to ours; `grace` is the time between SIGTERM and SIGKILL (s)."""
        at.folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.command = command
        self.log = at.folder / "server.log"
        self._grace = grace
        self.warm, self.rounds = set(), 0
        guardian = [sys.executable, "-m", "stackrace.backends.guardian"]
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._guardian = subprocess.Popen(
                [*guardian, str(grace), ",".join(map(str, at.cores)), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=at.folder,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.endpoint = replace(endpoint, pid=self._guardian.pid)

    def check_alive(self) -> None:
        """Raise EngineDied, with the tail of the log, if it has exited."""
        code = self._guardian.poll()
        if code is not None:
            raise EngineDied(f"{self.name} {ending(code)}; its last lines:\n{self.log_tail()}")

    def wait_for_token(self, timeout: float) -> None:
        """Return when it has generated a token. Raises EngineDied, or EngineTimeout after `timeout` seconds.

        Whoever else listens at its port, having been there first, is not asked.
        """
        deadline = time.monotonic() + timeout
        while not (self.listens() and has_token(self.endpoint, deadline - time.monotonic())):
            self.check_alive()
            if time.monotonic() > deadline:
                tail = self.log_tail()
                raise EngineTimeout(
                    f"{self.name} gave no token within backend.startup_timeout={timeout:g} s"
                    + (f"; its last lines:\n{tail}" if tail else f": is there a server at {self.endpoint.url}?")
                )
            time.sleep(_POLL)

    def listens(self) -> bool:
        """Whether a process of it listens at its port; True where the system does not tell."""
        port = urlsplit(self.endpoint.url).port
        try:
            family = psutil.Process(self._guardian.pid).children(recursive=True)
        except psutil.Error:
            return True
        return any(_listens(process, port) for process in family)

    def fault(self, timeout: float) -> str | None:
        """What shows that it is broken, though it has not exited; None if nothing does. Asks it for a token."""
        return fault_of(self.endpoint, timeout)

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
            self._guardian.wait(self._grace + 10)
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


def has_token(endpoint: Endpoint, timeout: float) -> bool:
    """Whether the endpoint answers a short prompt with a token within `timeout` seconds.

    Raises EngineError if it answers that it never will (a 4xx other than 408 and 429).
    """
    try:
        return _brought_token(_complete(endpoint, timeout))
    except urllib.error.HTTPError as e:
        if 400 <= e.code < 500 and e.code not in (408, 429):
            said = endpoint.scrub(e.read().decode(errors="replace")[:300])
            raise EngineError(f"{endpoint.url} refuses a plain completion: HTTP {e.code}: {said}") from None
        return False
    except (OSError, ValueError, http.client.HTTPException):
        return False


def fault_of(endpoint: Endpoint, timeout: float) -> str | None:
    """What a short prompt meets with that no working engine answers, however busy; None otherwise.

    That is a 5xx other than 503, or a connection that is refused or breaks. To be late is no fault.
    """
    try:
        _complete(endpoint, timeout)
    except urllib.error.HTTPError as e:
        said = endpoint.scrub(e.read().decode(errors="replace")[:300])
        return f"HTTP {e.code}: {said}" if e.code >= 500 and e.code != 503 else None
    except (OSError, http.client.HTTPException) as e:
        cause = e.reason if isinstance(e, urllib.error.URLError) else e
        return None if isinstance(cause, TimeoutError) else f"{type(cause).__name__}: {cause}"
    except ValueError:
        return None
    return None


def _complete(endpoint: Endpoint, timeout: float) -> object:
    """What a short prompt is answered with, unstreamed."""
    body = {"model": endpoint.model, "prompt": [4, 5], "max_tokens": 1, "temperature": 0, **endpoint.extra_body}
    content = json.dumps({k: v for k, v in body.items() if k not in endpoint.omit}).encode()
    headers = {"Content-Type": "application/json", **endpoint.headers}
    request = urllib.request.Request(f"{endpoint.url.rstrip('/')}/v1/completions", content, headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the load generator knows no proxy either
    with direct.open(request, timeout=max(timeout, _POLL)) as response:
        answer: object = json.load(response)
        return answer


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


def _brought_token(answer: object) -> bool:
    """By its usage, else by its text."""
    if not isinstance(answer, dict) or not answer.get("choices"):
        return False
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    return bool(answer["choices"][0].get("text") if tokens is None else tokens)

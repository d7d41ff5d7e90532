"""A running engine: its process, its log, its first token, its end."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

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
        guardian = [sys.executable, "-m", "stackrace.backends.guardian"]
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
            raise EngineDied(f"{self.name} exited with {code}; its last lines:\n{self.log_tail()}")

    def wait_for_token(self, timeout: float) -> None:
        """Return when it has generated a token."""
        deadline = time.monotonic() + timeout
        while not has_token(self.endpoint, timeout):
            self.check_alive()
            if time.monotonic() > deadline:
                raise EngineTimeout(
                    f"{self.name} gave no token within backend.startup_timeout={timeout:g} s; "
                    f"its last lines:\n{self.log_tail()}"
                )
            time.sleep(_POLL)

    def log_tail(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])

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

    def __init__(self, name: str, endpoint: Endpoint, timeout: float) -> None:
        """Raises EngineTimeout if it gives no token now."""
        self.name = name
        self.command = []
        self.endpoint = endpoint
        self.log = Path(os.devnull)
        if not has_token(endpoint, timeout):
            raise EngineTimeout(
                f"{endpoint.url} gave no token: start the server, or check backend.url and backend.model"
            )

    def check_alive(self) -> None:
        """Nothing of ours to look at."""

    def stop(self) -> None:
        """Not ours to stop."""


def has_token(endpoint: Endpoint, timeout: float) -> bool:
    """Whether the endpoint answers a short prompt with a token within `timeout` seconds.

    Raises EngineError if it answers that it never will (a 4xx other than 408 and 429).
    """
    body = {"model": endpoint.model, "prompt": [4, 5], "max_tokens": 1, "temperature": 0, **endpoint.extra_body}
    headers = {"Content-Type": "application/json", **endpoint.headers}
    request = urllib.request.Request(f"{endpoint.url.rstrip('/')}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return bool(json.load(response).get("choices"))
    except urllib.error.HTTPError as e:
        if 400 <= e.code < 500 and e.code not in (408, 429):
            raise EngineError(f"{endpoint.url} refuses a plain completion: HTTP {e.code}: {e.read()[:300]!r}") from None
        return False
    except (OSError, ValueError):
        return False

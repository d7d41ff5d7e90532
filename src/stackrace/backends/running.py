"""A running engine: its process, its log, its first token, its end."""

import http.client
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

from stackrace.backends import guardian as guardian_of
from stackrace.harness.errors import EngineDied, EngineError, EngineTimeout
from stackrace.harness.types import Endpoint

_POLL = 0.1
_LOG_LINES = 20
_LONGEST_RESET = 10  # seconds: what was given up a moment ago may still be running
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # nor does the load generator know one


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
                env={**os.environ, guardian_of.VARIABLE: json.dumps(dict(environment))},
                start_new_session=True,
            )
        self.endpoint = replace(endpoint, pid=self._guardian.pid)

    def check_alive(self) -> None:
        """Raise EngineDied, with the tail of the log, if it has exited."""
        code = self._guardian.poll()
        if code is not None:
            raise EngineDied(f"{self.name} exited with {code}; its last lines:\n{self.log_tail()}")

    def wait_for_token(self, timeout: float) -> None:
        """Return when it has generated a token. Raises EngineDied, or EngineTimeout after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not has_token(self.endpoint, deadline - time.monotonic()):
            self.check_alive()
            if time.monotonic() > deadline:
                tail = self.log_tail()
                raise EngineTimeout(
                    f"{self.name} gave no token within backend.startup_timeout={timeout:g} s"
                    + (f"; its last lines:\n{tail}" if tail else f": is there a server at {self.endpoint.url}?")
                )
            time.sleep(_POLL)

    def empty_cache(self, path: str) -> None:
        """Empty its prefix cache by a POST to `path`. EngineError if it will not, though nothing is in flight."""
        deadline = time.monotonic() + _LONGEST_RESET
        while (refusal := refused(self.endpoint, path)) is not None:
            self.check_alive()
            if time.monotonic() > deadline:
                raise EngineError(f"{self.name} does not empty its prefix cache: {self.endpoint.scrub(refusal)}")
            time.sleep(_POLL)

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

    def stop(self) -> None:
        """Not ours to stop."""


def has_token(endpoint: Endpoint, timeout: float) -> bool:
    """Whether the endpoint answers a short prompt with a token within `timeout` seconds.

    Raises EngineError if it answers that it never will (a 4xx other than 408 and 429).
    """
    body = {"model": endpoint.model, "prompt": [4, 5], "max_tokens": 1, "temperature": 0, **endpoint.extra_body}
    content = json.dumps({k: v for k, v in body.items() if k not in endpoint.omit}).encode()
    headers = {"Content-Type": "application/json", **endpoint.headers}
    request = urllib.request.Request(f"{endpoint.url.rstrip('/')}/v1/completions", content, headers)
    try:
        with _NO_PROXY.open(request, timeout=max(timeout, _POLL)) as response:
            return _brought_token(json.load(response))
    except urllib.error.HTTPError as e:
        if 400 <= e.code < 500 and e.code not in (408, 429):
            said = endpoint.scrub(e.read().decode(errors="replace")[:300])
            raise EngineError(f"{endpoint.url} refuses a plain completion: HTTP {e.code}: {said}") from None
        return False
    except (OSError, ValueError, http.client.HTTPException):
        return False


def refused(endpoint: Endpoint, path: str) -> str | None:
    """What an empty POST to `path` was refused with; None if it was done."""
    request = urllib.request.Request(f"{endpoint.url.rstrip('/')}{path}", b"", dict(endpoint.headers))
    try:
        with _NO_PROXY.open(request, timeout=_LONGEST_RESET) as response:
            said = response.read().decode(errors="replace")
    except urllib.error.HTTPError as e:
        return f"POST {path}: HTTP {e.code}: {e.read().decode(errors='replace')[:300]}"
    except (OSError, http.client.HTTPException) as e:
        return f"POST {path}: {type(e).__name__}: {e}"
    return f"POST {path}: {said[:300]}" if _says_false(said) else None


def _says_false(said: str) -> bool:
    """vLLM answers 200 either way, with `success` in JSON; SGLang's text is no JSON."""
    try:
        answer = json.loads(said)
    except ValueError:
        return False
    return isinstance(answer, dict) and answer.get("success") is False


def _brought_token(answer: object) -> bool:
    """By its usage, else by its text."""
    if not isinstance(answer, dict) or not answer.get("choices"):
        return False
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    return bool(answer["choices"][0].get("text") if tokens is None else tokens)

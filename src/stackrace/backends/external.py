"""A server that somebody else runs: any URL that speaks OpenAI's completions."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from stackrace.backends.base import Backend, bearer, check_variables
from stackrace.backends.gauges import VLLM_CACHE, Names
from stackrace.backends.running import Attached, Engine, Placement
from stackrace.harness.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class External(Backend):
    """Attached to, never launched nor stopped. Secrets are read from the environment and stay there."""

    url: str
    api_key_env: str | None  # variable that holds the key, sent as a bearer token
    headers_env: Mapping[str, str]  # header -> variable that holds its value
    gauge_names: Mapping[str, str]  # common name of a gauge -> what its /metrics calls it

    def check(self) -> None:
        """URL well formed and every variable set."""
        super().check()
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"backend.url={self.url!r}: must be http://host:port or https://host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UsageError(
                "backend.url holds credentials, a query or a fragment: give the bare URL, "
                "and secrets by the names of their variables in backend.api_key_env or backend.headers_env"
            )
        check_variables([self.api_key_env, *self.headers_env.values()])

    def command(self, at: Placement) -> list[str]:
        """None: it runs already."""
        return []

    def version(self) -> str:
        """Unknown to us: the URL stands for it."""
        return self.url

    def start(self, folder: Path, cores: tuple[int, ...]) -> Engine:
        """Attach once it gives a token."""
        engine = Attached(self.name, self.endpoint(self.url))
        engine.wait_for_token(self.startup_timeout)
        return engine

    def headers(self) -> dict[str, str]:
        """Those that variables are named for, and the key as a bearer token."""
        return {name: os.environ[variable] for name, variable in self.headers_env.items()} | bearer(self.api_key_env)

    def gauges(self) -> Names:
        """Those that were named."""
        return {ours: VLLM_CACHE if theirs == VLLM_CACHE.name else theirs for ours, theirs in self.gauge_names.items()}

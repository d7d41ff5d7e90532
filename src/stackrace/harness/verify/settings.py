"""How equivalence is checked, as conf/verify has it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from stackrace.harness.errors import UsageError, require

_COUNTS = ("prefixes", "shortest", "longest", "greedy", "greedy_tokens", "logprobs", "concurrency")
_NUMBERS = ("mean_limit", "worst_limit", "gap_limit", "noise_factor", "far_factor", "timeout")
_MOST = 20  # log-probabilities that servers tell


class Settings(NamedTuple):
    """The keys of conf/verify."""

    seed: int
    prefixes: int
    shortest: int
    longest: int
    exact: list[int]
    greedy: int
    greedy_tokens: int
    logprobs: int
    concurrency: int
    mean_limit: float
    worst_limit: float
    gap_limit: float
    noise_factor: float
    far_factor: float
    tail: float
    device: str
    timeout: float


def parse(node: Mapping[str, Any]) -> Settings:
    """The `verify` of a resolved configuration. UsageError for a value that cannot be."""
    missing = [name for name in Settings._fields if name not in node]
    if missing:
        raise UsageError(f"verify lacks {', '.join(missing)}: with verify=none leave verify.* out")
    settings = Settings(**node)
    for name in _COUNTS:
        require(f"verify.{name}", getattr(settings, name), int, lambda v: v > 0, "a whole number above 0")
    for name in _NUMBERS:
        require(f"verify.{name}", getattr(settings, name), (int, float), lambda v: v > 0, "a number above 0")
    require("verify.seed", settings.seed, int, lambda v: v >= 0, "a whole number, 0 or more")
    least = settings.shortest
    require("verify.longest", settings.longest, int, lambda v: v >= least, f"verify.shortest={least} or more")
    require("verify.logprobs", settings.logprobs, int, lambda v: v <= _MOST, f"{_MOST} at most")
    require("verify.tail", settings.tail, (int, float), lambda v: 0 <= v < 1, "a share from 0 to below 1")
    for length in settings.exact:
        require("verify.exact", length, int, lambda v: v > 0, "a list of whole numbers above 0")
    require("verify.device", settings.device, str, lambda v: v.split(":")[0] in ("cpu", "cuda"), "cpu or cuda")
    return settings

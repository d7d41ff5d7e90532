"""What a data set holds that cannot be asked: refused with its place, or left out, counted and told."""

import sys
from functools import cache
from pathlib import Path

from stackrace.harness.errors import UsageError, require


class Skipped:
    """The bad lines or entries of one file."""

    def __init__(self, path: str, setting: str, policy: str) -> None:
        """`policy`, the value of `setting`: error or skip."""
        self._path = path
        self._setting = setting
        self._policy = policy
        self._first: str | None = None
        self._count = 0

    def add(self, place: str, error: ValueError) -> None:
        """Note that what lies at `place` is bad; UsageError unless such are to be skipped."""
        if self._policy == "error":
            raise UsageError(
                f"workload.path={self._path}: {place}: {error}: mend it, or leave such out by {self._setting}=skip"
            )
        self._first = self._first or f"{place}: {error}"
        self._count += 1

    def tell(self, read: str) -> None:
        """One line to stderr, if anything was left out; `read` says of how many."""
        if self._count:
            _say(f"stackrace: {self._path}: {self._count} of {read} left out, the first {self._first}")


def check_policy(setting: str, policy: str) -> None:
    """UsageError unless `policy` is error or skip."""
    require(setting, policy, str, lambda v: v in ("error", "skip"), "error or skip")


def check_max_tokens(tokens: int | None) -> None:
    """UsageError unless it is a limit on prompt and output together, or None for no limit."""
    if tokens is not None:
        require("workload.max_tokens", tokens, int, lambda v: v > 1, "a whole number above 1, or null")


def cannot_read(path: str, error: OSError) -> UsageError:
    """The error for a data set that is not there."""
    return UsageError(f"workload.path={path}: {error.strerror or error}: give the path of a file")


def absolute(path: str) -> Path:
    """Where a path of the configuration lies."""
    return Path(path).expanduser()


@cache  # a schedule is drawn more than once
def _say(line: str) -> None:
    print(line, file=sys.stderr)

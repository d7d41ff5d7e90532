"""Every error that stackrace raises on purpose.

StackraceError
├── UsageError          what was asked for cannot be done: one line, exit code 2
├── EngineError         an engine did not start, or stopped
│   ├── EngineDied      it exited, or answers no more; carries the tail of its log
│   ├── EngineHangs     it runs, but sends nothing any more
│   └── EngineTimeout   it runs, but gave no token in time
├── InstallFailed       pip could not fill an engine's environment or bundle; carries the tail of its log
├── LoadGeneratorDied   our own client's process ended before the race was over
├── TelemetryError      a source of telemetry could not be read: run.json says so, the race goes on
├── ProtocolError       a server answered something that is not the dialect we speak
└── PointFailed         a point of a sweep ended without a result; its folder says why
"""

from collections.abc import Callable
from typing import Any


class StackraceError(Exception):
    """Base of all errors below."""


class UsageError(StackraceError):
    """What was asked for cannot be done. The message is one line: what was wrong, with the value, and the remedy."""


class EngineError(StackraceError):
    """An engine did not start, or stopped."""


class EngineDied(EngineError):
    """The engine ended by itself, or what is left of it is broken; the message ends with the last lines of its log."""


class EngineHangs(EngineError):
    """Requests are in flight, and nothing has come for any of them for too long."""


class EngineTimeout(EngineError):
    """The engine runs but did not answer in time."""


class InstallFailed(StackraceError):
    """pip could not fill an engine's environment or bundle; the message ends with its last lines."""


class LoadGeneratorDied(StackraceError):
    """The load generator's process ended before the race was over; the message ends with what it printed."""


class TelemetryError(StackraceError):
    """A source of telemetry could not be read; the message says why."""


class ProtocolError(StackraceError):
    """A server answered bytes that are not the dialect we speak; the message quotes them."""


class PointFailed(StackraceError):
    """One point of a sweep ended without a result; its run folder says why."""


def one_line(error: Exception) -> str:
    """The message of an error, whatever lines it came in, as one."""
    return " ".join(str(error).split())


def require(name: str, value: object, kind: type | tuple[type, ...], holds: Callable[[Any], bool], wanted: str) -> None:
    """Raise a UsageError naming the setting and its value unless it is of `kind` and `holds` is true of it."""
    fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    if not fits or not holds(value):
        raise UsageError(f"{name}={value!r}: must be {wanted}")

"""Every error that stackrace raises on purpose.

StackraceError
├── UsageError          what was asked for cannot be done: one line, exit code 2
├── EngineError         an engine did not start, or stopped
│   ├── EngineDied      it exited; carries the tail of its log
│   └── EngineTimeout   it runs, but gave no token in time
├── ProtocolError       a server answered something that is not the dialect we speak
└── PointFailed         a point of a sweep ended without a result; its folder says why
"""


class StackraceError(Exception):
    """Base of all errors below."""


class UsageError(StackraceError):
    """What was asked for cannot be done. The message is one line: what was wrong, with the value, and the remedy."""


class EngineError(StackraceError):
    """An engine did not start, or stopped."""


class EngineDied(EngineError):
    """The engine's process ended by itself; the message ends with the last lines of its log."""


class EngineTimeout(EngineError):
    """The engine runs but did not answer in time."""


class ProtocolError(StackraceError):
    """A server answered bytes that are not the dialect we speak; the message quotes them."""


class PointFailed(StackraceError):
    """One point of a sweep ended without a result; its run folder says why."""

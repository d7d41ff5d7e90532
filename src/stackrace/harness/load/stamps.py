"""When the kernel received what a read brought: SO_TIMESTAMPNS, and the map from its clock to ours."""

import contextlib
import socket
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stackrace.harness.clock import SECOND, now

ANCILLARY_BYTES = 64  # room for one stamp
STAMP_BYTES = 16  # struct timespec: seconds and nanoseconds of CLOCK_REALTIME
NO_STAMP = bytes(STAMP_BYTES)
SAMPLE_EVERY = SECOND // 10
_SO_TIMESTAMPNS = 35
_TRIES = 5

Nanoseconds = npt.NDArray[np.int64]


class Offset(NamedTuple):
    """CLOCK_REALTIME - CLOCK_MONOTONIC at `time` (monotonic), all nanoseconds; right to within `width`."""

    time: int
    offset: int
    width: int


def enable(sock: socket.socket) -> None:
    """Have the kernel stamp what this socket receives, where it can (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)


def sample_offset() -> Offset:
    """The narrowest of five pairs of readings of the clocks."""
    return min((_pair() for _ in range(_TRIES)), key=lambda o: o.width)


def largest_step(offsets: Sequence[Offset]) -> float:
    """The most that the offset changed from one sample to the next, in seconds: what a set or slewed clock does."""
    steps = np.abs(np.diff([o.offset for o in offsets]))
    return float(steps.max() / SECOND) if len(steps) else 0.0


def on_our_clock(
    kernel: bytes, user: Nanoseconds, offsets: Sequence[Offset]
) -> tuple[Nanoseconds, npt.NDArray[np.bool_]]:
    """Kernel stamps as nanoseconds of CLOCK_MONOTONIC, and which reads had one; `user` stamps serve for the others.

    `kernel` holds STAMP_BYTES a read. A stamp is never later than the user-space one, which was taken after it.
    """
    timespecs = np.frombuffer(kernel, dtype=np.int64).reshape(-1, 2)
    stamped = timespecs[:, 0] != 0
    if not stamped.any() or not offsets:
        return user, np.zeros(len(user), dtype=np.bool_)
    base = offsets[0].offset
    rough = timespecs[:, 0] * SECOND + timespecs[:, 1] - base
    drift = np.interp(rough, [o.time for o in offsets], [o.offset - base for o in offsets])
    ours = np.minimum(rough - np.round(drift).astype(np.int64), user)
    return np.where(stamped, ours, user), stamped


def _pair() -> Offset:
    before = now()
    real = time.time_ns()
    after = now()
    middle = (before + after) // 2
    return Offset(middle, real - middle, after - before)

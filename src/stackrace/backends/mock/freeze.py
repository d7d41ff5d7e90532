"""A server that hangs for a while."""

import time

from stackrace.backends.mock.behaviour import Behaviour
from stackrace.backends.mock.times import nanoseconds
from stackrace.harness.clock import SECOND, now

NEVER = 1 << 62


class Freeze:
    """Begins some time after the first streamed request; what was due then goes out late, when it is over."""

    def __init__(self, b: Behaviour) -> None:
        self._after, self._length = b.freeze_after, nanoseconds(b.freeze)
        self.begins = NEVER  # ns

    def count_from(self, arrived: int) -> None:
        """The first streamed request arrived at `arrived` (ns); later ones change nothing."""
        if self._after is not None:
            self.begins, self._after = arrived + nanoseconds(self._after), None

    def sit_out(self) -> None:
        """Return at once, or when the freeze is over."""
        if now() < self.begins:
            return
        ends, self.begins = self.begins + self._length, NEVER
        while (left := ends - now()) > 0:
            time.sleep(left / SECOND)

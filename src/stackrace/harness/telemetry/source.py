"""What telemetry is read from."""

from typing import NamedTuple, Protocol


class Reading(NamedTuple):
    """A number that a source tells, in SI units."""

    name: str
    value: float
    device: int | None = None


class Source(Protocol):
    """Something that tells numbers when it is asked, always from one thread."""

    name: str

    def read(self) -> list[Reading]:
        """What it tells now; what it does not know is left out. TelemetryError if it could not be read."""
        ...

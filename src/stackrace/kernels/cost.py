"""What an operation cannot do without: the ruler that kernels are held to."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Of one call."""

    flops: int  # a multiplication and its addition count as two
    bytes: int  # each input read once, each output written once

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

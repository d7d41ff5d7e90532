"""What came on the streams, unparsed: a worker's journal of it, and what each request got out of that."""

from array import array
from collections import defaultdict
from itertools import accumulate, pairwise
from typing import NamedTuple

from stackrace.harness.load.stamps import STAMP_BYTES


class Reads(NamedTuple):
    """Successive reads of a worker's streams, packed to go to another process."""

    positions: "array[int]"  # of the request that each was for, in the schedule
    stamps: "array[int]"  # just after the read, ns of CLOCK_MONOTONIC
    kernel: bytes  # STAMP_BYTES a read, zeros where the kernel told none
    sizes: "array[int]"
    data: bytes


class Journal:
    """Every read of every stream, in order: columns with an entry a read, emptied from the front.

    What was taken is let go of when it is half of what there is: to move the rest each time would cost more than it.
    """

    __slots__ = ("_last", "_taken", "data", "kernel", "positions", "stamps")

    def __init__(self) -> None:
        self._taken = 0
        self._last: int | None = None
        self.positions: list[int] = []
        self.stamps: list[int] = []
        self.kernel: list[bytes] = []
        self.data: list[bytes] = []

    def __len__(self) -> int:
        return len(self.data) - self._taken

    @property
    def last(self) -> int | None:
        """Stamp of the latest entry ever made."""
        return self.stamps[-1] if self.stamps else self._last

    def take(self, most: int) -> Reads:
        """The oldest entries, `most` of them if there are as many; they are gone from here."""
        begin, end = self._taken, min(self._taken + most, len(self.data))
        data = self.data[begin:end]
        reads = Reads(
            array("q", self.positions[begin:end]),
            array("q", self.stamps[begin:end]),
            b"".join(self.kernel[begin:end]),
            array("q", map(len, data)),
            b"".join(data),
        )
        self._taken, self._last = end, self.last
        if 2 * end >= len(self.data):
            for column in (self.positions, self.stamps, self.kernel, self.data):
                del column[:end]
            self._taken = 0
        return reads


class Received:
    """What one request got: columns with an entry a read, as in the journal."""

    __slots__ = ("data", "kernel", "stamps")

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.stamps: list[int] = []
        self.kernel: list[bytes] = []


def hand_out(reads: Reads, requests: defaultdict[int, Received]) -> None:
    """Append each read to what its request has received."""
    stops = pairwise(accumulate(reads.sizes, initial=0))
    for i, (position, stamp, (begin, end)) in enumerate(zip(reads.positions, reads.stamps, stops, strict=True)):
        received = requests[position]
        received.stamps.append(stamp)
        received.kernel.append(reads.kernel[i * STAMP_BYTES : (i + 1) * STAMP_BYTES])
        received.data.append(reads.data[begin:end])

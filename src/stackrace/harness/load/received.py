"""What came on a stream, read by read, unparsed."""

from array import array
from collections.abc import Callable
from itertools import accumulate, pairwise

_BYTES_A_READ = 500  # with what Python needs to keep them


class Received:
    """Three columns with an entry a read. Packs itself into few large pieces when it goes to another process."""

    __slots__ = ("data", "kernel", "stamps")

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.stamps: list[int] = []  # just after the read, ns of CLOCK_MONOTONIC
        self.kernel: list[bytes] = []  # stamps.STAMP_BYTES a read, zeros where the kernel told none

    @property
    def size(self) -> int:
        """Bytes, about: of events of a usual size."""
        return _BYTES_A_READ * len(self.data)

    def __reduce__(self) -> "tuple[Callable[..., Received], tuple[bytes, array[int], array[int], bytes]]":
        sizes = array("q", map(len, self.data))
        return _unpacked, (b"".join(self.data), sizes, array("q", self.stamps), b"".join(self.kernel))


def _unpacked(data: bytes, sizes: "array[int]", stamps: "array[int]", kernel: bytes) -> Received:
    received = Received()
    received.data = [data[a:b] for a, b in pairwise(accumulate(sizes, initial=0))]
    received.stamps, received.kernel = list(stamps), [kernel]
    return received

"""A concurrency cap that all workers share: a place freed by one goes to whoever has waited longest, in whichever."""

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

_WORD = struct.Struct("=q")


@dataclass(frozen=True)
class SlotTable:
    """What the workers of one race share; made by their parent, inherited as open files.

    Word 0 counts the releases so far, word 1 + r holds when release r happened (ns of CLOCK_MONOTONIC).
    """

    cap: int
    tickets: int  # of all workers together
    file: int
    wake: tuple[tuple[int, int], ...]  # for each worker a pipe, (read, write) end

    @classmethod
    def make(cls, cap: int, tickets: int, workers: int) -> "SlotTable":
        """With memory and pipes of its own; `close` frees them."""
        with tempfile.TemporaryFile() as file:
            file.truncate(_WORD.size * (1 + tickets))
            table = os.dup(file.fileno())
        pipes = tuple(os.pipe() for _ in range(workers))
        for end in (end for pipe in pipes for end in pipe):
            os.set_blocking(end, False)
        return cls(cap, tickets, table, pipes)

    @property
    def files(self) -> tuple[int, ...]:
        """What a worker has to inherit."""
        return (self.file, *(end for pipe in self.wake for end in pipe))

    def close(self) -> None:
        """Free what `make` opened."""
        for file in self.files:
            os.close(file)


class Slots:
    """One worker's view of the table. Ticket t has its slot once t + 1 - cap slots have been released."""

    def __init__(self, table: SlotTable, worker: int) -> None:
        self._table = table
        self._worker = worker
        self._words = mmap.mmap(table.file, _WORD.size * (1 + table.tickets))

    @property
    def cap(self) -> int:
        """Slots of all workers together."""
        return self._table.cap

    @property
    def wake_file(self) -> int:
        """Readable when another worker has released what a ticket of this one waits for."""
        return self._table.wake[self._worker][0]

    def calm(self) -> None:
        """Take the wake-up."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.wake_file, 4096):
                pass

    def free_since(self, ticket: int) -> int | None:
        """When the ticket's slot came free (ns; 0: from the start), None while it has none."""
        needed = ticket - self.cap
        if needed < 0:
            return 0
        with self._locked():
            return self._read(1 + needed) if self._read(0) > needed else None

    def release(self, time: int) -> None:
        """A slot came free at `time`."""
        with self._locked():
            count = self._read(0)
            self._write(1 + count, time)
            self._write(0, count + 1)
        ticket = count + self.cap
        owner = ticket % len(self._table.wake)
        if ticket < self._table.tickets and owner != self._worker:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._table.wake[owner][1], b"!")

    def close(self) -> None:
        """Let the memory go."""
        self._words.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if len(self._table.wake) == 1:
            yield
            return
        fcntl.lockf(self._table.file, fcntl.LOCK_EX)  # let go by the kernel if a worker dies with it
        try:
            yield
        finally:
            fcntl.lockf(self._table.file, fcntl.LOCK_UN)

    def _read(self, word: int) -> int:
        value: int = _WORD.unpack_from(self._words, word * _WORD.size)[0]
        return value

    def _write(self, word: int, value: int) -> None:
        _WORD.pack_into(self._words, word * _WORD.size, value)

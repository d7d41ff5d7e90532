"""The harness's side of the load generator: starts workers and parser, sets them off together, reads what comes."""

import contextlib
import fcntl
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO

from stackrace.harness.clock import SECOND, now
from stackrace.harness.errors import LoadGeneratorDied
from stackrace.harness.load import messages
from stackrace.harness.load.health import Health
from stackrace.harness.load.messages import (
    Cold,
    Enough,
    Finished,
    Go,
    Job,
    Message,
    Ready,
    Round,
    RoundDone,
    Started,
    Tick,
    WorkerJob,
)
from stackrace.harness.load.slots import SlotTable
from stackrace.harness.types import Record

_HEAD_START = SECOND // 20
_LISTEN = 0.5  # seconds
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", None)

NextRound = Callable[[RoundDone | None], Round | None]
"""The warm-up's next round, given what the last one showed (None: it is the first); None: enough."""


class LoadGenerator:
    """Running workers and their parser. Use as a context manager: on leaving, the processes are gone."""

    def __init__(self, job: Job, next_round: NextRound | None = None) -> None:
        self._job = job
        self._next_round = next_round
        self._ready = 0
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._slots = _slots(job)
        pipes = [os.pipe() for _ in range(job.workers)]
        self._workers = [self._start_worker(i, out) for i, (_, out) in enumerate(pipes)]
        self._parser = self._start_parser([end for end, _ in pipes])
        for end in (end for pipe in pipes for end in pipe):
            os.close(end)
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        for i, worker in enumerate(self._workers):
            warms_up = i == 0 and next_round is not None
            self._say(worker, WorkerJob(job=job, worker=i, slots=self._slots, warms_up=warms_up))

    def __enter__(self) -> "LoadGenerator":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for process in (*self._workers, self._parser):
            process.kill()
            process.wait()
        self._reader.join()
        for pipe in (self._parser.stdout, self._errors):
            if pipe is not None:
                pipe.close()
        if self._slots is not None:
            self._slots.close()

    def stop(self) -> None:
        """Have the workers give up what is in flight; their last messages still come."""
        for worker in self._workers:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()

    def messages(self, interval: float) -> Iterator[Message | None]:
        """Messages as they come, None whenever `interval` seconds passed without one; ends with the workers.

        Raises LoadGeneratorDied, with what it printed, if one of them failed: the others are stopped.
        """
        while True:
            try:
                message = self._inbox.get(timeout=interval)
            except queue.Empty:
                self._check()
                yield None
                continue
            if message is None:
                break
            if isinstance(message, Ready):
                self._on_ready()
            elif isinstance(message, Tick):
                self._check()
            yield message
            if isinstance(message, Cold | RoundDone):
                self._warm_up(message)
        for process in (*self._workers, self._parser):
            process.wait()
        self._check()

    def _warm_up(self, message: Cold | RoundDone) -> None:
        assert self._next_round is not None
        order = self._next_round(message if isinstance(message, RoundDone) else None)
        self._say(self._workers[0], order or Enough())

    def _on_ready(self) -> None:
        self._ready += 1
        if self._ready == len(self._workers):
            go = Go(now() + _HEAD_START)
            for worker in self._workers:
                self._say(worker, go)

    def _check(self) -> None:
        for process in (*self._workers, self._parser):
            if process.poll():
                self.stop()
                self._errors.seek(0)
                said = self._errors.read().decode(errors="replace").strip().splitlines()
                raise LoadGeneratorDied(f"the load generator ended with {process.returncode}: {' '.join(said[-1:])}")

    def _say(self, worker: subprocess.Popen[bytes], message: object) -> None:
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it died: `messages` will say with what words
            worker.stdin.write(messages.encode(message))
            worker.stdin.flush()

    def _start_worker(self, worker: int, out: int) -> subprocess.Popen[bytes]:
        if _F_SETPIPE_SZ is not None:
            with contextlib.suppress(OSError):  # more than this user may have: then it is smaller
                fcntl.fcntl(out, _F_SETPIPE_SZ, _PIPE_BYTES)
        return subprocess.Popen(
            [sys.executable, "-m", "stackrace.harness.load.worker"],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=self._errors,
            pass_fds=self._slots.files if self._slots else (),
            start_new_session=True,  # Ctrl-C is for the harness, which then stops the workers in order
        )

    def _start_parser(self, files: list[int]) -> subprocess.Popen[bytes]:
        cores = ",".join(map(str, self._job.parser_cores))
        return subprocess.Popen(
            [sys.executable, "-m", "stackrace.harness.load.parser", *map(str, files), f"cores={cores}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=files,
            start_new_session=True,
        )

    def _read(self) -> None:
        assert self._parser.stdout is not None
        try:
            while (message := messages.read(self._parser.stdout)) is not None:
                self._inbox.put(message)
        finally:
            self._inbox.put(None)


@dataclass
class Collected:
    """What one race told: its start (ns of the clock), records (times after it, ids: positions), workers' health."""

    start: int = 0
    records: list[Record] = field(default_factory=list)
    health: list[Health] = field(default_factory=list)
    stamped: bool = True  # by the kernel, all of it


def collect(job: Job, next_round: NextRound | None = None) -> Collected:
    """Run a job to its end. Raises LoadGeneratorDied."""
    found = Collected()
    with LoadGenerator(job, next_round) as generator:
        for message in generator.messages(_LISTEN):
            if isinstance(message, Started):
                found.start = message.start
            elif isinstance(message, Finished):
                found.records.append(message.record)
                found.stamped &= message.stamped
            elif isinstance(message, Health):
                found.health.append(message)
    if len(found.health) < job.workers:
        raise LoadGeneratorDied("the load generator ended before the race was over")
    return found


def _slots(job: Job) -> SlotTable | None:
    if job.concurrency is None:
        return None
    return SlotTable.make(job.concurrency, job.sessions, job.workers)

"""The parent's side of the load generator: starts the worker, reads its captures, turns them into records."""

import contextlib
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

from stackrace.harness.errors import LoadGeneratorDied
from stackrace.harness.load import messages
from stackrace.harness.load.driver import Capture
from stackrace.harness.load.response import Answer, parse
from stackrace.harness.types import Record


class LoadGenerator:
    """A running worker. Use as a context manager: on leaving, the process is gone."""

    def __init__(self, job: messages.Job) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stackrace.harness.load.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the harness, which then stops the worker in order
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: `messages` will say with what words
            self._process.stdin.write(messages.encode(job))
            self._process.stdin.flush()
        self._inbox: queue.SimpleQueue[messages.Message | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "LoadGenerator":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def stop(self) -> None:
        """Have it give up what is in flight; its last messages still come."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def messages(self, interval: float) -> Iterator[messages.Message | None]:
        """Messages as they come, None whenever `interval` seconds passed without one; ends with the worker.

        Raises LoadGeneratorDied, with what it printed, if it failed.
        """
        while True:
            try:
                message = self._inbox.get(timeout=interval)
            except queue.Empty:
                yield None
                continue
            if message is None:
                break
            yield message
        if self._process.wait() != 0:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise LoadGeneratorDied(f"the load generator ended with {self._process.returncode}: {' '.join(said[-1:])}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            while (message := messages.read(self._process.stdout)) is not None:
                self._inbox.put(message)
        finally:
            self._inbox.put(None)


def record(capture: Capture, request_id: int, start: int) -> Record:
    """Parse a capture into a record, its times after `start` (ns)."""
    answer = parse(capture.reads)
    return Record(
        id=request_id,
        due=capture.due - start,
        slot=capture.slot - start,
        sent=_after(capture.sent, start),
        body_sent=_after(capture.body_sent, start),
        chunk_times=[t - start for t in answer.chunk_times],
        chunk_tokens=answer.chunk_tokens,
        output_ids=answer.output_ids or None,
        end=capture.end - start,
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.output_tokens,
        cached_tokens=answer.cached_tokens,
        token_source=answer.token_source,
        reconnected=capture.reconnected,
        censored=capture.censored,
        error=None if capture.censored else answer.error or capture.error or _unfinished(answer),
    )


def _after(time: int | None, start: int) -> int | None:
    return None if time is None else time - start


def _unfinished(answer: Answer) -> str | None:
    if not answer.complete:
        return "the response ended in the middle"
    if not answer.done:
        return "the stream ended without [DONE]"
    return None if answer.chunk_times else "no token came"

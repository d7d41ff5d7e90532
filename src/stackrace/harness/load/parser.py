"""The parser's process: python -m stackrace.harness.load.parser FD..., workers' messages in, the harness's out.

It runs beside the race at the lowest priority, so that what it needs is taken from nobody.
"""

import os
import selectors
import sys
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from stackrace.harness import host
from stackrace.harness.load import messages, stamps
from stackrace.harness.load.driver import Capture
from stackrace.harness.load.messages import Finished, Offsets, Started
from stackrace.harness.load.outbox import Parcel
from stackrace.harness.load.received import Received, hand_out
from stackrace.harness.load.response import Answer, parse
from stackrace.harness.load.stamps import Nanoseconds, Offset
from stackrace.harness.types import Record

_READ_BYTES = 1 << 20


class Parser:
    """Turns one worker's messages into what the harness wants to know."""

    def __init__(self) -> None:
        self._start = 0
        self._offsets: list[Offset] = []
        self._received: defaultdict[int, Received] = defaultdict(Received)  # by position, of requests in flight
        self._captures: list[Capture] = []  # until the offset of the clocks after them is known

    def take(self, message: object) -> Iterator[object]:
        """What follows from one message; captures wait for the next sample of the clocks."""
        if isinstance(message, Parcel):
            hand_out(message.reads, self._received)
            self._captures += message.captures
            return
        if isinstance(message, Offsets):
            self._offsets += message.samples
            yield from self.finish()
            return
        if isinstance(message, Started):
            self._start = message.start
        yield message

    def finish(self) -> Iterator[Finished]:
        """What waits, with the samples there are."""
        captures, self._captures = self._captures, []
        for capture in captures:
            received = self._received.pop(capture.position, Received())
            yield record(capture, received, self._start, self._offsets)


def record(capture: Capture, received: Received, start: int, offsets: list[Offset]) -> Finished:
    """Parse what a request received into its record, times after `start` (ns), the id its position in the schedule."""
    answer = parse(received.data)
    user = np.array(received.stamps, dtype=np.int64)
    times, stamped = stamps.on_our_clock(b"".join(received.kernel), user, offsets)
    reads = np.array(answer.chunk_reads, dtype=np.int64)
    finished = Record(
        id=capture.position,
        due=capture.due - start,
        slot=capture.slot - start,
        sent=_after(capture.sent, start),
        body_sent=_after(capture.body_sent, start),
        chunk_times=(times[reads] - start).tolist(),
        chunk_tokens=answer.chunk_tokens,
        chunk_lateness=(user - times)[reads].tolist() if stamped.any() else None,
        chunk_coalesced=_coalesced(reads),
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
    return Finished(finished, bool(stamped.all()))


def _coalesced(reads: Nanoseconds) -> list[bool]:
    """For each chunk, whether a later one came with the same read and so gave it its time."""
    return [*(np.diff(reads) == 0).tolist(), False] if len(reads) else []


def _after(time: int | None, start: int) -> int | None:
    return None if time is None else time - start


def _unfinished(answer: Answer) -> str | None:
    if not answer.complete and not answer.is_at_close:
        return "the response ended in the middle"
    if not answer.done:
        return "the stream ended without [DONE]"
    return None if answer.chunk_reads else "no token came"


def main() -> None:
    """Entry point: the files to read from as arguments, then `cores=0,1`."""
    host.die_with_parent()
    *files, cores = sys.argv[1:]
    host.pin(tuple(map(int, cores.removeprefix("cores=").split(","))))
    host.lower_priority()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with selectors.DefaultSelector() as selector:
        for file in map(int, files):
            selector.register(file, selectors.EVENT_READ, (messages.Unframer(), Parser()))
        while selector.get_map():
            for key, _ in selector.select():
                unframer, parser = key.data
                data = os.read(key.fd, _READ_BYTES)
                if not data:
                    selector.unregister(key.fd)
                results = [r for m in unframer.feed(data) for r in parser.take(m)] if data else parser.finish()
                for result in results:
                    out.write(messages.encode(result))
            out.flush()


if __name__ == "__main__":
    main()

"""One soak: a server, its requests, and what must be left of them in the end."""

import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop
from server_kit import call, metrics, prompt

from soak.asks import MODEL
from soak.drive import Driver, Tally
from soak.fault import Fault, must
from soak.known import Book
from soak.memory import GROWTH, Growth, fit
from soak.requests import Maker
from soak.server import PAGES, QUEUE, end, serving
from soak.wire import post
from stackrace.backends.mla.cache import PAGE

REST = 3.0  # seconds in which a server that nobody asks comes to rest
LONG = PAGES * PAGE - PAGE  # output tokens, each of which takes a step
STEPS = "iteration_tokens_total_count"
SHOWN = 3000  # characters of the server's stderr


class Bout(NamedTuple):
    """What is run; see `python -m soak --help`."""

    requests: int
    seconds: float
    seed: int
    concurrency: int
    module: Sequence[str] = ()  # the interpreter's words, instead of the server's module


class Outcome(NamedTuple):
    """What there is to tell of a soak that found no fault."""

    tally: Tally
    growth: Growth
    metrics: dict[str, float]


def soak(bout: Bout, path: Path, book: Book) -> Outcome:
    """Serve the checkpoint, ask, look what is left. Fault: the server did what it must not."""
    stderr = path.parent / "stderr"
    with serving(path, bout.module, stderr) as (process, port):
        driver = Driver(port, Maker(book, bout.seed), bout.requests, bout.seconds)
        try:
            uvloop.run(driver.run(process.pid, bout.concurrency))
            found = _rest(port)
            growth = fit(driver.tally.memory)
            check(driver.tally, growth, found)
            _fill(port)
            end(process)
        except (Fault, OSError) as error:
            raise Fault(f"{error}\nserver's stderr: {stderr.read_text()[:SHOWN] or 'empty'}") from error
    said = stderr.read_text()
    must(not said, f"the server wrote to stderr: {said[:SHOWN]}")
    return Outcome(driver.tally, growth, found)


def _rest(port: int) -> dict[str, float]:
    """The metrics once nothing is there any more."""
    deadline = time.monotonic() + REST
    gauges = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
    while any((found := metrics(port))[name] for name in gauges):
        left = {name: found[name] for name in gauges}
        must(time.monotonic() < deadline, f"{REST:g} s after the last request there are still {left}")
        time.sleep(0.05)
    return found


def check(tally: Tally, growth: Growth, found: dict[str, float]) -> None:
    """The server's own counts against the client's, and its memory. Fault: they do not fit."""
    success, rejections = found["request_success_total"], found["admission_rejections_total"]
    most = tally.choices + tally.left
    must(tally.choices <= success <= most, f"{success:g} sequences ended well; {tally.choices} to {most} were due")
    seen, gone = tally.count("429"), tally.count("left")
    must(seen <= rejections <= seen + gone, f"{rejections:g} rejections are counted; {seen} to {seen + gone} were due")
    must(found["generation_tokens_total"] >= tally.tokens, "fewer tokens are counted than were answered")
    grown = f"{growth.grown / 1e6:.1f} MB after the warm-up, {growth.slope / 1e3:.1f} kB a second"
    must(growth.grown < GROWTH, f"memory grew by {grown}; {GROWTH / 1e6:g} MB are allowed")


def _fill(port: int) -> None:
    """No place in the queue lacks, no page does: requests that need all of them are served, and end when left."""
    _complete(port, [[5]] * QUEUE, 1, QUEUE)
    before = _rest(port)
    _leave(port)
    steps = (_rest(port)[STEPS] - before[STEPS]) / LONG
    must(steps < 0.5, f"a request that was left at its first token went on for {steps:.0%} of its length")
    _complete(port, prompt(PAGES * PAGE - 9), 10, 10)
    _rest(port)


def _leave(port: int) -> None:
    body = {"model": MODEL, "prompt": [5], "max_tokens": LONG, "ignore_eos": True, "stream": True}
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(post("/v1/completions", body))
        connection.recv(1)


def _complete(port: int, given: object, most: int, due: int) -> None:
    body = {"model": MODEL, "prompt": given, "max_tokens": most, "temperature": 0, "ignore_eos": True}
    status, content = call(port, "POST", "/v1/completions", body)
    count = json.loads(content)["usage"]["completion_tokens"] if status == 200 else 0
    must(count == due, f"a request for all pages, or all places, got {status} {content[:300]!r}")

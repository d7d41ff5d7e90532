"""One trial: the load generator against the mock, which knows when it sent what."""

import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import orjson

from stackrace.backends.garage import Garage
from stackrace.harness import host
from stackrace.harness.calibrate.outcome import Outcome, compare
from stackrace.harness.clock import SECOND
from stackrace.harness.composing import composed
from stackrace.harness.load.generator import Collected, collect
from stackrace.harness.load.messages import Job
from stackrace.harness.point import build_backend
from stackrace.harness.schedule import Schedule
from stackrace.harness.types import Endpoint, Request, Sampling

_PATIENCE = 60.0  # seconds
_LONGEST = 600.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a trial asks: how the mock is set, what is sent to it, and by how many workers."""

    mock: Mapping[str, Any]
    schedule: Schedule
    workers: int = 1
    concurrency: int | None = None


class Lab:
    """A place for trials: the mock on one core, the load generator on cores of its own."""

    def __init__(self, cores: host.Cores) -> None:
        self._cores = cores
        self._garage = Garage()
        self._folder = TemporaryDirectory(prefix="stackrace-calibrate-")

    def __enter__(self) -> "Lab":
        host.pin(self._cores.engine)  # this process listens, and must not disturb who is measured
        return self

    def __exit__(self, *_: object) -> None:
        host.pin(host.usable_cores())
        self._garage.close()
        self._folder.cleanup()

    def trial(self, asked: Asked) -> Outcome:
        """Run it. Raises LoadGeneratorDied or EngineError."""
        endpoint = self.start(asked.mock)
        truth_of(endpoint)  # forget what was before
        heard = self.race(asked, endpoint)
        return compare(heard.records, truth_of(endpoint), heard.start, heard.health, heard.stamped)

    def start(self, settings: Mapping[str, Any]) -> Endpoint:
        """A mock set like this, the running one if it is."""
        overrides = [f"backend.{name}={'null' if value is None else value}" for name, value in settings.items()]
        backend, _ = build_backend(composed("bench", ["backend=mock", "backend.record_truth=true", *overrides]))
        return self._garage.engine(backend, Path(self._folder.name, "mock"), self._cores.engine[:1], 0).endpoint

    def race(self, asked: Asked, endpoint: Endpoint) -> Collected:
        """What the load generator tells of a trial."""
        path = Path(self._folder.name, "schedule.parquet")
        asked.schedule.save(path)
        return collect(_job(asked, endpoint, path, self._cores))


def ask(number: int, tokens: int, due: list[float], prompt_tokens: int = 4) -> Schedule:
    """`number` requests, due at these seconds, each with its position as its seed."""
    prompt = (5,) * prompt_tokens
    requests = tuple(Request(i, prompt, tokens, Sampling(0.0, 1.0, 0, i)) for i in range(number))
    return Schedule(requests, tuple(round(d * SECOND) for d in due))


def _job(asked: Asked, endpoint: Endpoint, path: Path, cores: host.Cores) -> Job:
    return Job(
        endpoint=endpoint,
        schedule=path,
        sessions=len(asked.schedule.sessions),
        concurrency=asked.concurrency,
        seconds=None,
        drain=_PATIENCE,
        connect_timeout=_PATIENCE,
        request_timeout=_LONGEST,
        stall_timeout=_PATIENCE,
        workers=asked.workers,
        cores=cores.load_generator,
        parser_cores=cores.engine,
    )


def truth_of(endpoint: Endpoint) -> list[Any]:
    """What the mock sent since it was last asked."""
    connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=_PATIENCE)
    try:
        connection.request("GET", "/truth")
        told: list[Any] = orjson.loads(connection.getresponse().read())["requests"]
    finally:
        connection.close()
    return told

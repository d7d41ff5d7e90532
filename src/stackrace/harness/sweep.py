"""A sweep: every point planned before the first is launched, finished ones skipped, failed ones survived."""

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf

from stackrace.backends.garage import Garage
from stackrace.harness import store
from stackrace.harness.capacity import Capacity, Found, first_level, rules_of
from stackrace.harness.errors import PointFailed, UsageError
from stackrace.harness.point import Point, plan
from stackrace.harness.progress import Progress
from stackrace.harness.race import race
from stackrace.harness.verify.checks import Checks


class Sweep:
    """What one `stackrace bench` does; Hydra calls `run` once a point, with `expect` before where it knows them all."""

    active: ClassVar["Sweep | None"] = None  # the one that Hydra's jobs of this process belong to

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._garage = Garage()
        self._checks = Checks()
        self._on_sigterm: signal.Handlers | Callable[[int, FrameType | None], Any] | int | None = None
        self._planned: dict[str, Point] = {}
        self.points: list[Point] = []
        self.found: list[Found] = []  # of searches
        self.failed: list[str] = []
        self.refused: UsageError | None = None

    def __enter__(self) -> "Sweep":
        Sweep.active = self
        if threading.current_thread() is threading.main_thread():
            self._on_sigterm = signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        Sweep.active = None
        if self._on_sigterm is not None:
            signal.signal(signal.SIGTERM, self._on_sigterm)
        self._progress.close()
        self._garage.close()

    def expect(self, configs: Iterable[DictConfig]) -> list[int]:
        """Plan all points; raises UsageError for the first that could not run, with nothing launched or written.

        Returns the order to run them in: repeat by repeat, and within one so that each engine is launched once.
        Of a search the point that it begins with is planned.
        """
        asked = list(configs)
        planned = [(_identity(cfg), plan(first_level(cfg))) for cfg in asked]
        points = [point for _, point in planned]
        engines = list(dict.fromkeys(p.fingerprint for p in points))
        order = sorted(
            range(len(points)), key=lambda i: (points[i].config["repeat"], engines.index(points[i].fingerprint))
        )
        to_run = [points[i] for i in order if not is_finished(points[i])]
        if not self._garage.is_busy:
            for point in to_run:
                point.backend.check_port()
        self._planned |= dict(planned)
        if any(_is_search(cfg) for cfg in asked):
            self._progress.expect_at_most(sum(rules_of(c).max_points if _is_search(c) else 1 for c in asked))
        else:
            self._progress.expect(to_run, len(points) - len(to_run))
        return order

    def run(self, cfg: DictConfig) -> dict[str, Any] | None:
        """Run one point unless it is finished, or one search; returns its run.json or result. Raises PointFailed."""
        identity = _identity(cfg)
        if identity not in self._planned:
            self.expect([cfg])
        point = self._planned[identity]
        if _is_search(cfg):
            return self._find(cfg, point)
        self.points.append(point)
        return store.read_meta(point.folder) if is_finished(point) else self._race(point)

    def _find(self, cfg: DictConfig, first: Point) -> dict[str, Any]:
        """Search: every measurement a point, all of them before one launch of the engine."""
        search = Capacity(cfg, first, self._measure)
        try:
            return search.go()
        finally:
            self.found.append(search.found)

    def _measure(self, cfg: DictConfig) -> Point:
        point = dataclasses.replace(plan(cfg), launch=0)
        self.points.append(point)
        if is_finished(point):
            self._progress.reuse(point)
        else:
            self._race(point)
        return point

    def _race(self, point: Point) -> dict[str, Any]:
        self._progress.begin(point)
        try:
            meta = race(point, self._garage, self._checks, self._progress.watch)
        except PointFailed as e:
            self.failed.append(str(e))
            self._progress.failed(str(e))
            raise
        self._progress.end(meta)
        return meta

    def run_and_note(self, cfg: DictConfig) -> dict[str, Any] | None:
        """Like `run`, but what goes wrong is kept in `failed` and `refused`: Hydra would print it in its own way."""
        try:
            return self.run(cfg)
        except PointFailed:
            return None
        except UsageError as e:
            self.refused = e
            return None


def is_finished(point: Point) -> bool:
    """Its folder holds a result. UsageError if a newer stackrace wrote it."""
    meta = store.read_meta(point.folder)
    return meta is not None and meta["status"] == "ok"


def _is_search(cfg: DictConfig) -> bool:
    return cfg.get("search") is not None


def _identity(cfg: DictConfig) -> str:
    return OmegaConf.to_yaml(cfg, sort_keys=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

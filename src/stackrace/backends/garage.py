"""Keeps the engine that is running, so that one launch serves every point that asks for the same engine."""

import contextlib
from pathlib import Path

from stackrace.backends.base import Backend
from stackrace.backends.running import Engine
from stackrace.harness.errors import EngineDied, EngineError


class Garage:
    """At most one engine at a time."""

    def __init__(self) -> None:
        self._running: tuple[str, Engine] | None = None
        self._failed: dict[str, EngineError] = {}

    def engine(self, backend: Backend, folder: Path, cores: tuple[int, ...], repeat: int) -> Engine:
        """The running engine if it is just this one and alive, else a new one, the old one being stopped first.

        Each repeat gets a launch of its own, so that what differs between launches shows between repeats. An engine
        that could not start is not tried again: its error is raised at once.
        """
        key = f"{backend.fingerprint()} {backend.checkpoint} {backend.port} {cores} {repeat}"
        if self._running is not None and self._running[0] == key:
            with contextlib.suppress(EngineDied):
                self._running[1].check_alive()
                return self._running[1]
        if key in self._failed:
            raise self._failed[key]
        self.close()
        try:
            engine = backend.start(folder, cores)
        except EngineError as e:
            self._failed[key] = e
            raise
        self._running = key, engine
        return engine

    @property
    def is_busy(self) -> bool:
        """An engine of ours is running."""
        return self._running is not None

    def close(self) -> None:
        """Stop what is running."""
        if self._running is not None:
            engine = self._running[1]
            self._running = None
            engine.stop()

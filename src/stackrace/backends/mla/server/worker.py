"""The engine in a thread of its own: messages in, token events out."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from stackrace.backends.mla.engine import Engine, TokenEvent
from stackrace.backends.mla.sequence import Sequence


class Abort(NamedTuple):
    """Drop the request of this id."""

    id: str


class ResetPrefixCache(NamedTuple):
    """Let nothing be found of what was computed before."""


class Stop(NamedTuple):
    """End the thread after the current step."""


class Worker:
    """Steps an engine while it has work and sleeps while it has none.

    Nothing is shared with the caller but messages, so that the engine may move to another process. Both
    callbacks run in the worker's thread.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[TokenEvent]], object],
        fail: Callable[[BaseException], object],
    ) -> None:
        """`deliver` gets each step's events; `fail` the error that ended the thread, if one did."""
        self.stats = engine.stats  # replaced after each step or message
        self._engine = engine
        self._deliver = deliver
        self._fail = fail
        self._inbox: SimpleQueue[Sequence | Abort | ResetPrefixCache | Stop] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin stepping."""
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Queue a request; the worker owns it from here."""
        self._inbox.put(sequence)

    def abort(self, id: str) -> None:
        """Drop a request, if it is still there, and free its pages."""
        self._inbox.put(Abort(id))

    def reset_prefix_cache(self) -> None:
        """Requests submitted from now on find nothing in the prefix cache."""
        self._inbox.put(ResetPrefixCache())

    def stop(self, timeout: float) -> bool:
        """Ask the thread to end and wait for it, seconds at most; whether it did."""
        self._inbox.put(Stop())
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._read_inbox():
                events = self._engine.step()
                self.stats = self._engine.stats
                if events:
                    self._deliver(events)
        except BaseException as error:
            self._fail(error)

    def _read_inbox(self) -> bool:
        """Act on every message, waiting for one if there is nothing else to do; False: stop."""
        while self._engine.idle or not self._inbox.empty():
            self.stats = self._engine.stats
            match self._inbox.get():
                case Abort(id):
                    self._engine.abort(id)
                case ResetPrefixCache():
                    self._engine.reset_prefix_cache()
                case Stop():
                    return False
                case sequence:
                    self._engine.submit(sequence)
        return True

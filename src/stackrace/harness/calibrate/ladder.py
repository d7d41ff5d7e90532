"""Which trials a calibration makes, and how far each ladder is right."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from stackrace.harness.calibrate.outcome import Outcome
from stackrace.harness.calibrate.trial import Asked, Lab, ask

_TTFT = 0.05  # seconds of the mock
_ALIKE = 0.9  # a mock that sends less than this share of what was asked is the limit itself


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One trial and what came of it."""

    ladder: str
    workers: int
    load: float  # as the ladder counts: events or requests a second, streams, tokens
    outcome: Outcome

    @property
    def is_whole(self) -> bool:
        """Nothing failed, nothing was lost."""
        return not self.outcome.failed and not self.outcome.lost

    def is_right(self, by: str, limit: float) -> bool:
        """At p99, by the stamps, or in sending (`lag`)."""
        p99 = getattr(self.outcome, by).p99
        return self.is_whole and p99 is not None and p99 <= limit


def staggered(settings: Mapping[str, Any], rate: float, workers: int = 1) -> Asked:
    """So many events a second, the streams spread over time."""
    return _streams(settings, max(1, round(rate / settings["stream_rate"])), workers, in_step=False)


def in_step(settings: Mapping[str, Any], streams: int, workers: int = 1) -> Asked:
    """So many streams that all send at once."""
    return _streams(settings, streams, workers, in_step=True)


def _streams(s: Mapping[str, Any], number: int, workers: int, in_step: bool) -> Asked:
    due = np.linspace(0, s["ramp"], number, endpoint=False).tolist()
    schedule = ask(number, round(s["seconds"] * s["stream_rate"]), due)
    mock = {"ttft": _TTFT, "gap": 1 / s["stream_rate"], "in_step": str(in_step).lower()}
    return Asked(mock=mock, schedule=schedule, workers=workers)


class Ladders:
    """All of them, one after the other."""

    def __init__(self, lab: Lab, settings: Mapping[str, Any], right: Mapping[str, float]) -> None:
        self._lab = lab
        self._s = settings
        self._right = right

    def climb(self, workers: Sequence[int]) -> Iterator[Rung]:
        """Rung by rung, as they are measured."""
        for n in workers:
            yield from self._while_right("events", n, self._s["events"], partial(staggered, self._s))
        for n in workers:
            yield from self._while_right("in step", n, self._s["in_step"], partial(in_step, self._s))
        yield from self._while_right("requests", 1, self._s["requests"], self._requests)
        yield self._rung("connections", 1, self._s["connections"], self._connections())
        yield self._rung("long prompts", 1, self._s["long_prompt"], self._long_prompts())
        yield self._rung("long outputs", 1, self._s["long_output"], self._long_outputs())

    def _while_right(self, ladder: str, workers: int, loads: Sequence[float], asked: Any) -> Iterator[Rung]:
        wrong = 0
        for load in loads:
            rung = self._rung(ladder, workers, load, asked(load, workers))
            yield rung
            stamps = ("lag",) if ladder == "requests" else ("kernel", "user")
            wrong = 0 if any(rung.is_right(by, self._right[by]) for by in stamps) else wrong + 1
            if wrong == 2:
                return

    def _rung(self, ladder: str, workers: int, load: float, asked: Asked) -> Rung:
        return Rung(ladder=ladder, workers=workers, load=load, outcome=self._lab.trial(asked))

    def _requests(self, rate: float, workers: int) -> Asked:
        n = round(rate * self._s["request_seconds"])
        gaps = np.random.default_rng(0).exponential(1 / rate, n)
        return Asked(mock={"ttft": 0.01, "gap": 0.01}, schedule=ask(n, 1, np.cumsum(gaps).tolist()), workers=workers)

    def _connections(self) -> Asked:
        schedule = ask(self._s["connections"], 1, [0.0] * self._s["connections"])
        mock = {"ttft": 0.0, "gap": 0.01, "transfer": "close"}
        return Asked(mock=mock, schedule=schedule, concurrency=self._s["connections_at_once"])

    def _long_prompts(self) -> Asked:
        n = self._s["long_prompts"]
        schedule = ask(n, 50, (np.arange(n) / 4).tolist(), prompt_tokens=self._s["long_prompt"])
        return Asked(mock={"ttft": _TTFT, "gap": 0.01}, schedule=schedule)

    def _long_outputs(self) -> Asked:
        n, rate = self._s["long_outputs"], self._s["long_rate"]
        return Asked(mock={"ttft": _TTFT, "gap": 1 / rate}, schedule=ask(n, self._s["long_output"], [0.0] * n))


def limits(rungs: Sequence[Rung], right: Mapping[str, float]) -> dict[str, Any]:
    """What one worker keeps up with: the last rung of each ladder before the first that is not right."""
    events = [r for r in rungs if r.ladder == "events" and r.workers == 1]
    requests = [r for r in rungs if r.ladder == "requests"]
    return {
        "events_per_s": {by: _last_right(events, by, right[by]) for by in ("kernel", "user")},
        "requests_per_s": _last_right(requests, "lag", right["lag"]),
    }


def is_the_mocks_limit(rung: Rung) -> bool:
    """The mock did not send as much as was asked."""
    return rung.ladder == "events" and rung.outcome.events_per_s < _ALIKE * rung.load


def _last_right(rungs: Sequence[Rung], by: str, limit: float) -> float | None:
    last = None
    for rung in rungs:
        if not rung.is_right(by, limit) or is_the_mocks_limit(rung):
            return last
        last = rung.load
    return last

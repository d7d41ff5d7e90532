"""The warm-up before a point: rounds of other prompts, of the race's own lengths, until their latencies settle."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stackrace.backends.running import Engine
from stackrace.harness import schedule
from stackrace.harness.clock import SECOND, now
from stackrace.harness.errors import EngineError
from stackrace.harness.load.messages import Round, RoundDone
from stackrace.harness.point import Point
from stackrace.harness.schedule import Schedule
from stackrace.harness.types import Request
from stackrace.workloads.arrivals import Immediate

_SEED = 1 << 32  # added to the seed once a round: other prompts, as repeatable

SETTLED, KNOWN, FIXED = "settled", "warm already", "fixed"
"""Why it ended: latencies settled; this launch had settled at this shape before; nothing is judged."""
ROUNDS, SECONDS = "warmup.rounds.most", "warmup.seconds"
"""Or the limit that it ran into."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The section `warmup` of the configuration."""

    requests: int
    concurrency: int
    output_tokens: int
    least: int
    most: int
    seconds: float
    tolerance: float | None
    slack: float

    @classmethod
    def of(cls, section: dict[str, Any]) -> "Rules":
        """Flattened."""
        return cls(**{k: v for k, v in section.items() if k != "rounds"}, **section["rounds"])


class WarmUp:
    """Says round by round what comes next; Engine.warm and Engine.rounds keep what a launch has been through."""

    def __init__(self, point: Point, asked: Sequence[Request], engine: Engine) -> None:
        backend = point.backend
        self._reset_path = backend.reset_path if backend.has_prefix_cache else None
        self._rules = rules = Rules.of(point.config["warmup"])
        self._workload, self._seed = point.workload(), point.config["seed"]
        self._engine = engine
        self._concurrency = in_flight(rules, point.config["concurrency"], len(asked), is_closed=not any(point.due))
        shapes = [(len(r.prompt), min(r.output_tokens, rules.output_tokens)) for r in asked]
        self._shapes = [shapes[i % len(shapes)] for i in range(max(rules.requests, self._concurrency))]
        self._shape = (self._concurrency, *self._shapes)
        self._is_known = self._shape in engine.warm
        self._began: int | None = None
        self.rounds: list[RoundDone] = []
        self.ended: str | None = None

    def next_round(self, last: RoundDone | None) -> Round | None:
        """What to ask next, None when it is over. EngineError if all requests of the last round failed."""
        if self._began is None:
            self._began = now()
        if last is not None:
            if last.failed == last.requests:
                said = self._engine.endpoint.scrub(last.first_error or "nothing said")
                raise EngineError(f"every request of the warm-up failed, the first with: {said}")
            self.rounds.append(last)
        self.ended = self._end()
        if self.ended is None:
            return Round(self._draw(), self._concurrency)
        if self.ended == SETTLED:
            self._engine.warm.add(self._shape)
        if self._reset_path is not None:
            self._engine.empty_cache(self._reset_path)  # the race begins with an empty one, however long the warm-up
        return None

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        change = change_of(self.rounds, self._rules.slack)
        errors = [r.first_error for r in self.rounds if r.first_error]
        return {
            "concurrency": self._concurrency,
            "rounds": [{k: v for k, v in r._asdict().items() if k != "first_error"} for r in self.rounds],
            "ended": self.ended,
            "settled": {SETTLED: True, KNOWN: True, FIXED: None}.get(self.ended or "", False),
            "change": change,
            "seconds": sum(r.seconds for r in self.rounds),
            "failed": sum(r.failed for r in self.rounds),
            "first_error": self._engine.endpoint.scrub(errors[0]) if errors else None,
        }

    def _end(self) -> str | None:
        rules, done = self._rules, len(self.rounds)
        if done < rules.least:
            return SECONDS if done and self._seconds() >= rules.seconds else None
        if rules.tolerance is None:
            return FIXED
        if self._is_known:
            return KNOWN
        change = change_of(self.rounds, rules.slack)
        if change is not None and change < rules.tolerance:
            return SETTLED
        if done >= rules.most:
            return ROUNDS
        return SECONDS if self._seconds() >= rules.seconds else None

    def _seconds(self) -> float:
        return 0.0 if self._began is None else (now() - self._began) / SECOND

    def _draw(self) -> Schedule:
        self._engine.rounds += 1  # of all points of this launch: no round asks what another one did
        seed = self._seed + self._engine.rounds * _SEED
        drawn = schedule.draw(self._workload, Immediate(), seed, len(self._shapes), None).requests
        alone = tuple(_like(r, *shape) for r, shape in zip(drawn, self._shapes, strict=False))
        return Schedule(alone, (0,) * len(alone))


def in_flight(rules: Rules, cap: int | None, asked: int, is_closed: bool) -> int:
    """How many requests of a round are under way at once: a closed loop's own number, in an open loop all of them."""
    wanted = min(cap, asked) if is_closed and cap is not None else min(rules.requests, cap or rules.requests)
    return min(wanted, rules.concurrency)


def change_of(rounds: Sequence[RoundDone], slack: float) -> float | None:
    """The larger of the shares by which median TTFT and TPOT of the last round differ from the one before.

    A difference of up to `slack` seconds is none. None where there is nothing to compare.
    """
    if len(rounds) < 2:
        return None
    before, last = rounds[-2], rounds[-1]
    pairs = [(before.ttft, last.ttft), (before.tpot, last.tpot)]
    return max((_change(a, b, slack) for a, b in pairs if a is not None and b is not None), default=None)


def _change(before: float, last: float, slack: float) -> float:
    difference = abs(last - before)
    return 0.0 if difference <= slack else difference / max(before, slack)


def _like(request: Request, prompt_tokens: int, output_tokens: int) -> Request:
    """A request by itself with these lengths: its own tokens cut short or repeated. A chat keeps its words."""
    alone = dataclasses.replace(request, session=None, turn=None, think=0.0, due=None)
    if request.messages is not None:
        return dataclasses.replace(alone, output_tokens=min(output_tokens, request.output_tokens))
    times = -(-prompt_tokens // len(request.prompt))
    return dataclasses.replace(alone, prompt=(request.prompt * times)[:prompt_tokens], output_tokens=output_tokens)

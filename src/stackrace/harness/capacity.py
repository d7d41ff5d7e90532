"""`search`: a search whose measurements are ordinary points of the sweep, and its result on disk."""

import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from omegaconf import DictConfig, OmegaConf, open_dict

from stackrace.harness import store
from stackrace.harness.errors import UsageError, require
from stackrace.harness.grounds import CLIENT, OTHER_WORK
from stackrace.harness.levels import Level, Measurement, wilson
from stackrace.harness.metrics import judged
from stackrace.harness.observed import Observed
from stackrace.harness.point import Point
from stackrace.harness.search import Answer, Rules, Search, Step
from stackrace.harness.summary import parse_slo, summarize
from stackrace.harness.validity import Validity, judge

OVER = ("arrival.rate", "concurrency")

Run = Callable[[DictConfig], Point]  # measures a point, or finds it measured


@dataclass(frozen=True, slots=True)
class Found:
    """The result of one search: where it was written, and what."""

    path: Path
    result: dict[str, Any]

    @property
    def is_blocked(self) -> bool:
        """It ended at measurements that say nothing about the server."""
        log = self.result["log"]
        return self.result["status"] == "stopped" and log[-1]["fault"] is not None


def rules_of(cfg: DictConfig) -> Rules:
    """The `search` of a composed configuration, checked. UsageError for whatever could not be searched."""
    node: dict[str, Any] = OmegaConf.to_container(cfg.search, resolve=True)  # type: ignore[assignment]
    over = node.pop("over")
    require("search.over", over, str, lambda v: v in OVER, " or ".join(OVER))
    _check_numbers(node, over == "concurrency")
    _check_load(cfg, over)
    node |= {name: float(node[name]) for name in ("low", "high", "start")}
    return Rules(whole=over == "concurrency", **node)


def at_level(cfg: DictConfig, value: float, repeat: int) -> DictConfig:
    """The configuration of one measurement: a point like any other, each repeat with other draws."""
    level = copy.deepcopy(cfg)
    over = level.search.over
    with open_dict(level):
        del level["search"]
    OmegaConf.update(level, over, int(value) if over == "concurrency" else value)
    OmegaConf.update(level, "repeat", repeat)
    OmegaConf.update(level, "seed", cfg.seed + repeat)
    return level


def first_level(cfg: DictConfig) -> DictConfig:
    """Where a search begins; what is no search is as it is."""
    return at_level(cfg, rules_of(cfg).start, 0) if cfg.get("search") is not None else cfg


class Capacity:
    """One search over points, its result written after every one of them."""

    def __init__(self, cfg: DictConfig, first: Point, run: Run) -> None:
        self._cfg, self._first, self._run = cfg, first, run
        self._rules = rules_of(cfg)
        self._search = Search(self._rules, self._measure)
        self._keys: list[str] = []
        self._result: dict[str, Any] = {}
        self._began = time.monotonic()
        identity = json.dumps([asdict(self._rules), cfg.search.over, first.key])
        name = f"capacity-{first.backend.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}.json"
        self.path = first.sweep_folder / name

    @property
    def found(self) -> Found:
        """As it was last written."""
        return Found(self.path, self._result)

    def go(self) -> dict[str, Any]:
        """Search to the end and return the result; it is written whatever happens."""
        status = "interrupted"
        try:
            answer = self._search.run()
            status = "done" if answer.is_complete else "stopped"
        except Exception:
            status = "failed"
            raise
        finally:
            self._write(status)
        return self._result

    def _measure(self, value: float, repeat: int) -> Measurement:
        if self._keys:
            self._write("running")
        point = self._run(at_level(self._cfg, value, repeat))
        self._keys.append(point.key)
        return measurement(point.folder)

    def _write(self, status: str) -> None:
        answer, labels = self._search.answer(), self._first.labels()
        self._result = {
            "schema_version": store.SCHEMA_VERSION,
            "status": status,
            "stack": labels["stack"],
            "model": labels["model"],
            "over": self._cfg.search.over,
            "rules": asdict(self._rules),
            "answer": {"estimate": answer.estimate, "low": answer.low, "high": answer.high},
            "words": in_words(answer),
            "ended": answer.ended,
            "seconds": time.monotonic() - self._began,
            "levels": [_level(level, self._rules) for level in answer.levels],
            "log": [_step(step, key) for step, key in zip(answer.log, self._keys, strict=False)],
        }
        if self.path.parent.exists():
            store.write_atomically(self.path, orjson.dumps(self._result, option=orjson.OPT_INDENT_2))


def measurement(folder: Path) -> Measurement:
    """What a finished point says of its level, judged anew from its records."""
    run = store.read_run(folder)
    slo = run.config["slo"]
    validity = judge(run.records, summarize(run.records, slo, run.telemetry), run.config, run.meta)
    observed = Observed(run.records, parse_slo(slo))
    attained, of = (0, 0) if observed.whole is None else judged(observed, observed.whole)
    return Measurement(attained, of, validity.sustainable, *_fault(validity))


def in_words(answer: Answer) -> str:
    """The answer for people: 47.6 (47.2 to 48), at least 1000, below 0.1, or that there is none."""
    if answer.estimate is None:
        return "none" if answer.high is None else f"below {answer.high:g}"
    if answer.high is None:
        return f"at least {(answer.low or answer.estimate):g}"
    return f"{answer.estimate:g} ({'not shown' if answer.low is None else f'{answer.low:g}'} to {answer.high:g})"


def _fault(validity: Validity) -> tuple[str | None, bool]:
    """Why the point says nothing about the server, and whether the client is to blame. Failures are the server's."""
    grounds = set(validity.invalid)
    is_client = bool(grounds & CLIENT)
    return ("; ".join(validity.reasons) if is_client or grounds & OTHER_WORK else None), is_client


def _level(level: Level, rules: Rules) -> dict[str, Any]:
    attained, of = level.pooled
    return {
        "level": level.value,
        "verdict": level.verdict(rules.target, rules.confidence) if level.held else "not measured",
        "repeats": len(level.held),
        "unsustainable": level.unsustainable,
        "attained": attained,
        "judged": of,
        "interval": list(wilson(attained, of, rules.confidence)),
    }


def _step(step: Step, key: str) -> dict[str, Any]:
    return {"level": step.level, "repeat": step.repeat, "key": key, **asdict(step.measurement)}


def _check_numbers(node: dict[str, Any], whole: bool) -> None:
    kind, what = (int, "a whole number above 0") if whole else ((int, float), "a number above 0")
    for name in ("low", "high"):
        require(f"search.{name}", node[name], kind, lambda v: v > 0, what)
    low, high = node["low"], node["high"]
    require("search.high", high, kind, lambda v: v >= low, f"search.low={low} or more")
    require("search.start", node["start"], kind, lambda v: low <= v <= high, f"between {low} and {high}")
    require("search.target", node["target"], float, lambda v: 0 < v < 1, "a share between 0 and 1")
    require("search.confidence", node["confidence"], float, lambda v: 0.5 <= v < 1, "a share from 0.5 to below 1")
    require("search.precision", node["precision"], float, lambda v: 0.005 <= v < 1, "from 0.005 to below 1")
    for name in ("repeats", "max_points"):
        require(f"search.{name}", node[name], int, lambda v: v > 0, "a whole number above 0")
    least = node["repeats"]
    require("search.max_repeats", node["max_repeats"], int, lambda v: v >= least, f"search.repeats={least} or more")


def _check_load(cfg: DictConfig, over: str) -> None:
    is_closed = "rate" not in cfg.arrival
    if over == "concurrency" and not is_closed:
        raise UsageError(f"search.over=concurrency: arrival={cfg.arrival.name} is an open loop: give arrival=immediate")
    if over == "arrival.rate" and is_closed:
        raise UsageError(f"search.over=arrival.rate: arrival={cfg.arrival.name} has no rate: give search=concurrency")
    if over == "arrival.rate" and cfg.stop.seconds is None:
        raise UsageError("stop.seconds=null: at every rate the runs must be as long: give stop.seconds=30")
    if all(limit is None for limit in cfg.slo.values()):
        raise UsageError("slo: a search needs a limit that requests can meet: give slo=interactive")
    if cfg.repeat != 0:
        raise UsageError(f"repeat={cfg.repeat}: a search repeats by itself: give search.repeats instead")

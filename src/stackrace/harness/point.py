"""One point of a sweep, planned: everything checked and frozen before anything is launched."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from stackrace.backends import checkpoint
from stackrace.backends.base import Backend
from stackrace.harness import host, schedule
from stackrace.harness.clock import SECOND
from stackrace.harness.errors import PointFailed, UsageError, one_line, require
from stackrace.harness.schedule import Schedule
from stackrace.harness.summary import parse_slo
from stackrace.harness.types import Arrival, Workload
from stackrace.harness.verify import settings as verification
from stackrace.workloads.arrivals import Immediate

_PATHS = ("models", "engines", "results", "sweep", "calibration")
_BESIDES = (*_PATHS, "common", "division", "backend", "verify")  # not measured, or told by the engine's fingerprint
_DIVISIONS = ("matched", "tuned")
_BUDGET = {"dtype", "kv_cache_memory_bytes", "tensor_parallel_size", "enable_prefix_caching"}
_SOURCES = ("path", "tokenizer")  # of a workload: what they hold is in the schedule


@dataclass(frozen=True, kw_only=True)
class Point:
    """What to run and where to keep it."""

    config: dict[str, Any]  # resolved
    backend: Backend
    version: str  # of the backend, and its fingerprint, as they were when this was planned
    fingerprint: str
    weights: str | None  # identity of the checkpoint
    cores: host.Cores
    schedule_hash: str
    due: tuple[int, ...]  # nanoseconds after the start
    input_tokens: float  # mean of a request
    output_tokens: float
    repeated_tokens: int  # of all prompts together: what a perfect prefix cache would serve
    key: str
    launch: int  # points of one engine and one of these share a launch

    @property
    def sweep_folder(self) -> Path:
        """results/<sweep>/."""
        return Path(self.config["results"], self.config["sweep"])

    @property
    def folder(self) -> Path:
        """results/<sweep>/<key>/."""
        return self.sweep_folder / self.key

    @property
    def workers(self) -> int:
        """Processes of the load generator."""
        return int(self.config["hardware"]["workers"] or len(self.cores.load_generator))

    @property
    def seconds(self) -> float:
        """About how long the schedule asks; 0 for a closed loop, which nobody knows before."""
        return float(self.config["stop"]["seconds"] or self.due[-1] / SECOND)

    def schedule(self) -> Schedule:
        """Drawn again, since a sweep's prompts together could fill the memory. PointFailed if it came out different."""
        drawn = _draw(self.config, _build(self.config["arrival"], "name"), _workload(self.config))
        if drawn.hash != self.schedule_hash:
            raise PointFailed("the workload draws another schedule each time: it must draw from the rng it is given")
        return drawn

    def workload(self) -> Workload:
        """What is asked, built anew."""
        return _workload(self.config)

    def labels(self) -> dict[str, Any]:
        """What tells it from the other points of a sweep."""
        return {
            "stack": self.backend.name,
            "model": self.config["model"]["name"],
            "workload": self.config["workload"]["name"],
            "arrival": self.config["arrival"]["name"],
            "rate": self.config["arrival"].get("rate"),
            "concurrency": self.config["concurrency"],
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "division": self.config["division"],
            "repeat": self.config["repeat"],
        }


def plan(cfg: DictConfig) -> Point:
    """Check and freeze a composed configuration. UsageError, one line, for whatever could not run."""
    config = _resolve(cfg)
    _check_numbers(config)
    parse_slo(config["slo"])
    backend: Backend = _build(config["backend"])
    backend.check()
    cores = _cores(config)
    arrival, workload = _build(config["arrival"], "name"), _workload(config)  # may refuse: before a checkpoint is made
    weights = _weights(backend, config["model"])
    race = _draw(config, arrival, workload)
    _check_lengths(race, backend)
    fingerprint = backend.fingerprint()
    n = len(race.requests)
    return Point(
        config=config,
        backend=backend,
        version=backend.version(),
        fingerprint=fingerprint,
        weights=weights,
        cores=cores,
        schedule_hash=race.hash,
        due=race.due,
        input_tokens=sum(len(r.prompt) for r in race.requests) / n,
        output_tokens=sum(r.output_tokens for r in race.requests) / n,
        repeated_tokens=race.repeated_tokens,
        key=_key(config, backend, (fingerprint, weights, race.hash), cores),
        launch=config["repeat"],
    )


def build_backend(cfg: DictConfig) -> tuple[Backend, host.Cores]:
    """The backend of a composed configuration, checked, and the cores for it: what `stackrace serve` needs."""
    config = _resolve(cfg)
    backend: Backend = _build(config["backend"])
    backend.check()
    _weights(backend, config["model"])
    return backend, _cores(config)


def gpus_of(backend: Backend) -> tuple[dict[str, str], ...]:
    """What is known of the GPUs that an engine may use."""
    return host.gpus(backend.visible_gpus()) if backend.uses_gpu() else ()


def _resolve(cfg: DictConfig) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as e:
        raise UsageError(f"{e.full_key} is not set: give {e.full_key}=VALUE") from None
    except OmegaConfBaseException as e:
        raise UsageError(str(e).splitlines()[0]) from None
    assert isinstance(config, dict)
    return _in_division({str(k): v for k, v in config.items()})


def _in_division(config: dict[str, Any]) -> dict[str, Any]:
    """The backend as its division wants it: `tuned` has its own values for what it names."""
    division = config["division"]
    require("division", division, str, lambda v: v in _DIVISIONS, " or ".join(_DIVISIONS))
    backend = dict(config["backend"])
    tuned = backend.pop("tuned", {})
    for name in _BUDGET & tuned.keys():
        raise UsageError(f"backend.tuned.{name}: the budget is the same for every stack; set common.{name}")
    for name, value in tuned.items() if division == "tuned" else ():
        if name not in backend:
            raise UsageError(f"backend.tuned.{name}: there is no backend.{name} to tune; correct the name")
        backend[name] = {**backend[name], **value} if isinstance(value, dict) else value
    return {**config, "backend": backend}


def _check_numbers(config: Mapping[str, Any]) -> None:
    number = (int, float)
    for name in ("requests", "rounds", "seconds"):
        if (value := config["stop"][name]) is not None:
            kind = number if name == "seconds" else int
            require(f"stop.{name}", value, kind, lambda v: v > 0, "above 0, or null")
    if config["concurrency"] is not None:
        require("concurrency", config["concurrency"], int, lambda v: v > 0, "a whole number above 0, or null")
    require("seed", config["seed"], int, lambda v: v >= 0, "a whole number, 0 or more")
    require("stop.drain", config["stop"]["drain"], number, lambda v: v >= 0, "a number of seconds")
    _check_warmup(config["warmup"])
    for name, limits in config["validity"].items():
        wanted = "a mapping of suspect and invalid"
        require(f"validity.{name}", limits, dict, lambda v: {"suspect", "invalid"} == set(v), wanted)
        for grade, limit in limits.items():
            if limit is not None:
                require(f"validity.{name}.{grade}", limit, number, lambda v: v >= 0, "a number, 0 or more, or null")
    if (interval := config["telemetry"]["interval"]) is not None:
        require("telemetry.interval", interval, number, lambda v: v > 0, "a number of seconds above 0, or null")
    if config.get("verify") is not None:
        verification.parse(config["verify"])
    for name, value in config["timeouts"].items():
        require(f"timeouts.{name}", value, number, lambda v: v > 0, "a number of seconds above 0")


def _check_warmup(warmup: Mapping[str, Any]) -> None:
    number, rounds, tolerance = (int, float), warmup["rounds"], warmup["tolerance"]
    for name in ("requests", "concurrency", "output_tokens"):
        require(f"warmup.{name}", warmup[name], int, lambda v: v > 0, "a whole number above 0")
    require("warmup.rounds.least", rounds["least"], int, lambda v: v > 0, "a whole number above 0")
    fewest = max(rounds["least"], 1 if tolerance is None else 2)
    wanted = f"a whole number, {fewest} or more: rounds are compared, and warmup.rounds.least is {rounds['least']}"
    require("warmup.rounds.most", rounds["most"], int, lambda v: v >= fewest, wanted)
    if tolerance is not None:
        require("warmup.tolerance", tolerance, number, lambda v: v > 0, "a share above 0, or null: nothing is judged")
    require("warmup.seconds", warmup["seconds"], number, lambda v: v > 0, "a number of seconds above 0")
    require("warmup.slack", warmup["slack"], number, lambda v: v >= 0, "a number of seconds")


def _draw(config: Mapping[str, Any], arrival: Arrival, workload: Workload) -> Schedule:
    stop = config["stop"]
    is_endless = not getattr(workload, "is_finite", False)
    if is_endless and stop["requests"] is None and (stop["seconds"] is None or isinstance(arrival, Immediate)):
        raise UsageError("stop.requests=null: without it a closed loop, or a run without stop.seconds, has no end")
    return schedule.draw(workload, arrival, config["seed"], _requests(config), stop["seconds"])


def _requests(config: Mapping[str, Any]) -> int | None:
    """How many are asked; None where time alone ends the point."""
    requests: int | None = config["stop"]["requests"]
    rounds = config["stop"]["rounds"]
    if requests is None or rounds is None or config["concurrency"] is None:
        return requests
    return int(max(requests, rounds * config["concurrency"]))


def _workload(config: Mapping[str, Any]) -> Workload:
    built: Workload = _build(_without(config["workload"], ("name",)))
    return built


def _without(node: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A mapping less the keys of these names, at any depth: a workload may hold another."""
    kept = {key: value for key, value in node.items() if key not in names}
    return {key: _without(value, names) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _cores(config: Mapping[str, Any]) -> host.Cores:
    load_generator, engine = (config["hardware"][f"{name}_cores"] for name in ("load_generator", "engine"))
    count = "a whole number of cores above 0"
    require("hardware.load_generator_cores", load_generator, int, lambda v: v > 0, count)
    if engine is not None:
        require("hardware.engine_cores", engine, int, lambda v: v > 0, count + ", or null for all others")
    workers = config["hardware"]["workers"]
    if workers is not None:
        require("hardware.workers", workers, int, lambda v: v > 0, "a whole number above 0, or null for one a core")
    return host.split_cores(load_generator, engine)


def _build(node: Mapping[str, Any], *without: str) -> Any:
    """Instantiate a config node, leaving keys out that only name it."""
    fields = {k: v for k, v in node.items() if k not in without}
    try:
        return instantiate(fields, _convert_="all")
    except InstantiationException as e:
        cause = e.__cause__
        if isinstance(cause, UsageError):
            raise cause from None
        raise UsageError(one_line(e)) from None


def _weights(backend: Backend, model: Mapping[str, Any]) -> str | None:
    """Identity of the checkpoint; a small one is made where it is missing."""
    if backend.checkpoint is None:
        return None
    path = Path(backend.checkpoint)
    if not path.exists() and model["auto_make"]:
        checkpoint.make(model["config"], path, model["seed"], model["shard_bytes"], "cpu")
    weights = checkpoint.check(path)
    backend.check_weights(weights)
    return weights.identity


def _check_lengths(race: Schedule, backend: Backend) -> None:
    longest = max(race.requests, key=lambda r: len(r.prompt) + r.output_tokens)
    limit = backend.max_model_len
    if limit is not None and len(longest.prompt) + longest.output_tokens > limit:
        raise UsageError(
            f"lengths: {len(longest.prompt)} prompt + {longest.output_tokens} output tokens exceed "
            f"model.max_model_len={limit}: shorten lengths or raise the limit, "
            "or set workload.max_tokens, where there is one"
        )


def _key(config: Mapping[str, Any], backend: Backend, frozen: tuple[str | None, ...], cores: host.Cores) -> str:
    """12 hex digits that change whenever the result could: by settings, what is frozen (stack, weights, schedule),
    processor or GPU.
    """
    settings = {k: v for k, v in config.items() if k not in _BESIDES}
    settings["workload"] = _without(config["workload"], _SOURCES)
    settings["model"] = {k: v for k, v in config["model"].items() if k != "checkpoint"}
    settings["hardware"] = {k: v for k, v in config["hardware"].items() if k != "roofs"}
    identity = [settings, *frozen, host.cpu_model(), *map(len, cores), *(gpu["name"] for gpu in gpus_of(backend))]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

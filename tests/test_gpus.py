"""Which of a machine's GPUs are told to be an engine's."""

import os

import pytest

from stackrace.backends.mla.backend import MLA
from stackrace.backends.vllm import VLLM
from stackrace.harness import host
from stackrace.harness.point import gpus_of, plan
from stackrace.harness.provenance import provenance

TOLD = """\
GPU-a0, NVIDIA H100 80GB HBM3, 580.1, 81559 MiB, 700.00 W, 1980 MHz
GPU-b0, NVIDIA H200, 580.1, 143771 MiB, 700.00 W, 1980 MHz
"""


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A machine with two GPUs, by what stands in for nvidia-smi."""
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{TOLD}END\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    host.gpus.cache_clear()
    yield
    host.gpus.cache_clear()


def backend(kind, **settings):
    """Nothing of it but what these questions need."""
    made = object.__new__(kind)
    made.__dict__.update({"env": {}, "enable_prefix_caching": False, "device": "cpu", **settings})
    return made


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]),
        ({"CUDA_VISIBLE_DEVICES": 1}, ["NVIDIA H200"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a"}, ["NVIDIA H100 80GB HBM3"]),
        ({"CUDA_VISIBLE_DEVICES": "1,7,0"}, ["NVIDIA H200"]),  # as in CUDA, what cannot be found ends the list
        ({"CUDA_VISIBLE_DEVICES": "MIG-5c89"}, ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
    ],
)
@pytest.mark.usefixtures("two")
def test_those_that_the_engine_may_use(setting, expected):
    assert [gpu["name"] for gpu in gpus_of(backend(VLLM, env=setting))] == expected


@pytest.mark.usefixtures("two")
def test_those_that_the_harness_leaves_to_it(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (found,) = gpus_of(backend(VLLM))
    assert found == dict(
        zip(
            ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm"),
            ("NVIDIA H200", "580.1", "143771 MiB", "700.00 W", "1980 MHz"),
            strict=True,
        )
    )


@pytest.mark.usefixtures("two")
def test_an_engine_on_the_cpu_has_none():
    assert gpus_of(backend(MLA)) == ()


@pytest.mark.usefixtures("two")
def test_a_points_key_and_provenance_know_those_alone(compose, monkeypatch):
    asked = ("backend=external", "backend.url=http://127.0.0.1:1", "backend.model=x", "backend.checkpoint=null")

    def planned(visible):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return plan(compose(*asked))

    first, second, both = map(planned, ("0", "1", "0,1"))
    assert len({first.key, second.key, both.key}) == 3
    assert planned("GPU-b").key == second.key
    assert [gpu["name"] for gpu in provenance(second)["gpus"]] == ["NVIDIA H200"]

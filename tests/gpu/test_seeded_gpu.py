"""The seeded checkpoint has the same bits whether a GPU or the CPU computed them."""

from importlib import resources

import pytest
import yaml

from stackrace.backends import checkpoint

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: run on a machine that has one"),
]


def test_the_same_bits_on_gpu_and_cpu(tmp_path):
    model = yaml.safe_load(resources.files("stackrace.conf").joinpath("model", "tiny.yaml").read_text())
    made = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        checkpoint.make(model["config"], folder, 3, 1 << 20, device)
        made[device] = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert len(made["cpu"]) > 5
    assert made["cpu"] == made["cuda"]


def test_experts_are_hit_evenly_on_a_gpu_as_on_a_cpu(tmp_path):
    from stackrace.backends.mla import balance

    model = yaml.safe_load(resources.files("stackrace.conf").joinpath("model", "tiny.yaml").read_text())
    made = checkpoint.make(model["config"], tmp_path / "tiny", 0, 1 << 30, "cuda")
    loads = [balance.measure(made, torch.device(device), torch.float32, seed=0) for device in ("cpu", "cuda")]
    assert loads[0].mean_touched == pytest.approx(loads[1].mean_touched, rel=0.01)
    assert loads[0].largest_share == pytest.approx(loads[1].largest_share, rel=0.05)

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

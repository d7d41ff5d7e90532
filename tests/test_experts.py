"""How evenly experts are hit: exact on made-up choices, near even on seeded weights, and told where it is not."""

import pytest
import torch
from engine_kit import make
from safetensors.torch import load_file, save_file

from stackrace.backends import checkpoint
from stackrace.backends.mla import balance
from stackrace.harness import models
from stackrace.harness.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def test_even_and_lopsided_choices_are_counted():
    same = torch.tensor([[[0, 1]]]).expand(balance.BATCH, 10, 2)
    each = torch.stack([torch.arange(16) % 8, (torch.arange(16) + 1) % 8], dim=1).unsqueeze(1).expand(16, 10, 2)
    load = balance._summarise([same, each], 8)
    assert load == balance.Balance(2, 8, 2, mean_touched=5.0, fewest_touched=2.0, largest_share=1.0)
    assert load.even_share == 0.25
    assert load.even_touched == pytest.approx(8 * (1 - 0.75**16))
    assert balance._summarise([each], 8).largest_share == 0.25


def test_seeded_weights_route_nearly_evenly_and_a_biased_router_is_seen(tmp_path):
    path = make(tmp_path, {"num_hidden_layers": 2, "first_k_dense_replace": 1, "initializer_range": 0.02}, "tiny_v3")
    found = checkpoint.check(path)
    load = balance.measure(found, CPU, torch.float32, seed=0)
    assert load == balance.measure(found, CPU, torch.float32, seed=0)
    assert load.num_layers == 1
    assert load.mean_touched > 0.9 * load.even_touched
    (shard,) = {info.shard for info in found.tensors.values()}
    tensors = load_file(path / shard)
    bias = next(name for name in tensors if name.endswith("correction_bias"))
    tensors[bias] = torch.zeros_like(tensors[bias])
    tensors[bias][: load.num_chosen] = 10.0
    save_file(tensors, path / shard)
    load = balance.measure(checkpoint.check(path), CPU, torch.float32, seed=0)
    assert load.fewest_touched == load.num_chosen
    assert load.largest_share == 1.0


def test_make_tells_it_where_it_is_quick_and_inspect_where_it_is_asked(tmp_path, monkeypatch):
    heard = []
    load = balance.Balance(2, 8, 2, 7.9, 7.7, 0.27)
    monkeypatch.setattr(balance, "measure", lambda *args, **kwargs: heard.append(args) or load)
    told = models.make("tiny", 0, tmp_path / "tiny", "cpu", None)
    assert told.splitlines()[-2:] == [
        "experts: 2 of 8 a token in 2 layers; 16 tokens touch 7.9 a layer, in the narrowest 7.7; even routing 7.9",
        "busiest expert: 27.0% of 4,096 tokens; even routing 25.0%",
    ]
    assert "experts:" not in models.inspect(tmp_path / "tiny", False, "cpu")
    monkeypatch.setattr(models, "SMALL", 1000)
    assert "experts:" not in models.make("tiny", 0, tmp_path / "large", "cpu", None)
    assert "experts:" in models.inspect(tmp_path / "large", True, "cpu")
    assert len(heard) == 2


def test_a_model_without_experts_and_a_device_that_is_none_are_named(tmp_path):
    assert "experts:" not in models.make("tiny_gqa", 0, tmp_path / "gqa", "cpu", None)
    with pytest.raises(UsageError, match="llama has no routed experts: leave --experts out"):
        models.inspect(tmp_path / "gqa", True, "cpu")
    with pytest.raises(UsageError, match="--device='tpu': must be cpu or cuda"):
        models.make("tiny", 0, tmp_path / "x", "tpu", None)

"""The seeded checkpoint sends its tokens to the experts evenly, so that a step reads as many weights as it should."""

import random
from importlib import resources

import pytest
import yaml

from stackrace.backends import checkpoint
from stackrace.backends.mla import engine as engines
from stackrace.backends.mla import model
from stackrace.backends.mla.sequence import Sampling, Sequence

STREAMS = 16


def test_a_decode_step_hits_as_many_experts_as_even_routing_would(tmp_path, monkeypatch):
    tiny = yaml.safe_load(resources.files("stackrace.conf").joinpath("model", "tiny.yaml").read_text())
    config = tiny["config"]
    made = checkpoint.make(config, tmp_path / "tiny", tiny["seed"], tiny["shard_bytes"], "cpu")
    settings = engines.Settings(made.path, "mla", "float32", "cpu", STREAMS, 512, 256, 60_000_000, False)
    engine = engines.build(settings, made)
    hit = []
    route = model.route

    def note(logit_TE, *args):
        routing = route(logit_TE, *args)
        if len(logit_TE) == STREAMS:
            hit.append(len(routing.expert_TK.unique()))
        return routing

    monkeypatch.setattr(model, "route", note)
    rng = random.Random(0)
    for i in range(STREAMS):
        prompt = [rng.randrange(4, config["vocab_size"]) for _ in range(40)]
        engine.submit(Sequence(str(i), prompt, 40, Sampling(seed=i, temperature=0), frozenset()))
    while not engine.idle:
        engine.step()
    num_experts, num_chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    even = num_experts * (1 - (1 - num_chosen / num_experts) ** STREAMS)
    assert len(hit) > 30
    print(f"{sum(hit) / len(hit):.1f} of {num_experts} experts a step; even routing: {even:.1f}")
    assert sum(hit) / len(hit) == pytest.approx(even, rel=0.08)

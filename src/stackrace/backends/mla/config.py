"""The architecture, typed, as config.json describes it; what the engine cannot compute is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stackrace.harness.errors import UsageError

REQUIRED = {  # keys with only one value the model code implements; absent counts as that value
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding; `factor` 1 means plain, without YaRN."""

    theta: float
    factor: float
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One DeepSeek-V2 model. Widths count numbers, not bytes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_dense_layers: int  # the first layers, without experts
    num_heads: int
    q_lora_rank: int | None  # None: queries are projected in one step
    kv_lora_rank: int
    qk_nope_width: int
    qk_rope_width: int
    v_width: int
    num_experts: int
    num_shared_experts: int
    num_chosen_experts: int
    expert_width: int
    renormalise: bool
    routed_scale: float
    rms_norm_eps: float
    rope: Rope
    max_positions: int
    eos_tokens: frozenset[int]

    @property
    def qk_width(self) -> int:
        """Width of a query or key of one head."""
        return self.qk_nope_width + self.qk_rope_width

    @property
    def latent_width(self) -> int:
        """Numbers cached for a token in one layer when latents are cached."""
        return self.kv_lora_rank + self.qk_rope_width


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """From config.json's content. UsageError names a key that lacks or a value that is not supported."""
    for key, value in REQUIRED.items():
        if config.get(key, value) != value:
            raise UsageError(f"config.json: {key} {config[key]!r} is not supported; only {value!r} is")
    if config.get("quantization_config"):
        raise UsageError("config.json: quantization_config is not supported; use a bf16 checkpoint")
    try:
        return _parse(config)
    except KeyError as error:
        raise UsageError(f"config.json: the key {error} lacks; add it") from None


def _parse(config: Mapping[str, Any]) -> ModelConfig:
    eos = config["eos_token_id"]
    return ModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_dense_layers=config["first_k_dense_replace"],
        num_heads=config["num_attention_heads"],
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_width=config["qk_nope_head_dim"],
        qk_rope_width=config["qk_rope_head_dim"],
        v_width=config["v_head_dim"],
        num_experts=config["n_routed_experts"],
        num_shared_experts=config["n_shared_experts"],
        num_chosen_experts=config["num_experts_per_tok"],
        expert_width=config["moe_intermediate_size"],
        renormalise=config["norm_topk_prob"],
        routed_scale=config["routed_scaling_factor"],
        rms_norm_eps=config["rms_norm_eps"],
        rope=_parse_rope(config),
        max_positions=config["max_position_embeddings"],
        eos_tokens=frozenset(eos if isinstance(eos, list) else [eos]),
    )


def _parse_rope(config: Mapping[str, Any]) -> Rope:
    """Both spellings: `rope_theta` and `rope_scaling`, and `rope_parameters` as transformers 5 writes it."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling["rope_theta"] if "rope_theta" in scaling else config["rope_theta"]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(theta, 1.0, 32, 1, 0.0, 0.0, config["max_position_embeddings"])
    if kind != "yarn":
        raise UsageError(f"config.json: rope_scaling type {kind!r} is not supported; 'yarn' or null is")
    return Rope(
        theta=theta,
        factor=scaling["factor"],
        beta_fast=scaling["beta_fast"],
        beta_slow=scaling["beta_slow"],
        mscale=scaling["mscale"],
        mscale_all_dim=scaling["mscale_all_dim"],
        original_positions=scaling["original_max_position_embeddings"],
    )

"""The architecture, typed, as config.json describes it; what the engine cannot compute is refused by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stackrace.backends.architectures import LATENT, biases, grouped_heads
from stackrace.harness.errors import UsageError

Values = dict[str, list[Any]]

ALL: Values = {"hidden_act": ["silu"], "partial_rotary_factor": [1]}
DEEPSEEK: Values = ALL | {"attention_bias": [False], "mlp_bias": [False], "moe_layer_freq": [1]}
SUPPORTED: dict[str, Values] = {  # by model_type; an absent key counts as the first value
    # transformers ignores V2's norm_topk_prob: there is nothing to hold a renormalised one to
    "deepseek_v2": DEEPSEEK
    | {"topk_method": ["greedy", "group_limited_greedy"], "scoring_func": ["softmax"], "norm_topk_prob": [False]}
    | {"rope_interleave": [True]},
    "deepseek_v3": DEEPSEEK | {"topk_method": ["noaux_tc"], "scoring_func": ["sigmoid"]},
    "llama": ALL | {"sliding_window": [None]},
    "qwen2": ALL | {"use_sliding_window": [False]},
}
ROPE: Values = {"rope_type": ["default", "linear", "llama3", "yarn"], "partial_rotary_factor": [1], "truncate": [True]}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding; slow rotations may be slowed further, for contexts longer than the original."""

    kind: str  # default, linear, llama3 or yarn
    theta: float
    interleaved: bool  # which numbers are turned together: neighbours, or those half a head apart
    factor: float  # by which rotations are slowed
    fast: float  # turns within the original context from which a rotation stays as it is
    slow: float  # turns up to which it is slowed by the whole factor
    original_positions: int
    magnitude: float  # of what is rotated


@dataclass(frozen=True, slots=True)
class Latent:
    """Keys and values of all heads, expanded from one latent a token."""

    q_rank: int | None  # None: queries are projected in one step
    rank: int
    nope_width: int
    rope_width: int
    v_width: int

    @property
    def qk_width(self) -> int:
        """Width of a query or key of one head."""
        return self.nope_width + self.rope_width

    @property
    def cached_width(self) -> int:
        """Numbers cached for a token in one layer when latents are cached."""
        return self.rank + self.rope_width


@dataclass(frozen=True, slots=True)
class Grouped:
    """Keys and values of a few heads, each of which serves a group of query heads; all widths are one."""

    num_heads: int
    qk_width: int
    rope_width: int
    v_width: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts, and how each token's are chosen."""

    num_experts: int
    num_shared: int
    width: int
    corrected: bool  # sigmoid scores, corrected by a bias when choosing; otherwise softmax
    num_chosen: int
    num_groups: int
    num_chosen_groups: int
    renormalise: bool
    scale: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model. Widths count numbers, not bytes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_dense_layers: int  # the first layers, without experts
    num_heads: int
    kv: Latent | Grouped
    mixture: Mixture | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool  # the embedding gives the logits too
    rms_norm_eps: float
    rope: Rope
    softmax_scale: float
    max_positions: int
    eos_tokens: frozenset[int]


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """From config.json's content. UsageError names a key that lacks or a value that is not supported."""
    if config.get("quantization_config"):
        raise UsageError("config.json: quantization_config is not supported; use a bf16 checkpoint")
    _refuse_others(config, SUPPORTED[config["model_type"]])
    try:
        return _parse(config)
    except KeyError as error:
        raise UsageError(f"config.json: the key {error} lacks; add it") from None


def _refuse_others(config: Mapping[str, Any], supported: Values) -> None:
    for key, values in supported.items():
        if config.get(key, values[0]) not in values:
            only = " or ".join(map(repr, values))
            raise UsageError(f"config.json: {key} {config[key]!r} is not supported; only {only} is")


def _parse(config: Mapping[str, Any]) -> ModelConfig:
    latent = config["model_type"] in LATENT
    kv = _parse_latent(config) if latent else _parse_grouped(config)
    scaling = _rope_parameters(config)
    rope = _parse_rope(scaling, config["max_position_embeddings"], latent and config.get("rope_interleave", True))
    mscale = yarn_mscale(rope.factor, scaling.get("mscale_all_dim") or 0) if latent else 1
    qkv_bias, o_bias, mlp_bias = biases(config)
    return ModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_dense_layers=config["first_k_dense_replace"] if latent else config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        kv=kv,
        mixture=_parse_mixture(config) if latent else None,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        tied=config.get("tie_word_embeddings", False),
        rms_norm_eps=config["rms_norm_eps"],
        rope=rope,
        softmax_scale=kv.qk_width**-0.5 * mscale**2,
        max_positions=config["max_position_embeddings"],
        eos_tokens=end_tokens(config["eos_token_id"]),
    )


def end_tokens(eos: int | list[int] | None) -> frozenset[int]:
    """From `eos_token_id`, which may be one, several or null."""
    return frozenset([] if eos is None else eos if isinstance(eos, list) else [eos])


def _parse_latent(config: Mapping[str, Any]) -> Latent:
    return Latent(
        q_rank=config["q_lora_rank"],
        rank=config["kv_lora_rank"],
        nope_width=config["qk_nope_head_dim"],
        rope_width=config["qk_rope_head_dim"],
        v_width=config["v_head_dim"],
    )


def _parse_grouped(config: Mapping[str, Any]) -> Grouped:
    heads, (kv_heads, width) = config["num_attention_heads"], grouped_heads(config)
    if heads % kv_heads:
        raise UsageError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    return Grouped(kv_heads, width, width, width)


def _parse_mixture(config: Mapping[str, Any]) -> Mixture:
    corrected = config["model_type"] == "deepseek_v3"
    in_groups = corrected or config.get("topk_method") == "group_limited_greedy"
    groups, best = (config["n_group"], config["topk_group"]) if in_groups else (1, 1)
    number, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    size = number // groups
    if number % groups or best > groups or size < 1 + corrected or best * size < chosen:
        wanted = f"num_experts_per_tok {chosen} of topk_group {best} of n_group {groups}"
        raise UsageError(f"config.json: {wanted} is no choice among n_routed_experts {number}; correct these")
    return Mixture(
        num_experts=number,
        num_shared=config["n_shared_experts"],
        width=config["moe_intermediate_size"],
        corrected=corrected,
        num_chosen=chosen,
        num_groups=groups,
        num_chosen_groups=best,
        renormalise=config["norm_topk_prob"],
        scale=config["routed_scaling_factor"],
    )


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of both spellings: `rope_theta` and `rope_scaling`, and `rope_parameters` as transformers 5 writes it."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("type", "default")
    return {"rope_type": kind, "rope_theta": config.get("rope_theta", 10000.0), **given}


def _parse_rope(scaling: Mapping[str, Any], max_positions: int, interleaved: bool) -> Rope:
    _refuse_others(scaling, ROPE)
    kind = scaling["rope_type"]
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    if kind == "llama3":
        fast, slow = scaling["high_freq_factor"], scaling["low_freq_factor"]
    return Rope(
        kind=kind,
        theta=scaling["rope_theta"],
        interleaved=interleaved,
        factor=1.0 if kind == "default" else scaling["factor"],
        fast=fast,
        slow=slow,
        original_positions=scaling.get("original_max_position_embeddings", max_positions),
        magnitude=_yarn_magnitude(scaling) if kind == "yarn" else 1.0,
    )


def _yarn_magnitude(scaling: Mapping[str, Any]) -> float:
    factor, mscale, all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 mscale ln(factor) + 1, and 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

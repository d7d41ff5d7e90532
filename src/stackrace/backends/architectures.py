"""What config.json alone tells of a model: the tensors of its checkpoint, and what a token leaves in the cache."""

from collections.abc import Mapping
from typing import Any

LATENT = ("deepseek_v2", "deepseek_v3")  # keys and values of all heads come from one latent a token
MODEL_TYPES = (*LATENT, "llama", "qwen2")

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


def kv_widths(config: Config) -> dict[str, int]:
    """Numbers cached for one token in one layer, by each kind of attention the model can be run with."""
    heads = config["num_attention_heads"]
    if config["model_type"] in LATENT:
        head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
        return {"mla": config["kv_lora_rank"] + config["qk_rope_head_dim"], "mha": heads * head}
    kv_heads, width = grouped_heads(config)
    return {"gqa": 2 * kv_heads * width}


def grouped_heads(config: Config) -> tuple[int, int]:
    """How many key-value heads a model without latents has, and the width of every head."""
    heads: int = config["num_attention_heads"]
    return config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def biases(config: Config) -> tuple[bool, bool, bool]:
    """Whether queries, keys and values have biases, attention's output has, and feed-forward networks have."""
    if config["model_type"] == "llama":
        attention = bool(config.get("attention_bias"))
        return attention, attention, bool(config.get("mlp_bias"))
    return config["model_type"] == "qwen2", False, False


def is_spare(config: Config, name: str) -> bool:
    """Whether a published checkpoint may hold this tensor though the model computes without it."""
    num_layers, extra = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    predicting = tuple(f"model.layers.{layer}." for layer in range(num_layers, num_layers + extra))
    tied = name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))
    return tied or name.startswith(predicting) or name.endswith(".rotary_emb.inv_freq")


def tensor_shapes(config: Config) -> Shapes:
    """Every tensor the model computes with, in forward order. KeyError: a key lacks."""
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    attention = _latent_shapes(config) if config["model_type"] in LATENT else _grouped_shapes(config)
    dense = _mlp_shapes("mlp.", hidden, config["intermediate_size"], biases(config)[2])
    num_dense = config["first_k_dense_replace"] if config["model_type"] in LATENT else config["num_hidden_layers"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        norms: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        members = norms | attention | (dense if layer < num_dense else _moe_shapes(config))
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in members.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if config.get("tie_word_embeddings") else shapes | {"lm_head.weight": (vocab, hidden)}


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def _latent_shapes(config: Config) -> Shapes:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query, q_rank, at = heads * (nope + rope), config["q_lora_rank"], "self_attn."
    if q_rank is None:
        shapes = _linear(at + "q_proj", query, hidden)
    else:
        shapes = _linear(at + "q_a_proj", q_rank, hidden) | {at + "q_a_layernorm.weight": (q_rank,)}
        shapes |= _linear(at + "q_b_proj", query, q_rank)
    shapes |= _linear(at + "kv_a_proj_with_mqa", rank + rope, hidden) | {at + "kv_a_layernorm.weight": (rank,)}
    shapes |= _linear(at + "kv_b_proj", heads * (nope + value), rank)
    return shapes | _linear(at + "o_proj", hidden, heads * value)


def _grouped_shapes(config: Config) -> Shapes:
    hidden, (kv_heads, width) = config["hidden_size"], grouped_heads(config)
    query, (qkv_bias, o_bias, _) = config["num_attention_heads"] * width, biases(config)
    shapes: Shapes = {}
    for name, rows in (("q_proj", query), ("k_proj", kv_heads * width), ("v_proj", kv_heads * width)):
        shapes |= _linear(f"self_attn.{name}", rows, hidden, qkv_bias)
    return shapes | _linear("self_attn.o_proj", hidden, query, o_bias)


def _moe_shapes(config: Config) -> Shapes:
    number, hidden, width = config["n_routed_experts"], config["hidden_size"], config["moe_intermediate_size"]
    shapes = _linear("mlp.gate", number, hidden)
    if config["model_type"] == "deepseek_v3":
        shapes["mlp.gate.e_score_correction_bias"] = (number,)
    for expert in range(number):
        shapes |= _mlp_shapes(f"mlp.experts.{expert}.", hidden, width)
    return shapes | _mlp_shapes("mlp.shared_experts.", hidden, width * config["n_shared_experts"])


def _mlp_shapes(prefix: str, hidden: int, width: int, bias: bool = False) -> Shapes:
    wide = _linear(prefix + "gate_proj", width, hidden, bias) | _linear(prefix + "up_proj", width, hidden, bias)
    return wide | _linear(prefix + "down_proj", hidden, width, bias)

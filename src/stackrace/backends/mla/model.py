"""DeepSeek-V2: embedding, layers of attention and (mixtures of) feed-forward networks, logits.

Letters: T tokens of a batch, S sampled rows, D hidden, E experts, P positions, F frequencies, V vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from stackrace.backends.mla.attention import KINDS, Batch, parameter
from stackrace.backends.mla.cache import LayerCache
from stackrace.backends.mla.config import ModelConfig, Rope
from stackrace.kernels.moe.naive import experts, route_softmax, silu_and_mul
from stackrace.kernels.rms_norm.naive import rms_norm
from stackrace.kernels.rotary.naive import frequencies, rotation_table, yarn_frequencies, yarn_mscale


def rotations(rope: Rope, width: int, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The model's rotation of every position, complex [num_positions, F]; `dtype` is that of the angles."""
    if rope.factor == 1:
        return rotation_table(frequencies(width, rope.theta, dtype).to(device), num_positions, 1.0)
    ramp = (rope.factor, rope.beta_fast, rope.beta_slow, rope.original_positions)
    frequency_F = yarn_frequencies(width, rope.theta, *ramp, dtype).to(device)
    magnitude = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return rotation_table(frequency_F, num_positions, magnitude)


class FeedForward(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up_proj = parameter(2 * width, hidden, dtype=dtype, device=device)
        self.down_proj = parameter(hidden, width, dtype=dtype, device=device)

    def destinations(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes, by its name below `mlp`."""
        gate, up = self.gate_up_proj.chunk(2)
        return {"gate_proj": gate, "up_proj": up, "down_proj": self.down_proj}

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] from [T, D]."""
        return linear(silu_and_mul(linear(x_TD, self.gate_up_proj)), self.down_proj)


class Experts(nn.Module):
    """A few routed experts for each token, and the shared ones for all."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        number, width, hidden = config.num_experts, config.expert_width, config.hidden_size
        self.gate = parameter(number, hidden, dtype=dtype, device=device)
        self.gate_up_proj = parameter(number, 2 * width, hidden, dtype=dtype, device=device)
        self.down_proj = parameter(number, hidden, width, dtype=dtype, device=device)
        self.shared = FeedForward(hidden, width * config.num_shared_experts, dtype, device)

    def destinations(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes, by its name below `mlp`."""
        places: dict[str, Tensor] = {"gate": self.gate}
        places |= {f"shared_experts.{name}": place for name, place in self.shared.destinations().items()}
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            gate, up = gate_up.chunk(2)
            places |= {f"experts.{expert}.gate_proj": gate, f"experts.{expert}.up_proj": up}
            places[f"experts.{expert}.down_proj"] = down
        return places

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] from [T, D]; the router works in float32 at least, as in every implementation."""
        config = self.config
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        logit_TE = linear(x_TD.to(wide), self.gate.to(wide))
        routing = route_softmax(logit_TE, config.num_chosen_experts, config.renormalise, config.routed_scale)
        routed_TD: Tensor = experts(x_TD, self.gate_up_proj, self.down_proj, routing)
        return routed_TD + cast(Tensor, self.shared(x_TD))


class Layer(nn.Module):
    """Attention, then experts or one wide network, each on normalised input and added back."""

    def __init__(
        self, config: ModelConfig, index: int, attention: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_norm = parameter(config.hidden_size, dtype=dtype, device=device)
        self.post_norm = parameter(config.hidden_size, dtype=dtype, device=device)
        self.attention = KINDS[attention](config, dtype, device)
        self.mlp: FeedForward | Experts
        if index < config.num_dense_layers:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, dtype, device)
        else:
            self.mlp = Experts(config, dtype, device)

    def destinations(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes, by its name below the layer."""
        places: dict[str, Tensor] = {"input_layernorm": self.input_norm}
        places["post_attention_layernorm"] = self.post_norm
        places |= {f"self_attn.{name}": place for name, place in self.attention.destinations().items()}
        return places | {f"mlp.{name}": place for name, place in self.mlp.destinations().items()}

    def forward(self, x_TD: Tensor, batch: Batch, rotation_TF: Tensor, cache: LayerCache) -> Tensor:
        """[T, D] from [T, D]; writes the tokens' rows into `cache`."""
        normed_TD = rms_norm(x_TD, self.input_norm, self.eps)
        x_TD = x_TD + self.attention(normed_TD, batch, rotation_TF, cache)
        out_TD: Tensor = x_TD + self.mlp(rms_norm(x_TD, self.post_norm, self.eps))
        return out_TD


class Model(nn.Module):
    """The whole network, its weights uninitialised."""

    rotation_PF: Tensor

    def __init__(
        self,
        config: ModelConfig,
        attention: str,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`num_positions`: the longest context it will be asked for."""
        super().__init__()
        self.config = config
        self.embed = parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            Layer(config, index, attention, dtype, device) for index in range(config.num_layers)
        )
        self.norm = parameter(config.hidden_size, dtype=dtype, device=device)
        self.head = parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        angle_dtype = torch.promote_types(dtype, torch.float32)
        table = rotations(config.rope, config.qk_rope_width, num_positions, angle_dtype, device)
        self.register_buffer("rotation_PF", table, persistent=False)

    def destinations(self) -> dict[str, Tensor]:
        """For every tensor a checkpoint must hold, the (part of a) weight it fills."""
        places: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embed,
            "model.norm.weight": self.norm,
            "lm_head.weight": self.head,
        }
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            prefix = f"model.layers.{index}."
            places |= {f"{prefix}{name}.weight": place for name, place in layer.destinations().items()}
        return places

    def forward(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor:
        """Logits of the sampled rows, [S, V], float32 at least; writes all tokens' rows into `caches`."""
        x_TD = embedding(batch.token_T, self.embed)
        rotation_TF = self.rotation_PF.index_select(0, batch.position_T)
        for layer, cache in zip(self.layers, caches, strict=True):
            x_TD = layer(x_TD, batch, rotation_TF, cache)
        x_SD = rms_norm(x_TD.index_select(0, batch.sampled_row), self.norm, self.config.rms_norm_eps)
        logit_SV = linear(x_SD, self.head)
        return logit_SV.to(torch.promote_types(logit_SV.dtype, torch.float32))

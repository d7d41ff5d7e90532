"""The model: embedding, layers of attention and (mixtures of) feed-forward networks, logits.

Letters: T tokens of a batch, S sampled rows, D hidden, E experts, P positions, F frequencies, V vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from stackrace.backends.mla.attention import KINDS, Batch
from stackrace.backends.mla.cache import LayerCache
from stackrace.backends.mla.config import Mixture, ModelConfig, Rope
from stackrace.backends.mla.projection import Projection, parameter
from stackrace.kernels.moe.naive import Routing, experts, route, silu_and_mul
from stackrace.kernels.rms_norm.naive import rms_norm
from stackrace.kernels.rotary.naive import frequencies, llama3_frequencies, rotation_table, yarn_frequencies

STRETCHED = {"llama3": llama3_frequencies, "yarn": yarn_frequencies}


def rotations(rope: Rope, width: int, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The model's rotation of every position, complex [num_positions, F]; `dtype` is that of the angles."""
    if rope.kind in STRETCHED:
        ramp = rope.factor, rope.fast, rope.slow, rope.original_positions
        frequency_F = STRETCHED[rope.kind](width, rope.theta, *ramp, dtype)
    else:
        frequency_F = frequencies(width, rope.theta, dtype) / rope.factor
    return rotation_table(frequency_F.to(device), num_positions, rope.magnitude)


class FeedForward(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up_proj = Projection({"gate_proj": width, "up_proj": width}, hidden, bias, dtype, device)
        self.down_proj = Projection({"down_proj": hidden}, width, bias, dtype, device)

    def destinations(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes, by its name below `mlp`."""
        return self.gate_up_proj.destinations() | self.down_proj.destinations()

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] from [T, D]."""
        out_TD: Tensor = self.down_proj(silu_and_mul(self.gate_up_proj(x_TD)))
        return out_TD


class Experts(nn.Module):
    """A few routed experts for each token, and the shared ones for all."""

    def __init__(self, mixture: Mixture, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.mixture = mixture
        number, width, wide = mixture.num_experts, mixture.width, torch.promote_types(dtype, torch.float32)
        self.gate = parameter(number, hidden, dtype=dtype, device=device)
        self.correction = parameter(number, dtype=wide, device=device) if mixture.corrected else None
        self.gate_up_proj = parameter(number, 2 * width, hidden, dtype=dtype, device=device)
        self.down_proj = parameter(number, hidden, width, dtype=dtype, device=device)
        self.shared = FeedForward(hidden, width * mixture.num_shared, False, dtype, device)

    def destinations(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes, by its name below `mlp`."""
        places: dict[str, Tensor] = {"gate.weight": self.gate}
        if self.correction is not None:
            places["gate.e_score_correction_bias"] = self.correction
        places |= {f"shared_experts.{name}": place for name, place in self.shared.destinations().items()}
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            gate, up = gate_up.chunk(2)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            places |= {f"experts.{expert}.{name}.weight": part for name, part in parts.items()}
        return places

    def route(self, x_TD: Tensor) -> Routing:
        """Which experts each token goes to; in float32 at least, as in every implementation."""
        how, wide = self.mixture, torch.promote_types(x_TD.dtype, torch.float32)
        logit_TE = linear(x_TD.to(wide), self.gate.to(wide))
        groups = how.num_groups, how.num_chosen_groups
        return route(logit_TE, self.correction, how.num_chosen, *groups, how.renormalise, how.scale)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] from [T, D]."""
        routed_TD: Tensor = experts(x_TD, self.gate_up_proj, self.down_proj, self.route(x_TD))
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
        if config.mixture is None or index < config.num_dense_layers:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.mlp_bias, dtype, device)
        else:
            self.mlp = Experts(config.mixture, config.hidden_size, dtype, device)

    def destinations(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes, by its name below the layer."""
        places: dict[str, Tensor] = {"input_layernorm.weight": self.input_norm}
        places["post_attention_layernorm.weight"] = self.post_norm
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
        self.head = self.embed
        if not config.tied:
            self.head = parameter(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        angle_dtype = torch.promote_types(dtype, torch.float32)
        table = rotations(config.rope, config.kv.rope_width, num_positions, angle_dtype, device)
        self.register_buffer("rotation_PF", table, persistent=False)

    def destinations(self) -> dict[str, Tensor]:
        """For every tensor a checkpoint must hold, the (part of a) weight it fills."""
        places: dict[str, Tensor] = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        if not self.config.tied:
            places["lm_head.weight"] = self.head
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            prefix = f"model.layers.{index}."
            places |= {f"{prefix}{name}": place for name, place in layer.destinations().items()}
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

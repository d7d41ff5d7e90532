"""Multi-head latent attention over a paged cache of latents, or of the keys and values they expand to.

Letters: T tokens of a batch, B one-token sequences (the batch's first rows), S context tokens of the longer
ones, D hidden, H heads, L latent (512), R rotated (64), C = L + R, N not rotated (128), K = N + R, V value.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from stackrace.backends.mla.cache import LayerCache
from stackrace.backends.mla.config import ModelConfig
from stackrace.kernels.gqa_decode.naive import gqa_decode
from stackrace.kernels.mha_prefill.naive import mha_prefill
from stackrace.kernels.mla_decode.naive import mla_decode
from stackrace.kernels.rms_norm.naive import rms_norm
from stackrace.kernels.rotary.naive import rotate, yarn_mscale


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens, sequences end to end, those that compute a single token first."""

    token_T: Tensor
    position_T: Tensor
    slot_T: Tensor  # where each token's cache row goes: page * PAGE + offset
    table_BM: Tensor  # pages of the one-token sequences
    length_B: Tensor  # their context, the new token included
    query_starts: list[int]  # of the longer ones, from row 0 of T - B, with the end
    context_starts: list[int]  # the same among their context tokens
    context_slot_S: Tensor  # where each of their context tokens lies
    sampled_row: Tensor  # rows whose logits are wanted


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised weight."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


def softmax_scale(config: ModelConfig) -> float:
    """qk_width^-0.5, times YaRN's temperature squared."""
    mscale = yarn_mscale(config.rope.factor, config.rope.mscale_all_dim)
    return float(config.qk_width**-0.5 * mscale**2)


class Attention(nn.Module):
    """The projections both cache layouts share; a subclass says what is cached and how it is attended to."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        hidden, query, rank = config.hidden_size, config.num_heads * config.qk_width, config.q_lora_rank
        self.in_rows = [rank or query, config.kv_lora_rank, config.qk_rope_width]  # one product, not three
        self.in_proj = parameter(sum(self.in_rows), hidden, dtype=dtype, device=device)
        self.q_norm = parameter(rank, dtype=dtype, device=device) if rank else None
        self.q_b_proj = parameter(query, rank, dtype=dtype, device=device) if rank else None
        self.kv_norm = parameter(config.kv_lora_rank, dtype=dtype, device=device)
        expanded = config.num_heads * (config.qk_nope_width + config.v_width)
        self.kv_b_proj = parameter(expanded, config.kv_lora_rank, dtype=dtype, device=device)
        self.o_proj = parameter(hidden, config.num_heads * config.v_width, dtype=dtype, device=device)

    def destinations(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes, by its name below `self_attn`."""
        query = self.in_proj[: self.in_rows[0]]
        places = {
            "kv_a_proj_with_mqa": self.in_proj[len(query) :],
            "kv_a_layernorm": self.kv_norm,
            "kv_b_proj": self.kv_b_proj,
            "o_proj": self.o_proj,
        }
        if self.q_norm is None or self.q_b_proj is None:
            return places | {"q_proj": query}
        return places | {"q_a_proj": query, "q_a_layernorm": self.q_norm, "q_b_proj": self.q_b_proj}

    def forward(self, x_TD: Tensor, batch: Batch, rotation_TF: Tensor, cache: LayerCache) -> Tensor:
        """Attention of one layer: writes the new tokens into `cache`, attends, projects back to [T, D]."""
        q_THK, latent_TL, rotated_TR = self._project(x_TD, rotation_TF)
        self.store(cache, batch.slot_T, latent_TL, rotated_TR)
        num_decode = len(batch.length_B)
        parts = []
        if num_decode:
            parts.append(self.decode(q_THK[:num_decode], cache, batch))
        if num_decode < len(q_THK):
            key_SHK, value_SHV = self.context(cache, batch.context_slot_S)
            starts = batch.query_starts, batch.context_starts
            parts.append(mha_prefill(q_THK[num_decode:], key_SHK, value_SHV, *starts, self.scale))
        return linear(torch.cat(parts).flatten(1), self.o_proj)

    def _project(self, x_TD: Tensor, rotation_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, K], latents, and the key part all heads share; rotated by their positions."""
        config = self.config
        q, latent_TL, rotated_TR = torch.split(linear(x_TD, self.in_proj), self.in_rows, dim=-1)
        if self.q_norm is not None and self.q_b_proj is not None:
            q = linear(rms_norm(q, self.q_norm, config.rms_norm_eps), self.q_b_proj)
        q_THK = torch.unflatten(q, -1, (config.num_heads, config.qk_width))
        q_THN, q_THR = torch.split(q_THK, [config.qk_nope_width, config.qk_rope_width], dim=-1)
        q_THK = torch.cat([q_THN, rotate(q_THR, rotation_TF)], dim=-1)
        latent_TL = rms_norm(latent_TL, self.kv_norm, config.rms_norm_eps)
        return q_THK, latent_TL, rotate(rotated_TR.unsqueeze(1), rotation_TF).squeeze(1)

    def expand(self, latent_TL: Tensor, rotated_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [T, H, K] and values [T, H, V] of every head."""
        config = self.config
        expanded = torch.unflatten(linear(latent_TL, self.kv_b_proj), -1, (config.num_heads, -1))
        key_THN, value_THV = torch.split(expanded, [config.qk_nope_width, config.v_width], dim=-1)
        rotated_THR = rotated_TR.unsqueeze(1).expand(-1, config.num_heads, -1)
        return torch.cat([key_THN, rotated_THR], dim=-1), value_THV

    def store(self, cache: LayerCache, slot_T: Tensor, latent_TL: Tensor, rotated_TR: Tensor) -> None:
        """Write one cache row a token."""
        raise NotImplementedError

    def context(self, cache: LayerCache, slot_S: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [S, H, K] and values [S, H, V] of cached tokens."""
        raise NotImplementedError

    def decode(self, q_BHK: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
        """Attend with one query token a sequence: [B, H, V]."""
        raise NotImplementedError


class LatentAttention(Attention):
    """Caches latents; decodes in their space, with the up-projections absorbed into query and output."""

    def store(self, cache: LayerCache, slot_T: Tensor, latent_TL: Tensor, rotated_TR: Tensor) -> None:
        """Latent and rotated key, side by side."""
        cache[0].flatten(0, 1).index_copy_(0, slot_T, torch.cat([latent_TL, rotated_TR], dim=-1))

    def context(self, cache: LayerCache, slot_S: Tensor) -> tuple[Tensor, Tensor]:
        """Expanded from the latents, once for each chunk of a prompt."""
        latent_SC = cache[0].flatten(0, 1).index_select(0, slot_S)
        latent_SL, rotated_SR = torch.split(latent_SC, self.in_rows[1:], dim=-1)
        return self.expand(latent_SL, rotated_SR)

    def decode(self, q_BHK: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
        """In the latent space, where all heads read the same rows."""
        config = self.config
        up_HXL = torch.unflatten(self.kv_b_proj, 0, (config.num_heads, -1))  # X: N, then V rows
        up_HNL, up_HVL = torch.split(up_HXL, [config.qk_nope_width, config.v_width], dim=1)
        q_BHN, q_BHR = torch.split(q_BHK, [config.qk_nope_width, config.qk_rope_width], dim=-1)
        q_BHL = torch.bmm(q_BHN.transpose(0, 1), up_HNL).transpose(0, 1)
        q_BHC = torch.cat([q_BHL, q_BHR], dim=-1)
        o_BHL = mla_decode(q_BHC, cache[0], batch.table_BM, batch.length_B, self.scale, config.kv_lora_rank)
        return torch.bmm(o_BHL.transpose(0, 1), up_HVL.transpose(1, 2)).transpose(0, 1)


class ExpandedAttention(Attention):
    """Caches every head's key and value, as multi-head attention does, and decodes over those."""

    def store(self, cache: LayerCache, slot_T: Tensor, latent_TL: Tensor, rotated_TR: Tensor) -> None:
        """Every head's key and value."""
        for rows, new in zip(cache, self.expand(latent_TL, rotated_TR), strict=True):
            rows.flatten(0, 1).index_copy_(0, slot_T, new)

    def context(self, cache: LayerCache, slot_S: Tensor) -> tuple[Tensor, Tensor]:
        """As they were stored: nothing is left to compute."""
        key, value = (rows.flatten(0, 1).index_select(0, slot_S) for rows in cache)
        return key, value

    def decode(self, q_BHK: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
        """Each head reads rows of its own."""
        return gqa_decode(q_BHK, cache[0], cache[1], batch.table_BM, batch.length_B, self.scale)


KINDS: dict[str, type[Attention]] = {"mla": LatentAttention, "mha": ExpandedAttention}

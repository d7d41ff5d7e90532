"""Attention over a paged cache: of latents, of the keys and values they expand to, or of those heads share.

Letters: T tokens of a batch, B one-token sequences (the batch's first rows), S context tokens of the longer
ones, D hidden, H heads, G key-value heads, L latent (512), R rotated (64), C = L + R, N not rotated (128),
K = N + R, V value.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from stackrace.backends.mla.cache import LayerCache
from stackrace.backends.mla.config import Grouped, Latent, ModelConfig
from stackrace.backends.mla.projection import Projection, parameter
from stackrace.kernels.gqa_decode.naive import gqa_decode
from stackrace.kernels.mha_prefill.naive import mha_prefill
from stackrace.kernels.mla_decode.naive import mla_decode
from stackrace.kernels.rms_norm.naive import rms_norm
from stackrace.kernels.rotary.naive import rotate


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


class Attention(nn.Module):
    """Attends to cached keys and values; a subclass says how they come about, or that it caches something else."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        values = config.num_heads * config.kv.v_width
        self.o_proj = Projection({"o_proj": config.hidden_size}, values, config.o_bias, dtype, device)

    def destinations(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes, by its name below `self_attn`."""
        parts = [part.destinations() for part in self.children() if isinstance(part, Projection)]
        return {name: place for part in parts for name, place in part.items()}

    def forward(self, x_TD: Tensor, batch: Batch, rotation_TF: Tensor, cache: LayerCache) -> Tensor:
        """Attention of one layer: writes the new tokens into `cache`, attends, projects back to [T, D]."""
        q_THK, *new = self.project(x_TD, rotation_TF)
        for rows, new_rows in zip(cache, new, strict=True):
            rows.flatten(0, 1).index_copy_(0, batch.slot_T, new_rows)
        num_decode = len(batch.length_B)
        parts = []
        if num_decode:
            parts.append(self.decode(q_THK[:num_decode], cache, batch))
        if num_decode < len(q_THK):
            parts.append(self.prefill(q_THK[num_decode:], cache, batch))
        out_TD: Tensor = self.o_proj(torch.cat(parts).flatten(1))
        return out_TD

    def project(self, x_TD: Tensor, rotation_TF: Tensor) -> tuple[Tensor, ...]:
        """Queries [T, H, K], rotated by their positions, and the rows to be cached."""
        raise NotImplementedError

    def prefill(self, q_THK: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
        """Attend with several query tokens a sequence: [T, H, V]."""
        key_SGK, value_SGV = (rows.flatten(0, 1).index_select(0, batch.context_slot_S) for rows in cache)
        return self.attend(q_THK, key_SGK, value_SGV, batch)

    def attend(self, q_THK: Tensor, key_SGK: Tensor, value_SGV: Tensor, batch: Batch) -> Tensor:
        """Causally, each sequence to its own context: [T, H, V]."""
        starts = batch.query_starts, batch.context_starts
        return mha_prefill(q_THK, key_SGK, value_SGV, *starts, self.config.softmax_scale)

    def decode(self, q_BHK: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
        """Attend with one query token a sequence: [B, H, V]."""
        return gqa_decode(q_BHK, cache[0], cache[1], batch.table_BM, batch.length_B, self.config.softmax_scale)


class GroupedAttention(Attention):
    """Caches a key and a value for each group of heads; a group may be one head, or all."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        assert isinstance(config.kv, Grouped)
        self.kv = kv = config.kv
        query, shared = config.num_heads * kv.qk_width, kv.num_heads * kv.qk_width
        rows = {"q_proj": query, "k_proj": shared, "v_proj": shared}
        self.qkv_proj = Projection(rows, config.hidden_size, config.qkv_bias, dtype, device)

    def project(self, x_TD: Tensor, rotation_TF: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, all heads of one width."""
        shared, interleaved = self.kv.num_heads, self.config.rope.interleaved
        all_heads = torch.unflatten(self.qkv_proj(x_TD), -1, (-1, self.kv.qk_width))
        q_THK, key_TGK, value_TGV = torch.split(all_heads, [self.config.num_heads, shared, shared], dim=1)
        return rotate(q_THK, rotation_TF, interleaved), rotate(key_TGK, rotation_TF, interleaved), value_TGV


class CompressedAttention(Attention):
    """The projections of latent attention, whichever is cached: the latents or what they expand to."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        assert isinstance(config.kv, Latent)
        self.kv = kv = config.kv
        rank, query = kv.q_rank, config.num_heads * kv.qk_width
        rows = {"q_a_proj": rank} if rank else {"q_proj": query}
        rows["kv_a_proj_with_mqa"] = kv.cached_width
        self.in_proj = Projection(rows, config.hidden_size, False, dtype, device)
        self.q_norm = parameter(rank, dtype=dtype, device=device) if rank else None
        self.q_b_proj = Projection({"q_b_proj": query}, rank, False, dtype, device) if rank else None
        self.kv_norm = parameter(kv.rank, dtype=dtype, device=device)
        rows = {"kv_b_proj": config.num_heads * (kv.nope_width + kv.v_width)}
        self.kv_b_proj = Projection(rows, kv.rank, False, dtype, device)

    def destinations(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes, by its name below `self_attn`."""
        places = super().destinations() | {"kv_a_layernorm.weight": self.kv_norm}
        return places if self.q_norm is None else places | {"q_a_layernorm.weight": self.q_norm}

    def compress(self, x_TD: Tensor, rotation_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, K], latents, and the key part all heads share; rotated by their positions."""
        kv, eps, interleaved = self.kv, self.config.rms_norm_eps, self.config.rope.interleaved
        both = self.in_proj(x_TD)
        q, latent_TL, rotated_TR = torch.split(both, [both.shape[-1] - kv.cached_width, kv.rank, kv.rope_width], dim=-1)
        if self.q_norm is not None and self.q_b_proj is not None:
            q = self.q_b_proj(rms_norm(q, self.q_norm, eps))
        q_THK = torch.unflatten(q, -1, (-1, kv.qk_width))
        q_THN, q_THR = torch.split(q_THK, [kv.nope_width, kv.rope_width], dim=-1)
        q_THK = torch.cat([q_THN, rotate(q_THR, rotation_TF, interleaved)], dim=-1)
        rotated_TR = rotate(rotated_TR.unsqueeze(1), rotation_TF, interleaved).squeeze(1)
        return q_THK, rms_norm(latent_TL, self.kv_norm, eps), rotated_TR

    def expand(self, latent_TL: Tensor, rotated_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [T, H, K] and values [T, H, V] of every head."""
        expanded = torch.unflatten(self.kv_b_proj(latent_TL), -1, (self.config.num_heads, -1))
        key_THN, value_THV = torch.split(expanded, [self.kv.nope_width, self.kv.v_width], dim=-1)
        rotated_THR = rotated_TR.unsqueeze(1).expand(-1, self.config.num_heads, -1)
        return torch.cat([key_THN, rotated_THR], dim=-1), value_THV


class LatentAttention(CompressedAttention):
    """Caches latents; decodes in their space, with the up-projections absorbed into query and output."""

    def project(self, x_TD: Tensor, rotation_TF: Tensor) -> tuple[Tensor, ...]:
        """Queries; latents and rotated keys, side by side."""
        q_THK, latent_TL, rotated_TR = self.compress(x_TD, rotation_TF)
        return q_THK, torch.cat([latent_TL, rotated_TR], dim=-1)

    def prefill(self, q_THK: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
        """Either over keys and values expanded from the context's latents, or absorbed, whichever multiplies less."""
        latent_SC = cache[0].flatten(0, 1).index_select(0, batch.context_slot_S)
        if self.absorbing_pays(batch):
            latent_SGC = latent_SC.unsqueeze(1)
            o_THL = self.attend(self.absorb(q_THK), latent_SGC, latent_SGC[..., : self.kv.rank], batch)
            return self.unabsorb(o_THL)
        latent_SL, rotated_SR = torch.split(latent_SC, [self.kv.rank, self.kv.rope_width], dim=-1)
        return self.attend(q_THK, *self.expand(latent_SL, rotated_SR), batch)

    def decode(self, q_BHK: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
        """In the latent space, where all heads read the same rows."""
        scale, rank = self.config.softmax_scale, self.kv.rank
        return self.unabsorb(mla_decode(self.absorb(q_BHK), cache[0], batch.table_BM, batch.length_B, scale, rank))

    def absorbing_pays(self, batch: Batch) -> bool:
        """Expanding costs each context token once, absorbing each new one and more for each pair of the two."""
        kv, queries, contexts = self.kv, pairwise(batch.query_starts), pairwise(batch.context_starts)
        projection = kv.rank * (kv.nope_width + kv.v_width)
        longer_rows = kv.cached_width + kv.rank - kv.qk_width - kv.v_width
        num_pairs = sum((q[1] - q[0]) * (c[1] - c[0]) for q, c in zip(queries, contexts, strict=True))
        saved = projection * (batch.context_starts[-1] - batch.query_starts[-1])
        return num_pairs * longer_rows < saved

    def absorb(self, q_THK: Tensor) -> Tensor:
        """Queries [T, H, C] that read latents, from those that read keys."""
        q_THN, q_THR = torch.split(q_THK, [self.kv.nope_width, self.kv.rope_width], dim=-1)
        q_THL = torch.bmm(q_THN.transpose(0, 1), self.up_projections()[0]).transpose(0, 1)
        return torch.cat([q_THL, q_THR], dim=-1)

    def unabsorb(self, o_THL: Tensor) -> Tensor:
        """Outputs [T, H, V] from weighted means of latents."""
        return torch.bmm(o_THL.transpose(0, 1), self.up_projections()[1].transpose(1, 2)).transpose(0, 1)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """What expands a latent to each head's key [H, N, L] and value [H, V, L]."""
        up_HXL = torch.unflatten(self.kv_b_proj.weight, 0, (self.config.num_heads, -1))  # X: N, then V rows
        up_HNL, up_HVL = torch.split(up_HXL, [self.kv.nope_width, self.kv.v_width], dim=1)
        return up_HNL, up_HVL


class ExpandedAttention(CompressedAttention):
    """Caches every head's key and value, as multi-head attention does, and decodes over those."""

    def project(self, x_TD: Tensor, rotation_TF: Tensor) -> tuple[Tensor, ...]:
        """Queries; every head's key and value."""
        q_THK, latent_TL, rotated_TR = self.compress(x_TD, rotation_TF)
        return q_THK, *self.expand(latent_TL, rotated_TR)


KINDS: dict[str, type[Attention]] = {"mla": LatentAttention, "mha": ExpandedAttention, "gqa": GroupedAttention}

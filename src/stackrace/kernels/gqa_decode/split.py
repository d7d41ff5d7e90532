"""Decode attention over paged keys and values in Triton, split over the cached tokens: MHA, GQA and MQA.

Letters: B sequences, T query tokens each (the last of their context), H query heads, N key-value heads (a divisor of
H), K key width, V value width, G pages, P tokens a page, M pages a table row.
"""

from torch import Tensor

from stackrace.kernels.split_kv.attend import Cache, Config, attend
from stackrace.kernels.split_kv.schedule import Schedule


def gqa_decode(
    q_BTHK: Tensor,
    key_GPNK: Tensor,
    value_GPNV: Tensor,
    table_BM: Tensor,
    length_B: Tensor,
    scale: float,
    schedule: Schedule,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V], and log-sum-exps [B, T, H]: see `attend`."""
    cache = Cache(key_GPNK, value_GPNV, value_GPNV.shape[-1], table_BM, length_B)
    return attend(q_BTHK, cache, scale, schedule, config)

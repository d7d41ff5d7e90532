"""Decode attention over paged keys and values in Triton, split over the cached tokens: MHA, GQA and MQA.

Letters: B sequences, T query tokens each (the last of their context), H query heads, N key-value heads (a divisor of
H), K key width, V value width, G pages, P tokens a page, M pages a table row.
"""

from torch import Tensor

from stackrace.kernels.split_kv.attend import Config, attend
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
    width = value_GPNV.shape[-1]
    return attend(q_BTHK, key_GPNK, value_GPNV, width, table_BM, length_B, scale, schedule, config)

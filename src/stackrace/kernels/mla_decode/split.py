"""Decode attention over a paged latent cache in Triton, split over the cached tokens.

Letters: B sequences, T query tokens each (the last of their context), H query heads, C cached width (rank and rotated
part), R rank, G pages, P tokens a page, M pages a table row.
"""

from torch import Tensor

from stackrace.kernels.split_kv.attend import Cache, Config, attend
from stackrace.kernels.split_kv.schedule import Schedule


def mla_decode(
    q_BTHC: Tensor,
    cache_GPC: Tensor,
    table_BM: Tensor,
    length_B: Tensor,
    scale: float,
    rank: int,
    schedule: Schedule,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Outputs in the latent space [B, T, H, R], and log-sum-exps [B, T, H]: see `attend`. One key-value head, whose
    values are the first R numbers of its keys.
    """
    cache = Cache(cache_GPC.unsqueeze(2), None, rank, table_BM, length_B)
    return attend(q_BTHC, cache, scale, schedule, config)

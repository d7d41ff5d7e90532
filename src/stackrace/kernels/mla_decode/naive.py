"""Decode attention over a paged latent cache in plain torch: the reference, and the path taken on a CPU.

Letters: B sequences, H query heads, C cached width (rank + rotated part), R rank, G pages, P tokens a page,
M pages a table row. Every head reads the same cached row: keys are all of it, values its first R numbers.
"""

import torch
from torch import Tensor


def mla_decode(q_BHC: Tensor, cache_GPC: Tensor, table_BM: Tensor, length_B: Tensor, scale: float, rank: int) -> Tensor:
    """softmax(scale q kT) v for one query token a sequence, in the latent space: [B, H, R], typed as `q_BHC`.

    `table_BM` holds page numbers; entries past a sequence's last page are not read, and neither are rows past
    its length. A sequence of length 0 gives zeros. Sums are in float32 at least.
    Source: arXiv 2405.04434, 2.1 with the up-projections absorbed.
    """
    wide = torch.promote_types(q_BHC.dtype, torch.float32)
    scaled_BHC = q_BHC.to(wide) * scale
    out_BHR = scaled_BHC.new_zeros(*q_BHC.shape[:2], rank)
    num_rows = cache_GPC.shape[1]
    for row, length in enumerate(length_B.tolist()):  # padding to one length was measured 2 to 5 times slower
        pages_M = table_BM[row, : -(-length // num_rows)]
        latent_SC = cache_GPC.index_select(0, pages_M).flatten(0, 1)[:length].to(wide)
        weight_HS = torch.softmax(scaled_BHC[row] @ latent_SC.T, dim=-1)
        torch.mm(weight_HS, latent_SC[:, :rank], out=out_BHR[row])
    return out_BHR.to(q_BHC.dtype)

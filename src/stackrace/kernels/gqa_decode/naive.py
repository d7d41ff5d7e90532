"""Decode attention over paged keys and values in plain torch: the reference, and the path taken on a CPU.

Letters: B sequences, H query heads, N key-value heads (a divisor of H), K key width, V value width, G pages,
P tokens a page, M pages a table row.
"""

import torch
from torch import Tensor


def gqa_decode(
    q_BHK: Tensor,
    key_GPNK: Tensor,
    value_GPNV: Tensor,
    table_BM: Tensor,
    length_B: Tensor,
    scale: float,
) -> Tensor:
    """softmax(scale q kT) v for one query token a sequence: [B, H, V], typed as `q_BHK`.

    Query head h reads key-value head h // (H/N). Table entries past a sequence's last page are not read, and
    neither are rows past its length. A sequence of length 0 gives zeros. Sums are in float32 at least.
    """
    wide = torch.promote_types(q_BHK.dtype, torch.float32)
    num_rows, num_kv_heads = key_GPNK.shape[1:3]
    scaled_BNgK = torch.unflatten(q_BHK.to(wide) * scale, 1, (num_kv_heads, -1))
    out_BNgV = scaled_BNgK.new_zeros(*scaled_BNgK.shape[:3], value_GPNV.shape[-1])
    for row, length in enumerate(length_B.tolist()):
        pages_M = table_BM[row, : -(-length // num_rows)]
        key_SNK = key_GPNK.index_select(0, pages_M).flatten(0, 1)[:length].to(wide)
        value_SNV = value_GPNV.index_select(0, pages_M).flatten(0, 1)[:length].to(wide)
        weight_NgS = torch.softmax(torch.bmm(scaled_BNgK[row], key_SNK.permute(1, 2, 0)), dim=-1)
        torch.bmm(weight_NgS, value_SNV.transpose(0, 1), out=out_BNgV[row])
    return out_BNgV.flatten(1, 2).to(q_BHK.dtype)

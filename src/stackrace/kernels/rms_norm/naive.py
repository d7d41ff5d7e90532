"""Root mean square normalisation in plain torch: the reference, and the path taken on a CPU."""

import torch
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Each row of `x_TD` divided by its root mean square, times `weight_D`; same shape and type as `x_TD`.

    The mean is taken in float32 at least. T: tokens, D: width. Source: arXiv 1910.07467.
    """
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return (wide_TD * scale_T1).to(x_TD.dtype) * weight_D

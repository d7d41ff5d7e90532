"""Rotary position embedding and its stretched forms in plain torch: the reference, and the path taken on a CPU.

Letters: T tokens or positions, N heads, R rotated width, F = R/2 frequencies.
"""

import math

import torch
from torch import Tensor


def frequencies(width: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Plain RoPE: theta^(-2i/width) for i < width/2, radians a position. Source: arXiv 2104.09864."""
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=dtype) / width)


def yarn_frequencies(
    width: int, theta: float, factor: float, fast: float, slow: float, original_positions: int, dtype: torch.dtype
) -> Tensor:
    """YaRN: frequencies that turn over `fast` times within the original context stay, those that turn less
    than `slow` times are divided by `factor`, with a ramp between. Source: arXiv 2309.00071, 3.2.
    """
    plain_F = frequencies(width, theta, dtype)
    low = max(math.floor(_turning(fast, width, theta, original_positions)), 0)
    high = min(math.ceil(_turning(slow, width, theta, original_positions)), width - 1)
    ramp_F = (torch.arange(width // 2, dtype=dtype) - low) / max(high - low, 0.001)
    stretched_F = ramp_F.clamp(0, 1)
    return plain_F / factor * stretched_F + plain_F * (1 - stretched_F)


def _turning(turns: float, width: int, theta: float, positions: int) -> float:
    """The (fractional) index of the frequency that makes `turns` full turns within `positions`."""
    return width * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


def llama3_frequencies(
    width: int, theta: float, factor: float, fast: float, slow: float, original_positions: int, dtype: torch.dtype
) -> Tensor:
    """Llama 3.1's: as YaRN's, but with a ramp that is straight in the turns within the original context."""
    plain_F = frequencies(width, theta, dtype)
    turns_F = plain_F * (original_positions / (2 * math.pi))
    stretched_F = ((fast - turns_F) / (fast - slow)).clamp(0, 1)
    return plain_F / factor * stretched_F + plain_F * (1 - stretched_F)


def rotation_table(frequency_F: Tensor, num_positions: int, magnitude: float) -> Tensor:
    """magnitude * exp(i position frequency) for every position, complex, [num_positions, F]."""
    position_T = torch.arange(num_positions, dtype=frequency_F.dtype, device=frequency_F.device)
    angle_TF = torch.outer(position_T, frequency_F)
    return torch.polar(torch.full_like(angle_TF, magnitude), angle_TF)


def rotate(x_TNR: Tensor, rotation_TF: Tensor, interleaved: bool) -> Tensor:
    """`x_TNR` with each pair turned as one complex number by `rotation_TF`; same shape and type.

    Interleaved pairs are (2i, 2i + 1), as in DeepSeek's checkpoints; otherwise (i, i + R/2), as in Llama's.
    """
    wide_TNR = x_TNR.to(torch.promote_types(x_TNR.dtype, torch.float32))
    if interleaved:
        turned_TNF = torch.view_as_complex(torch.unflatten(wide_TNR, -1, (-1, 2))) * rotation_TF.unsqueeze(1)
        return torch.view_as_real(turned_TNF).flatten(-2).to(x_TNR.dtype)
    turned_TNF = torch.complex(*wide_TNR.chunk(2, dim=-1)) * rotation_TF.unsqueeze(1)
    return torch.cat([turned_TNF.real, turned_TNF.imag], dim=-1).to(x_TNR.dtype)

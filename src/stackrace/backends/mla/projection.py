"""Linear maps that know the checkpoint's names of their parts."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised weight."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class Projection(nn.Module):
    """Several linear maps of one input, as one product."""

    def __init__(
        self, rows: Mapping[str, int], width: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`rows`: how many numbers each map gives, by its name in the checkpoint; `width`: of the input."""
        super().__init__()
        self.rows = rows
        self.weight = parameter(sum(rows.values()), width, dtype=dtype, device=device)
        self.bias = parameter(sum(rows.values()), dtype=dtype, device=device) if bias else None

    def destinations(self) -> dict[str, Tensor]:
        """Where each of the checkpoint's tensors goes."""
        return {
            f"{name}.{kind}": part
            for kind, whole in self.named_parameters()
            for name, part in zip(self.rows, torch.split(whole, list(self.rows.values())), strict=True)
        }

    def forward(self, x_TD: Tensor) -> Tensor:
        """What the maps give, side by side."""
        return linear(x_TD, self.weight, self.bias)

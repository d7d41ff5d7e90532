"""Merges what several parts found out about one sequence, by their log-sum-exps.

Letters: B sequences, X query rows of each, V value width, S segments. The segment that part i leaves of sequence j is
number i + j: from one to the next of them along the line at least one of the two grows.
"""

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from stackrace.kernels.split_kv.schedule import Schedule


class Segments(NamedTuple):
    """Where parts leave what is to be merged, in float32."""

    out_SXV: Tensor
    lse_SX: Tensor  # to base 2

    @classmethod
    def allocate(cls, schedule: Schedule, num_sequences: int, num_rows: int, width: int) -> Self:
        """Room for all that may come."""
        device, number = schedule.part_W3.device, num_sequences + schedule.num_parts
        out_SXV = torch.empty(number, num_rows, width, dtype=torch.float32, device=device)
        return cls(out_SXV, torch.empty(number, num_rows, dtype=torch.float32, device=device))


def combine(out_BXV: Tensor, lse_BX: Tensor, segments: Segments, schedule: Schedule, length_B: Tensor) -> None:
    """Complete results, and log-sum-exps to base e, of sequences that more than one part computed.

    Those of length 0 get zeros and -inf. One launch.
    """
    num_sequences, num_rows, width = out_BXV.shape
    _combine[(num_sequences, num_rows)](
        length_B,
        schedule.segments_B2,
        out_BXV,
        lse_BX,
        segments.out_SXV,
        segments.lse_SX,
        num_rows,
        WIDTH=width,
        num_warps=1,
    )


@triton.jit
def _combine(
    length_ptr,
    segments_ptr,
    out_ptr,
    lse_ptr,
    segment_out_ptr,
    segment_lse_ptr,
    num_rows,
    WIDTH: tl.constexpr,
):
    """One row of one sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    first = tl.load(segments_ptr + 2 * sequence)
    last = tl.load(segments_ptr + 2 * sequence + 1)
    at = sequence * num_rows + row
    column = tl.arange(0, WIDTH)
    if tl.load(length_ptr + sequence) == 0:
        tl.store(out_ptr + at * WIDTH + column, tl.zeros([WIDTH], out_ptr.dtype.element_ty))
        tl.store(lse_ptr + at, float("-inf"))
    elif first < last:
        highest = tl.full([], float("-inf"), tl.float32)
        for part in range(first, last + 1):
            highest = tl.maximum(highest, tl.load(segment_lse_ptr + (sequence + part) * num_rows + row))
        total = tl.zeros([], tl.float32)
        sums = tl.zeros([WIDTH], tl.float32)
        for part in range(first, last + 1):
            segment = (sequence + part) * num_rows + row
            weight = tl.exp2(tl.load(segment_lse_ptr + segment) - highest)
            total += weight
            sums += weight * tl.load(segment_out_ptr + segment * WIDTH + column)
        tl.store(out_ptr + at * WIDTH + column, (sums / total).to(out_ptr.dtype.element_ty))
        tl.store(lse_ptr + at, (highest + tl.log2(total)) * 0.6931471805599453)

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

LN2 = tl.constexpr(0.6931471805599453)  # from base 2 to base e
_COLUMNS = 128  # of a program
_AT_ONCE = 16  # segments that are on their way together


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
    columns = min(width, _COLUMNS)
    _combine[(num_sequences, num_rows, width // columns)](
        length_B,
        schedule.segments_B2,
        out_BXV,
        lse_BX,
        segments.out_SXV,
        segments.lse_SX,
        num_rows,
        WIDTH=width,
        COLUMNS=columns,
        AT_ONCE=_AT_ONCE,
        num_warps=4,
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
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Some columns of one row of one sequence, some segments at a time."""
    sequence = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(segments_ptr + 2 * sequence)
    last = tl.load(segments_ptr + 2 * sequence + 1)
    at = sequence * num_rows + row
    if tl.load(length_ptr + sequence) == 0:
        tl.store(out_ptr + at * WIDTH + column, tl.zeros([COLUMNS], out_ptr.dtype.element_ty))
        tl.store(lse_ptr + at, float("-inf"))
    elif first < last:
        highest = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
        sums = tl.zeros([COLUMNS], tl.float32)
        for part in range(first, last + 1, AT_ONCE):
            own = part + tl.arange(0, AT_ONCE)
            segment = (sequence + own) * num_rows + row
            lse = tl.load(segment_lse_ptr + segment, mask=own <= last, other=float("-inf"))
            piece_ptr = segment_out_ptr + segment[:, None] * WIDTH + column[None, :]
            piece = tl.load(piece_ptr, mask=(own <= last)[:, None], other=0.0)
            before = highest
            highest = tl.maximum(highest, tl.max(lse))
            base = tl.where(highest == float("-inf"), 0.0, highest)  # segments of which this row sees nothing
            weight = tl.exp2(lse - base)
            shrink = tl.exp2(before - base)
            total = total * shrink + tl.sum(weight)
            sums = sums * shrink + tl.sum(weight[:, None] * piece, 0)
        tl.store(out_ptr + at * WIDTH + column, (sums / total).to(out_ptr.dtype.element_ty))
        tl.store(lse_ptr + at, (highest + tl.log2(total)) * LN2)

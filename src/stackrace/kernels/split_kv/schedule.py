"""Who computes what, where the cached tokens of a batch are shared out among the multiprocessors of a GPU.

The pages of all sequences are laid end to end on a line of work, and the line is cut into parts. A part that begins or
ends amid a sequence leaves a *segment* of it, with a log-sum-exp, for `combine`; a sequence within one part needs none.
Filled on the device, once a step for all layers, without asking the host: safe in a CUDA graph, whatever the lengths.

Letters: B sequences, W parts.
"""

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

OVERHEAD = 2  # pages that a sequence costs besides its own: queries in, results out
_CHUNK = 256  # sequences that are looked at at once


class Schedule(NamedTuple):
    """The parts of one step."""

    part_W3: Tensor  # of each part: its first sequence, pages of it that come before, units of the line that it covers
    segments_B2: Tensor  # of each sequence: the first and the last part that has pages of it

    @classmethod
    def allocate(cls, max_sequences: int, num_parts: int, device: torch.device | str) -> Self:
        """Room for one: what a CUDA graph refers to stays where it is, and is filled at every step."""
        part_W3 = torch.empty(num_parts, 3, dtype=torch.int32, device=device)
        return cls(part_W3, torch.empty(max_sequences, 2, dtype=torch.int32, device=device))

    @property
    def num_parts(self) -> int:
        """Programs for each block of query rows."""
        return len(self.part_W3)

    def share_evenly(self, length_B: Tensor, page: int) -> None:
        """Parts of equal length, whatever the lengths of the sequences. One launch; `length_B` is int32."""
        assert 0 < len(length_B) <= len(self.segments_B2)
        _share_evenly[(self.num_parts,)](
            length_B, self.part_W3, self.segments_B2, len(length_B), self.num_parts, page, OVERHEAD, _CHUNK
        )

    def split_each(self, length_B: Tensor, page: int) -> None:
        """The same number of parts for every sequence. One launch; `length_B` is int32.

        One part for each is FlashAttention's schedule, several are Flash-Decoding's. ValueError: parts do not go round.
        """
        num_splits, rest = divmod(self.num_parts, len(length_B))
        if rest or not num_splits:
            raise ValueError(f"{self.num_parts} parts for {len(length_B)} sequences: must be a multiple")
        assert len(length_B) <= len(self.segments_B2)
        _split_each[(len(length_B),)](length_B, self.part_W3, self.segments_B2, num_splits, page)


@triton.jit
def _share_evenly(
    length_ptr,
    part_ptr,
    segments_ptr,
    num_sequences,
    num_parts,
    PAGE: tl.constexpr,
    OVERHEAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program i tells part i; the first one tells the segments."""
    part = tl.program_id(0)
    line = tl.zeros([], tl.int32)
    for first in range(0, num_sequences, CHUNK):
        line += tl.sum(_units(length_ptr, first, num_sequences, PAGE, OVERHEAD, CHUNK))
    units_of_part = tl.cdiv(line, num_parts)  # the last parts may be short, or empty
    begin = tl.minimum(part * units_of_part, line)
    end = tl.minimum(begin + units_of_part, line)
    sequence = tl.zeros([], tl.int32)  # how many end before the part begins
    before = tl.zeros([], tl.int32)  # where the last of these ends
    here = tl.zeros([], tl.int32)
    for first in range(0, num_sequences, CHUNK):
        units = _units(length_ptr, first, num_sequences, PAGE, OVERHEAD, CHUNK)
        ends = here + tl.cumsum(units)
        here += tl.sum(units)
        index = first + tl.arange(0, CHUNK)
        is_one = index < num_sequences
        is_past = is_one & (ends <= begin)
        sequence += tl.sum(is_past.to(tl.int32))
        before = tl.maximum(before, tl.max(tl.where(is_past, ends, 0)))
        if part == 0:
            tl.store(segments_ptr + 2 * index, (ends - units) // units_of_part, mask=is_one)
            tl.store(segments_ptr + 2 * index + 1, (ends - OVERHEAD - 1) // units_of_part, mask=is_one)
    tl.store(part_ptr + 3 * part, sequence)
    tl.store(part_ptr + 3 * part + 1, begin - before)
    tl.store(part_ptr + 3 * part + 2, end - begin)


@triton.jit
def _units(length_ptr, first, num_sequences, PAGE: tl.constexpr, OVERHEAD: tl.constexpr, CHUNK: tl.constexpr):
    """What each of some sequences takes up on the line: its pages, and what it costs besides."""
    index = first + tl.arange(0, CHUNK)
    length = tl.load(length_ptr + index, mask=index < num_sequences, other=0)
    return tl.where(index < num_sequences, tl.cdiv(length, PAGE) + OVERHEAD, 0)


@triton.jit
def _split_each(length_ptr, part_ptr, segments_ptr, num_splits, PAGE: tl.constexpr):
    """Program i tells the parts of sequence i. Some at its end are empty where it has too few pages."""
    sequence = tl.program_id(0)
    num_pages = tl.cdiv(tl.load(length_ptr + sequence), PAGE)
    pages = tl.maximum(tl.cdiv(num_pages, num_splits), 1)  # of a part
    for split in range(num_splits):
        part = sequence * num_splits + split
        tl.store(part_ptr + 3 * part, sequence)
        tl.store(part_ptr + 3 * part + 1, split * pages)
        tl.store(part_ptr + 3 * part + 2, tl.maximum(tl.minimum(num_pages - split * pages, pages), 0))
    first = sequence * num_splits
    tl.store(segments_ptr + 2 * sequence, first)
    tl.store(segments_ptr + 2 * sequence + 1, first + tl.maximum(tl.cdiv(num_pages, pages), 1) - 1)

"""Decode attention over paged keys and values, split over the cached tokens, in Triton.

One program for each part of the schedule and each block of query rows walks along its piece of the line of work. With
`value_GPNV=None` values are the first numbers of the keys, as where latents are cached: each tile is then read once and
used twice by its program.

Letters: B sequences, T query tokens each (the last of their context), H query heads, N key-value heads (a divisor of
H), K key width, V value width, G pages, P tokens a page, M pages a table row, X = T H query rows of a sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stackrace.kernels.split_kv.combine import LN2, Segments, combine
from stackrace.kernels.split_kv.schedule import OVERHEAD, Schedule

_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Config:
    """How the work of a part is cut: what is tuned for a GPU and a number of query rows."""

    rows: int  # query rows of a program, 16 or more
    tile: int  # cached tokens at a time, a divisor of the page
    warps: int
    stages: int  # tiles that are on their way at once


def untuned(num_rows: int) -> Config:
    """One that a Hopper GPU takes without spilling, for so many query rows that read one key-value head."""
    rows, warps = (16, 4) if num_rows <= 16 else (32, 8)
    return Config(rows=rows, tile=32, warps=warps, stages=3)


class Cache(NamedTuple):
    """What a batch may attend to: the first `length_B` (int32) tokens of the pages in `table_BM`.

    Lengths count the query tokens, too. What lies past a sequence's length, in pages or in the table, does not matter.
    """

    key_GPNK: Tensor
    value_GPNV: Tensor | None  # None: the first V numbers of the keys
    value_width: int  # a power of two; K is V and another one more, or V alone
    table_BM: Tensor
    length_B: Tensor

    def check(self, q_BTHK: Tensor) -> None:
        """AssertionError for what would read or write somewhere else. Costs the host microseconds, in a graph none."""
        extra = q_BTHK.shape[-1] - self.value_width
        assert all(t.is_contiguous() for t in (q_BTHK, self.key_GPNK, self.value_GPNV, self.length_B) if t is not None)
        assert len(self.table_BM) == len(self.length_B) == len(q_BTHK)
        assert self.table_BM.stride(1) == 1
        assert self.key_GPNK.shape[-1] == q_BTHK.shape[-1]
        assert q_BTHK.shape[2] % self.key_GPNK.shape[2] == 0
        assert self.value_width & (self.value_width - 1) == 0 == extra & (extra - 1)
        assert self.value_GPNV is None or self.value_GPNV.shape == (*self.key_GPNK.shape[:3], self.value_width)


def attend(q_BTHK: Tensor, cache: Cache, scale: float, schedule: Schedule, config: Config) -> tuple[Tensor, Tensor]:
    """softmax(scale q kT) v of the last T tokens of each sequence: [B, T, H, V], typed as `q_BTHK`, and float32
    log-sum-exps [B, T, H].

    Each query token sees itself and what comes before it. A sequence of length 0 gives zeros and -inf; other lengths
    are T at least. `schedule` must have been filled for these lengths. Two launches.
    """
    num_sequences, num_tokens, num_heads, width = q_BTHK.shape
    page, num_kv_heads = cache.key_GPNK.shape[1:3]
    num_rows, group = num_tokens * num_heads, num_heads // num_kv_heads
    cache.check(q_BTHK)
    assert num_sequences <= len(schedule.segments_B2)
    assert page % config.tile == 0
    out_BXV = q_BTHK.new_empty(num_sequences, num_rows, cache.value_width)
    lse_BX = q_BTHK.new_empty(num_sequences, num_rows, dtype=torch.float32)
    segments = Segments.allocate(schedule, num_sequences, num_rows, cache.value_width)
    num_blocks = triton.cdiv(num_tokens * group, config.rows)
    _attend[(num_kv_heads * num_blocks, schedule.num_parts)](
        q_BTHK,
        cache.key_GPNK,
        cache.key_GPNK if cache.value_GPNV is None else cache.value_GPNV,
        cache.table_BM,
        cache.length_B,
        schedule.part_W3,
        out_BXV,
        lse_BX,
        *segments,
        scale * _LOG2E,
        cache.table_BM.stride(0),
        num_tokens,
        num_blocks,
        GROUP=group,
        NUM_KV_HEADS=num_kv_heads,
        VALUE=cache.value_width,
        EXTRA=width - cache.value_width,
        IS_SHARED=cache.value_GPNV is None,
        PAGE=page,
        OVERHEAD=OVERHEAD,
        ROWS=config.rows,
        TILE=config.tile,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    combine(out_BXV, lse_BX, segments, schedule, cache.length_B)
    return torch.unflatten(out_BXV, 1, (num_tokens, num_heads)), torch.unflatten(lse_BX, 1, (num_tokens, num_heads))


@triton.jit(do_not_specialize=["table_stride"])
def _attend(
    q_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    length_ptr,
    part_ptr,
    out_ptr,
    lse_ptr,
    segment_out_ptr,
    segment_lse_ptr,
    scale_log2,
    table_stride,
    num_tokens,
    num_blocks,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    EXTRA: tl.constexpr,
    IS_SHARED: tl.constexpr,
    PAGE: tl.constexpr,
    OVERHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of the query rows that read one key-value head, along one part of the line."""
    part = tl.program_id(1)
    kv_head = tl.program_id(0) // num_blocks
    inner = tl.program_id(0) % num_blocks * ROWS + tl.arange(0, ROWS)  # token by token, and of each the group's heads
    is_row = inner < num_tokens * GROUP
    unseen = num_tokens - 1 - inner // GROUP  # cached tokens that come after the row's own
    row = inner // GROUP * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + inner % GROUP
    num_rows = num_tokens * NUM_KV_HEADS * GROUP
    column = tl.arange(0, VALUE)
    sequence = tl.load(part_ptr + 3 * part)
    page = tl.load(part_ptr + 3 * part + 1)
    left = tl.load(part_ptr + 3 * part + 2)
    while left > 0:
        length = tl.load(length_ptr + sequence)
        num_pages = tl.cdiv(length, PAGE)
        last_page = tl.minimum(page + left, num_pages)
        if page < last_page:
            begin = page * PAGE
            end = tl.minimum(last_page * PAGE, length)
            pages_ptr = table_ptr + sequence.to(tl.int64) * table_stride
            here = sequence.to(tl.int64) * num_rows + row
            q_row_ptr = q_ptr + here * (VALUE + EXTRA)
            q = tl.load(q_row_ptr[:, None] + column[None, :], mask=is_row[:, None], other=0.0)
            q_extra = q
            if EXTRA > 0:
                extra = VALUE + tl.arange(0, EXTRA)
                q_extra = tl.load(q_row_ptr[:, None] + extra[None, :], mask=is_row[:, None], other=0.0)
            top = tl.full([ROWS], float("-inf"), tl.float32)  # highest score so far, in powers of two
            total = tl.zeros([ROWS], tl.float32)
            sums = tl.zeros([ROWS, VALUE], tl.float32)
            # tiles that end before the first query token hide nothing from any row
            bare = begin + tl.maximum(tl.minimum(end, length - num_tokens + 1) - begin, 0) // TILE * TILE
            number = tl.load(pages_ptr + page)  # a tile ahead, or tiles could not be loaded ahead
            for position in tl.range(begin, bare, TILE, num_stages=STAGES):
                following = tl.load(pages_ptr + tl.minimum(position + TILE, end - 1) // PAGE)
                top, total, sums = _step(
                    q, q_extra, top, total, sums, key_ptr, value_ptr, number, kv_head, position, length, unseen,
                    scale_log2, NUM_KV_HEADS, VALUE, EXTRA, IS_SHARED, PAGE, TILE, IS_MASKED=False,
                )  # fmt: skip
                number = following
            for position in tl.range(bare, end, TILE, num_stages=1):
                number = tl.load(pages_ptr + position // PAGE)
                top, total, sums = _step(
                    q, q_extra, top, total, sums, key_ptr, value_ptr, number, kv_head, position, length, unseen,
                    scale_log2, NUM_KV_HEADS, VALUE, EXTRA, IS_SHARED, PAGE, TILE, IS_MASKED=True,
                )  # fmt: skip
            divisor = tl.where(total > 0, total, 1.0)  # a row that sees nothing of this segment has no sums
            out = sums / divisor[:, None]
            lse = top + tl.log2(divisor)
            if (page == 0) & (last_page == num_pages):
                whole_ptr = out_ptr + here[:, None] * VALUE + column[None, :]
                tl.store(whole_ptr, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
                tl.store(lse_ptr + here, lse * LN2, mask=is_row)
            else:
                segment = (sequence + part).to(tl.int64) * num_rows + row
                piece_ptr = segment_out_ptr + segment[:, None] * VALUE + column[None, :]
                tl.store(piece_ptr, out, mask=is_row[:, None])
                tl.store(segment_lse_ptr + segment, lse, mask=is_row)
        left -= num_pages + OVERHEAD - page
        page = 0
        sequence += 1


@triton.jit
def _step(
    q,
    q_extra,
    top,
    total,
    sums,
    key_ptr,
    value_ptr,
    number,
    kv_head,
    position,
    length,
    unseen,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    EXTRA: tl.constexpr,
    IS_SHARED: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Take one tile, of the page with this number, into the running softmax."""
    token = position + tl.arange(0, TILE)
    cached = (number.to(tl.int64) * PAGE + token % PAGE) * NUM_KV_HEADS + kv_head
    is_there = (token < length)[:, None]
    column = tl.arange(0, VALUE)
    key_row_ptr = key_ptr + cached[:, None] * (VALUE + EXTRA)
    key = _load(key_row_ptr + column[None, :], is_there, IS_MASKED)
    score = tl.dot(q, tl.trans(key), input_precision="ieee")
    if EXTRA > 0:
        key_extra = _load(key_row_ptr + VALUE + tl.arange(0, EXTRA)[None, :], is_there, IS_MASKED)
        score = tl.dot(q_extra, tl.trans(key_extra), score, input_precision="ieee")
    score *= scale_log2
    if IS_MASKED:
        score = tl.where(token[None, :] < length - unseen[:, None], score, float("-inf"))
    highest = tl.maximum(top, tl.max(score, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen nothing yet
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(top - base)
    value = key
    if not IS_SHARED:
        value = _load(value_ptr + cached[:, None] * VALUE + column[None, :], is_there, IS_MASKED)
    sums = tl.dot(weight.to(value.dtype), value, sums * shrink[:, None], input_precision="ieee")
    return highest, total * shrink + tl.sum(weight, 1), sums


@triton.jit
def _load(pointers, is_there, IS_MASKED: tl.constexpr):
    """0 for rows past the sequence's end: whatever lies there would spoil the sums even at weight 0."""
    if IS_MASKED:
        return tl.load(pointers, mask=is_there, other=0.0)
    return tl.load(pointers)

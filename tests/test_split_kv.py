"""The Triton decode kernels in Triton's interpreter, against attention in float64; bfloat16 is for tests/gpu."""

import numpy as np
import pytest
import torch
from decode_kit import PAGE, attention, latents, normal, off, paged

pytest.importorskip("triton", reason="no triton for this platform")
from stackrace.kernels.gqa_decode.split import gqa_decode
from stackrace.kernels.mla_decode.split import mla_decode
from stackrace.kernels.split_kv.attend import Config
from stackrace.kernels.split_kv.schedule import OVERHEAD, Schedule

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [1, 0, 63, 64, 65, 300]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """As it was while the kernels were imported (conftest.py)."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def shared_out(lengths, num_parts):
    """(length_B, schedule with equal parts)."""
    length_B = torch.tensor(lengths, dtype=torch.int32)
    schedule = Schedule.allocate(len(lengths) + 2, num_parts, "cpu")
    schedule.share_evenly(length_B, PAGE)
    return length_B, schedule


def pieces(schedule, lengths, overhead):
    """Part by part (part, sequence, first page, page after the last) of all that it computes, as the kernel walks."""
    found = []
    for part, (sequence, page, left) in enumerate(schedule.part_W3.tolist()):
        while left > 0:
            num_pages = -(-lengths[sequence] // PAGE)
            if page < min(page + left, num_pages):
                found.append((part, sequence, page, min(page + left, num_pages)))
            left -= num_pages + overhead - page
            page, sequence = 0, sequence + 1
    return found


def check_cover(schedule, lengths, overhead):
    found = pieces(schedule, lengths, overhead)
    segments = schedule.segments_B2.tolist()
    for sequence, length in enumerate(lengths):
        own = [piece for piece in found if piece[1] == sequence]
        covered = [page for _, _, first, last in own for page in range(first, last)]
        assert covered == list(range(-(-length // PAGE)))  # each page once, and in order
        if own:
            assert [part for part, *_ in own] == list(range(segments[sequence][0], segments[sequence][1] + 1))
    numbers = [part + sequence for part, sequence, *_ in found]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("num_parts", [1, 5, 33])
@pytest.mark.parametrize("seed", range(4))
def test_no_part_is_longer_than_it_must_be_and_all_cover_every_page_once(num_parts, seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, [1, 70, 3000, 100_000][seed], size=[1, 7, 30, 300][seed]).tolist()
    _, schedule = shared_out(lengths, num_parts)
    check_cover(schedule, lengths, OVERHEAD)
    line = sum(-(-length // PAGE) + OVERHEAD for length in lengths)
    units = [left for _, _, left in schedule.part_W3.tolist()]
    assert sum(units) == line
    assert max(units) == -(-line // num_parts)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_each_sequence_may_have_parts_of_its_own(num_splits):
    lengths = [0, 1, 64, 65, 128, 1000]
    schedule = Schedule.allocate(len(lengths), num_splits * len(lengths), "cpu")
    schedule.split_each(torch.tensor(lengths, dtype=torch.int32), PAGE)
    check_cover(schedule, lengths, OVERHEAD)
    with pytest.raises(ValueError, match="must be a multiple"):
        Schedule.allocate(6, 7, "cpu").split_each(torch.tensor([5, 6], dtype=torch.int32), PAGE)


def expected(q, keys, values, scale):
    """Outputs and log-sum-exps of all sequences, in float64."""
    each = [attention(one.double(), key, value, scale) for one, key, value in zip(q, keys, values, strict=True)]
    return [torch.stack(part) for part in zip(*each, strict=True)]


def run_mla(lengths, heads, tokens, dtype, num_parts, config=(16, 32, 4, 2)):
    """(found, expected), each outputs and log-sum-exps of all sequences."""
    rank, rotated, scale = 32, 16, 0.17
    cached = paged(lengths, rank + rotated, dtype=dtype)
    q = normal(len(lengths), tokens, heads, rank + rotated, seed=9).to(dtype)
    length_B, schedule = shared_out(lengths, num_parts)
    found = mla_decode(q, cached.cache, cached.table, length_B, scale, rank, schedule, Config(*config))
    return found, expected(q, *latents(cached, rank), scale)


def assert_close(found, expected, dtype):
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert off(one, other) <= TOLERANCE[dtype] * max(1.0, float(other[other.isfinite()].abs().max()))


@pytest.mark.parametrize("heads", [1, 3, 16, 63, 64, 126, 128])
def test_mla_decode_for_any_number_of_heads(heads):
    config = (64, 64, 8, 2) if heads > 16 else (16, 32, 4, 2)
    found, right = run_mla(LENGTHS, heads, 1, torch.float32, 4, config)
    assert_close(found, right, torch.float32)


@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_query_tokens_do_not_see_those_after_them(tokens):
    lengths = [tokens, 0, 63, 64, 65, 66, 130]
    for num_parts in (3, 20):  # 20: a segment may hold nothing that the first token sees
        found, right = run_mla(lengths, 2, tokens, torch.float32, num_parts)
        assert_close(found, right, torch.float32)


def test_half_precision():
    assert_close(*run_mla(LENGTHS, 16, 1, torch.float16, num_parts=4), torch.float16)


@pytest.mark.parametrize("config", [(16, 16, 4, 1), (32, 64, 8, 3)])
def test_how_the_work_is_cut_changes_nothing(config):
    assert_close(*run_mla(LENGTHS, 20, 1, torch.float32, 4, config), torch.float32)


def test_the_number_of_splits_changes_only_rounding():
    whole, _ = run_mla([300, 65], 3, 1, torch.float32, num_parts=1)
    for num_parts in (2, 9, 20):
        split, _ = run_mla([300, 65], 3, 1, torch.float32, num_parts)
        assert off(split[0], whole[0].double()) < 1e-6
        assert off(split[1], whole[1].double()) < 1e-6


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "extra", "num_splits"),
    [(1, 4, 4, 16, None), (3, 6, 2, 0, None), (1, 8, 1, 0, None), (1, 6, 2, 0, 1), (2, 6, 2, 16, 3)],
)
def test_gqa_decode(tokens, heads, kv_heads, extra, num_splits):
    width, scale, dtype, lengths = 32, 0.2, torch.float32, [tokens, *LENGTHS[1:]]
    key = paged(lengths, kv_heads, width + extra, dtype=dtype)
    value = paged(lengths, kv_heads, width, dtype=dtype, seed=50)
    q = normal(len(lengths), tokens, heads, width + extra, seed=9).to(dtype)
    length_B, schedule = shared_out(lengths, 7)
    if num_splits is not None:
        schedule = Schedule.allocate(len(lengths), num_splits * len(lengths), "cpu")
        schedule.split_each(length_B, PAGE)
    config = Config(16, 32, 4, 2)
    found = gqa_decode(q, key.cache, value.cache, key.table, length_B, scale, schedule, config)
    assert_close(found, expected(q, key.rows, value.rows, scale), dtype)

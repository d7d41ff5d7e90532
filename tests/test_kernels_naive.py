"""The plain-torch kernels against attention, routing and rotation written out in float64."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from stackrace.backends.mla.config import yarn_mscale
from stackrace.kernels.gqa_decode.naive import gqa_decode
from stackrace.kernels.mha_prefill.naive import mha_prefill
from stackrace.kernels.mla_decode.naive import mla_decode
from stackrace.kernels.moe.naive import Routing, experts, route, silu_and_mul
from stackrace.kernels.rms_norm.naive import rms_norm
from stackrace.kernels.rotary.naive import (
    frequencies,
    llama3_frequencies,
    rotate,
    rotation_table,
    yarn_frequencies,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = 64
LENGTHS = [1, 20, 63, 64, 65, 140, 300]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(q_HK: Tensor, key_SHK: Tensor, value_SHV: Tensor, scale: float) -> Tensor:
    """One query, head by head, in float64."""
    out = []
    for q, key, value in zip(q_HK, key_SHK.unbind(1), value_SHV.unbind(1), strict=True):
        score = torch.tensor([float(q @ k) * scale for k in key], dtype=torch.float64)
        weight = (score - score.max()).exp()
        out.append((weight / weight.sum()) @ value)
    return torch.stack(out)


def page(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of each sequence on permuted pages among others full of NaN, NaN beyond each length, and the table.

    Table entries past a sequence's last page are out of range.
    """
    counts = [-(-len(row) // PAGE) for row in rows]
    order = torch.randperm(2 * sum(counts), generator=torch.Generator().manual_seed(1)).tolist()
    cache = torch.full((len(order), PAGE, *rows[0].shape[1:]), math.nan, dtype=torch.float64)
    table = torch.full((len(rows), max(counts) + 1), 1 << 40, dtype=torch.int64)
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        pages = [order.pop() for _ in range(count)]
        table[number, :count] = torch.tensor(pages, dtype=torch.int64)
        for index, chunk in enumerate(row.split(PAGE)):
            cache[pages[index], : len(chunk)] = chunk
    return cache, table


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mla_decode(heads: int, dtype: torch.dtype) -> None:
    rank, width, scale = 32, 48, 0.11
    rows = [normal(length, width, seed=length).to(dtype).double() for length in LENGTHS]
    q = normal(len(LENGTHS), heads, width).to(dtype)
    cache, table = page(rows)
    found = mla_decode(q, cache.to(dtype), table, torch.tensor(LENGTHS), scale, rank)
    keys = [row.unsqueeze(1).expand(-1, heads, -1) for row in rows]
    expected = [attend(x.double(), key, key[..., :rank], scale) for x, key in zip(q, keys, strict=True)]
    assert_close(found, torch.stack(expected), dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gqa_decode(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    scale = 0.13
    keys = [normal(length, kv_heads, 24, seed=length).to(dtype).double() for length in LENGTHS]
    values = [normal(length, kv_heads, 16, seed=-length).to(dtype).double() for length in LENGTHS]
    q = normal(len(LENGTHS), heads, 24).to(dtype)
    (key_cache, table), (value_cache, _) = page(keys), page(values)
    lengths = torch.tensor(LENGTHS)
    found = gqa_decode(q, key_cache.to(dtype), value_cache.to(dtype), table, lengths, scale)
    group = heads // kv_heads
    expected = [
        attend(x.double(), key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), scale)
        for x, key, value in zip(q, keys, values, strict=True)
    ]
    assert_close(found, torch.stack(expected), dtype)


def test_decode_of_nothing_is_zero() -> None:
    table, length = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0])
    empty = torch.empty(1, PAGE, 1, 4)
    assert mla_decode(torch.ones(1, 2, 4), empty[:, :, 0], table, length, 1.0, 3).eq(0).all()
    assert gqa_decode(torch.ones(1, 2, 4), empty, empty, table, length, 1.0).eq(0).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mha_prefill(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    scale = 0.2
    new, context = [1, 5, 128, 129, 300], [1, 70, 128, 200, 300]
    query_starts = [0, *torch.tensor(new).cumsum(0).tolist()]
    context_starts = [0, *torch.tensor(context).cumsum(0).tolist()]
    q, key, value = (
        normal(rows, number, width, seed=width).to(dtype)
        for rows, number, width in ((sum(new), heads, 24), (sum(context), kv_heads, 24), (sum(context), kv_heads, 16))
    )
    found = mha_prefill(q, key, value, query_starts, context_starts, scale)
    key, value = (rows.repeat_interleave(heads // kv_heads, 1) for rows in (key, value))
    expected = []
    for number, (count, length) in enumerate(zip(new, context, strict=True)):
        start = context_starts[number]
        for index in range(count):
            seen = slice(start, start + length - count + index + 1)
            row = q[query_starts[number] + index].double()
            expected.append(attend(row, key[seen].double(), value[seen].double(), scale))
    assert_close(found, torch.stack(expected), dtype)


def test_absorbed_and_expanded_attention_are_equal() -> None:
    heads, nope, rope, rank, value, length, scale = 4, 12, 8, 32, 10, 150, 0.2
    latent, rotated = normal(length, rank, seed=1), normal(length, rope, seed=2)
    up_k, up_v = normal(heads, nope, rank, seed=3), normal(heads, value, rank, seed=4)
    q_nope, q_rope = normal(1, heads, nope, seed=5), normal(1, heads, rope, seed=6)
    cache, table = page([torch.cat([latent, rotated], -1)])
    absorbed = torch.cat([torch.einsum("bhn,hnl->bhl", q_nope, up_k), q_rope], -1)
    out = mla_decode(absorbed, cache, table, torch.tensor([length]), scale, rank)
    found = torch.einsum("bhl,hvl->bhv", out, up_v)
    key = torch.cat([torch.einsum("sl,hnl->shn", latent, up_k), rotated[:, None].expand(-1, heads, -1)], -1)
    values = torch.einsum("sl,hvl->shv", latent, up_v)
    expected = mha_prefill(torch.cat([q_nope, q_rope], -1), key, values, [0, 1], [0, length], scale)
    assert_close(found, expected, torch.float64)


@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_experts(num_tokens: int) -> None:
    number, chosen, hidden, width = 8, 3, 16, 12
    x, gate_up = normal(num_tokens, hidden), normal(number, 2 * width, hidden, seed=1)
    down = normal(number, hidden, width, seed=2)
    routing = route(normal(num_tokens, number, seed=3), None, chosen, 1, 1, renormalise=False, scale=1.0)
    expected = torch.zeros_like(x)
    for row, (ids, weights) in enumerate(zip(routing.expert_TK.tolist(), routing.weight_TK, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = gate_up[expert, :width] @ x[row], gate_up[expert, width:] @ x[row]
            expected[row] += weight * (down[expert] @ (gate / (1 + (-gate).exp()) * up))
    assert_close(experts(x, gate_up, down, routing), expected, torch.float64)


def test_experts_never_hit_are_not_read() -> None:
    gate_up, down = torch.full((4, 6, 5), math.nan), torch.full((4, 5, 3), math.nan)
    gate_up[2], down[2] = 1.0, 1.0
    routing = Routing(torch.full((3, 1), 2), torch.ones(3, 1))
    assert experts(torch.ones(3, 5), gate_up, down, routing).isfinite().all()


def chosen(logits: list[float], bias: list[float] | None, groups: int, kept: int, count: int) -> dict[int, float]:
    """One token's experts and their scores, written out: softmax and best, or sigmoid, bias and two best together."""
    if bias is None:
        total = sum(math.exp(logit) for logit in logits)
        score = choice = [math.exp(logit) / total for logit in logits]
    else:
        score = [1 / (1 + math.exp(-logit)) for logit in logits]
        choice = [s + b for s, b in zip(score, bias, strict=True)]
    size = len(logits) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    best = 1 if bias is None else 2
    members.sort(key=lambda group: sum(sorted(choice[e] for e in group)[-best:]), reverse=True)
    allowed = [expert for group in members[:kept] for expert in group]
    return {expert: score[expert] for expert in sorted(allowed, key=lambda e: choice[e], reverse=True)[:count]}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("groups", "kept", "count"), [(1, 1, 3), (4, 2, 3), (4, 1, 4), (8, 3, 6), (2, 2, 5)])
def test_routing(corrected: bool, groups: int, kept: int, count: int) -> None:
    logits = normal(60, 16, seed=groups)
    bias = normal(16, seed=5) * 0.3 if corrected else None
    plain = route(logits, bias, count, groups, kept, renormalise=False, scale=2.5)
    shared = route(logits, bias, count, groups, kept, renormalise=True, scale=2.5)
    for row, token in enumerate(logits.tolist()):
        expected = chosen(token, None if bias is None else bias.tolist(), groups, kept, count)
        for routing, total in ((plain, 1), (shared, sum(expected.values()))):
            found = dict(zip(routing.expert_TK[row].tolist(), routing.weight_TK[row].tolist(), strict=True))
            assert found == pytest.approx({e: 2.5 * score / total for e, score in expected.items()}, rel=1e-12)


def test_the_correction_changes_the_choice_and_not_the_weight() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0]])
    ids, weights = route(logits, torch.tensor([0.0, 0.0, 0.0, 1.0]), 2, 1, 1, renormalise=False, scale=1.0)
    assert sorted(ids[0].tolist()) == [0, 3]
    assert torch.equal(weights, logits.sigmoid().gather(1, ids))


def test_silu_and_mul_and_rms_norm() -> None:
    x, weight = normal(4, 6), normal(6, seed=1)
    gate, up = x[:, :3], x[:, 3:]
    assert_close(silu_and_mul(x), gate * gate.sigmoid() * up, torch.float64)
    rms = (x.pow(2).sum(-1, keepdim=True) / 6 + 1e-6).sqrt()
    assert_close(rms_norm(x, weight, 1e-6), x / rms * weight, torch.float64)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_turns_pairs(interleaved: bool) -> None:
    width, theta = 8, 10000.0
    x = normal(5, 2, width)
    table = rotation_table(frequencies(width, theta, torch.float64), 100, 1.0)
    positions = torch.tensor([0, 1, 7, 50, 99])
    found = rotate(x, table[positions], interleaved)
    for row, position in enumerate(positions.tolist()):
        for head in range(2):
            for pair in range(width // 2):
                real, imaginary = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
                number = complex(x[row, head, real], x[row, head, imaginary])
                turned = number * cmath.exp(1j * position * theta ** (-2 * pair / width))
                assert found[row, head, real] == pytest.approx(turned.real, abs=1e-12)
                assert found[row, head, imaginary] == pytest.approx(turned.imag, abs=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        assert_close(rotate(x.to(dtype), table[positions].to(torch.complex64), interleaved), found, dtype)


def test_yarn_of_deepseek_v2_lite() -> None:
    plain = frequencies(64, 10000.0, torch.float64)
    yarn = yarn_frequencies(64, 10000.0, 40.0, 32, 1, 4096, torch.float64)
    turns = plain * 4096 / (2 * math.pi)
    low, high = int((turns > 32).sum()) - 1, int((turns > 1).sum())  # floor and ceil of the ramp's ends
    assert torch.equal(yarn[: low + 1], plain[: low + 1])
    assert torch.allclose(yarn[high:], plain[high:] / 40)
    ratio = (yarn / plain)[low : high + 1]
    assert (ratio.diff() < 0).all()
    assert torch.allclose(ratio.diff(), ratio.diff()[0])  # a straight ramp
    assert yarn_mscale(40, 0.707) ** 2 * 192**-0.5 == pytest.approx(0.11472, abs=5e-6)
    assert yarn_mscale(40, 1.0) ** 2 * 192**-0.5 == pytest.approx(0.13523, abs=5e-6)
    assert yarn_mscale(1.0, 0.707) == 1.0


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    """Llama 3.1's wavelengths: to 8192/4 as they are, from 8192 on 8 times as long, with a ramp between."""
    plain = frequencies(128, 500000.0, torch.float64)
    found = llama3_frequencies(128, 500000.0, 8.0, 4.0, 1.0, 8192, torch.float64)
    for before, after in zip(plain.tolist(), found.tolist(), strict=True):
        turns = before * 8192 / (2 * math.pi)
        smooth = (turns - 1) / (4 - 1)
        ramp = (1 - smooth) * before / 8 + smooth * before
        expected = before if turns > 4 else before / 8 if turns < 1 else ramp
        assert after == pytest.approx(expected, rel=1e-12)
    assert 0 < int(((found < plain) & (found > plain / 8)).sum()) < 64

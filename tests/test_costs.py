"""What operations cost at least, against the sums in the papers and by hand."""

import pytest

from stackrace.kernels.gqa_decode.cost import gqa_decode
from stackrace.kernels.mla_decode.cost import mla_decode


def test_mla_decode_costs_what_deepseeks_papers_count():
    batch, context, heads = 128, 4096, 128
    cost = mla_decode([context] * batch, 1, heads, rank=512, rotated=64, item=2)
    assert cost.flops == 2176 * heads * batch * context
    queries_and_outputs = batch * heads * ((576 + 512) * 2 + 4)
    assert cost.bytes == 1152 * batch * context + queries_and_outputs
    rows = mla_decode([10**9], 1, 1, rank=512, rotated=64, item=2)
    assert rows.intensity == pytest.approx(2176 / 1152)  # FLOPs a byte and query row


def test_gqa_decode_by_hand():
    # 2 sequences of 10 and 30; 3 query tokens; 4 heads on 2 of keys; 8 wide keys, 6 wide values, 4 bytes
    cost = gqa_decode([10, 30], 3, 4, 2, key=8, value=6, item=4)
    assert cost.flops == 2 * 14 * 12 * 40
    assert cost.bytes == 40 * 2 * 14 * 4 + 2 * 12 * (14 * 4 + 4)

"""What decode attention over cached keys and values costs at least."""

from collections.abc import Sequence

from stackrace.kernels.cost import Cost


def gqa_decode(
    lengths: Sequence[int], num_tokens: int, num_heads: int, num_kv_heads: int, key: int, value: int, item: int
) -> Cost:
    """Of `lengths` cached tokens each, for `num_tokens` query tokens a sequence; `item` is the bytes of a number.

    `key` and `value` are widths. Counted as in `mla_decode`.
    """
    num_rows = num_tokens * num_heads
    flops = 2 * (key + value) * num_rows * sum(lengths)
    cached = num_kv_heads * (key + value) * item * sum(lengths)
    return Cost(flops, cached + len(lengths) * num_rows * ((key + value) * item + 4))

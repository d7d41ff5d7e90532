"""What decode attention over cached latents costs at least."""

from collections.abc import Sequence

from stackrace.kernels.cost import Cost


def mla_decode(lengths: Sequence[int], num_tokens: int, num_heads: int, rank: int, rotated: int, item: int) -> Cost:
    """Of `lengths` cached tokens each, for `num_tokens` query tokens a sequence; `item` is the bytes of a number.

    Scores take 2 (rank + rotated) FLOPs for each cached token and query row, sums 2 rank; what a causal mask hides is
    counted all the same, as the field does. Bytes: every latent once, queries, outputs and float32 log-sum-exps.
    """
    num_rows = num_tokens * num_heads
    flops = 2 * (2 * rank + rotated) * num_rows * sum(lengths)
    cached = (rank + rotated) * item * sum(lengths)
    return Cost(flops, cached + len(lengths) * num_rows * ((2 * rank + rotated) * item + 4))

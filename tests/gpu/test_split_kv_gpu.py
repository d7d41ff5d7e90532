"""The Triton decode kernels on a GPU, in bfloat16, against attention in float64."""

import pytest
from decode_kit import PAGE, attention, normal, off, paged

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: run on a machine that has one"),
]

RANK, ROTATED, SCALE = 512, 64, 192**-0.5
LENGTHS = [1, 0, 63, 64, 65, 4096, 700]


def decode(q, cached, lengths, num_parts):
    """Outputs and log-sum-exps of mla_decode on the GPU."""
    from stackrace.kernels.mla_decode.split import mla_decode
    from stackrace.kernels.split_kv.attend import untuned
    from stackrace.kernels.split_kv.schedule import Schedule

    length_B = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    schedule = Schedule.allocate(len(lengths), num_parts, "cuda")
    schedule.share_evenly(length_B, PAGE)
    config = untuned(q.shape[1] * q.shape[2])
    return mla_decode(q.cuda(), cached.cache.cuda(), cached.table.cuda(), length_B, SCALE, RANK, schedule, config)


def expected(q, cached):
    found = [
        attention(one.double(), rows[:, None], rows[:, None, :RANK], SCALE)
        for one, rows in zip(q, cached.rows, strict=True)
    ]
    return [torch.stack(one) for one in zip(*found, strict=True)]


@pytest.mark.parametrize("heads", [1, 3, 16, 63, 64, 126, 128])
@pytest.mark.parametrize("tokens", [1, 4])
def test_mla_decode(heads, tokens):
    lengths = [length if length >= tokens else 0 for length in LENGTHS]
    cached = paged(lengths, RANK + ROTATED, dtype=torch.bfloat16)
    q = normal(len(lengths), tokens, heads, RANK + ROTATED, seed=9).to(torch.bfloat16)
    out, lse = decode(q, cached, lengths, 132)
    right, right_lse = expected(q, cached)
    found = out.double().cpu()
    assert 1 - torch.cosine_similarity(found.flatten(), right.flatten(), dim=0) < 5e-6  # FlashMLA's bounds
    assert (found - right).abs().max() < 8e-4 + 0.01 * right.abs().max()
    assert off(lse, right_lse) < 1e-3


def test_a_cuda_graph_follows_the_lengths():
    from stackrace.kernels.mla_decode.split import mla_decode
    from stackrace.kernels.split_kv.attend import untuned
    from stackrace.kernels.split_kv.schedule import Schedule

    longest = [700, 300, 65]
    cached = paged(longest, RANK + ROTATED, dtype=torch.bfloat16)
    q = normal(3, 1, 16, RANK + ROTATED, seed=9).to(torch.bfloat16).cuda()
    cache, table = cached.cache.cuda(), cached.table.cuda()
    length_B = torch.tensor(longest, dtype=torch.int32, device="cuda")
    schedule = Schedule.allocate(3, 132, "cuda")

    def step():
        schedule.share_evenly(length_B, PAGE)
        return mla_decode(q, cache, table, length_B, SCALE, RANK, schedule, untuned(16))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = step()
    for lengths in (longest, [64, 300, 0], [1, 1, 1]):
        length_B.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        replayed = out.clone()
        again, _ = step()
        assert torch.equal(replayed, again)  # the same bits: nothing depends on who comes first


def test_offsets_beyond_two_to_the_31():
    """The page of one sequence lies 2.4 billion numbers into the cache."""
    number = 2**31 // (PAGE * (RANK + ROTATED)) + 7000
    cached = paged([64], RANK + ROTATED, dtype=torch.bfloat16)
    large = torch.zeros(number, PAGE, RANK + ROTATED, dtype=torch.bfloat16, device="cuda")
    large[-1] = cached.cache[cached.table[0, 0]].cuda()
    table = torch.tensor([[number - 1]], dtype=torch.int32)
    q = normal(1, 1, 16, RANK + ROTATED, seed=9).to(torch.bfloat16)
    out, _ = decode(q, cached._replace(cache=large, table=table), [64], 4)
    assert off(out, expected(q, cached)[0]) < 0.02

"""The Triton decode kernels on a GPU, in bfloat16, against attention in float64."""

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
from decode_kit import PAGE, attention, latents, normal, off, paged  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: run on a machine that has one"),
]

RANK, ROTATED, SCALE = 512, 64, 192**-0.5
LENGTHS = [1, 0, 63, 64, 65, 4096, 700]


@pytest.fixture(scope="module")
def kernels():
    """Module of each kernel; compiled, not interpreted, or these tests would show nothing."""
    from stackrace.kernels.gqa_decode import split as gqa
    from stackrace.kernels.mla_decode import split as mla
    from stackrace.kernels.split_kv import attend, schedule

    assert isinstance(attend._attend, triton.JITFunction)
    return {"gqa": gqa, "mla": mla, "attend": attend, "schedule": schedule}


def share_out(kernels, lengths, num_parts):
    length_B = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    schedule = kernels["schedule"].Schedule.allocate(len(lengths), num_parts, "cuda")
    schedule.share_evenly(length_B, PAGE)
    return length_B, schedule


def decode(kernels, q, cached, lengths, num_parts):
    """Outputs and log-sum-exps of mla_decode on the GPU."""
    length_B, schedule = share_out(kernels, lengths, num_parts)
    config = kernels["attend"].untuned(q.shape[1] * q.shape[2])
    cache, table = cached.cache.cuda(), cached.table.cuda()
    return kernels["mla"].mla_decode(q.cuda(), cache, table, length_B, SCALE, RANK, schedule, config)


def assert_right(found, q, keys, values, scale=SCALE):
    """Sequence by sequence, by FlashMLA's bound on the angle and by what bfloat16 rounds away."""
    for out, lse, one, key, value in zip(*found, q, keys, values, strict=True):
        if not len(key):
            assert (out == 0).all()
            assert (lse == -torch.inf).all()
            continue
        right, right_lse = attention(one.double(), key, value, scale)
        told = out.double().cpu()
        assert 1 - torch.cosine_similarity(told.flatten(), right.flatten(), dim=0) < 5e-6
        assert off(told, right) < 8e-4 + 0.01 * float(right.abs().max())
        assert off(lse, right_lse) < 1e-3


@pytest.mark.parametrize("heads", [1, 3, 16, 63, 64, 126, 128])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_mla_decode(kernels, heads, tokens):
    lengths = [length if length >= tokens else 0 for length in LENGTHS]
    cached = paged(lengths, RANK + ROTATED, dtype=torch.bfloat16)
    q = normal(len(lengths), tokens, heads, RANK + ROTATED, seed=9).to(torch.bfloat16)
    for num_parts in (7, 264):
        assert_right(decode(kernels, q, cached, lengths, num_parts), q, *latents(cached, RANK))


def test_many_sequences_and_a_long_one(kernels):
    lengths = [131_072, *torch.randint(1, 500, (299,), generator=torch.Generator().manual_seed(0)).tolist()]
    cached = paged(lengths, RANK + ROTATED, dtype=torch.bfloat16)
    q = normal(len(lengths), 1, 16, RANK + ROTATED, seed=9).to(torch.bfloat16)
    assert_right(decode(kernels, q, cached, lengths, 132), q, *latents(cached, RANK))


@pytest.mark.parametrize("num_splits", [None, 1, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (32, 8), (32, 1)])
def test_gqa_decode(kernels, heads, kv_heads, num_splits):
    width, dtype = 128, torch.bfloat16
    key, value = (paged(LENGTHS, kv_heads, width, dtype=dtype, seed=seed) for seed in (0, 50))
    q = normal(len(LENGTHS), 1, heads, width, seed=9).to(dtype)
    length_B, schedule = share_out(kernels, LENGTHS, 132)
    if num_splits is not None:
        schedule = kernels["schedule"].Schedule.allocate(len(LENGTHS), num_splits * len(LENGTHS), "cuda")
        schedule.split_each(length_B, PAGE)
    config = kernels["attend"].untuned(heads // kv_heads)
    on_gpu = (t.cuda() for t in (q, key.cache, value.cache, key.table))
    found = kernels["gqa"].gqa_decode(*on_gpu, length_B, width**-0.5, schedule, config)
    assert_right(found, q, key.rows, value.rows, width**-0.5)


def test_a_cuda_graph_follows_the_lengths(kernels):
    longest = [700, 300, 65]
    cached = paged(longest, RANK + ROTATED, dtype=torch.bfloat16)
    q = normal(3, 1, 16, RANK + ROTATED, seed=9).to(torch.bfloat16)
    on_gpu = [t.cuda() for t in (q, cached.cache, cached.table)]
    length_B, schedule = share_out(kernels, longest, 132)

    def step():
        schedule.share_evenly(length_B, PAGE)
        return kernels["mla"].mla_decode(*on_gpu, length_B, SCALE, RANK, schedule, kernels["attend"].untuned(16))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for lengths in (longest, [64, 300, 0], [1, 1, 1]):
        length_B.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        shorter = cached._replace(rows=[rows[:n] for rows, n in zip(cached.rows, lengths, strict=True)])
        assert_right(found, q, *latents(shorter, RANK))
        bits = [t.clone() for t in found]
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, bits, strict=True))  # whoever comes first


def test_offsets_beyond_two_to_the_31(kernels):
    """The page of one sequence lies 2.4 billion numbers into the cache."""
    number = 2**31 // (PAGE * (RANK + ROTATED)) + 7000
    cached = paged([64], RANK + ROTATED, dtype=torch.bfloat16)
    large = torch.zeros(number, PAGE, RANK + ROTATED, dtype=torch.bfloat16, device="cuda")
    large[-1] = cached.cache[cached.table[0, 0]].cuda()
    table = torch.tensor([[number - 1]], dtype=torch.int32)
    q = normal(1, 1, 16, RANK + ROTATED, seed=9).to(torch.bfloat16)
    found = decode(kernels, q, cached._replace(cache=large, table=table), [64], 4)
    assert_right(found, q, *latents(cached, RANK))

"""L-infinity start and step: bitwise equal to the reference, whatever the size, dtype, layout and alignment."""

import pytest
import torch

from spat_kernels.ops.linf import hash_ref
from tests.ops.helpers import acc, layouts, reference, sentinels

SHAPES = [(0, 3, 4, 4), (1, 1), (1, 127), (3, 1001), (5, 3, 7, 7), (4, 3, 32, 32)]
SEED = (0x0123456789ABCDEF, -5)


def samples(dtype):
    x_adv, x, grad = (torch.rand(4, 3, 32, 32).to(dtype) for _ in range(3))
    one, each, seed = torch.full((1,), 0.1, dtype=acc(dtype)), torch.rand(4, dtype=acc(dtype)), torch.tensor([1, 2])
    yield "linf_random_start_", (x_adv, x, one, seed, 0.0, 1.0)
    yield "linf_step_", (x_adv, x, grad, each, one, 0.0, 1.0, None, torch.zeros(4, dtype=torch.int64))
    for op in ("linf_step_", "l2_step_"):
        yield op, (x_adv, x, grad, one, one, 0.0, 1.0, torch.zeros(4, dtype=torch.uint8))
        yield op, (x_adv, x, grad, each, one, 0.0, 1.0, None)


def images(shape, dtype, device, **layout):
    """x_adv (poisoned, in sentinels) and x, in one layout."""
    x_adv, intact = sentinels(shape, dtype, device, **layout)
    x, _ = sentinels(shape, dtype, device, **layout)
    x.copy_(torch.rand(shape))
    return x_adv, x, intact


def radii(shape, dtype, device, per_sample):
    return (torch.rand(shape[0] if per_sample else 1, device=device) * 0.1).to(acc(dtype))


@pytest.mark.parametrize("per_sample", [False, True], ids=["one_eps", "eps_per_sample"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_is_bitwise_the_reference(impl, shape, per_sample):
    for dtype, grad_dtype, layout in layouts(impl, shape):
        x_adv, x, intact = images(shape, dtype, impl.device, **layout)
        x_adv.copy_(x + 0.03 * torch.randn(shape, device=impl.device))
        grad = torch.empty_like(x, dtype=grad_dtype).copy_(torch.randn(shape))
        eps, step = (radii(shape, dtype, impl.device, per_sample) for _ in range(2))
        expected, unhashed = x_adv.clone(), x_adv.clone()
        hashes = [torch.arange(shape[0], device=impl.device) for _ in range(2)]  # added to, not overwritten
        reference("linf_step_")(expected, x, grad, eps, step, 0.0, 1.0, None, hashes[0])
        impl("linf_step_")(x_adv, x, grad, eps, step, 0.0, 1.0, None, hashes[1])
        impl("linf_step_")(unhashed, x, grad, eps, step, 0.0, 1.0, None)
        assert torch.equal(x_adv, expected), (dtype, grad_dtype, layout)
        assert torch.equal(unhashed, expected), (dtype, grad_dtype, layout)
        assert torch.equal(*hashes), (dtype, grad_dtype, layout)
        assert intact()


MASK = 2**64 - 1


def hash_of(values: bytes, size: int) -> int:
    """The docstring's formula in Python's integers, on the bytes of one sample with elements of `size` bytes."""
    total = 0
    for i in range(len(values) // size):
        z = int.from_bytes(values[i * size : (i + 1) * size], "little") + (i + 1) * 0x9E3779B97F4A7C15 & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        total += z ^ z >> 31
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_hash_is_that_of_the_bytes(dtype):
    x = torch.randn(3, 2, 5, 7).to(dtype)
    x[2] = x[0]
    x[2, 1, 4, 6] += torch.finfo(dtype).eps * x[2, 1, 4, 6]  # one unit in the last place of one element
    x[1, 0, 0, :2] = torch.tensor([-0.0, torch.inf])
    for layout in (torch.contiguous_format, torch.channels_last):
        images = x.contiguous(memory_format=layout)
        memory = images if layout == torch.contiguous_format else images.permute(0, 2, 3, 1)
        raw = memory.contiguous().view(torch.uint8).flatten(1)
        expected = [hash_of(bytes(sample.tolist()), x.element_size()) for sample in raw]
        assert hash_ref(images).tolist() == expected
        assert len(set(expected)) == 3


def test_step_at_extreme_gradients(impl):
    """Signed zeros and NaN do not move, infinities and denormals do; NaN is reported for its sample alone."""
    values = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 3e38]
    moves = [0.0, 0.0, 0.0, 1.0, -1.0, 1.0, -1.0, 1.0]
    grad = torch.tensor([values, [1.0] * 8], device=impl.device)
    x = torch.full((2, 8), 0.5, device=impl.device)
    x_adv, nan_seen = x.clone(), torch.zeros(2, dtype=torch.uint8, device=impl.device)
    eps, step = torch.tensor([0.25], device=impl.device), torch.tensor([0.125], device=impl.device)
    impl("linf_step_")(x_adv, x, grad, eps, step, 0.0, 1.0, nan_seen)
    assert x_adv.tolist() == [[0.5 + 0.125 * m for m in moves], [0.625] * 8]
    assert nan_seen.tolist() == [1, 0]
    impl("linf_step_")(x_adv, x, torch.ones_like(x), eps, step, 0.0, 1.0, nan_seen)
    assert nan_seen.tolist() == [1, 0], "a later clean step must not clear it"


@pytest.mark.parametrize("op", ["linf_step_", "linf_random_start_", "l2_step_"])
def test_nan_in_an_image_stays(impl, op):
    x = torch.full((2, 8), 0.5, device=impl.device)
    x[0, 3] = torch.nan
    x_adv, grad, eps, seed = x.clone(), torch.ones_like(x), torch.tensor([0.25], device=impl.device), torch.tensor(SEED)
    impl(op)(x_adv, x, *([eps, seed.to(x.device)] if "start" in op else [grad, eps, eps]), 0.0, 1.0, *[None] * ("step" in op))
    assert torch.equal(x_adv.isnan(), x.isnan())


def test_step_moves_on_half_precision_denormals(impl):
    for dtype in set(impl.dtypes) & {torch.float16, torch.bfloat16}:
        tiny = torch.finfo(dtype).smallest_normal / 4
        x = torch.full((1, 16), 0.5, device=impl.device)
        grad = torch.tensor([[tiny, -tiny] * 8], dtype=dtype, device=impl.device)
        x_adv, eps = x.clone(), torch.tensor([0.25], device=impl.device)
        impl("linf_step_")(x_adv, x, grad, eps, eps, 0.0, 1.0, None)
        assert x_adv.tolist() == [[0.75, 0.25] * 8]


@pytest.mark.parametrize("per_sample", [False, True], ids=["one_eps", "eps_per_sample"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_start_is_bitwise_the_reference(impl, shape, per_sample):
    seed = torch.tensor(SEED, device=impl.device)
    for dtype, grad_dtype, layout in layouts(impl, shape):
        if dtype == grad_dtype:
            x_adv, x, intact = images(shape, dtype, impl.device, **layout)
            eps = radii(shape, dtype, impl.device, per_sample)
            expected = torch.full_like(x, torch.nan)
            reference("linf_random_start_")(expected, x, eps, seed, 0.0, 1.0)
            impl("linf_random_start_")(x_adv, x, eps, seed, 0.0, 1.0)
            assert torch.equal(x_adv, expected), (dtype, layout)
            assert intact()


def test_random_start_is_uniform_in_the_ball(impl):
    x = torch.full((8, 4096), 0.5, device=impl.device)
    eps = torch.tensor([0.25], device=impl.device)
    starts = []
    for key, counter in [(1, 0), (1, 1), (2, 0)]:
        x_adv = torch.empty_like(x)
        impl("linf_random_start_")(x_adv, x, eps, torch.tensor([key, counter], device=impl.device), 0.0, 1.0)
        starts.append(((x_adv - x) / 0.25).flatten().double().cpu())
    for u in starts:
        assert u.abs().max() <= 1
        # Kolmogorov-Smirnov against U(-1, 1): the statistic exceeds 1.95/sqrt(n) once in a thousand times; the seed is fixed
        n = len(u)
        distance = ((u.sort().values + 1) / 2 - torch.arange(1, n + 1) / n).abs().max()
        assert distance < 1.95 / n**0.5
    for i, j in [(0, 1), (0, 2), (1, 2)]:  # another key or counter, other noise
        assert abs(torch.corrcoef(torch.stack([starts[i], starts[j]]))[0, 1]) < 0.02

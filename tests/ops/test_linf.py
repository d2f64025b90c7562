"""L-infinity start and step: bitwise equal to the reference, whatever the size, dtype, layout and alignment."""

import pytest
import torch

from tests.ops.helpers import acc, layouts, reference, sentinels

SHAPES = [(0, 3, 4, 4), (1, 1), (1, 127), (3, 1001), (5, 3, 7, 7), (4, 3, 32, 32)]
SEED = (0x0123456789ABCDEF, -5)


def samples(dtype):
    x_adv, x, grad = (torch.rand(4, 3, 32, 32).to(dtype) for _ in range(3))
    one, each, seed = torch.full((1,), 0.1, dtype=acc(dtype)), torch.rand(4, dtype=acc(dtype)), torch.tensor([1, 2])
    yield "linf_random_start_", (x_adv, x, one, seed, 0.0, 1.0)
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
        expected = x_adv.clone()
        reference("linf_step_")(expected, x, grad, eps, step, 0.0, 1.0, None)
        impl("linf_step_")(x_adv, x, grad, eps, step, 0.0, 1.0, None)
        assert torch.equal(x_adv, expected), (dtype, grad_dtype, layout)
        assert intact()


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

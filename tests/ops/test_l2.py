"""L2 step: within fp32 rounding of the fp64 reference; the ball is held; zero, tiny and unusable gradients."""

import pytest
import torch

from tests.ops.helpers import acc, layouts, reference, sentinels


def step(impl, x_adv, x, grad, eps, step_size, nan_seen=None):
    eps, step_size = (torch.as_tensor(v, dtype=acc(x.dtype), device=x.device).reshape(-1) for v in (eps, step_size))
    impl("l2_step_")(x_adv, x, grad, eps, step_size, 0.0, 1.0, nan_seen)
    return x_adv


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 127), (3, 1001), (5, 3, 7, 7), (4, 3, 32, 32)], ids=str)
def test_step_matches_the_reference(impl, shape):
    for dtype, grad_dtype, layout in layouts(impl, shape):
        x_adv, intact = sentinels(shape, dtype, impl.device, **layout)
        x = torch.empty_like(x_adv).copy_(torch.rand(shape))
        x_adv.copy_((x + 0.01 * torch.randn(shape, device=impl.device)).clamp(0, 1))
        grad = torch.empty_like(x, dtype=grad_dtype).copy_(torch.randn(shape))
        eps, length = (torch.rand(shape[0] or 1, dtype=acc(dtype), device=impl.device) for _ in range(2))
        expected = x_adv.clone()
        reference("l2_step_")(expected, x, grad, eps, length, 0.0, 1.0, None)
        step(impl, x_adv, x, grad, eps, length)
        # both round once to dtype: one ulp apart where the fp64 values straddle a tie
        torch.testing.assert_close(x_adv, expected, rtol=0, atol=torch.finfo(dtype).eps if x.numel() else 0)
        assert intact()


def test_result_is_in_the_ball_and_moves_by_the_step(impl):
    x = torch.full((6, 3, 8, 8), 0.5, device=impl.device)
    for eps, length in [(0.5, 0.1), (0.5, 10.0), (0.0, 0.1)]:
        x_adv = x.clone()
        for _ in range(3):
            before = (x_adv - x).flatten(1).norm(dim=1)
            step(impl, x_adv, x, torch.ones_like(x), eps, length)
            expected = (before + length).clamp(max=eps)
            torch.testing.assert_close((x_adv - x).flatten(1).norm(dim=1), expected, rtol=1e-5, atol=1e-6)


def test_gradient_scale_does_not_matter(impl):
    """Squares of 1e-40 vanish in fp32, squares of 1e30 overflow it."""
    x = torch.full((1, 300), 0.5, device=impl.device)
    grad = torch.randn(1, 300, device=impl.device)
    moved = step(impl, x.clone(), x, grad, 1.0, 0.3)
    for scale in (1e-38, 1e30):
        torch.testing.assert_close(step(impl, x.clone(), x, grad * scale, 1.0, 0.3), moved, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(4, 1), (4, 127), (4, 1001), (4, 3, 7, 7), (4, 3, 32, 32)], ids=str)
def test_zero_gradient_stays(impl, shape):
    """To the bit inside the ball, else on its surface: in every dtype, for both zeros, beside a sample that moves."""
    for dtype, grad_dtype, layout in layouts(impl, shape):
        x_adv, intact = sentinels(shape, dtype, impl.device, **layout)
        x = torch.empty_like(x_adv).copy_(torch.rand(shape) * 0.6 + 0.2)
        grad = torch.zeros_like(x, dtype=grad_dtype)
        x_adv.copy_(x + 0.1 * torch.randn(shape, device=impl.device) * (x - 0.2)).clamp_(0, 1)
        grad[1], grad[2] = -0.0, 1.0
        before, nan_seen = x_adv.clone(), torch.zeros(4, dtype=torch.uint8, device=impl.device)
        length = (before.double() - x.double()).flatten(1).norm(dim=1)
        eps = torch.where(torch.arange(4, device=impl.device) == 3, length / 2, 2 * length + 0.1)  # the last is outside
        step(impl, x_adv, x, grad, eps, 0.05, nan_seen)
        assert torch.equal(x_adv[:2], before[:2]), (dtype, layout)
        assert not torch.equal(x_adv[2], before[2])
        projected = x + (before - x) / 2
        torch.testing.assert_close(x_adv[3], projected[3], rtol=0, atol=2 * torch.finfo(dtype).eps)
        assert intact()
        assert not nan_seen.any()


def test_zero_gradient_outside_the_box_is_clamped(impl):
    x = torch.full((1, 5), 0.5, device=impl.device)
    x_adv = torch.tensor([[-0.25, -0.0, 0.25, 1.0, 1.25]], device=impl.device)
    assert step(impl, x_adv, x, torch.zeros_like(x), 5.0, 0.3).tolist() == [[0.0, 0.0, 0.25, 1.0, 1.0]]


def test_unusable_elements_count_as_zero(impl):
    x = torch.full((4, 64), 0.5, device=impl.device)
    grad = torch.ones_like(x)
    grad[0, 3], grad[1, 5], grad[2] = torch.nan, torch.inf, torch.nan
    nan_seen = torch.zeros(4, dtype=torch.uint8, device=impl.device)
    delta = step(impl, x.clone(), x, grad, 1.0, 0.25, nan_seen) - x
    assert nan_seen.tolist() == [1, 1, 1, 0]
    assert delta[0, 3] == 0
    assert delta[1, 5] == 0
    assert not delta[2].any(), "nothing usable: no step"
    torch.testing.assert_close(delta.norm(dim=1).cpu(), torch.tensor([0.25, 0.25, 0.0, 0.25]))

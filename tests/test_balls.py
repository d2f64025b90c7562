"""The L1 ball: exact projections onto ball and box at once, uniform starts, sparse steps. Those of other balls are ops."""

import math

import numpy as np
import pytest
import torch

from spat_kernels.balls import SPARSITY, L1Ball, project_l1
from tests.helpers import assert_inside, distance, nearest_in_l1

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def clean(*shape, dtype=torch.float64):
    """Images in [0, 1], a fifth of whose elements are 0 and a tenth 1."""
    x, corner = torch.rand(shape, dtype=torch.float64), torch.rand(shape)
    return x.masked_fill(corner < 0.2, 0).masked_fill(corner > 0.9, 1).to(dtype)


def ball_around(x, eps=1.0, step_size=0.5, bounds=(0.0, 1.0)):
    return L1Ball(x, eps, step_size, bounds)


# --- projection ---


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_projections_are_the_nearest_points(n):
    """p is nearest to v in a convex set if (v - p)(q - p) <= 0 for each q of it: the largest is that of a linear program."""
    optimize = pytest.importorskip("scipy.optimize")
    x = clean(40, n)
    points = x + torch.randn(40, n) * 10 ** torch.linspace(-2, 1, 40, dtype=torch.float64)[:, None]
    eps = n * torch.linspace(0.01, 0.4, 40, dtype=torch.float64)[torch.randperm(40), None]
    found, inside = project_l1(points, x, eps, 0.0, 1.0), 0
    assert_inside(found, x, eps[:, 0], "l1", atol=1e-12)
    for v, p, c, radius in zip(points.numpy(), found.numpy(), x.numpy(), eps[:, 0].numpy(), strict=True):
        away = v - p
        inside += bool(np.abs(p - c).sum() < 0.999 * radius)
        # q = c + a - b, with a and b >= 0
        sides = [*zip(np.zeros(n), 1 - c, strict=True), *zip(np.zeros(n), c, strict=True)]
        result = optimize.linprog(np.concatenate((-away, away)), np.ones((1, 2 * n)), [radius], bounds=sides)
        assert -result.fun - away @ (p - c) <= 1e-9 * max(np.abs(away).sum(), 1e-3)
    assert 0 < inside < 40, "some of both"


@pytest.mark.parametrize("values", ["any", "eighths"])
@pytest.mark.parametrize("n", [1, 5, 192, 3072])
def test_projections_to_the_last_bits(n, values):
    """Eighths: bends coincide, many elements are equal."""
    x, points = clean(30, n), clean(30, n) + torch.randn(30, n, dtype=torch.float64)
    if values == "eighths":
        x, points = (v.mul(8).round().div(8) for v in (x, points))
    eps = n * 10 ** torch.linspace(-5, -0.3, 30, dtype=torch.float64)[:, None]
    found = project_l1(points, x, eps, 0.0, 1.0)
    torch.testing.assert_close(found, nearest_in_l1(points, x, eps), rtol=0, atol=1e-12)
    assert_inside(found, x, eps[:, 0], "l1", atol=1e-10)
    assert torch.equal(project_l1(points, x, torch.zeros(1, 1).double(), 0.0, 1.0), x), "eps=0"


def test_what_is_inside_stays_to_the_bit():
    x = clean(20, 50)
    points = (x + torch.randn(20, 50) / 100).clamp(0, 1)
    eps = distance(points, x, "l1")[:, None]
    assert torch.equal(project_l1(points, x, eps * (1 + 1e-12), 0.0, 1.0), points)
    assert not torch.equal(project_l1(points, x, eps * 0.99, 0.0, 1.0), points)
    far = torch.where(torch.rand(20, 50) < 0.5, points, points * 9 - 4)
    assert torch.equal(project_l1(far, x, torch.full((1, 1), 51.0).double(), 0.0, 1.0), far.clamp(0, 1)), "the box alone"


def test_both_at_once_is_not_one_after_the_other():
    """Clamping a projection to the ball leaves a part of eps unused."""
    x, points = torch.tensor([[0.9, 0.5, 0.5]]).double(), torch.tensor([[3.0, 1.0, 0.5]]).double()
    found = project_l1(points, x, torch.full((1, 1), 0.4).double(), 0.0, 1.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.8, 0.5]]).double())


# --- starts ---


@pytest.mark.parametrize("n", [1, 2, 50])
def test_random_starts_are_uniform(n):
    """Uniform in the ball: (|d| / eps)^n is uniform, and so are (1 - |d_1| / |d|)^(n-1) and the signs."""
    stats = pytest.importorskip("scipy.stats")
    x = torch.full((4000, n), 0.5, dtype=torch.float64)
    ball, x_adv = ball_around(x, eps=0.4), torch.full_like(x, torch.nan)
    ball.random_start_(x_adv, ball.draw(torch.Generator().manual_seed(0), len(x)))
    moved = x_adv - x
    share = moved.abs().sum(1) / 0.4
    assert stats.kstest(share**n, "uniform").pvalue > 0.01
    assert abs((moved > 0).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(4000 * n)
    if n > 1:
        for i in (0, n - 1):
            assert stats.kstest((1 - moved[:, i].abs() / moved.abs().sum(1)) ** (n - 1), "uniform").pvalue > 0.01
        assert abs(torch.corrcoef(moved[:, :2].sign().T)[0, 1]) < 4 / math.sqrt(4000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_starts_are_inside_and_follow_the_seed(dtype):
    x, eps = clean(5, 3, 6, 7, dtype=dtype), torch.linspace(0, 5, 5)
    ball, starts = ball_around(x, eps), []
    for seed in (1, 1, 2):
        draws = ball.draw(torch.Generator().manual_seed(seed), 5)
        for method in (ball.random_start_, ball.surface_start_):
            starts.append(torch.full_like(x, torch.nan))
            method(starts[-1], draws)
            assert_inside(starts[-1], x, eps, "l1")
            assert torch.equal(starts[-1][0], x[0]), "eps=0"
    assert torch.equal(starts[0], starts[2])
    assert torch.equal(starts[1], starts[3])
    assert not torch.equal(starts[0], starts[4])


def test_surface_starts_are_projected_normal_noise():
    x, eps = clean(6, 3, 8, 8), torch.linspace(0.5, 6, 6).double()
    ball, x_adv = ball_around(x, eps), torch.full_like(x, torch.nan)
    noise, *others = ball.draw(torch.Generator().manual_seed(0), 6)
    ball.surface_start_(x_adv, (noise, *others))
    assert abs(noise.std() - 1) < 0.1
    expected = nearest_in_l1((x + noise).flatten(1), x.flatten(1), eps[:, None]).view_as(x)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(distance(x_adv, x, "l1"), eps)
    changed = (x_adv != x).flatten(1).sum(1)
    assert (changed.diff() >= 0).all(), "the larger, the less sparse"
    assert 0 < changed[0] < changed[-1] < 40


# --- steps ---


def test_a_step_goes_equally_far_along_the_largest():
    x = torch.full((4, 1, 10, 20), 0.5, dtype=torch.float64)
    grad = torch.randn(4, 1, 10, 20, dtype=torch.float64)
    grad[1, 0, :2, :5], grad[2], grad[3, 0, 0, :2] = -9.0, 0.0, torch.tensor([torch.inf, torch.nan])
    ball, x_adv = ball_around(x, eps=3.0, step_size=0.3), x.clone()
    assert ball.kept.tolist() == [2] == [SPARSITY * 200]
    ball.step_(x_adv, grad)
    moved = (x_adv - x).flatten(1)
    largest = grad[0].flatten().abs().topk(2).indices
    assert moved[0].nonzero()[:, 0].tolist() == sorted(largest.tolist())
    assert torch.equal(moved[0, largest].sign(), grad[0].flatten()[largest].sign())
    torch.testing.assert_close(moved[0, largest].abs(), torch.full((2,), 0.15).double())
    torch.testing.assert_close(moved[1].view(10, 20)[:2, :5], torch.full((2, 5), -0.03).double())
    assert moved[1].count_nonzero() == 10, "all that are equal"
    assert not moved[2].any(), "a gradient of zero stays"
    assert moved[3, 0] == pytest.approx(0.15), "an infinite one is the largest"
    assert moved[3, 1] == 0
    assert ball.nan_seen.tolist() == [0, 0, 0, 1]
    ball.step_(x_adv, -grad, torch.full((1,), 0.1).double())
    torch.testing.assert_close(distance(x_adv, x, "l1"), torch.tensor([0.2, 0.2, 0.0, 0.2]).double())


def test_no_step_is_lost_at_the_sides_of_the_box():
    x = torch.full((2, 100), 0.5).double()
    x[:, :50], grad = 1.0, torch.linspace(2, 1, 100).double().repeat(2, 1)
    for skips, expected in ((True, 50), (False, 0)):
        ball, x_adv = ball_around(x, eps=3.0, step_size=0.25), x.clone()
        ball.skips_sides = skips
        ball.step_(x_adv, grad)
        moved = (x_adv - x)[0]
        assert moved[expected] == (0.25 if skips else 0)
        assert moved.count_nonzero() == skips
    ball = ball_around(1 - x, eps=3.0, step_size=0.25)
    ball.step_(x_adv := 1 - x, -grad)
    assert (x_adv - (1 - x))[0, 50] == -0.25


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_those_in_fp64_rounded_once(dtype):
    x, eps = clean(12, 3, 9, 11, dtype=dtype), torch.linspace(0, 6, 12)
    x_adv, grad = clean(12, 3, 9, 11, dtype=dtype), torch.randn(12, 3, 9, 11).to(dtype)
    kept = torch.tensor([1, 2, 5, 30, 100, 297] * 2)
    exact, flat, g = (v.double().flatten(1).clone() for v in (x, x_adv, grad))
    for i in range(12):
        free = torch.where(g[i] > 0, flat[i] < 1, flat[i] > 0)
        size = g[i].abs() * free
        chosen = (size >= size.sort(descending=True).values[kept[i] - 1]) & (size > 0)
        flat[i] += g[i].sign() * chosen * 2.5 / chosen.sum()
    expected = nearest_in_l1(flat, exact, eps.double()[:, None])
    for layout in (torch.contiguous_format, torch.channels_last):
        points = x.contiguous(memory_format=layout)
        ball, found = ball_around(points, eps, step_size=2.5), x_adv.contiguous(memory_format=layout).clone()
        ball.kept = kept
        ball.step_(found, grad)
        assert found.stride() == points.stride()
        assert_inside(found, x, eps, "l1")
        error = (found.double().flatten(1) - expected).abs()
        assert (error <= torch.finfo(dtype).eps * expected.abs() + 1e-14).all()
        again = found.clone()
        ball.project_(again)
        assert ((again - found).abs() <= 2 * torch.finfo(dtype).eps).all()


def test_a_part_has_its_own_of_everything():
    x = clean(4, 30)
    ball = ball_around(x, torch.linspace(0.1, 1, 4))
    assert ball.part(torch.tensor([2])).kept.tolist() == [1]
    ball.kept = torch.tensor([1, 2, 3, 4])
    part = ball.part(torch.tensor([3, 1]))
    assert part.kept.tolist() == [4, 2]
    assert torch.equal(part.eps, ball.eps[[3, 1]])
    whole, some, grad = x.clone(), x[[3, 1]], torch.randn(4, 30)
    ball.step_(whole, grad)
    part.step_(some, grad[[3, 1]])
    assert torch.equal(whole[[3, 1]], some)

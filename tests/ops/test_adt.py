"""Adversarial distributions: bitwise the reference in fp32. Its functions are those of fp64, its gradients autograd's."""

import pytest
import torch
import torch.nn.functional as F

from spat_kernels.ops import adt
from tests.ops.helpers import EXTREMES, acc, bits_of, layouts, reference, sentinels

SHAPES = [((0, 3, 4, 4), False), ((1, 1), False), ((3, 1001), True), ((5, 3, 7, 7), False), ((5, 3, 7, 7), True)]
SEED, LR, ENTROPY = (0x0123456789ABCDEF, -5), 0.3, 1e-4


def samples(dtype):
    x_adv, x, grad = (torch.rand(4, 3, 32, 32).to(dtype) for _ in range(3))
    mu, rho, *sums = (torch.randn(x.shape, dtype=acc(dtype)) for _ in range(4))
    one, each, seed = torch.full((1,), 0.1, dtype=acc(dtype)), torch.rand(4, dtype=acc(dtype)), torch.tensor([1, 2])
    nan_seen = torch.zeros(4, dtype=torch.uint8)
    yield "adt_sample_", (x_adv, mu, rho, x, one, seed, 3, 0.0, 1.0)
    yield "adt_step_", (x_adv, mu, rho, x, grad, one, each, seed, 3, LR, ENTROPY, 0.0, 1.0)
    yield "adt_step_", (x_adv, mu, rho, x, grad, each, one, seed, 3, LR, ENTROPY, 0.0, 1.0, nan_seen, *sums, False)


def same(found, expected, dtype):
    """To the bit, but in fp64 a library's exp and log1p, an ulp or two apart, are in values of up to 10 that lr multiplies."""
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    else:
        assert torch.equal(found, expected), dtype


def arguments(shape, dtype, grad_dtype, device, per_sample, **layout):
    """Images (x_adv poisoned), mu, rho and two sums in sentinels; x and a gradient; eps and factor."""
    written = [sentinels(shape, kind, device, **layout) for kind in (dtype, *[acc(dtype)] * 4)]
    x, grad = (sentinels(shape, kind, device, **layout)[0] for kind in (dtype, grad_dtype))
    x.copy_(torch.rand(shape))
    grad.copy_(torch.randn(shape) * 10.0 ** torch.randint(-9, 2, shape))
    for t, _ in written[1:]:
        t.copy_(3 * torch.randn(shape))
    eps, factor = ((0.01 + torch.rand(shape[0] if per_sample else 1, device=device)).to(acc(dtype)) for _ in range(2))
    return [t for t, _ in written], x, grad, 0.1 * eps, factor, [intact for _, intact in written]


@pytest.mark.parametrize(("shape", "per_sample"), SHAPES, ids=str)
def test_ops_are_the_reference(impl, shape, per_sample):
    seed = torch.tensor(SEED, device=impl.device)
    for dtype, grad_dtype, layout in layouts(impl, shape):
        if impl.interpreted and "offset" in layout:  # which it does not know
            continue
        found, x, grad, eps, factor, intact = arguments(shape, dtype, grad_dtype, impl.device, per_sample, **layout)
        expected, box = [t.clone() for t in found], (0.0, 1.0)

        def compare(found=found, expected=expected, dtype=dtype):
            for ours, theirs in zip(found, expected, strict=True):
                same(ours, theirs, dtype)

        for op, (x_adv, mu, rho, *_) in ((impl, found), (reference, expected)):
            op("adt_sample_")(x_adv, mu, rho, x, eps, seed, 7, *box)
        compare()
        for last, with_sums in ((True, False), (False, True), (True, True)):  # the last one sees what the others have left
            for op, (x_adv, mu, rho, *sums) in ((impl, found), (reference, expected)):
                rest = (*sums, last) if with_sums else ()
                op("adt_step_")(x_adv.fill_(torch.nan), mu, rho, x, grad, eps, factor, seed, 7, LR, ENTROPY, *box, None, *rest)
            compare()
        assert not any(t.any() for t in found[3:]), "the sums that have stepped are 0"
        assert all(check() for check in intact)


@pytest.mark.parametrize("eps", [0.0, 1e-45, 0.03, 1e30])
def test_at_the_extremes_ops_are_the_reference(impl, eps):
    """Where exp, log1p, tanh and their derivatives end: +-104 is the last exponent of e, 17 the last slope beside 1."""
    ends = torch.tensor([*EXTREMES, 17.0, -17.0, 52.0, -52.0, 87.5, -87.5, 103.9, -103.9, 104.5, -104.5, 1e20, -1e20])
    grad, mu, rho = torch.cartesian_prod(torch.tensor([*EXTREMES, -1e20]), ends, ends).T.reshape(3, 13, -1).contiguous()
    x, eps, one = torch.rand(mu.shape), torch.tensor([eps]), torch.ones(1)
    seen = torch.zeros(len(x), dtype=torch.uint8)
    found = []
    for op, device in ((reference, "cpu"), (impl, impl.device)):
        given = x, grad, eps, one, torch.tensor(SEED)
        written = [t.to(device, copy=True) for t in (torch.full_like(x, torch.nan), mu, rho, seen)]
        op("adt_step_")(*written[:3], *(t.to(device) for t in given), 7, LR, ENTROPY, 0.0, 1.0, written[3])
        found.append([t.cpu() for t in written])
    assert all(torch.equal(bits_of(ours), bits_of(theirs)) for ours, theirs in zip(*found, strict=True))
    finite = mu.isfinite() & rho.isfinite()
    assert all(t[finite].isfinite().all() for t in found[0][:3])


def test_the_step_is_that_of_adam_on_the_gradients_of_autograd():
    x, seed = torch.rand(3, 3, 8, 8).double(), torch.tensor(SEED)
    mu, rho = (torch.randn(x.shape).double().requires_grad_() for _ in range(2))
    weight, factor, eps = torch.randn(x.shape).double(), torch.rand(3).double(), torch.full((1,), 0.4).double()
    sums, r = [torch.randn(x.shape).double() for _ in range(2)], adt.normals(x, seed, 4)
    total = [t.clone() for t in sums]
    adam = torch.optim.Adam([mu, rho], lr=LR, betas=(0.0, 0.0), maximize=True)
    found = [t.detach().clone() for t in (x, mu, rho)]
    for last in (False, True):
        a = mu + F.softplus(rho) * r
        x_adv = (x + eps * a.tanh()).clamp(0, 1)
        assert 0.05 < ((x_adv == 0) | (x_adv == 1)).double().mean() < 0.5, "the box matters"
        entropy = r**2 / 2 + (F.softplus(rho) + 1e-8).log() + (1 - a.tanh() ** 2 + 1e-8).log()
        loss = (weight * x_adv).flatten(1).sum(1) * factor + ENTROPY * entropy.flatten(1).sum(1)
        for t, g in zip(total, torch.autograd.grad(loss.sum(), (mu, rho)), strict=True):
            t += g
        args = found[1], found[2], x, weight, eps, factor, seed, 4, LR, ENTROPY, 0.0, 1.0, None
        torch.ops.spat.adt_step_(found[0], *args, *sums, last)
    mu.grad, rho.grad = total
    adam.step()
    for ours, theirs in zip(found[1:], (mu, rho), strict=True):  # g / (|g| + 1e-8) is as steep as 1e8, and g is 1e-16 off
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-7)
    after = x + eps * (mu + F.softplus(rho) * adt.normals(x, seed, 5)).tanh()
    torch.testing.assert_close(found[0], after.detach().clamp(0, 1), rtol=0, atol=1e-7)


def test_functions_of_the_reference_are_those_of_fp64():
    """Relative errors in fp32, of 6e-8 at best."""
    v = torch.rand(100_000)
    assert (adt.log1p_unit(v) / v.double().log1p() - 1).abs().max() < 4e-7
    words = torch.randint(2**32, (100_000,))
    words[:2] = torch.tensor([0, 2**32 - 1])
    r, u = adt.normal(words).double(), ((words >> 8) * 2 + 1 - 2**24).double() / 2**24
    below = torch.special.ndtri((1 - u.abs()) / 2) * -u.sign()
    assert r.dtype == torch.float64
    assert (r / below - 1).abs().max() < 1.5e-6
    assert r.abs().max() > 5.3
    z = -110 * torch.rand(100_000)
    assert (adt.exp_nonpositive(z).double() - z.double().exp()).abs().max() < 2e-7


def test_noise_is_normal_and_of_the_draw(impl):
    x, eps = torch.full((2, 8192), 0.5, device=impl.device), torch.tensor([0.5], device=impl.device)
    mu, rho = torch.zeros_like(x), torch.full_like(x, -0.5)  # sigma is 0.47, so few tanh are 1
    found = []
    for key, counter, draw in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]:
        x_adv = torch.empty_like(x)
        impl("adt_sample_")(x_adv, mu, rho, x, eps, torch.tensor([key, counter], device=impl.device), draw, 0.0, 1.0)
        found.append((((x_adv - x) / 0.5).double().clamp(-1 + 1e-9, 1 - 1e-9).atanh() / F.softplus(rho.double())).flatten().cpu())
    assert torch.equal(found[1], found[2]), "draws count up"
    for r in found:
        n, share = len(r), (1 + torch.erf(r.sort().values / 2**0.5)) / 2
        # Kolmogorov-Smirnov: the statistic exceeds 1.95/sqrt(n) once in a thousand times; the seed is fixed
        assert (share - torch.arange(1, n + 1) / n).abs().max() < 1.95 / n**0.5
    for i, j in [(0, 1), (0, 3), (1, 3)]:
        assert abs(torch.corrcoef(torch.stack([found[i], found[j]]))[0, 1]) < 0.02


def test_unusable_gradients_count_as_zero(impl):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0, 1e-45, 1.0, -1.0])
    grad = torch.stack([values, values.nan_to_num(0, 0, 0).clamp(-1, 1)]).to(impl.device)
    x, mu, rho = torch.full_like(grad, 0.5), torch.zeros_like(grad), torch.zeros_like(grad)
    eps, seed = torch.tensor([0.25], device=impl.device), torch.tensor(SEED, device=impl.device)
    x_adv, nan_seen = torch.empty_like(x), torch.zeros(2, dtype=torch.uint8, device=impl.device)
    impl("adt_step_")(x_adv, mu, rho, x, grad, eps, torch.ones_like(eps), seed, 0, LR, 0.0, 0.0, 1.0, nan_seen)
    assert nan_seen.tolist() == [1, 0]
    assert all(t.isfinite().all() for t in (x_adv, mu, rho))
    assert not mu[0, :6].any()
    assert torch.equal(mu[0, 6:].sign(), values[6:].to(impl.device))

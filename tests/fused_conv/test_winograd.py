"""Winograd's convolutions on CPUs: as exact as PyTorch's, with bits that depend on nothing but the image and the weights."""

import pytest
import torch
from torch import nn

from spat_kernels.fused_conv import winograd
from spat_kernels.fused_conv.recipe import Recipe, convolve
from tests.input_gradient.models import images, logits_and_gradient, planned

pytestmark = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="it is for AVX-512")

SETTINGS = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
# (N, C, K, H, W): single tiles, odd sizes, channels that end in half a panel, more than one block of the sums
SHAPES = [
    (1, 32, 32, 1, 1), (2, 32, 64, 2, 2), (3, 96, 32, 5, 7), (2, 64, 160, 8, 8), (1, 288, 96, 4, 3), (7, 32, 32, 32, 1),
    (0, 32, 32, 4, 4),
]  # fmt: skip


def channels_last(*shape):
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def recipes(shape):
    n, c, k, *pixels = shape
    for way in ("forward", "gradient"):
        x = channels_last(n, c if way == "forward" else k, *pixels)
        yield Recipe(way, torch.float64, n, (c, *pixels), (k, *pixels), (3, 3), padding=(1, 1)), x


def run(recipe, x, weight):
    return getattr(winograd.Winograd(weight), recipe.way)(x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_pytorch(shape):
    weight = channels_last(shape[2], shape[1], 3, 3)
    for recipe, x in recipes(shape):
        exact = convolve(recipe, x.double(), weight.double())
        found, eager = run(recipe, x, weight), convolve(recipe, x, weight)
        assert found.shape == exact.shape
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found - exact).norm() <= 2 * (eager - exact).norm() + 2**-24 * exact.norm()


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_batch_and_threads(threads):
    weight = channels_last(64, 96, 3, 3)
    for recipe, x in recipes((40, 96, 64, 6, 5)):
        whole, before = run(recipe, x, weight), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            parts = [run(recipe, part, weight) for part in x.split([1, 2, 3, 5, 7, 22])]
        finally:
            torch.set_num_threads(before)
        assert torch.equal(torch.cat(parts), whole)


def test_what_reads_zeros_is_zero():
    """A pixel that an attack's loss does not depend on must not get a sign from rounding. Samples do not meet either."""
    weight, x = channels_last(32, 32, 3, 3), channels_last(3, 32, 8, 8)
    x[:, :, 3:] = 0
    x[1] = torch.nan
    out = winograd.Winograd(weight).forward(x)
    assert (out[[0, 2], :, 4:] == 0).all()
    assert out[[0, 2]].isfinite().all()
    assert (out[[0, 2], :, :4] != 0).all()


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((64, 48, 3, 3), {}), ((64, 64, 1, 1), {}), ((64, 64, 3, 3), {"stride": (2, 2)}), ((64, 64, 3, 3), {"padding": (0, 0)}),
        ((64, 64, 3, 3), {"dilation": (2, 2)}), ((64, 32, 3, 3), {"groups": 2}),
    ],
)  # fmt: skip
def test_applies_to_nothing_else(shape, settings):
    assert not winograd.applies(torch.empty(shape), SETTINGS | settings, 16, (4, 4))
    assert winograd.applies(torch.empty(64, 64, 3, 3), SETTINGS, 16, (4, 4))
    assert not winograd.applies(torch.empty(64, 64, 3, 3), SETTINGS, 15, (4, 4)), "one step would not pay for the weights"
    for dtype in (torch.bfloat16, torch.float64):
        assert not winograd.applies(torch.empty(64, 64, 3, 3, dtype=dtype), SETTINGS, 16, (4, 4))


def test_refuses_what_does_not_fit():
    x, weight, out = channels_last(2, 32, 4, 4), torch.empty(16, 64, 32), channels_last(2, 64, 4, 4)
    op, transform = torch.ops.spat.winograd.default, torch.ops.spat.winograd_weights.default
    for arguments, message in [
        ((x.contiguous(), weight, out), "x must be channels_last"), ((x, weight[:15], out), "weight must"),
        ((x, weight, channels_last(2, 64, 4, 5)), "out must have x's pixels"),
        ((x.double(), weight, out), "x has the wrong dtype"),
        ((x, weight, channels_last(2, 48, 4, 4)), "out must be channels_last with a multiple of 32"),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    with pytest.raises(RuntimeError, match="must be"):
        transform(channels_last(64, 32, 3, 2), False, weight)
    with pytest.raises(RuntimeError, match="out must"):
        transform(channels_last(64, 32, 3, 3), True, weight)


def test_a_plan_uses_it(monkeypatch):
    """With a bias that stays in the convolution (no ReLU behind it), and with BatchNorm folded into the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 32, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 64, 10),
    ).eval()  # fmt: skip
    model[3].running_mean.normal_()
    x = images(3, 16, dtype=torch.float32)
    found, expected = [], []
    for results, applies in ((found, winograd.applies), (expected, lambda *_: False)):
        monkeypatch.setattr(winograd, "applies", applies)
        gradient = planned(model, x)
        assert sum(getattr(b, "winograd", None) is not None for b in gradient.bound) == (2 if results is found else 0)
        results += logits_and_gradient(gradient, x, torch.ones(3, 10))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

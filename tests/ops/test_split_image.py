"""The image in two parts: bitwise equal to the reference, zeros around them, and together far closer than one rounding."""

import itertools

import pytest
import torch

from spat_kernels import ops
from tests.ops.helpers import bits_of, channels_last, image, reference, values

SHAPES = [(0, 4, 4), (1, 1, 1), (3, 5, 7), (4, 32, 32)]
WIDTHS = [(3, 8), (1, 2), (3, 6), (3, 7), (4, 8), (1, 16), (3, 16), (10, 24), (8, 20)]  # C and P


def samples(dtype):
    x, v = channels_last(torch.rand(4, 3, 8, 8)), torch.rand(3)
    out = torch.empty(4, 8, 8, 8, dtype=dtype if dtype.itemsize == 2 else torch.float16, memory_format=torch.channels_last)
    yield "split_image", (x, v, v - 1, out)
    yield "split_image", (x, None, None, out)


def outputs(impl):
    return [dtype for dtype in (torch.float16, torch.bfloat16) if dtype in impl.dtypes]


@pytest.mark.parametrize(("channels", "width"), WIDTHS)
def test_is_bitwise_the_reference(impl, channels, width):
    scale_shift = list(itertools.product((False, True), repeat=2))
    for dtype, shape, offset, given in itertools.product(outputs(impl), SHAPES, impl.offsets, scale_shift):
        x, _ = image(shape, channels, torch.float32, impl.device, offset)
        values(x)
        out, intact = image(shape, width, dtype, impl.device, offset)
        scale, shift = (torch.randn(channels, device=impl.device) if there else None for there in given)
        expected = out.clone(memory_format=torch.preserve_format)
        reference("split_image")(x, scale, shift, expected)
        impl("split_image")(x, scale, shift, out)
        assert torch.equal(bits_of(out), bits_of(expected)), (dtype, shape, offset, given)
        assert intact()
        assert (out[:, 2 * channels :] == 0).all()


def test_the_parts_add_up(impl):
    x = channels_last(torch.rand(2, 3, 9, 9, device=impl.device))
    for dtype in outputs(impl):
        out = torch.empty(2, 8, 9, 9, dtype=dtype, device=impl.device, memory_format=torch.channels_last)
        impl("split_image")(x, None, None, out)
        parts = out.double()
        error = (parts[:, :3] + parts[:, 3:6] - x).abs().max()
        assert error <= (2**-17 if dtype == torch.bfloat16 else 2**-22)
        assert torch.equal(out[:, :3], x.to(dtype))


def test_what_is_not_finite_stays_visible(impl):
    x = channels_last(torch.tensor([torch.nan, torch.inf, -torch.inf, 1e5, -1e5, 65519.0], device=impl.device).view(1, 6, 1, 1))
    out = torch.empty(1, 12, 1, 1, dtype=torch.float16, device=impl.device, memory_format=torch.channels_last)
    impl("split_image")(x, None, None, out)
    hi, lo = out.flatten()[:6], out.flatten()[6:]
    assert hi[0].isnan()
    assert hi[1:].tolist() == [torch.inf, -torch.inf, torch.inf, -torch.inf, 65504.0]
    assert lo.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 15.0]


def test_a_split_convolution_does_not_round_the_image(device):
    """The purpose: hi + lo through repeated weights is the convolution of the unrounded image, up to the weights' rounding."""
    x = channels_last(torch.rand(4, 3, 8, 8, device=device))
    weight = torch.randn(5, 3, 3, 3, device=device).bfloat16().float()
    out = channels_last(torch.empty(4, 8, 8, 8, dtype=torch.bfloat16, device=device))
    ops.split_image(x, out)
    wide = torch.cat([weight, weight, torch.zeros(5, 2, 3, 3, device=device)], 1)
    exact = torch.conv2d(x.double(), weight.double())
    split = torch.conv2d(out.double(), wide.double())
    rounded = torch.conv2d(x.bfloat16().double(), weight.double())
    assert (split - exact).abs().max() < (rounded - exact).abs().max() / 100

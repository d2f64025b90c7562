"""Forwards in windows: of any network what its whole forward gives, wherever the square is."""

import pytest
import torch
from torch import nn

from spat_kernels.input_gradient.autograd import InputGradient
from spat_kernels.input_gradient.windows import Windows
from spat_train.models.networks.small import MnistCNN
from spat_train.models.registry import create
from tests.input_gradient.models import MODELS, images, planned, randomized


def check(model, x, sizes, seed=0, rtol=1e-10):
    """Squares of all `sizes` at random places and in all corners, of some of the images, adopted by some of those."""
    generator = torch.Generator().manual_seed(seed)
    gradient = planned(model, x)
    windows = Windows(gradient)
    assert windows.supports(gradient)
    base = x.clone()
    with torch.no_grad():
        windows.begin(base.clone())
        for height, width in sizes:
            down, right = x.shape[2] - height, x.shape[3] - width
            inside = [[int(torch.randint(n + 1, (), generator=generator)) for n in (down, right)] for _ in range(2)]
            for top, left in [(0, 0), (0, right), (down, 0), (down, right), *inside]:
                which = (torch.rand(len(base), generator=generator) < 0.7).nonzero()[:, 0]
                if len(which) == 0:
                    continue
                pixels = torch.rand(len(which), x.shape[1], height, width, dtype=x.dtype, generator=generator)
                variants = base[which].clone()
                variants[:, :, top : top + height, left : left + width] = pixels
                ours, whole = windows.variants(which, top, left, pixels), gradient.logits(variants)
                assert (ours - whole).abs().max() <= rtol * whole.abs().max()
                better = torch.rand(len(which), generator=generator) < 0.5
                windows.adopt(which, better)
                base[which[better]] = variants[better]
            if len(base) > 2:
                kept = torch.arange(len(base)) != 1
                windows.keep(kept)
                base = base[kept]
    return windows


SMALL = [name for name in MODELS if not any(s in name for s in ("50", "VGG", "18", "WRN", "Mobile"))]


@pytest.mark.parametrize("name", SMALL)
def test_equals_the_whole_forward(name):
    make, size = MODELS[name]
    torch.manual_seed(0)
    check(randomized(make()), images(4, size=size), [(1, 1), (2, 2), (5, 3), (size, size)])


@pytest.mark.parametrize("conv", [
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)}, {"kernel_size": 2, "stride": 3, "padding": 1},
    {"kernel_size": 3, "dilation": (1, 3), "padding": (2, 0)}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 9, "padding": 4},
    {"kernel_size": (2, 1), "stride": (5, 4)},
], ids=str)  # fmt: skip
def test_any_convolution_on_images_that_are_not_square(conv):
    torch.manual_seed(0)
    tail = (nn.MaxPool2d(2, 1), nn.AvgPool2d((1, 2)), nn.ELU(), nn.Flatten(), nn.LazyLinear(5))
    model = nn.Sequential(nn.Conv2d(2, 4, **conv), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), *tail)
    x = torch.rand(3, 2, 14, 19, dtype=torch.float64)
    model.double().eval()(x)
    check(randomized(model), x, [(1, 1), (2, 4), (13, 19)])


def test_in_fp32_with_channels_for_winograd():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(c, 32, 3, padding=1), nn.ReLU()) for c in (3, 32, 32)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 144, 10)).eval()
    x = torch.rand(8, 3, 12, 12)
    check(model, x, [(1, 1), (3, 3), (12, 12)], rtol=1e-5)


def test_does_a_part_of_the_work():
    """As few multiplications as the windows need, by hand for the network of Madry et al.: 5x5, pool, 5x5, pool, two dense."""
    model, x = MnistCNN(scale=1).double().eval(), torch.rand(2, 1, 28, 28, dtype=torch.float64)
    windows = Windows(planned(model, x))
    dense = 4 * 49 * 64 + 64 * 10
    full = 28 * 28 * 2 * 25 + 14 * 14 * 2 * 4 * 25 + dense
    part = 6 * 6 * 2 * 25 + 8 * 8 * 2 * 4 * 25 + dense  # a square of side 2 reaches 6x6, pooled 4x4, 8x8
    assert windows.share(2) == pytest.approx(part / full)
    assert windows.share(28) == 1
    assert windows.bytes_per_image == 8 * (28 * 28 + 2 * (28 * 28 + 14 * 14) + 4 * (14 * 14 + 49))
    assert windows.share(1) < windows.share(2) < windows.share(14) < 1


def test_keeps_to_a_few_shapes(monkeypatch):
    """Wherever the square is and however many images are asked for: oneDNN prepares again for every shape."""
    model, x = randomized(create("wrn-10-1")), images(24, size=32)
    windows, shapes = Windows(planned(model, x)), set()
    conv2d = torch.conv2d
    with torch.no_grad():
        windows.begin(x)
        monkeypatch.setattr(torch, "conv2d", lambda x, w, *args: shapes.add((x.shape, w.shape)) or conv2d(x, w, *args))
        for top, left in [(0, 0), (0, 29), (13, 14), (14, 13), (29, 29), (1, 30)]:
            for count in (17, 20, 24):
                windows.variants(torch.arange(count), top, left, torch.rand(count, 3, 2, 2, dtype=x.dtype))
    assert len(shapes) <= len([s for s in windows.steps if type(s[0]).__name__ == "Conv"])


def test_supports_what_it_can():
    x = images(2, size=16)
    model = randomized(create("wrn-10-1"))
    assert Windows.supports(planned(model, x))
    assert Windows.supports(planned(model.float(), x.float(), "fp32"))
    assert not Windows.supports(planned(model.float(), x.float(), "bf16")), "there the image is split"
    assert not Windows.supports(InputGradient(model))

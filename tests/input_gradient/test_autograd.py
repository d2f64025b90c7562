"""Memory formats on the way through a model: iterates, convolutions and their weights come in the one that is read fastest."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spat_kernels import APGD, PGD
from spat_kernels.input_gradient import autograd, pool_steps
from spat_kernels.input_gradient.autograd import InputGradient
from spat_kernels.input_gradient.choose import input_gradient
from tests.helpers import EPS, batch, cnn


class Formats(TorchDispatchMode):
    """Which memory formats convolutions and steps met, how often images were copied or converted, and weights cast."""

    def __init__(self):
        super().__init__()
        self.seen, self.conversions, self.casts = Counter(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in ("convolution", "linf_step_", "l2_step_"):
            contiguous = {t.is_contiguous() and not t.is_contiguous(memory_format=torch.channels_last) for t in args[:2]}
            self.seen[name, "contiguous" if True in contiguous else "channels_last"] += 1
        self.casts += name == "_to_copy" and args[0].shape[2:] == (3, 3)
        out = function(*args, **kwargs)
        if name in ("clone", "copy_") and args[0].shape[1:2] == (3,):
            self.conversions += out.stride() != args[name == "copy_"].stride()
        return out


def formats_of(attack, model, x, y):
    attack(model, x, y)  # what is found out once for a model is not counted
    with Formats() as formats:
        attack(model, x, y)
    return formats


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_iterates_are_laid_out_as_the_plan_reads_them(precision, norm):
    model, (x, _) = cnn(size=16).eval(), batch(size=16)
    y, settings = model(x).argmax(1), {"precision": precision, "input_gradient": "plan", "norm": norm}
    few, many, apgd = (
        formats_of(attack, model, x, y)
        for attack in (PGD(EPS, steps=1, **settings), PGD(EPS, steps=5, **settings), APGD(1 / 255, steps=4, **settings))
    )
    step, starts = f"{norm}_step_", norm == "l2"  # a random start in the L2 ball is a step too, in the format of x
    for found in (few, many, apgd):
        assert found.seen[step, "contiguous"] == starts
    assert many.seen[step, "channels_last"] == 5
    assert apgd.seen[step, "channels_last"] >= 4
    # In half precision the gradient of the split image is a slice, which is made dense; nothing else is converted.
    assert many.conversions - few.conversions == 4 * (precision == "bf16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autograd_in_half_precision_runs_in_channels_last(precision, device):
    """Images and weights, which are cast once an attack."""
    model, (x, y) = cnn(size=16).eval().to(device), (t.to(device) for t in batch(size=16))
    settings = {"precision": precision, "input_gradient": "autograd", "graph": False}
    few, many = (formats_of(PGD(EPS, steps=steps, **settings), model, x, y) for steps in (1, 5))
    assert set(many.seen) == {("convolution", "channels_last"), ("linf_step_", "channels_last")}
    assert many.conversions == few.conversions
    assert many.casts == few.casts == 2


def test_flat_networks_are_not_converted():
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 10)), batch()
    few, many = (formats_of(PGD(EPS, steps=steps, input_gradient="plan"), model, x, y) for steps in (1, 5))
    assert many.conversions == few.conversions


class OwnArithmetic(nn.Module):
    """Convolutions of which autocast does not cast all, and a weight that is read beside them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(64, 10)

    def forward(self, x):
        x = self.conv1(x)
        with torch.autocast("cpu", enabled=False):
            x = self.conv2(x.float()) + torch.conv2d(x.float(), self.conv2.weight)
        return self.fc(x.flatten(1)) * self.conv1.weight.sum()


class Upcast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = cnn()

    def forward(self, x):
        return self.net(x.float())


def test_models_with_an_arithmetic_of_their_own_keep_it():
    """Copies stand in only where autocast would cast the weights anyway: the same logits, and no weight is touched."""
    x, y = batch()
    cases = [(OwnArithmetic(), x, "bf16"), (Upcast().eval(), x.half(), None), (cnn().double().eval(), x.double(), None)]
    for model, images, precision in cases:
        weights = list(model.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is None and images.dtype == torch.float64):
            gradient, plain = (InputGradient(model, precision, **given) for given in ({"x": images}, {}))
            with gradient.arithmetic("cpu"):
                gradient.prepare()
                found = gradient.logits(gradient.laid_out(images))
            with plain.arithmetic("cpu"):
                expected = plain.logits(images)
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
            PGD(EPS, precision=precision, input_gradient="autograd")(model, images, y)
        assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


class NeedsContiguous(nn.Module):
    """As many models do, it takes activations for contiguous: in the forward, by an assertion, or in the backward alone."""

    def __init__(self, where):
        super().__init__()
        self.conv, self.fc, self.layouts, self.where = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 10), [], where

    def forward(self, x):
        self.layouts.append(x.is_contiguous())
        x = self.conv(x).relu()
        if self.where == "assertion":
            assert x.is_contiguous()
        x = ViewsBackward.apply(x) if self.where == "backward" else x
        return self.fc(x.view(len(x), -1) if self.where == "forward" else x.flatten(1))


class ViewsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad + 0 * ctx.saved_tensors[0].view(-1)[0]


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("where", ["forward", "assertion", "backward"])
def test_models_that_need_contiguous_activations_keep_them(where, loss):
    """Found out once for a model; the result is that of the layout which it needs."""
    model, (x, y) = NeedsContiguous(where), batch()
    settings = {"precision": "bf16", "input_gradient": "autograd", "loss": loss, "steps": 3}
    found = []
    for images in (x, x, x.contiguous(memory_format=torch.channels_last)):
        torch.manual_seed(1)
        found.append(PGD(EPS, random_start=loss == "kl", **settings)(model, images, y))
    assert model.layouts.count(False) == (2 if (where, loss) == ("backward", "kl") else 1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        attack = PGD(EPS, random_start=loss == "kl", **settings | {"precision": None})
        expected = attack(lambda x: NeedsContiguous.forward(model, x.contiguous()), x, y)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], expected)
    assert loss == "kl" or torch.equal(found[2], expected)


def test_a_failing_model_is_not_blamed_on_the_format():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fails = nn.Conv2d(3, 4, 3), True

        def forward(self, x):
            if self.fails:
                raise RuntimeError("of its own")
            return self.conv(x).mean((2, 3))

    model, (x, y) = Fails(), batch()
    attack = PGD(EPS, precision="bf16", input_gradient="autograd")
    with pytest.raises(RuntimeError, match="of its own"):
        attack(model, x, y)
    model.fails = False
    attack(model, x, y % 4)
    assert InputGradient(model, "bf16", x=x).laid_out(x).is_contiguous(memory_format=torch.channels_last)
    changing = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="changes its input in place"):
        attack(changing, x, y % 4)


def test_other_models_in_half_precision_are_left_alone():
    """What a compiler looks at, what is computed from other tensors, and what is no image."""
    plain, compiled, (x, _) = cnn(), cnn(), batch()
    assert len(InputGradient(plain, "bf16", x=x)._weights) == 2
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(144, 10))
    compiled.compile()
    for model in (torch.compile(plain), compiled, normed, lambda x: plain(x)):
        assert not InputGradient(model, "bf16", x=x)._weights
    assert not InputGradient(plain, "bf16", x=x.flatten(1))._weights
    assert not InputGradient(plain, "fp32", x=x)._weights
    with torch.autocast("cpu", torch.bfloat16):
        assert InputGradient(plain, x=x)._half == torch.bfloat16
    assert InputGradient(plain, x=x.half())._half == torch.float16


@pytest.mark.parametrize("path", ["plan", "autograd"])
def test_padded_average_pooling_is_differentiated_in_nchw(path, monkeypatch):
    """torch 2.11's CUDA kernel is wrong in channels_last: as if the CPU's were."""
    given = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.avg_pool2d_backward.default:
                given.append(args[1])  # whose layout chooses the kernel
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(autograd, "POOLS_IN_NCHW", {"cpu"})
    monkeypatch.setattr(pool_steps, "POOLS_IN_NCHW", {"cpu"})
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 4)).eval()
    x = torch.rand(2, 3, 6, 6)
    ours = input_gradient(model, x, path, "bf16")
    with torch.no_grad(), ours.arithmetic("cpu"), Watch():
        ours.prepare()
        ours.forward(ours.laid_out(x))
        grad = ours.backward(torch.eye(4)[:2])
    assert [t.is_contiguous() for t in given] == [True]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf), leaf, torch.eye(4)[:2])
    assert torch.cosine_similarity(grad.flatten(), expected.flatten(), 0) > 0.999

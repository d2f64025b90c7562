"""Memory formats on the way through a model: iterates, convolutions and their weights come in the one that is read fastest."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spat_kernels import APGD, PGD
from spat_kernels.input_gradient import InputGradient
from tests.test_attacks import EPS, batch, cnn
from tests.test_borrow import assert_same, snapshot


class Formats(TorchDispatchMode):
    """Which memory formats convolutions and steps met, and how often images were copied or converted."""

    def __init__(self):
        super().__init__()
        self.seen, self.conversions = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in ("convolution", "linf_step_"):
            contiguous = {t.is_contiguous() and not t.is_contiguous(memory_format=torch.channels_last) for t in args[:2]}
            self.seen[name, "contiguous" if True in contiguous else "channels_last"] += 1
        self.conversions += name in ("clone", "copy_") and args[0].shape[1:2] == (3,)
        return function(*args, **kwargs)


def formats_of(attack, model, x, y):
    attack(model, x, y)  # what is found out once for a model is not counted
    with Formats() as formats:
        attack(model, x, y)
    return formats


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_iterates_are_laid_out_as_the_plan_reads_them(precision):
    model, (x, _) = cnn(size=16).eval(), batch(size=16)
    y, settings = model(x).argmax(1), {"precision": precision, "input_gradient": "plan"}
    few, many, apgd = (
        formats_of(attack, model, x, y)
        for attack in (PGD(EPS, steps=1, **settings), PGD(EPS, steps=5, **settings), APGD(1 / 255, steps=4, **settings))
    )
    for found in (few, many, apgd):
        assert ("linf_step_", "contiguous") not in found.seen
    assert many.seen["linf_step_", "channels_last"] == 5 and apgd.seen["linf_step_", "channels_last"] >= 4
    # In half precision the gradient of the split image is a slice, which is made dense; nothing else is converted.
    assert many.conversions - few.conversions == 4 * (precision == "bf16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autograd_in_half_precision_runs_in_channels_last(precision):
    """Images, convolutions and their weights; the weights are cast once an attack, and the model is given back as it was."""
    model, (x, _) = cnn(size=16).eval(), batch(size=16)
    y = model(x).argmax(1)
    settings = {"precision": precision, "input_gradient": "autograd"}
    before = snapshot(model, x, y)
    few, many = (formats_of(PGD(EPS, steps=steps, **settings), model, x, y) for steps in (1, 5))
    assert set(many.seen) == {("convolution", "channels_last"), ("linf_step_", "channels_last")}
    assert many.conversions == few.conversions
    assert_same(snapshot(model, x, y), before)
    with pytest.raises(RuntimeError, match="in the middle"):
        fail = Fails(model)
        PGD(EPS, **settings)(fail, x, y)
    assert_same(snapshot(model, x, y), before)


class Fails(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        self.model(x)
        raise RuntimeError("in the middle")


class Views(nn.Module):
    """As many models do, it takes activations for contiguous."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.layouts = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 10), []

    def forward(self, x):
        self.layouts.append(x.is_contiguous())
        return self.fc(self.conv(x).relu().view(len(x), -1))


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_models_that_need_contiguous_activations_keep_them(loss):
    """Found out once for a model; the result is that of the layout which it needs."""
    model, (x, y) = Views(), batch()
    settings = {"precision": "bf16", "input_gradient": "autograd", "loss": loss, "steps": 3}
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(PGD(EPS, **settings)(model, x, y))
    assert model.layouts.count(False) == 1
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        expected = PGD(EPS, **settings | {"precision": None})(lambda x: Views.forward(model, x), x, y)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], expected)


def test_other_models_in_half_precision_are_left_alone():
    """What a compiler or a replica looks at, what is computed from other tensors, and what is no image."""
    plain, (x, _) = cnn(), batch()
    assert len(InputGradient(plain, "bf16", x=x)._weights) == 2
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(144, 10))
    for model in (torch.compile(plain), nn.DataParallel(plain), normed, lambda x: plain(x)):
        assert not InputGradient(model, "bf16", x=x)._weights
    assert not InputGradient(plain, "bf16", x=x.flatten(1))._weights and not InputGradient(plain, "fp32", x=x)._weights
    with torch.autocast("cpu", torch.bfloat16):
        assert InputGradient(plain, x=x)._half == torch.bfloat16
    assert InputGradient(plain, x=x.half())._half == torch.float16

"""Convolutions with the passes next to them: which carry one, and the same results by an engine that does both."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels as sk
from spat_kernels.fused_conv import winograd
from spat_kernels.input_gradient import packed_linear
from spat_kernels.input_gradient.choose import input_gradient
from spat_kernels.input_gradient.steps import Conv, FusedConv, Pointwise
from spat_train.models.registry import create
from tests.fused_conv.engines import Twin, chooser, installed
from tests.input_gradient.models import (
    EPS,
    MODELS,
    assert_equals_autograd,
    images,
    logits_and_gradient,
    moved,
    planned,
    randomized,
    torchvision,
)


def fused(model, x, engine, fuse=True, precision=None):
    """The plan of `model`, prepared, whose convolutions `engine` does."""
    with torch.no_grad(), installed(chooser(engine)):
        gradient = input_gradient(model, x, "plan", precision, fuse=fuse)
        gradient.prepare()
    return gradient


def passes(gradient):
    return [step for step in gradient.plan.steps if isinstance(step, Pointwise)]


HEAD, POOL = "the head does it", "the first to read it is no convolution"


@pytest.mark.parametrize(("name", "count", "alone", "back_alone"), [
    ("wrn-34-10", 31, [], [HEAD]),
    ("wrn-16-2", 13, [], [HEAD]),
    ("preactresnet-18", 17, [], [HEAD]),
    ("resnet-18", 17, [], [HEAD]),
    ("resnet-50", 49, [], [HEAD]),
])  # fmt: skip
def test_all_passes_ride_in_convolutions(name, count, alone, back_alone):
    """Forward all of them, backward all but the last, which the pooling and the last layer do."""
    if name.startswith("resnet"):
        torchvision()
    gradient = planned(create(name).eval().requires_grad_(False), images(1, dtype=torch.float32))
    steps, found = gradient.plan.steps, passes(gradient)
    assert len(found) == count
    assert [p.alone for p in found if p.alone] == alone
    assert [p.back_alone for p in found if p.back_alone] == back_alone
    assert sum(isinstance(s, FusedConv) and s.behind is not None for s in steps) == count - len(alone)
    assert sum(isinstance(s, FusedConv) and s.in_front is not None for s in steps) == count - len(back_alone)


class Shortcut(nn.Module):
    """A projection shortcut computed before or after the branch, and a pooled stem."""

    def __init__(self, first: bool):
        super().__init__()
        self.first = first
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.a, self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        if self.first:
            y = self.c(x)
            z = self.b(F.relu(self.a(x)))
        else:
            z = self.b(F.relu(self.a(x)))
            y = self.c(x)
        return self.fc(F.relu(y + z).mean((2, 3)))


@pytest.mark.parametrize("first", [True, False])
def test_the_later_of_two_convolutions_takes_the_sum(first):
    model, x = randomized(Shortcut(first)), images(2, 8)
    gradient = planned(model, x)
    carriers = {s.name: gradient.plan.steps[s.behind].name for s in gradient.plan.steps if getattr(s, "behind", None) is not None}
    assert carriers["b" if first else "c"] == "add"
    assert ("c" if first else "b") not in carriers
    assert [p.back_alone for p in passes(gradient)] == [POOL, "", HEAD]


class Awkward(nn.Module):
    """Sums that cannot be carried: of what comes later, of a value with itself, of one that others read."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(6))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        a = self.conv[0](x)
        b = F.relu(a + F.silu(a))
        c = self.conv[1](b)
        d = F.relu(c + c)
        e = self.conv[2](d)
        f = F.relu(e + F.silu(d))
        g = self.conv[3](f)
        h = F.relu(g + self.conv[4](F.silu(f))) + f
        return self.fc(F.relu(self.conv[5](h) + F.silu(g)).mean((2, 3)))


def test_what_cannot_be_carried_says_why():
    model, x = randomized(Awkward()), images(2, 8)
    gradient = planned(model, x)
    alone = [p.alone for p in passes(gradient)]
    assert "others read the convolution too" in alone
    assert "what is added is computed after the convolution" in alone
    engine = Twin()
    assert_equals_autograd(model, x, fused(model, x, engine))
    assert engine.calls


@pytest.mark.parametrize("name", [name for name in MODELS if name != "PreActResNet-18"])  # as the WRN, and seven times as much
def test_an_engine_changes_nothing(name):
    """In fp64 against autograd, forward and back; each convolution is asked for, and all passes that ride along are."""
    make, size = MODELS[name]
    torch.manual_seed(0)
    model, x, engine = randomized(make()), images(size=size), Twin()
    gradient = fused(model, x, engine)
    assert_equals_autograd(model, x, gradient)
    engine.calls.clear()
    logits_and_gradient(gradient, x)
    carried = {way: sum(r.way == way and r.epilogue is not None for _, r in engine.calls) for way in ("forward", "gradient")}
    assert carried["forward"] == sum(not p.alone for p in passes(gradient))
    assert carried["gradient"] == sum(not p.back_alone for p in passes(gradient))
    convolutions = sum(isinstance(s, Conv) for s in gradient.plan.steps)
    assert len(engine.calls) == 2 * convolutions


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["WRN (TRADES/MART)", "normalised", "functional", "defaults"])
def test_the_same_bits_as_apart(name, precision, monkeypatch):
    """The passes' operations and roundings are the same, where an engine does them one after the other."""
    for module in (winograd, packed_linear):
        monkeypatch.setattr(module, "applies", lambda *_: False)  # the engine's convolutions are PyTorch's
    monkeypatch.setattr(packed_linear, "is_fast", lambda _: False)
    make, size = MODELS[name]
    torch.manual_seed(0)
    model, x, engine = moved(randomized(make()), torch.float32), images(3, size, torch.float32), Twin()
    gradient = fused(model, x, engine, precision=precision)
    with torch.no_grad():
        ours = *logits_and_gradient(gradient, x), gradient.logits(x)
    apart = planned(model, x, precision)
    with torch.no_grad():
        theirs = *logits_and_gradient(apart, x), apart.logits(x)
    assert engine.calls
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert apart.engines.used == {}


def test_backward_again_and_after_an_error():
    """`keep`, and a forward that an error ended."""
    torch.manual_seed(0)
    model, x, engine = randomized(create("wrn-10-1")), images(3), Twin()
    gradient, apart = fused(model, x, engine), planned(copy.deepcopy(model), x)
    with torch.no_grad():
        apart.forward(x)
        gradient.forward(x)
        with pytest.raises(RuntimeError):
            gradient.forward(x[:, :2])
        logits = gradient.forward(x)
        dlogits = torch.randn_like(logits)
        expected = apart.backward(dlogits)
        assert torch.equal(gradient.backward(dlogits, keep=True), expected)
        assert torch.equal(gradient.backward(dlogits), expected)


def test_weights_are_prepared_once_an_attack():
    torch.manual_seed(0)
    model, x, y, engine = randomized(create("wrn-10-1")), images(4), torch.arange(4), Twin()
    with installed(chooser(engine)):
        first = sk.pgd(model, x, y, EPS, steps=3, random_start=False, fuse=True)
        engine.prepared = 0
        sk.pgd(model, x, y, EPS, steps=3, random_start=False, fuse=True)
        convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
        assert engine.prepared == 2 * convolutions
        model.conv1.weight.mul_(-1)
        changed = sk.pgd(model, x, y, EPS, steps=3, random_start=False, fuse=True)
    assert torch.equal(changed, sk.pgd(model, x, y, EPS, steps=3, random_start=False, fuse=False))
    assert not torch.equal(first, changed)

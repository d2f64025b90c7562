"""Models that have no plan: the reason, and that reading them changes nothing about them."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels as sk
from spat_train.models.registry import create
from tests.input_gradient.models import EPS, images, randomized, torchvision


class Lambda(nn.Module):
    def __init__(self, function, *children):
        super().__init__()
        self.function = function
        self.child = nn.Sequential(*children)
        self.fc = nn.Linear(3, 4)
        self.notes = {}
        self.register_buffer("count", torch.ones((), dtype=torch.int64))

    def forward(self, x):
        return self.function(self, x)


def read_later(m, x):
    a = m.child(x)
    return m.fc((F.relu(a, inplace=True) + a).mean((2, 3)))


def added_to(m, x):
    a = m.child(x)
    skip = a
    a += a.relu()
    return m.fc((a + skip).mean((2, 3)))


def own_forward():
    model = create("wrn-10-1")
    model.conv1.forward = lambda x: -nn.Conv2d.forward(model.conv1, x)
    return model


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return -grad


def without_gradient(m, x):
    with torch.no_grad():
        brightness = x.mean((2, 3))
    return m.fc(x.mean((2, 3)) - brightness)


def after(change):
    """A model that changes something in its forward."""
    return Lambda(lambda m, x: (change(m, x), m.fc(x.mean((2, 3))))[1])


REFUSED = {
    "statistics of the batch": (lambda: create("wrn-10-1"), {"bn_mode": "train"}),
    "random numbers": (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10)), {"bn_mode": "train"}),
    "random numbers on the host": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) * (1 + random.random()))), {}),
    "no rule for": (lambda: Lambda(lambda m, x: m.fc(x.cumsum(3).mean((2, 3)))), {}),
    "over several dimensions": (lambda: nn.Sequential(nn.LayerNorm([3, 32, 32]), nn.Flatten(), nn.Linear(3072, 10)), {}),
    "control flow|symbolically": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) * (2 if x.sum() > 0 else 1))), {}),
    "relu works in place on a value that add reads later": (lambda: Lambda(read_later, nn.Conv2d(3, 3, 3)), {}),
    "changes the images in place": (lambda: Lambda(lambda m, x: m.fc(x.mul_(2).mean((2, 3)))), {}),
    "its forward changes seen": (lambda: after(lambda m, x: setattr(m, "seen", x)), {}),
    "not those of the model itself": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) / x.shape[0])), {}),
    "without gradients": (lambda: Lambda(without_gradient), {}),
    "with its own backward": (lambda: Lambda(lambda m, x: m.fc(Reversed.apply(x.mean((2, 3))))), {}),
    "looks at the values of a tensor (__float__)": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) * float(m.count))), {}),
    "looks at the values of a tensor (item)": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) * m.fc.bias[0].item())), {}),
    "gives no tensor": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)) / torch.aminmax(x).max)), {}),
    "iadd works in place on a value that add reads later": (lambda: Lambda(added_to, nn.Conv2d(3, 3, 3)), {}),
    "has a forward of its own": (own_forward, {}),
    "changes notes": (lambda: after(lambda m, x: m.notes.update(seen=x)), {}),
    "changes count": (lambda: after(lambda m, x: m.count.add_(1)), {}),
    "samples may mix": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3)).view(1, -1, 3).mean(1).repeat(x.shape[0], 1))), {}),
    "a parameter or buffer of the model should be": (lambda: Lambda(lambda m, x: F.linear(m.fc.weight, x.mean((2, 3))).t()), {}),
    "dtype": (lambda: Lambda(lambda m, x: m.fc(x.mean((2, 3))).float()), {}),
}  # fmt: skip


def snapshot(model):
    """Every attribute, containers by content, and the values of buffers."""
    attributes = [
        {k: (list(v), [id(i) for i in v.values()]) if isinstance(v, dict) else id(v) for k, v in vars(m).items()}
        for m in model.modules()
    ]
    return attributes, [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_reason_and_autograd_does_it(reason):
    make, settings = REFUSED[reason]
    torch.manual_seed(0)
    model, x, y = make().double(), images(3), torch.tensor([0, 1, 2])
    state, values = snapshot(model)
    explanation = sk.explain(model, x, **settings)
    assert explanation.path == "autograd"
    assert explanation.plan == {}
    assert any(part in explanation.reason for part in reason.split("|")), explanation.reason
    now, values_now = snapshot(model)
    assert now == state
    assert all(map(torch.equal, values, values_now))
    with pytest.raises(ValueError, match="input_gradient='plan', but"):
        sk.pgd(model, x, y, EPS, steps=1, input_gradient="plan", **settings)


def test_vit_takes_autograd():
    model = torchvision().models.VisionTransformer(16, 8, 1, 2, 32, 64, num_classes=10).eval()
    explanation = sk.explain(model, images(2, 16, torch.float32))
    assert explanation.path == "autograd"
    assert explanation.reason
    assert str(explanation).startswith("autograd, because")
    x, y = images(2, 16, torch.float32), torch.tensor([0, 1])
    assert sk.pgd(model, x, y, EPS, steps=1).shape == x.shape


def test_hooks_are_seen_and_never_skipped():
    model, x, calls = randomized(create("wrn-10-1")), images(), []
    assert sk.explain(model, x).path == "plan"
    handle = model.fc.register_forward_hook(lambda *_: calls.append(1))
    assert "hooks" in sk.explain(model, x).reason
    sk.pgd(model, x, torch.tensor([0, 1]), EPS, steps=3)
    assert len(calls) >= 3
    handle.remove()
    assert sk.explain(model, x).path == "plan"

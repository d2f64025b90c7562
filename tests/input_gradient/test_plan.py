"""What the plan fuses: the pooling with the last layer, and the way back of the pass in front of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels as sk
from spat_kernels.input_gradient import plan
from spat_kernels.input_gradient.plan import Linear, PoolLinear
from tests.input_gradient.models import assert_equals_autograd, images, planned, randomized


class Headed(nn.Module):
    """A residual block, and a head of the caller's."""

    def __init__(self, head, classes=5):
        super().__init__()
        self.conv1, self.conv2, self.bn = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 11, 3, padding=1), nn.BatchNorm2d(11)
        self.fc, self.gate, self.head = nn.Linear(11, classes), nn.Linear(11, 11), head

    def forward(self, x):
        x = self.conv1(x)
        return self.head(self, F.relu(self.bn(x + self.conv2(x))))


HEADS = {  # the head, whether it is one step, and whether that does the way back of the pass in front
    "pooled by module": (lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 1).squeeze(3).flatten(1)), True, True),
    "in a smooth network": (lambda m, x: m.fc(F.silu(x).mean((2, 3))), True, False),
    "behind a sum": (lambda m, x: m.fc((x.relu() + F.max_pool2d(x, 3, 1, 1)).mean((2, 3))), True, True),
    "squeezed and excited": (
        lambda m, x: m.fc((x * torch.sigmoid(m.gate(x.mean((2, 3)))).unsqueeze(2).unsqueeze(3)).mean((2, 3))),
        True,
        False,
    ),
    "features read twice": (lambda m, x: m.fc((y := x.mean((2, 3))) + m.gate(y).relu()), False, False),
    "logits read on": (lambda m, x: m.fc(x.mean((2, 3))) / 3, False, False),
    "two linear layers": (lambda m, x: m.fc(m.gate(x.mean((2, 3))).relu()), False, False),
    "mean of rows": (lambda m, x: m.fc(x.mean(3).mean(2)), False, False),
    "largest pixel": (lambda m, x: m.fc(F.max_pool2d(F.avg_pool2d(x, 2), 3).flatten(1)), False, False),
}


@pytest.mark.parametrize("head", HEADS)
def test_pooling_and_the_last_layer_are_one_step(head):
    torch.manual_seed(0)
    head, one_step, way_back = HEADS[head]
    model, x = randomized(Headed(head)), images(3, 9)
    gradient = planned(model, x)
    last = gradient.plan.steps[-1]
    assert isinstance(last, PoolLinear) == one_step == sk.explain(model, x).plan["of them with the pooling"]
    assert (getattr(last, "pointwise", None) is not None) == way_back
    assert_equals_autograd(model, x, gradient)


def test_a_head_of_many_weights_stays_a_matrix_product(monkeypatch):
    for name, limit, kind in (("MAX_WEIGHTS", 55, PoolLinear), ("MAX_WEIGHTS", 54, Linear), ("MAX_CHANNELS", 10, Linear)):
        with monkeypatch.context() as limits:
            limits.setattr(plan, name, limit)
            assert type(planned(randomized(Headed(HEADS["pooled by module"][0])), images()).plan.steps[-1]) is kind


@pytest.mark.parametrize("head", ["pooled by module", "in a smooth network", "behind a sum"])
@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp16"])
def test_one_step_gives_what_the_steps_gave(head, precision, monkeypatch):
    """Logits, gradients and their factors, which lengths depend on, as often as the way back is gone."""
    torch.manual_seed(0)
    model, x = randomized(Headed(HEADS[head][0]), torch.float32 if precision else torch.float64), images(4, 9)
    x, dlogits = x.to(model.fc.weight.dtype), torch.randn(4, 5, dtype=model.fc.weight.dtype)
    dlogits *= torch.tensor([1.0, 0.0, 1e-6, 1e4])[:, None]
    found = []
    for most in (plan.MAX_WEIGHTS, 0):
        monkeypatch.setattr(plan, "MAX_WEIGHTS", most)
        gradient = planned(copy.deepcopy(model), x, precision)
        assert isinstance(gradient.plan.steps[-1], PoolLinear) == (most > 0)
        with torch.no_grad(), gradient.arithmetic("cpu"):
            logits = gradient.forward(x)
            first = gradient.backward(dlogits, keep=True)
            factor = gradient.factor
            again = gradient.backward(-2 * dlogits)
        assert (factor is None) == (precision not in ("bf16", "fp16"))
        length = 1 if factor is None else factor.view(-1, 1, 1, 1)
        assert torch.equal(again * (1 if factor is None else gradient.factor.view(-1, 1, 1, 1)), -2 * (first * length))
        found.append((logits, first.double(), factor))
    (ours, dx, factor), (theirs, expected, expected_factor) = found
    half = {"bf16": 2**-6, "fp16": 2**-9}.get(precision, 1e-6 if precision else 1e-14)
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if precision else 1e-12, atol=1e-6 if precision else 1e-13)
    assert ((dx - expected).flatten(1).norm(dim=1) <= half * expected.flatten(1).norm(dim=1)).all()
    assert (dx[1] == 0).all()
    if factor is not None:
        torch.testing.assert_close(factor, expected_factor, rtol=1e-5, atol=0)

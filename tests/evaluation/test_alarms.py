"""Alarms: raised by models that hide their gradients, each by those that show it; none by ordinary models."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from spat_train.evaluation import alarms as module
from spat_train.evaluation.alarms import alarms, compare, sign_test
from tests.evaluation.helpers import digits, fitted

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 0.15
NAMES = [
    "outputs are numbers", "images are only read", "outputs are logits", "outputs are deterministic",
    "outputs do not depend on the batch", "gradients are not zero", "noise is weaker than FGSM", "FGSM is weaker than PGD",
    "random search is weaker than PGD", "more steps break more", "larger eps break more", "unbounded attacks break all",
]  # fmt: skip


def mislead(x):
    """The identity, whose gradient has the wrong sign for pixels between the 256 levels."""
    return torch.where((255 * x - (255 * x).round()).abs() < 1e-3, x, 2 * x.detach() - x)


def write(x):
    x.data.mul_(0.5)
    return x


NO_GRADIENT = {"gradients are not zero", "unbounded attacks break all"}
MISLED = {"FGSM is weaker than PGD", "random search is weaker than PGD", "unbounded attacks break all"}
MODELS = {  # functions of the fitted network and its images, and the alarms that they raise
    "quantised": (lambda net, x: net((2 * x).round() / 2), NO_GRADIENT),
    "saturated": (lambda net, x: torch.sigmoid(1000 * net(x) - 5000), NO_GRADIENT),
    "misleading": (lambda net, x: net(mislead(x)), MISLED),
    "random": (lambda net, x: net(x + 0.3 * torch.randn_like(x)), {"outputs are deterministic"}),
    "of its batch": (lambda net, x: net(x - x.mean(0)), {"outputs do not depend on the batch"}),
    # sqrt has an infinite gradient at 0, times 0
    "NaN gradient": (lambda net, x: net(x) + (x * 0).sqrt().flatten(1).sum(1, keepdim=True), NO_GRADIENT),
    "softmax": (lambda net, x: net(x).softmax(1), {"outputs are logits"}),
    # for some images
    "NaN": (lambda net, x: net(x).masked_fill((x.flatten(1)[:, 20] > 0.5)[:, None], torch.nan), {"outputs are numbers"}),
    "writing": (lambda net, x: net(write(x)), {"images are only read"}),
    "detached": (lambda net, x: net(x.detach()), set()),
    "viewing": (lambda net, x: net(x.view(len(x), -1)), set()),  # unlike flatten, it refuses a batch without images
}


class Around(nn.Module):
    """The fitted network within one of the functions."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = fitted(), kind
        self.eval()

    def forward(self, x):
        return MODELS[self.kind][0](self.inner, x)


def raised(model, **how) -> set[str]:
    found = alarms(model, digits(100), eps=EPS, bar=None, **how)
    assert [alarm.name for alarm in found][: len(NAMES)] == NAMES
    assert all(alarm.meaning.endswith(".") and alarm.numbers for alarm in found)
    return {alarm.name for alarm in found if alarm.raised}


def test_ordinary_models_raise_none():
    for model in (fitted(0), fitted(1), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()):
        assert raised(model) == set()


@pytest.mark.filterwarnings("ignore:the input gradient was NaN", "ignore:model changes its input")
@pytest.mark.parametrize("kind", [kind for kind, (_, expected) in MODELS.items() if expected])
def test_models_that_hide_their_gradients(kind):
    found = raised(Around(kind))
    assert MODELS[kind][1] <= found
    assert kind == "random" or "outputs are deterministic" not in found


def test_a_black_box_that_is_the_better_one():
    name = "black box is weaker than white box"
    assert name not in raised(fitted(0), source=fitted(1))
    assert name in raised(Around("quantised"), source=fitted(0))


def test_a_model_without_a_graph_has_no_gradient():
    *found, last = alarms(Around("detached"), digits(5), eps=EPS, bar=None)
    assert [alarm.name for alarm in (*found, last)] == NAMES[:6]
    assert not any(alarm.raised for alarm in found)
    assert last.raised
    assert "do not depend on x" in last.meaning
    assert last.numbers == {"images": 5, "zero or NaN, %": 100.0}


def test_few_images_numbers_of_numpy_and_inference_mode():
    x, y = digits(100)
    assert len(alarms(Around("viewing"), (x[:1], y[:1]), eps=EPS, bar=None)) == len(NAMES)
    model = fitted()
    expected = alarms(model, (x, y), eps=EPS, bar=None)
    with torch.inference_mode():
        assert alarms(model, digits(100), eps=np.float64(EPS), bar=None) == expected


def test_the_sign_test():
    for wins, losses, p in ((0, 0, 1), (7, 0, 2**-7), (3, 4, 0.7734375), (12, 5, 9402 / 2**17), (0, 9, 1)):
        assert math.isclose(sign_test(wins, losses), p)
    weak, strong = torch.arange(100) < 50, torch.arange(100) < 43  # what they left
    numbers, alarming = compare(weak, strong, "a", "b")
    assert numbers == {"a, %": 50, "b, %": 43, "broken by a alone": 0, "by b alone": 7, "p": 2**-7}
    assert alarming
    assert not compare(weak, torch.arange(100) < 44, "a", "b")[1]
    assert not compare(strong, weak, "a", "b")[1]


def test_the_images_are_spread_evenly(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "outputs", lambda model, x, batch_size: seen.append(x) or [])
    x, y = digits(90)
    alarms(fitted(), (x, y), eps=EPS, rows=torch.arange(89, -1, -1), count=10, bar=None)
    assert torch.equal(seen[0], x[torch.arange(89, -1, -1)[torch.linspace(0, 89, 10).long()]])

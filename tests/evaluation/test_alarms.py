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


class Mislead(torch.autograd.Function):
    """The identity, whose gradient has the wrong sign for pixels between the 256 levels."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward((255 * x - (255 * x).round()).abs() < 1e-3)
        return x.clone()

    @staticmethod
    def backward(context, grad):
        (on_a_level,) = context.saved_tensors
        return torch.where(on_a_level, grad, -grad)


def write(x):
    x.data.mul_(0.5)
    return x


MODELS = {  # functions of the fitted network and its images
    "quantised": lambda net, x: net((2 * x).round() / 2),
    "saturated": lambda net, x: torch.sigmoid(1000 * net(x) - 5000),
    "misleading": lambda net, x: net(Mislead.apply(x)),
    "random": lambda net, x: net(x + 0.3 * torch.randn_like(x)),
    "of its batch": lambda net, x: net(x - x.mean(0)),
    # sqrt has an infinite gradient at 0, times 0
    "NaN gradient": lambda net, x: net(x) + (x * 0).sqrt().flatten(1).sum(1, keepdim=True),
    "softmax": lambda net, x: net(x).softmax(1),
    "overflowing": lambda net, x: net(x).masked_fill((x.flatten(1)[:, 20] > 0.5)[:, None], torch.nan),  # for some images
    "writing": lambda net, x: net(write(x)),
    "detached": lambda net, x: net(x.detach()),
    "viewing": lambda net, x: net(x.view(len(x), -1)),  # unlike flatten, it refuses a batch without images
}


class Around(nn.Module):
    """The fitted network within one of the functions."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = fitted(), kind
        self.eval()

    def forward(self, x):
        return MODELS[self.kind](self.inner, x)


def raised(model, **how) -> set[str]:
    found = alarms(model, digits(100), eps=EPS, bar=None, **how)
    assert [alarm.name for alarm in found][: len(NAMES)] == NAMES
    assert all(alarm.meaning.endswith(".") and alarm.numbers for alarm in found)
    return {alarm.name for alarm in found if alarm.raised}


def test_ordinary_models_raise_none():
    for model in (fitted(0), fitted(1), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()):
        assert raised(model) == set()


@pytest.mark.filterwarnings("ignore:the input gradient was NaN", "ignore:model changes its input")
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("quantised", {"gradients are not zero", "unbounded attacks break all"}),
        ("saturated", {"gradients are not zero", "unbounded attacks break all"}),
        ("misleading", {"FGSM is weaker than PGD", "random search is weaker than PGD", "unbounded attacks break all"}),
        ("random", {"outputs are deterministic"}),
        ("of its batch", {"outputs do not depend on the batch"}),
        ("NaN gradient", {"gradients are not zero", "unbounded attacks break all"}),
        ("softmax", {"outputs are logits"}),
        ("overflowing", {"outputs are numbers"}),
        ("writing", {"images are only read"}),
    ],
)
def test_models_that_hide_their_gradients(kind, expected):
    found = raised(Around(kind))
    assert expected <= found
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


def test_the_results_are_kept(tmp_path):
    model, images = fitted(), digits(30)
    first = alarms(model, images, eps=EPS, bar=None, folder=tmp_path, source=fitted(1))
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    assert len(kept) == 2
    assert alarms(model, images, eps=EPS, bar=None, folder=tmp_path, source=fitted(1)) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == kept

"""Normalisations before a network, and other activations in it."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from spat_train.models.registry import create
from spat_train.models.wrapping import ACTIVATIONS, Normalize
from tests.models.helpers import build

SMOOTH = [name for name in ACTIVATIONS if name != "relu"]


def test_normalize():
    normalize, x = Normalize([0.5, 0.25, 0], [0.5, 0.25, 2]), torch.rand(2, 3, 4, 5)
    expected = torch.stack([(x[:, 0] - 0.5) / 0.5, (x[:, 1] - 0.25) / 0.25, x[:, 2] / 2], 1)
    torch.testing.assert_close(normalize(x), expected)
    assert list(nn.Sequential(OrderedDict(normalize=normalize, model=nn.Linear(2, 2))).state_dict()) == [
        "normalize.mean", "normalize.std", "model.weight", "model.bias"
    ]  # fmt: skip


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5, 0.5]), ([0.5], [0]), ([0.5], [-1])])
def test_normalize_refuses(mean, std):
    with pytest.raises(ValueError, match="positive in std"):
        Normalize(mean, std)


@pytest.mark.parametrize("name", ["wrn-10-1", "preactresnet-18", "resnet-18", "mnist-cnn", "small-cnn", "timm:resnet18"])
def test_activations(monkeypatch, name):
    """Every ReLU is replaced, those in a forward included."""
    monkeypatch.setattr(nn.functional, "relu", lambda *_, **__: pytest.fail("a ReLU"))
    with torch.device("meta"):
        plain = build(name)
        for activation in SMOOTH:
            model = build(name, activation=activation).eval()
            kinds = [type(m) for m in model.modules() if isinstance(m, (nn.ReLU, nn.SiLU, nn.GELU, nn.Softplus))]
            assert kinds == [type(ACTIVATIONS[activation]())] * sum(isinstance(m, nn.ReLU) for m in plain.modules())
            assert list(model.state_dict()) == list(plain.state_dict())
            assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_activation_changes_the_function():
    logits = {}
    for activation in ACTIVATIONS:
        torch.manual_seed(0)
        logits[activation] = create("preactresnet-18", activation=activation).eval()(torch.ones(2, 3, 32, 32) / 2)
    assert not any(torch.allclose(logits["relu"], logits[activation]) for activation in SMOOTH)

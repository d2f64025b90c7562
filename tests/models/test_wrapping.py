"""A network that expects normalised images becomes one of images in [0, 1], and nothing in it changes."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import spat_train.models
from spat_train.models import Normalize, create, wrap
from spat_train.models.checkpoints import load_checkpoint
from spat_train.models.wrapping import normalising
from tests.input_gradient.models import torchvision
from tests.models.helpers import MEAN, STD, X, network, saved

MEANS, STDS = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda v: torch.tensor(v).view(1, 3, 1, 1),
                                  lambda v: nn.Parameter(torch.tensor(v, dtype=torch.float64))])  # fmt: skip
def test_numbers(kind):
    net = network()
    model = wrap(net, kind(MEAN), kind(STD))
    assert model.model is net
    torch.testing.assert_close(model(X), net((X - MEANS) / STDS))
    assert model.state_dict().keys() >= {"normalize.mean", "normalize.std", "model.conv1.weight"}
    assert not any(p.requires_grad for p in model.normalize.parameters())


def test_modes_stay():
    net = network().train()
    net.bn1.eval()
    net.fc.requires_grad_(False)
    before = {name: m.training for name, m in net.named_modules()}
    model = wrap(net, MEAN, STD)
    assert {name: m.training for name, m in net.named_modules()} == before
    assert model.training
    assert model.normalize.training
    assert not net.fc.weight.requires_grad
    assert not wrap(network(), MEAN, STD).training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_devices(dtype):
    model = wrap(network().to(dtype), MEAN, STD)
    assert model(X.to(dtype)).dtype == dtype
    with torch.device("meta"):
        other = create("wrn-10-1")
    assert wrap(other, MEAN, STD).normalize.mean.is_meta
    assert not wrap(nn.Flatten(), MEAN, STD).normalize.mean.is_meta


def test_a_wrapped_model_takes_checkpoints(tmp_path):
    theirs, model = network(), wrap(network(seed=2), MEAN, STD)
    load_checkpoint(model, saved(tmp_path, theirs.state_dict()))
    assert torch.equal(model.model(X), theirs(X))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5] * 3, [0.5] * 2, r"give both one number a channel, for images in \[0, 1\], positive in std"),
        ([], [], "one number a channel"),
        ([127.5] * 3, [63.0] * 3, r"mean=\[127.5, 127.5, 127.5\], std=\[63.0, .* for images in \[0, 1\]"),
        ([0.5], [0.0], "positive in std"),
        ([0.5], [float("nan")], "positive in std"),
        ([0.5], [float("inf")], "positive in std"),
        ([float("nan")], [0.5], "mean=.nan., std="),
        ("imagenet", [0.5], r"mean='imagenet': give one number a channel, such as \[0.5"),
        ([0.5], None, "std=None: give one number a channel"),
        ([0.5, None], [0.5, 0.5], "mean=.0.5, None.: give one number a channel"),
    ],
)
def test_other_numbers(mean, std, message):
    with pytest.raises(ValueError, match=message):
        wrap(network(), mean, std)


def test_other_counts_than_channels():
    with pytest.raises(ValueError, match=r"give both one number a channel \(3\)"):
        wrap(network(), [0.5], [0.5], channels=3)


def test_no_module():
    with pytest.raises(TypeError, match="give a torch.nn.Module, an instance and not its class"):
        wrap(nn.Linear, MEAN, STD)


class Theirs(nn.Module):
    """RobustBench's way: buffers in the network itself."""

    def __init__(self, mean: str, std: str):
        super().__init__()
        self.register_buffer(mean, MEANS[None])
        self.register_buffer(std, STDS[None], persistent=False)


class OneNumber(nn.Module):
    """The same for every channel."""

    mean, std = 0.5, 0.25

    def forward(self, x):
        return (x - self.mean) / self.std


NORMALISED = {
    "ours": lambda: nn.Sequential(OrderedDict(normalize=Normalize(MEAN, STD), model=network())),
    "wrapped": lambda: wrap(network(), MEAN, STD),
    "parallel": lambda: nn.DataParallel(wrap(network(), MEAN, STD)),
    "mu, sigma": lambda: nn.Sequential(Theirs("mu", "sigma"), network()),
    "mean, std": lambda: Theirs("mean", "std"),
    "new_mean, new_std": lambda: Theirs("new_mean", "new_std"),
    "pixel_mean, pixel_std": lambda: Theirs("pixel_mean", "pixel_std"),
    "one number": lambda: nn.Sequential(OneNumber(), network()),
    "torchvision": lambda: nn.Sequential(torchvision().transforms.Normalize(MEAN, STD), network()),
}


@pytest.mark.parametrize("kind", NORMALISED)
def test_nothing_is_normalised_twice(kind, monkeypatch):
    model = NORMALISED[kind]()
    with pytest.raises(ValueError, match=r"mean=.0.49.* the model normalises images already, in .*: leave out mean and std"):
        wrap(model, MEAN, STD)
    monkeypatch.setattr(spat_train.models.wrapping, "made", lambda num_classes: model, raising=False)
    with pytest.raises(ValueError, match="normalises images already"):
        create("spat_train.models.wrapping:made", mean=MEAN, std=STD)


def test_networks_that_do_not_normalise():
    """BatchNorm's statistics, and names that stand for something else."""
    other = network()
    other.mean, other.std = torch.zeros(64), torch.ones(64)  # of features
    other.mu, other.sigma = nn.Linear(3, 3), nn.Linear(3, 3)
    assert normalising(other) == ""
    wrap(other, MEAN, STD)

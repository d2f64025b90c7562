"""Every name makes its model or says why not: those of the package, timm's, and anybody's own code."""

import sys

import pytest
import torch
from torch import nn

from spat_train.models.networks import FAMILIES
from spat_train.models.registry import create
from spat_train.models.wrapping import normalisation
from tests.models.helpers import build, logits_shape


@pytest.mark.parametrize("name", ["wrn-34", "wrn-34-0", "resnet-19", "resnet-18/big", "preactresnet-18/cifar", ""])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"name='{name}'.*give .*, timm:NAME or package.module:factory$") as caught:
        create(name)
    assert all(family.usage in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "wrn-33-10"}, "6n"),
        ({"name": "resnet18"}, "did you mean [^?]*resnet-18"),
        ({"name": "WRN-34-10"}, "did you mean [^?]*wrn-34-10"),
        ({"name": "mnist"}, "did you mean [^?]*mnist-cnn"),
        ({"num_classes": 1}, "num_classes=1: give at least 2"),
        ({"image_shape": (32, 32)}, r"image_shape=\(32, 32\): give \(channels"),
        ({"activation": "relu6"}, "activation relu6: there is none: .*there are relu, silu, gelu, softplus"),
        ({"name": "mnist-cnn", "image_shape": (1, 30, 30)}, r"image_shape=\(1, 30, 30\): .*divisible by 4"),
        ({"name": "mnist-b", "image_shape": (1, 27, 28)}, "mnist-b needs images of at least 28x28"),
        ({"name": "mnist-trades", "image_shape": (1, 15, 28)}, "mnist-trades needs images of at least 16x16"),
    ],
)
def test_other_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create(**{"name": "wrn-10-1"} | arguments)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes own_models.py into the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(*lines):
        (tmp_path / "own_models.py").write_text("\n".join(["from torch import nn", *lines]))

    yield write
    for name in ("own_models", "own_helper"):
        sys.modules.pop(name, None)


def test_module_in_the_current_directory(own_module, tmp_path):
    (tmp_path / "own_helper.py").write_text("WIDTH = 5")
    own_module("def small(num_classes, width=None):", "    import own_helper",
               "    return nn.Linear(own_helper.WIDTH, num_classes)")  # fmt: skip
    before = list(sys.path)
    assert create("own_models:small", 3).weight.shape == (3, 5)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:net", "'no_such_module' cannot be imported .No module named"),
        ("own_models:nett", r"own_models has no function or class 'nett'.*did you mean net\??"),
        ("own_models:", "no function or class ''"),
        (":net", "'' cannot be imported"),
        ("own_models:WIDTH", "no function or class 'WIDTH'"),
        ("own_models:bare", "cannot be called as bare.num_classes=10.*num_classes"),
        ("own_models:deep", "missing a required argument: 'depth'"),
        ("own_models:text", "text returns str: return a torch.nn.Module"),
        ("own_models:kind", "kind returns type: return"),
    ],
)
def test_own_that_does_not_fit(own_module, name, message):
    own_module("WIDTH = 3", "def net(num_classes): return nn.Linear(3, num_classes)", "def bare(): return nn.Linear(3, 3)",
               "def deep(depth, num_classes): pass", "def text(num_classes): return 'net'",
               "def kind(num_classes): return nn.Linear")  # fmt: skip
    before = list(sys.path)
    with pytest.raises(ValueError, match=message) as caught:
        create(name)
    assert str(caught.value).startswith(f"name='{name}'")
    assert sys.path == before


def test_errors_in_own_code(own_module):
    own_module("def net(:")
    with pytest.raises(ValueError, match="cannot be imported .invalid syntax"):
        create("own_models:net")
    own_module("def net(num_classes): raise KeyError('theirs')")
    with pytest.raises(KeyError, match="theirs"):
        create("own_models:net")


def test_activations_of_own_models(own_module):
    own_module("class Net(nn.Module):", "    def __init__(self, num_classes):", "        super().__init__()",
               "        self.a = self.b = nn.ReLU()", "def linear(num_classes): return nn.Linear(12, num_classes)")  # fmt: skip
    model = create("own_models:Net", activation="gelu")
    assert [type(model.a), type(model.b)] == [nn.GELU, nn.GELU]  # one module under two names
    assert isinstance(create("own_models:linear", 3, activation="relu"), nn.Linear)
    with pytest.raises(ValueError, match="activation='silu': own_models:linear has no nn.ReLU"):
        create("own_models:linear", 3, activation="silu")


@pytest.mark.parametrize("channels", [1, 3])
def test_timm(channels):
    model = build("timm:resnet18", 7, (channels, 32, 32))
    mean, std = model.normalize.mean.flatten(), model.normalize.std.flatten()
    expected = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # ImageNet's
    expected = expected if channels == 3 else expected.mean(1, keepdim=True)
    torch.testing.assert_close(torch.stack([mean, std]), expected)
    assert model.model.conv1.in_channels == channels
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 7)
    other = create("timm:resnet18", 7, (channels, 32, 32), mean=[0.25] * channels, std=[0.5] * channels)
    assert normalisation(other) == f"mean{' 0.25' * channels}, std{' 0.5' * channels}"
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]


def test_timm_with_a_fixed_image_size():
    assert logits_shape("timm:vit_tiny_patch16_224", (3, 64, 64)) == (2, 10)


@pytest.mark.parametrize("name", ["resnet81", "hf-hub:timm/resnet18", "resnet18.no_such_tag", ""])
def test_timm_unknown(name):
    with pytest.raises(ValueError, match="name='timm:") as caught:
        build(f"timm:{name}")
    if name == "resnet81":
        assert "did you mean resnet18" in str(caught.value)


@pytest.mark.parametrize(("name", "package"), [("timm:resnet18", "timm"), ("resnet-18", "torchvision")])
def test_missing_package(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"name='{name}': it needs {package}.*pip install {package}"):
        create(name)

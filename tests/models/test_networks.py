"""The networks have the sizes of the papers and the layout of the public checkpoints, for images of any shape."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import spat_kernels
from spat_train.models.networks.small import MnistCNN
from spat_train.models.networks.wide_resnet import WideResNet
from spat_train.models.registry import NAMES, create
from spat_train.models.wrapping import ACTIVATIONS, Normalize
from tests.models.helpers import build, logits_shape

# without sub_block1, reference.md; the ResNets: public CIFAR code, PreActResNet with its last BatchNorm
PARAMETERS = {
    "wrn-34-10": 46_160_474,
    "wrn-28-10": 36_479_194,
    "preactresnet-18": 11_172_170,
    "resnet-18": 11_173_962,
    "resnet-50": 23_520_842,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes(name):
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["wrn-10-1", "preactresnet-18", "preactresnet-18/raw", "resnet-18"])
def test_every_parameter_gets_a_gradient(name):
    model = build(name, 7)
    logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_wide_resnet_has_the_public_layout():
    state = WideResNet(16, 2).state_dict()
    shapes = {
        "conv1.weight": (16, 3, 3, 3),
        "block1.layer.0.bn1.running_mean": (16,),
        "block1.layer.0.conv1.weight": (32, 16, 3, 3),
        "block1.layer.0.convShortcut.weight": (32, 16, 1, 1),
        "block2.layer.1.bn2.weight": (64,),
        "block3.layer.1.conv2.weight": (128, 128, 3, 3),
        "bn1.bias": (128,),
        "fc.weight": (10, 128),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert "block1.layer.1.convShortcut.weight" not in state
    assert not any("sub_block" in name for name in state)


def test_wide_resnet_initialisation():
    torch.manual_seed(0)
    model = WideResNet(10, 4)
    weight = model.block3.layer[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert not model.fc.bias.any()


def test_dropout_drops_in_training_only():
    model, x = WideResNet(10, 1, dropout=0.5), torch.rand(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", [*NAMES, "timm:resnet18"])
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (3, 96, 96), (4, 32, 64)])
def test_image_shapes(name, image_shape):
    assert logits_shape(name, image_shape, 7) == (2, 7)


def test_cnns_for_mnist():
    model, x = MnistCNN(), torch.rand(2, 1, 28, 28)
    assert sum(p.numel() for p in model.parameters()) == 3_274_634  # 832 + 51,264 + 3,212,288 + 10,250
    assert model.features(x).shape == (2, 64, 7, 7)
    assert create("mnist-cnn/1", 10, (1, 28, 28)).features(x).shape == (2, 4, 7, 7)
    assert create("mnist-b", 10, (1, 28, 28)).features(x).shape == (2, 128, 1, 1)  # filters of 8, 6, 5, strides of 2, 2, 1
    assert logits_shape("mnist-b", (3, 32, 29)) == (2, 10)


def test_the_cnn_of_trades():
    """Names and shapes of its public checkpoint: 312,202 weights."""
    model, x = create("mnist-trades", 10, (1, 28, 28)).eval(), torch.rand(2, 1, 28, 28)
    convolutions = {"conv1": (32, 1), "conv2": (32, 32), "conv3": (64, 32), "conv4": (64, 64)}
    shapes = {f"feature_extractor.{name}.weight": (*shape, 3, 3) for name, shape in convolutions.items()}
    shapes |= {f"classifier.{name}.weight": s for name, s in {"fc1": (200, 1024), "fc2": (200, 200), "fc3": (10, 200)}.items()}
    state = model.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items() if name.endswith("weight")} == shapes
    assert sum(t.numel() for t in state.values()) == 312_202

    def layer(function, name: str, out: torch.Tensor) -> torch.Tensor:
        return function(out, state[f"{name}.weight"], state[f"{name}.bias"])

    out = x
    for i in (1, 2, 3, 4):
        out = layer(F.conv2d, f"feature_extractor.conv{i}", out).relu()
        out = out if i % 2 else F.max_pool2d(out, 2)
    out = out.flatten(1)
    for i in (1, 2):
        out = layer(F.linear, f"classifier.fc{i}", out).relu()
    torch.testing.assert_close(model(x), layer(F.linear, "classifier.fc3", out))


def test_global_pooling_is_that_of_the_public_code():
    model, features = create("wrn-10-1").eval(), torch.rand(2, 64, 8, 8)
    model.conv1, model.block1, model.block2, model.block3 = (nn.Identity() for _ in range(4))
    expected = model.fc(F.avg_pool2d(model.relu(model.bn1(features)), 8).flatten(1))
    torch.testing.assert_close(model(features), expected)


@pytest.mark.parametrize(("stem", "gflop"), [("", 10.0), ("/cifar", 10.0), ("/stl10", 2.5), ("/imagenet", 0.7)])
def test_stems_at_96(stem, gflop):
    with torch.device("meta"):
        model = build("resnet-18" + stem, 10, (3, 96, 96)).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 96, 96))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.05)


@pytest.mark.parametrize(("side", "kernel"), [(32, 3), (64, 3), (96, 3), (127, 3), (128, 7), (224, 7)])
def test_stem_follows_the_images(side, kernel):
    with torch.device("meta"):
        model = build("resnet-50", 10, (1, side, side))
    assert model.conv1.weight.shape == (64, 1, kernel, kernel)
    assert isinstance(model.maxpool, nn.Identity) == (kernel == 3)


PLANNED = [
    "wrn-10-1", "preactresnet-18/raw", "resnet-18", "resnet-18/stl10", "resnet-50/imagenet", "mnist-cnn",
    "mnist-b", "mnist-trades", "small-cnn", "timm:resnet18",
]  # fmt: skip


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize(
    ("name", "activation"),
    [*((name, "relu") for name in PLANNED), *(("preactresnet-18", activation) for activation in ACTIVATIONS)],
)
def test_takes_the_plan(name, activation, image_shape):
    explanation = spat_kernels.explain(build(name, 10, image_shape, activation=activation), torch.rand(2, *image_shape))
    assert explanation.path == "plan", explanation.reason


@pytest.mark.parametrize("name", ["wrn-10-1", "preactresnet-18", "resnet-18", "mnist-cnn", "small-cnn", "timm:resnet18"])
def test_activations(monkeypatch, name):
    """Every ReLU is replaced, those in a forward included."""
    monkeypatch.setattr(nn.functional, "relu", lambda *_, **__: pytest.fail("a ReLU"))
    with torch.device("meta"):
        plain = build(name)
        for activation in ("silu", "gelu", "softplus"):
            model = build(name, activation=activation).eval()
            kinds = [type(m) for m in model.modules() if isinstance(m, (nn.ReLU, nn.SiLU, nn.GELU, nn.Softplus))]
            assert kinds == [type(ACTIVATIONS[activation]())] * sum(isinstance(m, nn.ReLU) for m in plain.modules())
            assert list(model.state_dict()) == list(plain.state_dict())
            assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_normalize():
    normalize, x = Normalize([0.5, 0.25, 0], [0.5, 0.25, 2]), torch.rand(2, 3, 4, 5)
    expected = torch.stack([(x[:, 0] - 0.5) / 0.5, (x[:, 1] - 0.25) / 0.25, x[:, 2] / 2], 1)
    torch.testing.assert_close(normalize(x), expected)
    assert list(create("mnist-b", mean=[0.5] * 3, std=[0.5] * 3).state_dict())[:2] == ["normalize.mean", "normalize.std"]

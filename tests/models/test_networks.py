"""Every name makes its model or says why not; the networks have the sizes of the papers and the layout of public checkpoints."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels
from spat_train.models.checkpoints import load_model
from spat_train.models.networks import FAMILIES
from spat_train.models.networks.small import MnistCNN
from spat_train.models.networks.wide_resnet import WideResNet
from spat_train.models.registry import NAMES, create
from spat_train.models.wrapping import ACTIVATIONS, normalisation
from tests.input_gradient.models import torchvision
from tests.models.helpers import CIFAR, X, build, logits_shape, network, saved

# without sub_block1, reference.md; the ResNets: public CIFAR code, PreActResNet with its last BatchNorm
PARAMETERS = {"wrn-34-10": 46_160_474, "wrn-28-10": 36_479_194, "preactresnet-18": 11_172_170, "resnet-18": 11_173_962}
PARAMETERS |= {"resnet-50": 23_520_842}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes(name):
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_wide_resnet():
    """In the public layout, with its initialisation and dropout in training."""
    torch.manual_seed(0)
    model, x = WideResNet(16, 4, dropout=0.5), torch.rand(2, 3, 32, 32)
    state = model.state_dict()
    shapes = {
        "conv1.weight": (16, 3, 3, 3), "block1.layer.0.bn1.running_mean": (16,), "block1.layer.0.conv1.weight": (64, 16, 3, 3),
        "block1.layer.0.convShortcut.weight": (64, 16, 1, 1), "block2.layer.1.bn2.weight": (128,),
        "block3.layer.1.conv2.weight": (256, 256, 3, 3), "bn1.bias": (256,), "fc.weight": (10, 256),
    }  # fmt: skip
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert "block1.layer.1.convShortcut.weight" not in state
    assert not any("sub_block" in name for name in state)
    assert state["block3.layer.0.conv2.weight"].std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert not model.fc.bias.any()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", [*NAMES, "timm:resnet18", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (3, 96, 96), (4, 32, 64)])
def test_image_shapes(name, image_shape):
    if name.startswith("convnext") and image_shape == (1, 28, 28):
        image_shape = (1, 29, 29)  # the least
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


@pytest.mark.parametrize(
    ("name", "side", "kernel", "stride", "pooled"),
    [
        *(("resnet-50", side, 3, 1, False) for side in (32, 96, 127)), *(("resnet-50", side, 7, 2, True) for side in (128, 224)),
        ("resnet-18/cifar", 128, 3, 1, False), ("resnet-18/stl10", 96, 3, 1, True), ("resnet-18/imagenet", 96, 7, 2, True),
    ],
)  # fmt: skip
def test_stems(name, side, kernel, stride, pooled):
    with torch.device("meta"):
        model = build(name, 10, (1, side, side))
    assert model.conv1.weight.shape == (64, 1, kernel, kernel)
    assert model.conv1.stride == (stride, stride)
    assert isinstance(model.maxpool, nn.Identity) != pooled


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize(
    ("name", "activation"),
    [
        *((name, "relu") for name in ("wrn-10-1", "preactresnet-18/raw", "resnet-18", "resnet-18/stl10", "resnet-50/imagenet")),
        *((name, "relu") for name in ("mnist-cnn", "mnist-b", "mnist-trades", "small-cnn", "timm:resnet18")),
        *((name, "relu") for name in ("dm-wrn-10-1", "dm-wrn-10-1/relu", "dm-preactresnet-18", "preactresnet-18/raw-no-bn")),
        *(("preactresnet-18", activation) for activation in ACTIVATIONS),
    ],
)
def test_takes_the_plan_and_every_parameter_gets_a_gradient(name, activation, image_shape):
    model, x = build(name, 10, image_shape, activation=activation), torch.rand(2, *image_shape)
    explanation = spat_kernels.explain(model, x)
    assert explanation.path == "plan", explanation.reason
    model(x).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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


# ---- names


@pytest.mark.parametrize("name", ["wrn-34", "wrn-34-0", "resnet-19", "resnet-18/big", "preactresnet-18/cifar", ""])
def test_unknown_names(name):
    others = "timm:NAME, torchvision:NAME, robustbench:NAME or package.module:factory"
    with pytest.raises(ValueError, match=f"name='{name}'.*give .*, {others}$") as caught:
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
        ({"name": "convnext-t-convstem", "image_shape": (3, 28, 32)}, "convnext-t-convstem needs images of at least 29x29"),
        ({"name": "convnext-t-convstm"}, "did you mean [^?]*convnext-t-convstem"),
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
        ("timm:resnet81", "no such model: did you mean resnet18"),
        ("timm:hf-hub:timm/resnet18", "timm"),
        ("timm:resnet18.no_such_tag", "timm"),
        ("timm:", "timm"),
    ],
)
def test_others_that_do_not_fit(own_module, name, message):
    own_module("WIDTH = 3", "def net(num_classes): return nn.Linear(3, num_classes)", "def bare(): return nn.Linear(3, 3)",
               "def deep(depth, num_classes): pass", "def text(num_classes): return 'net'",
               "def kind(num_classes): return nn.Linear")  # fmt: skip
    before = list(sys.path)
    with pytest.raises(ValueError, match=message) as caught:
        build(name)
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


def test_weights_of_timms_hub(tmp_path):
    """model.safetensors there has the names of timm's state dict."""
    torch_files, theirs = pytest.importorskip("safetensors.torch"), network("timm:resnet18")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "num_classes": 10}')
    torch_files.save_file(theirs.model.state_dict(), tmp_path / "model.safetensors")
    model, config = load_model(tmp_path / "model.safetensors", CIFAR, "timm:resnet18")
    assert config is None
    assert normalisation(model) == "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    torch.testing.assert_close(model(X), theirs(X))


# ---- torchvision's


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("resnet18", [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]),
        ("efficientnet_v2_l", [[0.5] * 3, [0.5] * 3]),
        ("vit_b_32", [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]),
    ],
)
def test_torchvision(name, numbers):
    models = torchvision().models
    with torch.device("meta"):
        theirs = models.get_model(name, num_classes=7, **({"image_size": 32} if name.startswith("vit") else {}))
        model = create(f"torchvision:{name}", 7)
        assert model.model.state_dict().keys() == theirs.state_dict().keys()
        assert model.eval()(torch.empty(2, 3, 32, 32)).shape == (2, 7)
    (preset,) = {(tuple(w.transforms().mean), tuple(w.transforms().std)) for w in models.get_model_weights(name)}
    assert [list(values) for values in preset] == numbers
    if name == "resnet18":
        model = create("torchvision:resnet18", 7)
        assert normalisation(model) == "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
        other = create("torchvision:resnet18", 7, mean=[0.25] * 3, std=[0.5] * 3, activation="silu")
        assert normalisation(other) == "mean 0.25 0.25 0.25, std 0.5 0.5 0.5"
        assert nn.ReLU not in {type(m) for m in other.modules()}


def test_weights_of_torchvision(tmp_path):
    theirs = network("torchvision:resnet18", num_classes=10)
    path = saved(tmp_path, theirs.model.state_dict())
    model, _ = load_model(path, CIFAR, "torchvision:resnet18")
    torch.testing.assert_close(model(X), theirs(X))
    other, _ = load_model(path, CIFAR, "resnet-18/imagenet", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    torch.testing.assert_close(other(X), theirs(X))


@pytest.mark.parametrize(
    ("name", "image_shape", "message"),
    [
        ("resnet81", (3, 32, 32), "torchvision has no such model: did you mean resnet18"),
        ("", (3, 32, 32), "torchvision has no such model: see torchvision.models"),
        ("fasterrcnn_resnet50_fpn", (3, 32, 32), "no such model"),
        ("resnet18", (1, 28, 28), r"it is for 3 channels, image_shape=.1, 28, 28.: give timm:NAME"),
        ("googlenet", (3, 32, 32), "reads? images that it normalises again: give package.module:factory"),
        ("inception_v3", (3, 32, 32), "returns several logits in training"),
        ("vit_b_16", (3, 32, 64), "torchvision cannot make it .*its images are square.: give another"),
        ("vit_b_16", (3, 40, 40), "torchvision cannot make it for num_classes=10, image_shape=.3, 40, 40."),
    ],
)
def test_torchvision_models_that_do_not_fit(name, image_shape, message):
    torchvision()
    with pytest.raises(ValueError, match=message) as caught:
        create(f"torchvision:{name}", 10, image_shape)
    assert str(caught.value).startswith(f"name='torchvision:{name}'")


@pytest.mark.parametrize(
    ("name", "package"), [("timm:resnet18", "timm"), ("resnet-18", "torchvision"), ("torchvision:resnet18", "torchvision")]
)
def test_missing_package(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"name='{name}': it needs {package}.*pip install {package}"):
        create(name)

"""Each public layout fills a model with its very weights, or the model stays as it was and the message says why."""

import argparse
import pathlib
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from spat_train.errors import InputError
from spat_train.evaluation.record_log import weights_hash
from spat_train.models import create
from spat_train.models.checkpoints import load_checkpoint, load_model
from spat_train.models.matching import prefixes
from spat_train.models.networks.preact_resnet import PreActResNet18
from spat_train.models.networks.wide_resnet import WideResNet
from spat_train.models.weight_files import read_weights
from spat_train.models.wrapping import normalisation
from tests.models.helpers import CIFAR, MEAN, STD, X, network, normalized, numbers, own, prefixed, refusal, same, saved


def other() -> dict:
    """Weights that must not be taken."""
    return network(seed=9).state_dict()


def kuangliu(state: dict) -> dict:
    return {name.replace("downsample", "shortcut").replace("fc.", "linear."): value for name, value in state.items()}


def robustness(state: dict) -> dict:
    ours = numbers("module.normalizer.new_mean", "module.normalizer.new_std", (3, 1, 1))
    attackers = numbers("module.attacker.normalize.new_mean", "module.attacker.normalize.new_std", (3, 1, 1))
    content = ours | prefixed("module.model.", state) | attackers | prefixed("module.attacker.model.", state)
    return {"model": content, "epoch": 3, "nat_prec1": torch.tensor(95.0)}


# ---- layouts that are read

LAYOUTS = {  # without numbers of a normalisation
    "bare": lambda s: s,
    "ordered": lambda s: OrderedDict(s),
    "ours": lambda s: {"format": "spat_train", "config": {"model": "wrn-10-1"}, "model": s, "ema": None, "epoch": 3},
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "model_state_dict": lambda s: {"model_state_dict": s, "model": "wrn-10-1"},
    "net": lambda s: {"net": s, "acc": 0.5},
    "RST": lambda s: {"num_classes": 10, "state_dict": prefixed("module.", s), "normalize_input": False},
    "nested twice": lambda s: {"model": {"state_dict": s, "epoch": 1}},
    "DataParallel": lambda s: prefixed("module.", s),
    "DataParallel twice": lambda s: prefixed("module.module.", s),
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "compiled, parallel, wrapped": lambda s: prefixed("module._orig_mod.model.", s),
    "sub_block1": lambda s: prefixed("module.", s | {"sub_block1.layer.0.bn1.weight": torch.ones(16)}),
    "command line": lambda s: {"args": argparse.Namespace(lr=0.1), "state_dict": s},
    "net., backbone., 0.": lambda s: prefixed("net.backbone.0.", s),
    "as in the Sequential of another": lambda s: prefixed("module.1.", s),
    "one unusual entry": lambda s: {"epoch": 3, "robust_classifier": s, "metrics": {"history": [1.0, 2.0]}},
    "Lightning": lambda s: {"state_dict": prefixed("model.", s), "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{}]},
    "NumPy's beside": lambda s: {"net": s, "acc": np.float64(95.3), "best": np.int64(3), "losses": np.ones(3)},
    "a path beside": lambda s: {"net": s, "file": pathlib.Path("x")},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(3)} | prefixed("module.", s),
    "swa_model": lambda s: {"swa_model": {"n_averaged": torch.tensor(3)} | prefixed("module.", s), "model": other()},
    "ema.module": lambda s: {"state_dict": other(), "ema": {"module": s, "decay": 0.999}},
    "ema.shadow": lambda s: {"state_dict": other(), "model_ema": {"shadow": s, "decay": 0.999}},
    "ema.state_dict": lambda s: {"model": other(), "ema": {"state_dict": s}},
    "ema in a Trainer's dict": lambda s: {"checkpoint": {"model": other(), "ema": s}},
    "a decay called ema": lambda s: {"model": s, "ema": 0.999},
    "settings called ema": lambda s: {"model": s, "args": {"ema": {"decay": torch.tensor(0.999), "every": 1}}},
    "three dicts deep": lambda s: {"run": {"trainer": {"model": s}}},
    "numbers of the average": lambda s: {"net": s, "config": {"ema_decay": np.float64(0.9)}, "ema_losses": torch.ones(5)},
    "metrics as tensors": lambda s: {"classifier": s, "metrics": {"acc": torch.tensor(95.0)}},
    "counts as floats": lambda s: {n: v.float() if n.endswith("num_batches_tracked") else v for n, v in s.items()},
    "another's format and config": lambda s: {"format": "v1", "config": {"model": {"depth": 10}}, "model": s},
    "another's settings": lambda s: {"format": "v1", "config": {"lr": 0.1}, "model": s},
}
NORMALISED = {
    "RobustBench, mu": lambda s: numbers("mu", "sigma") | s,
    "RobustBench, mean": lambda s: numbers("mean", "std") | s,
    "RobustBench, normalize": lambda s: numbers("normalize.mean", "normalize.std") | prefixed("model.", s),
    "ours, DataParallel": lambda s: prefixed("module.", numbers("normalize.mean", "normalize.std", (3, 1, 1))
                                             | prefixed("model.", s)),
    "robustness": robustness,
    "RST": lambda s: {"num_classes": 10, "normalize_input": True,
                      "state_dict": numbers("module.0.mean", "module.0.std") | prefixed("module.1.", s)},
}  # fmt: skip
NORMALIZERS = {
    "plain Sequential": normalized,
    "OrderedDict": lambda net: nn.Sequential(OrderedDict(normalize=normalized(net)[0], model=net)),
    "OrderedDict of other names": lambda net: nn.Sequential(OrderedDict(norm=normalized(net)[0], backbone=net)),
    "DataParallel": lambda net: nn.DataParallel(normalized(net)),
    "compiled": lambda net: torch.compile(normalized(net)),
}


@pytest.mark.parametrize(("wrap", "old_format"), [(None, False), (None, True), *((wrap, False) for wrap in NORMALIZERS)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_layouts(tmp_path, layout, wrap, old_format):
    """They leave the normalisation of the model alone."""
    state, inner = network().state_dict(), network(seed=2)
    model = NORMALIZERS[wrap](inner) if wrap else inner
    path = saved(tmp_path, LAYOUTS[layout](state), _use_new_zipfile_serialization=not old_format)
    load_checkpoint(model, path)
    assert same(inner.cpu(), state)  # nn.DataParallel moves it to the GPU, where there is one
    assert normalisation(model) == ("mean 0.5 0.5 0.5, std 0.5 0.5 0.5" if wrap else "")
    read = [value for name, value in read_weights(path).items() if name != "n_averaged"]
    assert [value.tolist() for value in read][: len(state)] == [value.tolist() for value in state.values()]


@pytest.mark.parametrize("wrap", NORMALIZERS)
@pytest.mark.parametrize("layout", NORMALISED)
def test_normalised_layouts(tmp_path, layout, wrap):
    """The remedy in the error works, however it is followed."""
    theirs, inner = network(), network(seed=2)
    path = saved(tmp_path, NORMALISED[layout](theirs.state_dict()))
    assert "put a spat_train.models.Normalize" in refusal(network(seed=2), path)
    model = NORMALIZERS[wrap](inner)
    load_checkpoint(model, path)
    assert same(inner.cpu(), theirs.state_dict())
    assert normalisation(model) == "mean 0.49 0.48 0.45, std 0.25 0.24 0.26"
    opened, _ = load_model(path, CIFAR, "wrn-10-1")
    expected = theirs((X - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    torch.testing.assert_close(opened(X), expected)


@pytest.mark.parametrize("layout", [kuangliu, lambda s: robustness(kuangliu(s))], ids=["kuangliu, MART", "robustness"])
def test_resnets(tmp_path, layout):
    theirs = network("resnet-18")
    model, _ = load_model(saved(tmp_path, layout(theirs.state_dict())), CIFAR, "resnet-18")
    inner = model.model if isinstance(model, nn.Sequential) else model
    assert torch.equal(inner(X), theirs(X))


def test_thousands_of_names_that_end_alike():
    names, start = [f"layers.{i}.weight" for i in range(4000)], time.perf_counter()
    assert prefixes([f"module.{name}" for name in names], names) == ("module.", "")
    assert time.perf_counter() - start < 10


def test_model_keeps_its_own(tmp_path):
    """dtype, device, mode, requires_grad, and the very tensors."""
    state, model = network().state_dict(), network(seed=2).half().eval()
    model.conv1.requires_grad_(False)
    before = dict(model.named_parameters())
    load_checkpoint(model, saved(tmp_path, state))
    assert same(model, {name: v.half() if v.is_floating_point() else v for name, v in state.items()})
    assert all(p is before[name] for name, p in model.named_parameters())
    assert not model.training
    assert not model.conv1.weight.requires_grad
    assert model.fc.weight.requires_grad


def test_batches_tracked_may_be_missing(tmp_path):
    state, model = network().state_dict(), network(seed=2)
    tracked = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    load_checkpoint(model, saved(tmp_path, {name: value for name, value in state.items() if name not in tracked}))
    assert same(model, state | tracked)


# ---- what does not fit


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ({"num_classes": 100}, {}, ["shape: fc.weight [100, 64] (the model has [10, 64]), fc.bias [100]", "num_classes=100"]),
        ({"name": "wrn-10-3"}, {"name": "wrn-10-2"},
         ["shape: block1.layer.0.conv1.weight [48, 16, 3, 3] (the model has [32, 16, 3, 3]), ", "another width:"]),
        ({"name": "wrn-16-1"}, {}, ["unexpected: module.block1.layer.1.bn1.weight, ", "and 28 more", "another depth:"]),
        ({}, {"name": "wrn-16-1"}, ["missing: block1.layer.1.bn1.weight, ", "and 22 more", "another depth:"]),
        ({"name": "wrn-16-2"}, {}, ["unexpected: ", "of another shape: ", "another depth or width"]),
        ({"name": "wrn-16-1"}, {"mean": [0.5] * 3, "std": [0.5] * 3}, ["another depth:"]),
        ({"name": "preactresnet-18"}, {},
         ["missing: conv1.weight, block1.", "unexpected: module.conv1.weight, module.layer1.", "another architecture"]),
        ({"name": "mnist-cnn", "image_shape": (1, 28, 28)}, {"name": "mnist-cnn", "image_shape": (1, 32, 32)},
         ["images of another shape"]),
    ],
    ids=str,
)  # fmt: skip
def test_another_network(tmp_path, theirs, ours, expected):
    message = refusal(network(seed=2, **ours), saved(tmp_path, prefixed("module.", network(**theirs).state_dict())))
    assert all(part in message for part in expected), message
    assert message.count(",") < 60


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {n.replace("fc.bias", "fc.scale"): s[n] for n in s}, "missing: fc.bias; unexpected: fc.scale: "),
        (lambda s: s | {"module.fc.bias": torch.zeros(10)}, "unexpected: module.fc.bias: "),
        (NORMALISED["RobustBench, normalize"], "unexpected: normalize.mean, normalize.std: the file's network normalises"),
        (lambda s: {"num_classes": 10, "state_dict": s, "normalize_input": True}, "normalize_input"),  # as RST's say it
        (lambda s: {"init_conv.weight": s["conv1.weight"], "logits.weight": s["fc.weight"]}, "create dm-wrn-DEPTH-WIDTH"),
        (lambda s: s | {"fc.weight": s["fc.weight"].to_sparse()}, "no such numbers: fc.weight (sparse_coo)"),
        (lambda s: s | {"fc.weight": s["fc.weight"].to("meta")}, "fc.weight (meta)"),
        (lambda s: s | {"fc.weight": s["fc.weight"].to(torch.complex64)}, "fc.weight (complex64, the model has float32)"),
        (lambda s: s | {"fc.weight": s["fc.weight"].to(torch.int8)}, "fc.weight (int8, the model has float32)"),
        (lambda s: s | {"fc.weight": torch.quantize_per_tensor(s["fc.weight"], 0.1, 0, torch.qint8)}, "fc.weight (quantized)"),
    ],
)
def test_other_weights(tmp_path, content, message):
    assert message in refusal(network(seed=2), saved(tmp_path, content(network().state_dict())))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": torch.zeros(1, 1, 1, 1), "std": torch.ones(1, 1, 1, 1)}, "of another shape: normalize.mean [1, 1, 1, 1]"),
        ({"mean": torch.zeros(3)}, "missing: normalize.std: the file has a mean without its std, or the reverse: save both"),
        ({"std": torch.ones(3)}, "missing: normalize.mean: the file has a mean without its std, or the reverse"),
        ({"mean": torch.full((3,), 125.3), "std": torch.full((3,), 63.0)},
         "its normalisation (mean 125.3 125.3 125.3, std 63 63 63) is none"),
        ({"mean": torch.zeros(3), "std": torch.zeros(3)}, "its normalisation (mean 0 0 0, std 0 0 0) is none"),
        ({"mean": torch.zeros(3), "std": torch.full((3,), -0.2)}, "std -0.2 -0.2 -0.2) is none: save it with positive std"),
        (numbers("mu", "sigma") | {"n.mean": torch.zeros(3), "n.std": torch.ones(3)},
         "unexpected: normalize.mu, normalize.sigma, normalize.n.mean, normalize.n.std"),
    ],
)  # fmt: skip
def test_refused_normalisations(tmp_path, given, message):
    path = saved(tmp_path, prefixed("normalize.", given) | prefixed("model.", network().state_dict()))
    assert message in refusal(NORMALIZERS["OrderedDict"](network(seed=2)), path)


def test_models_that_cannot_be_filled(tmp_path):
    path = saved(tmp_path, network().state_dict())
    expanded = network(seed=2)
    expanded.fc.weight = nn.Parameter(torch.zeros(10, 1).expand(10, 64))
    assert "fixed in the model: fc.weight (expanded)" in refusal(expanded, path)
    with torch.device("meta"):
        empty = create("wrn-10-1")
    assert "fixed in the model: conv1.weight (meta)" in refusal(empty, path)
    theirs = nn.Module()  # a normaliser of another class
    theirs.register_buffer("mean", torch.zeros(3))
    assert "use a spat_train.models.Normalize" in refusal(nn.Sequential(theirs, network(seed=2)), path)
    with pytest.raises(InputError, match="lazy layers"):
        load_checkpoint(nn.LazyLinear(3), path)
    with torch.inference_mode():
        frozen = create("wrn-10-1").eval()
    load_checkpoint(frozen, path)  # by the same way
    with torch.inference_mode():
        assert torch.equal(frozen(X), network()(X))


# ---- one layout, two functions


def test_shortcuts_of_preact_resnets(tmp_path):
    """fast_adversarial's read x, robust_overfitting's relu(bn1(x)), and their files have the same names and shapes."""
    raw = network("preactresnet-18/raw")
    path, x = saved(tmp_path, raw.state_dict()), X[:1]
    block, features = raw.layer2[0], torch.rand(1, 64, 8, 8)
    out = block.bn1(features).relu()
    expected = block.conv2(block.bn2(block.conv1(out)).relu()) + block.shortcut(features)
    torch.testing.assert_close(block(features), expected)
    for model in (create("preactresnet-18"), PreActResNet18()):
        message = refusal(model, path)
        assert "preactresnet-18/activated" in message
        assert "preactresnet-18/raw" in message
    alike, activated = create("preactresnet-18/raw").eval(), create("preactresnet-18/activated").eval()
    for model in (alike, activated):
        load_checkpoint(model, path)
    assert torch.equal(alike(x), raw(x))
    assert not torch.allclose(activated(x), raw(x), atol=1e-3)
    assert weights_hash(alike) != weights_hash(activated)  # whose evaluations must not be mixed

    path = saved(tmp_path, numbers("mu", "sigma") | raw.state_dict())  # RobustBench's with these are activated
    with pytest.warns(RuntimeWarning, match="taken as activated"):
        model, _ = load_model(path, CIFAR, "preactresnet-18")
    assert weights_hash(model.model) == weights_hash(activated)


@pytest.mark.parametrize(
    ("trained", "loaded", "fits"),
    [
        (("preactresnet-18", "relu"), ("preactresnet-18", "relu"), True),
        (("preactresnet-18", "relu"), ("preactresnet-18/activated", "relu"), True),
        (("preactresnet-18/raw", "relu"), ("preactresnet-18/raw", "relu"), True),
        (("preactresnet-18/raw", "relu"), ("preactresnet-18", "relu"), False),
        (("wrn-10-1", "silu"), ("wrn-10-1", "silu"), True),
        (("wrn-10-1", "silu"), ("wrn-10-1", "relu"), False),
        (("resnet-18/stl10", "relu"), ("resnet-18", "relu"), False),
        (("resnet-18", "relu"), ("resnet-18/cifar", "relu"), True),
        (("timm:resnet18", "silu"), ("timm:resnet18", "relu"), False),
        (("timm:resnet18", "silu"), ("timm:resnet18.a1_in1k", "silu"), True),
        (("robustbench:L2/Rice2020Overfitting", "relu"), ("robustbench:cifar10/L2/Rice2020Overfitting", "relu"), True),
        (("torchvision.models:resnet18", "silu"), ("torchvision.models.resnet:resnet18", "relu"), False),
        (("torchvision.models:resnet18", "silu"), ("torchvision.models.resnet:resnet18", "silu"), True),
        (("preactresnet-18/raw", "relu"), PreActResNet18, "has other 1x1 shortcuts"),
        (("wrn-10-1", "silu"), lambda: WideResNet(10, 1), "has ReLUs"),
        (("wrn-10-1", "relu"), lambda: normalized(network()), "normalises images, with numbers that"),
    ],
)
def test_own_files_know_their_function(tmp_path, trained, loaded, fits):
    model, activation = trained
    path = own(tmp_path, network(model, activation=activation), model=model, activation=activation)
    target = loaded() if callable(loaded) else network(loaded[0], activation=loaded[1], seed=2)
    if fits is True:
        load_checkpoint(target, path)
    else:
        assert f"it is a {model} with {activation}, the model {fits or 'a'}" in refusal(target, path)

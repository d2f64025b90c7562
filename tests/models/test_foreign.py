"""Checkpoints of other code: each public layout is read, to the same function, or refused for the true reason."""

import dataclasses
import json
import pathlib
import random
import sys
import time
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.data.images import Dataset, Images
from spat_train.errors import InputError
from spat_train.evaluation.evaluate import weights_hash
from spat_train.models.checkpoints import _prefixes, load_checkpoint, load_model, normalisation, run_config, with_classes_of
from spat_train.models.registry import Normalize, PreActResNet18, WideResNet, create
from spat_train.papers.runs import Options, Run, Scale, Wanted, completed
from spat_train.runtime.run_folder import FORMAT, RunFolder
from spat_train.training.check import check
from spat_train.training.trainer import train

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
CIFAR = SimpleNamespace(name="cifar10", num_classes=10, image_shape=(3, 32, 32), all_classes=True)


def network(name: str = "wrn-10-1", seed: int = 1, **options) -> nn.Module:
    """In eval mode, with statistics of batch norm that make each layer matter."""
    for package in ("timm", "torchvision"):
        if name.startswith(package) or (package, name[:6]) == ("torchvision", "resnet"):
            pytest.importorskip(package, exc_type=Exception)
    torch.manual_seed(seed)
    model = create(name, **options).eval()
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", "bias")):
            value.normal_(0, 0.3)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 2)
    return model


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def numbers(mean: str, std: str, shape=(1, 3, 1, 1)) -> dict:
    return {mean: torch.tensor(MEAN).view(shape), std: torch.tensor(STD).view(shape)}


def kuangliu(state: dict) -> dict:
    return {name.replace("downsample", "shortcut").replace("fc.", "linear."): value for name, value in state.items()}


def robustness(state: dict) -> dict:
    ours = numbers("module.normalizer.new_mean", "module.normalizer.new_std", (3, 1, 1))
    attackers = numbers("module.attacker.normalize.new_mean", "module.attacker.normalize.new_std", (3, 1, 1))
    content = ours | prefixed("module.model.", state) | attackers | prefixed("module.attacker.model.", state)
    return {"model": content, "epoch": 3, "nat_prec1": torch.tensor(95.0)}


def saved(tmp_path, content, name: str = "weights.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def refusal(model: nn.Module, path, **options) -> str:
    """The one-line message; the model is as before."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_checkpoint(model, path, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if not value.is_meta)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- layouts that are read

PLAIN = {  # without numbers of a normalisation
    "net., backbone., 0.": lambda s: prefixed("net.backbone.0.", s),
    "as in the Sequential of another": lambda s: prefixed("module.1.", s),
    "one unusual entry": lambda s: {"epoch": 3, "robust_classifier": s, "metrics": {"history": [1.0, 2.0]}},
    "Lightning": lambda s: {"state_dict": prefixed("model.", s), "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{}]},
    "NumPy's beside": lambda s: {"net": s, "acc": np.float64(95.3), "best": np.int64(3), "losses": np.ones(3)},
    "a path beside": lambda s: {"net": s, "file": pathlib.Path("x")},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(3)} | prefixed("module.", s),
    "swa_model": lambda s: {"swa_model": PLAIN["AveragedModel"](s), "model": network(seed=9).state_dict()},
    "ema.module": lambda s: {"state_dict": network(seed=9).state_dict(), "ema": {"module": s, "decay": 0.999}},
    "ema.shadow": lambda s: {"state_dict": network(seed=9).state_dict(), "model_ema": {"shadow": s, "decay": 0.999}},
    "ema.state_dict": lambda s: {"model": network(seed=9).state_dict(), "ema": {"state_dict": s}},
    "ema in a Trainer's dict": lambda s: {"checkpoint": {"model": network(seed=9).state_dict(), "ema": s}},
    "a decay called ema": lambda s: {"model": s, "ema": 0.999},
    "settings called ema": lambda s: {"model": s, "args": {"ema": {"decay": torch.tensor(0.999), "every": 1}}},
    "three dicts deep": lambda s: {"run": {"trainer": {"model": s}}},
    "numbers of the average": lambda s: {"net": s, "config": {"ema_decay": np.float64(0.9)}, "ema_losses": torch.ones(5)},
    "metrics as tensors": lambda s: {"classifier": s, "metrics": {"acc": torch.tensor(95.0)}},
    "counts as floats": lambda s: {n: v.float() if n.endswith("num_batches_tracked") else v for n, v in s.items()},
    "another's format and config": lambda s: {"format": "v1", "config": {"model": {"depth": 10}}, "model": s},
    "another's settings": lambda s: {"format": "v1", "config": {"lr": 0.1}, "model": s},
}  # fmt: skip
NORMALISED = {
    "RobustBench, mu": lambda s: numbers("mu", "sigma") | s,
    "RobustBench, mean": lambda s: numbers("mean", "std") | s,
    "RobustBench, normalize": lambda s: numbers("normalize.mean", "normalize.std") | prefixed("model.", s),
    "robustness": robustness,
    "RST": lambda s: {"num_classes": 10, "normalize_input": True,
                      "state_dict": numbers("module.0.mean", "module.0.std") | prefixed("module.1.", s)},
}  # fmt: skip
NORMALIZERS = {
    "plain Sequential": lambda net: nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), net),
    "OrderedDict": lambda net: nn.Sequential(OrderedDict(normalize=Normalize([0.5] * 3, [0.5] * 3), model=net)),
    "OrderedDict of other names": lambda net: nn.Sequential(OrderedDict(norm=Normalize([0.5] * 3, [0.5] * 3), backbone=net)),
    "DataParallel": lambda net: nn.DataParallel(nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), net)),
}
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wrap", [None, *NORMALIZERS])
@pytest.mark.parametrize("layout", PLAIN)
def test_plain_layouts(tmp_path, layout, wrap):
    theirs, inner = network(), network(seed=2)
    model = NORMALIZERS[wrap](inner) if wrap else inner
    load_checkpoint(model, saved(tmp_path, PLAIN[layout](theirs.state_dict())))
    assert torch.equal(inner.cpu()(X), theirs(X))
    assert normalisation(model) == ("mean 0.5 0.5 0.5, std 0.5 0.5 0.5" if wrap else "")


@pytest.mark.parametrize("wrap", NORMALIZERS)
@pytest.mark.parametrize("layout", NORMALISED)
def test_normalised_layouts(tmp_path, layout, wrap):
    """The remedy in the error works, however it is followed."""
    theirs, inner = network(), network(seed=2)
    path = saved(tmp_path, NORMALISED[layout](theirs.state_dict()))
    assert "put a spat_train.models.registry.Normalize" in refusal(network(seed=2), path)
    model = NORMALIZERS[wrap](inner)
    load_checkpoint(model, path)
    assert torch.equal(inner.cpu()(X), theirs(X))
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


def test_the_cnn_of_trades(tmp_path):
    """Names and shapes of its public checkpoint: 312,202 weights."""
    model = network("mnist-trades", image_shape=(1, 28, 28))
    convolutions = {"conv1": (32, 1), "conv2": (32, 32), "conv3": (64, 32), "conv4": (64, 64)}
    shapes = {f"feature_extractor.{name}.weight": (*shape, 3, 3) for name, shape in convolutions.items()}
    shapes |= {f"classifier.{name}.weight": s for name, s in {"fc1": (200, 1024), "fc2": (200, 200), "fc3": (10, 200)}.items()}
    state = model.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items() if name.endswith("weight")} == shapes
    assert sum(t.numel() for t in state.values()) == 312_202
    x = torch.rand(2, 1, 28, 28)
    out = x
    for name, pool in (("conv1", False), ("conv2", True), ("conv3", False), ("conv4", True)):
        out = nn.functional.conv2d(out, *(state[f"feature_extractor.{name}.{kind}"] for kind in ("weight", "bias"))).relu()
        out = nn.functional.max_pool2d(out, 2) if pool else out
    out = out.flatten(1)
    for name in ("fc1", "fc2"):
        out = nn.functional.linear(out, *(state[f"classifier.{name}.{kind}"] for kind in ("weight", "bias"))).relu()
    expected = nn.functional.linear(out, state["classifier.fc3.weight"], state["classifier.fc3.bias"])
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_safetensors(tmp_path, monkeypatch, name):
    torch_files = pytest.importorskip("safetensors.torch")
    theirs, model = network(), network(seed=2)
    torch_files.save_file(theirs.state_dict(), tmp_path / name)
    load_checkpoint(model, tmp_path / name)
    assert torch.equal(model(X), theirs(X))
    (tmp_path / "short.safetensors").write_bytes((tmp_path / name).read_bytes()[:5000])
    assert "cannot be read" in refusal(model, tmp_path / "short.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal(model, tmp_path / name)


# ---- layouts that are refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {"model": s, "ema": {"decay": 0.9, "shadow_params": [*s.values()]}}, "'ema', for averaged weights, has none"),
        (lambda s: {"model": s, "model_ema": [*s.values()]}, "'model_ema', for averaged weights, has none with names"),
        (lambda s: {"student": s, "teacher": s}, "it holds several networks (student, teacher): save the state_dict of one"),
        (lambda s: {"model": s, "ema": (*s.values(),)}, "'ema', for averaged weights, has none with names"),
        (lambda s: {"model": s, "ema": np.ones(3)}, "'ema', for averaged weights, has none with names"),
        (lambda s: {"run": {"model": s, "ema": {"shadow_params": [*s.values()]}}}, "'ema', for averaged weights, has none"),
        (lambda s: {"model": s, "ema.shadow_params": [*s.values()]}, "'ema.shadow_params', for averaged weights, has none"),
        (lambda s: {"model": {"mine": s}, "teacher": s}, "it holds several networks (model.mine, teacher)"),
        (lambda s: {"model": s, "ema_0.999": s, "ema_0.9999": s}, "it holds several networks (ema_0.999, ema_0.9999)"),
        (lambda s: {"ema": s, "swa": s}, "it holds several networks (ema, swa): save the state_dict of one"),
        (lambda s: {"ema": s} | {"net": None}, "it holds no weights"),
        (lambda s: {"init_conv.weight": s["conv1.weight"], "logits.weight": s["fc.weight"]}, "DeepMind's WRN, another function"),
    ],
)  # fmt: skip
def test_refused_layouts(tmp_path, content, message):
    weights = "model" if "no weights" in message else "auto"
    assert message in refusal(network(seed=2), saved(tmp_path, content(network().state_dict())), weights=weights)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), "of another shape: normalize.mean [1, 1, 1, 1]"),
        (torch.zeros(3), None, "missing: normalize.std: the file has a mean without its std, or the reverse: save both"),
        (None, torch.ones(3), "missing: normalize.mean: the file has a mean without its std, or the reverse"),
        (torch.full((3,), 125.3), torch.full((3,), 63.0), "its normalisation (mean 125.3 125.3 125.3, std 63 63 63) is none"),
        (torch.zeros(3), torch.zeros(3), "its normalisation (mean 0 0 0, std 0 0 0) is none"),
        (torch.zeros(3), torch.full((3,), -0.2), "std -0.2 -0.2 -0.2) is none: save it with positive std"),
    ],
)
def test_refused_normalisations(tmp_path, mean, std, message):
    state = {"normalize.mean": mean, "normalize.std": std} | prefixed("model.", network().state_dict())
    path = saved(tmp_path, {name: value for name, value in state.items() if value is not None})
    assert message in refusal(NORMALIZERS["OrderedDict"](network(seed=2)), path)


def test_two_normalisations(tmp_path):
    state = numbers("mu", "sigma") | {"n.mean": torch.zeros(3), "n.std": torch.ones(3)} | network().state_dict()
    assert "unexpected: mu, sigma, n.mean, n.std" in refusal(NORMALIZERS["OrderedDict"](network(seed=2)), saved(tmp_path, state))


def test_normaliser_of_another_class(tmp_path):
    own = nn.Module()
    own.register_buffer("mean", torch.zeros(3))
    model = nn.Sequential(own, network(seed=2))
    assert "use a spat_train.models.registry.Normalize" in refusal(model, saved(tmp_path, network().state_dict()))


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
    same, other = create("preactresnet-18/raw").eval(), create("preactresnet-18/activated").eval()
    for model in (same, other):
        load_checkpoint(model, path)
    assert torch.equal(same(x), raw(x))
    assert not torch.allclose(other(x), raw(x), atol=1e-3)
    assert weights_hash(same) != weights_hash(other)  # whose evaluations must not be mixed

    path = saved(tmp_path, numbers("mu", "sigma") | raw.state_dict())  # RobustBench's with these are activated
    with pytest.warns(RuntimeWarning, match="taken as activated"):
        model, _ = load_model(path, CIFAR, "preactresnet-18")
    assert weights_hash(model.model) == weights_hash(other)


def own(tmp_path, net: nn.Module, file: str = "own.pt", **options):
    content = {"format": FORMAT, "config": Config(**options).to_dict(), "model": net.state_dict(), "ema": None}
    return saved(tmp_path, content, file)


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
        (("torchvision.models:resnet18", "silu"), ("torchvision.models.resnet:resnet18", "relu"), False),
        (("torchvision.models:resnet18", "silu"), ("torchvision.models.resnet:resnet18", "silu"), True),
    ],
)
def test_own_files_know_their_function(tmp_path, trained, loaded, fits):
    model, activation = trained
    path = own(tmp_path, network(model, activation=activation), model=model, activation=activation)
    target = network(loaded[0], activation=loaded[1], seed=2)
    if fits:
        load_checkpoint(target, path)
    else:
        assert f"it is a {model} with {activation}, the model a" in refusal(target, path)


@pytest.mark.parametrize(
    ("trained", "target", "message"),
    [
        ({"model": "preactresnet-18/raw"}, PreActResNet18, "the model has other 1x1 shortcuts"),
        ({"model": "wrn-10-1", "activation": "silu"}, lambda: WideResNet(10, 1), "the model has ReLUs"),
        ({"model": "wrn-10-1"}, lambda: NORMALIZERS["OrderedDict"](network()), "the model normalises images, with numbers that"),
    ],
)
def test_own_files_and_models_that_were_made_elsewhere(tmp_path, trained, target, message):
    path = own(tmp_path, network(trained["model"]), **trained)
    assert message in refusal(target(), path)


@pytest.mark.parametrize(
    ("trained", "given"),
    [
        ("resnet-18", "resnet-18/cifar"),
        ("timm:resnet18", "timm:resnet18.a1_in1k"),
        ("torchvision.models:resnet18", "torchvision.models.resnet:resnet18"),
    ],
)
def test_another_name_for_the_model_of_a_run(tmp_path, trained, given):
    path = own(tmp_path, network(trained, activation="silu"), model=trained, activation="silu")
    model, _ = load_model(path, CIFAR, given)
    kinds = {type(m) for m in model.modules()}
    assert nn.SiLU in kinds
    assert nn.ReLU not in kinds
    with pytest.raises(InputError, match="is a run, whose config says them: leave them out"):
        load_model(path, CIFAR, given, mean=MEAN, std=STD)


@pytest.mark.parametrize("odd", [{"eps": "8"}, {"mean": 0.5}, {"mean": ["0.5"]}, {"activation": "tanh"}, {"epochs": True}])
def test_configs_that_no_run_writes(tmp_path, odd):
    (name, value), *_ = odd.items()
    content = Config(model="wrn-10-1").to_dict() | odd
    path = saved(tmp_path, {"format": FORMAT, "config": content, "model": network().state_dict()})
    (tmp_path / "config.json").write_text(json.dumps(content))
    for where in (tmp_path, path):
        with pytest.raises(InputError, match=f"no run writes such a config .{name}=.*: restore it"):
            run_config(where)
    assert f"no run writes such a config ({name}=" in refusal(network(), path)


# ---- what the file tells about classes, and how it is found


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_classes_of_the_file(tmp_path, suffix):
    """Where test images alone do not tell; a .safetensors file is sorted by name, so that its last tensor is any."""
    pixels, path = torch.zeros(1, 32, 32, 3, dtype=torch.uint8), tmp_path / f"weights{suffix}"
    save = torch.save if suffix == ".pt" else pytest.importorskip("safetensors.torch").save_file
    save({name: value.contiguous() for name, value in network("resnet-18").state_dict().items()}, path)

    def some(classes: int) -> Dataset:
        images = Images(pixels, torch.zeros(1, dtype=torch.int64))
        return Dataset("some", images, images, tuple(map(str, range(classes))), all_classes=False)

    model, _ = load_model(path, some(3), "resnet-18")
    assert with_classes_of(model, some(3)).classes == tuple("0123456789")
    with pytest.raises(InputError, match="looks like 10 classes, the model has 12"):
        load_model(path, some(12), "resnet-18")


def test_thousands_of_names_that_end_alike():
    names, start = [f"layers.{i}.weight" for i in range(4000)], time.perf_counter()
    assert _prefixes([f"module.{name}" for name in names], names) == ("module.", "")
    assert time.perf_counter() - start < 10


def test_errors_without_words(tmp_path, monkeypatch):
    def make(num_classes):
        raise ValueError

    monkeypatch.setitem(sys.modules, "their_code", SimpleNamespace(make=make))
    with pytest.raises(InputError, match="as their_code:make for cifar10 .*: ValueError"):
        load_model(saved(tmp_path, network().state_dict()), CIFAR, "their_code:make")


def test_names_that_are_too_long():
    with pytest.raises(InputError, match="there is no such run or checkpoint"):
        load_model("x" * 300, CIFAR)


# ---- files that are something else


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("arrays.npy", b"1")
    script = torch.jit.script(nn.Linear(2, 2))
    torch.jit.save(script, tmp_path / "script.pt")
    contents = {
        b"\n<!DOCTYPE html><html><title>Virus scan warning</title>": "it is a web page",
        b'<?xml version="1.0"?><Error>AccessDenied</Error>': "it is a web page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n": "it is a Git LFS pointer",
        b"": "it is empty",
        b"PK\x03\x04 cut short": "it is cut short or damaged (a zip without its end, 14 bytes)",
        (tmp_path / "other.zip").read_bytes(): "it is a zip file of other things (arrays.npy)",
        (tmp_path / "script.pt").read_bytes(): "it is a TorchScript archive",
    }
    for content, message in contents.items():
        path.write_bytes(content)
        assert message in refusal(network(), path)


def test_every_flipped_bit_is_found(tmp_path):
    """In the contents of the zip, which torch.load takes as they are; no checksum at all is let through."""
    file = tmp_path / "last.pt"
    content = {"format": FORMAT, "id": "1", "weight": torch.randn(20, 20), "progress": {"epoch": 3}}
    torch.save(content, file)
    whole, generator = file.read_bytes(), random.Random(0)
    with zipfile.ZipFile(file) as parts:
        spans = {i.filename: (whole.index(parts.read(i), i.header_offset), i.file_size) for i in parts.infolist()}
    for start, size in spans.values():
        for _ in range(20):
            flipped = bytearray(whole)
            flipped[start + generator.randrange(size)] ^= 1 << generator.randrange(8)
            file.write_bytes(flipped)
            for read in (lambda: load_checkpoint(nn.Linear(2, 2), file), lambda: RunFolder(tmp_path).open(resume=True)):
                with pytest.raises(InputError, match="damaged|cannot be read|another|other things"):
                    read()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(RunFolder(tmp_path).open(resume=True)["weight"], content["weight"])


# ---- all or none


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to_sparse(), "no such numbers: fc.weight (sparse_coo)"),
        (lambda t: t.to("meta"), "fc.weight (meta)"),
        (lambda t: t.to(torch.complex64), "fc.weight (complex64, the model has float32)"),
        (lambda t: t.to(torch.int8), "fc.weight (int8, the model has float32)"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "fc.weight (quantized)"),
    ],
)
def test_weights_that_cannot_be_copied(tmp_path, change, message):
    state = {name: change(value) if name == "fc.weight" else value for name, value in network().state_dict().items()}
    assert message in refusal(network(seed=2), saved(tmp_path, state))


def test_models_that_cannot_be_written(tmp_path):
    path = saved(tmp_path, network().state_dict())
    expanded = network(seed=2)
    expanded.fc.weight = nn.Parameter(torch.zeros(10, 1).expand(10, 64))
    assert "fixed in the model: fc.weight (expanded)" in refusal(expanded, path)
    with torch.device("meta"):
        empty = create("wrn-10-1")
    assert "fixed in the model: conv1.weight (meta)" in refusal(empty, path)
    with pytest.raises(InputError, match="lazy layers"):
        load_checkpoint(nn.LazyLinear(3), path)
    with torch.inference_mode():
        frozen = create("wrn-10-1").eval()
    load_checkpoint(frozen, path)  # by the same way
    with torch.inference_mode():
        assert torch.equal(frozen(X), network()(X))


# ---- by command


def digits_run(tmp_path, **options) -> Config:
    config = Config(
        model="small-cnn", data="digits", limit=40, epochs=1, steps=1, val_steps=1, batch_size=20, holdout=10, test=False,
        tensorboard=False, device="cpu", out=tmp_path / "run",
    )  # fmt: skip
    return Config(**(vars(config) | options))


def test_fine_tuning_and_normalised_runs(tmp_path):
    theirs = create("small-cnn", 10, (1, 8, 8), mean=[0.3], std=[0.4])
    path = saved(tmp_path, {"net": theirs.state_dict()})
    config = digits_run(tmp_path, init=path, mean=(0.3,), std=(0.4,), lr=1e-12)
    train(config)
    model, found = load_model(tmp_path / "run", load("digits"))
    assert normalisation(model) == "mean 0.3, std 0.4"
    assert found.init == path
    assert found.mean == (0.3,)
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value)
    assert not torch.equal(create("small-cnn", 10, (1, 8, 8)).classifier.weight, theirs.model.classifier.weight)

    with pytest.raises(InputError, match=r"--mean, --std: .* has others: give its own \(mean 0.3, std 0.4\)"):
        train(digits_run(tmp_path, init=path, mean=(0.5,), std=(0.5,), out=tmp_path / "other"))
    path.unlink()
    train(Config(**(vars(config) | {"resume": True})))  # the checkpoint wins
    with pytest.raises(InputError, match="--init: .*weights.pt: there is no such run or checkpoint"):
        train(digits_run(tmp_path, init=path, out=tmp_path / "other"))
    saved(tmp_path, create("small-cnn", 3, (1, 8, 8)).state_dict())
    with pytest.raises(InputError, match="--init: checkpoint .*looks like 3 classes"):
        train(digits_run(tmp_path, init=path, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="--activation, --mean, --std: .* is a run, whose config says them"):
        load_model(tmp_path / "run", load("digits"), mean=[0.3], std=[0.4])


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5] * 3, None, r"mean=\[0.5, 0.5, 0.5\], std=None: give both"),
        ([0.5], [0.5], r"one number a channel \(3\)"),
        ([125.0] * 3, [63.0] * 3, r"for images in \[0, 1\]"),
        ([0.5] * 3, [0.0] * 3, "positive in std"),
    ],
)
def test_normalisations_that_are_none(tmp_path, mean, std, message):
    with pytest.raises(ValueError, match=message):
        create("wrn-10-1", mean=mean, std=std)
    with pytest.raises(InputError, match=message):
        load_model(saved(tmp_path, network().state_dict()), CIFAR, "wrn-10-1", mean=mean, std=std)


def test_options_of_a_foreign_file(tmp_path):
    theirs = network(activation="silu")
    path = saved(tmp_path, theirs.state_dict())
    model, _ = load_model(path, CIFAR, "wrn-10-1", activation="silu", mean=MEAN, std=STD)
    torch.testing.assert_close(model(X), theirs((X - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)))
    assert weights_hash(model.model) != weights_hash(network())
    path = saved(tmp_path, numbers("mu", "sigma") | theirs.state_dict())
    with pytest.raises(InputError, match="--mean, --std: .* holds its own .mean 0.49 0.48 0.45"):
        load_model(path, CIFAR, "wrn-10-1", mean=[0.5] * 3, std=[0.5] * 3)


def test_timm_takes_other_numbers():
    pytest.importorskip("timm", exc_type=Exception)
    model = create("timm:resnet18", mean=MEAN, std=STD)
    assert normalisation(model) == "mean 0.49 0.48 0.45, std 0.25 0.24 0.26"
    assert len(model) == 2
    assert not any(isinstance(m, Normalize) for m in model.model.modules())


# ---- runs: who is to blame, and whose code runs


def a_run(tmp_path, net: nn.Module, **options):
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(Config(**options).to_json())
    own(folder, net, "best.pt", **options)
    return folder


def test_other_data_are_blamed_where_they_are_the_reason(tmp_path):
    run = a_run(tmp_path, network(), model="wrn-10-1", data="cifar10")
    other = SimpleNamespace(name="other", num_classes=7, image_shape=(3, 32, 32), all_classes=True)
    with pytest.raises(InputError, match="these images or classes are others: give other --data"):
        load_model(run, other)
    grey = SimpleNamespace(name="grey", num_classes=10, image_shape=(1, 32, 32), all_classes=True)
    with pytest.raises(InputError, match="give other --data"):
        load_model(run, grey)
    a_run(tmp_path, network(), model="timm:no-such", data="cifar10")
    with pytest.raises(InputError, match="name='timm:no-such'") as caught:
        load_model(run, CIFAR)
    assert "give other --data" not in str(caught.value)
    a_run(tmp_path, network("wrn-16-2"), model="wrn-10-1", data="cifar10")
    with pytest.raises(InputError, match="another depth") as caught:
        load_model(run, CIFAR)
    assert "give other --data" not in str(caught.value)
    (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:5000])
    with pytest.raises(InputError, match="it is cut short") as caught:
        load_model(run, CIFAR)
    assert "give other --data" not in str(caught.value)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """The name of a factory in the current folder that leaves a file behind when it is imported."""
    (tmp_path / "their_code.py").write_text(
        "import pathlib\nfrom torch import nn\npathlib.Path('ran').touch()\n"
        "def make(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "their_code:make"
    sys.modules.pop("their_code", None)


def test_code_that_a_file_names_runs_only_when_repeated(tmp_path, monkeypatch, capsys, code):
    from spat_train import cli
    from spat_train.papers.measure import TestImages, open_model

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    run = a_run(tmp_path, net, model=code, data="digits")
    digits = create("small-cnn", 10, (1, 8, 8))
    mine = own(tmp_path, digits, "mine.pt", model="small-cnn", data="digits")

    def command(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["spat-train", "evaluate", *map(str, arguments), "--attacks", "clean", "--limit", "5"])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        assert exit_info.value.code == 2
        return capsys.readouterr().err

    images = TestImages(load("digits"), torch.arange(5))
    shown = f"it names code, {code}, which would run: if you trust it, give"
    assert f"{shown} --model-name {code}" in command(run)
    assert f"{shown} --model-name {code}" in command(run / "best.pt")
    assert f"{shown} --source-name {code}" in command(mine, "--source", run)
    config = Config(**json.loads((run / "config.json").read_text()) | {"milestones": (75, 90)})
    with pytest.raises(InputError, match=f"{shown} --model {code}"):
        open_model(Run(run, config), images, Options(device="cpu"))
    with pytest.raises(InputError, match=f"{shown} --model {code}"):
        completed(None, Wanted(config, copy_of="A"), Run(run, config), Options(runs=tmp_path, train=True))
    assert not (tmp_path / "ran").exists()

    repeated = Options(device="cpu", scale=Scale(model=code))
    assert torch.equal(open_model(Run(run, config), images, repeated).model[1].weight, net[1].weight)
    assert (tmp_path / "ran").exists()


def test_classes_and_normalisation_of_test_images_alone(tmp_path):
    """The labels do not name all ten classes, and the model has no Normalize of its own."""
    theirs = create("small-cnn", 10, (1, 8, 8)).state_dict()
    path = saved(tmp_path, {"mu": torch.full((1, 1, 1, 1), 0.3), "sigma": torch.full((1, 1, 1, 1), 0.4)} | theirs)
    data = load("digits")
    data = dataclasses.replace(data, classes=("0", "1", "2"), all_classes=False)
    model, _ = load_model(path, data, "small-cnn")
    assert normalisation(model) == "mean 0.3, std 0.4"
    assert with_classes_of(model, data).num_classes == 10


@pytest.mark.parametrize("given", [{"flip": 1}, {"test": 0}, {"epochs": 2.0}])
def test_configs_from_python_are_read_as_they_are_taken(tmp_path, given):
    config = dataclasses.replace(digits_run(tmp_path), **given)
    check(config)
    torch.save({"format": "spat_train 3", "config": config.to_dict()}, tmp_path / "best.pt")
    assert run_config(tmp_path / "best.pt") == config

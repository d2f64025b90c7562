"""Models of runs and foreign files: which architecture, classes and normalisation they have, and whose code runs."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.data.images import Dataset, Images
from spat_train.errors import InputError
from spat_train.evaluation.record_log import weights_hash
from spat_train.models import create
from spat_train.models.checkpoints import load_model, with_classes_of
from spat_train.models.run_config import run_config
from spat_train.models.wrapping import normalisation
from spat_train.runtime import json_files
from spat_train.runtime.run_folder import FORMAT
from spat_train.training.check import check
from spat_train.training.trainer import train
from tests.models.helpers import CIFAR, MEAN, STD, X, network, numbers, own, refusal, saved
from tests.training.helpers import settings


def test_another_name_for_the_model_of_a_run(tmp_path):
    path = own(tmp_path, network("timm:resnet18", activation="silu"), model="timm:resnet18", activation="silu")
    model, _ = load_model(path, CIFAR, "timm:resnet18.a1_in1k")
    kinds = {type(m) for m in model.modules()}
    assert nn.SiLU in kinds
    assert nn.ReLU not in kinds
    with pytest.raises(InputError, match="has a config that says them: leave them out"):
        load_model(path, CIFAR, "timm:resnet18", mean=MEAN, std=STD)


def test_the_network_of_a_run_of_robustbench(tmp_path):
    """Its name says a function, which others with the same weights are not."""
    name = "robustbench:cifar10/L2/Rice2020Overfitting"
    path = own(tmp_path, network(name), model=name)
    for same in (None, "preactresnet-18/activated", "robustbench:L2/Rice2020Overfitting"):
        assert torch.equal(load_model(path, CIFAR, same)[0](X), network(name)(X))
    with pytest.raises(InputError, match=f"the run is a {name}: give that as --model-name .*the model a preactresnet-18/raw"):
        load_model(path, CIFAR, "preactresnet-18/raw")
    path = own(tmp_path, network("timm:resnet18"), model="timm:resnet18")
    with pytest.raises(InputError, match="the run is a timm:resnet18: give that"):
        load_model(path, CIFAR, "torchvision:resnet18")


class Partly(nn.Module):
    """A ReLU that `activation` replaces, and functions, which it cannot."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.head, self.relu = nn.Linear(3072, num_classes), nn.ReLU()

    def forward(self, x):
        return nn.functional.relu(self.head(self.relu(x.flatten(1)))) + torch.relu(x.sum()) + x.sum().relu_()


def test_an_activation_that_replaces_some_relus_alone(tmp_path):
    name = "tests.models.test_load_model:Partly"
    path = saved(tmp_path, Partly().state_dict())
    with pytest.raises(InputError, match="activation='silu': 3 of its ReLUs are functions, which stay: give 'relu'"):
        load_model(path, CIFAR, name, activation="silu")
    load_model(path, CIFAR, name)
    with pytest.raises(InputError, match="activation='silu': .* of its ReLUs are functions"):
        train(settings(model="tests.models.test_load_model:partly_on_digits", activation="silu"), save=False)


def partly_on_digits(num_classes: int) -> nn.Module:
    model = Partly(num_classes)
    model.head = nn.Linear(64, num_classes)
    return model


@pytest.mark.parametrize(
    "odd",
    [
        {"eps": "8"}, {"eps": float("nan")}, {"epochs": 10**30}, {"lr": float("inf")}, {"model_": 1, "data": 7}, {"init": [[]]},
        {"activation": ["relu"]}, {"mean": 0.5}, {"mean": ["0.5"]}, {"activation": "tanh"}, {"epochs": True},
    ],
)  # fmt: skip
def test_odd_configs(tmp_path, odd):
    *_, (name, value) = odd.items()
    content = Config(model="wrn-10-1").to_dict() | odd
    path = saved(tmp_path, {"format": FORMAT, "config": content, "model": network().state_dict()})
    (tmp_path / "config.json").write_text(json.dumps(content))
    for where in (tmp_path, path):
        with pytest.raises(InputError, match=f"no run writes such a config .{name}=.*: restore it"):
            run_config(where)
    assert f"no run writes such a config ({name}=" in refusal(network(), path)
    for given in ({"flip": 1}, {"test": 0}, {"epochs": 2.0}):  # as Python takes them
        config = settings(tmp_path / "run", **given)
        check(config)
        assert run_config(saved(tmp_path, {"format": FORMAT, "config": config.to_dict()})) == config


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("name", "beside"), [("resnet-18", {}), ("wrn-10-1", numbers("mu", "sigma"))])
def test_classes_of_the_file(tmp_path, name, beside, suffix):
    """Where test images alone do not show how many; a .safetensors file is sorted by name, so that its last tensor is any."""
    path = tmp_path / f"weights{suffix}"
    save = torch.save if suffix == ".pt" else pytest.importorskip("safetensors.torch").save_file
    save({name: value.contiguous() for name, value in (beside | network(name).state_dict()).items()}, path)
    images = Images(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    few, many = (Dataset("some", images, images, tuple(map(str, range(k))), all_classes=False) for k in (3, 12))
    model, _ = load_model(path, few, name)
    assert with_classes_of(model, few).classes == tuple("0123456789")
    assert normalisation(model) == ("mean 0.49 0.48 0.45, std 0.25 0.24 0.26" if beside else "")
    with pytest.raises(InputError, match="looks like 10 classes, the model has 12"):
        load_model(path, many, name)


def test_weights_that_are_nan(tmp_path):
    state = network().state_dict()
    state["conv1.weight"].view(-1)[3] = torch.nan
    path, model = (
        saved(tmp_path, {"format": FORMAT, "config": Config(model="wrn-10-1").to_dict(), "model": state}),
        network(seed=2),
    )
    assert "it has weights that are NaN (conv1.weight): take those of an earlier one" in refusal(model, path)
    with pytest.raises(InputError, match="weights that are NaN"):
        load_model(path, CIFAR)


def test_a_network_far_larger_than_its_file(tmp_path):
    """Memory for it is not taken: this one would need 60 TB."""
    content = {"format": FORMAT, "config": Config(model="wrn-994-999").to_dict(), "model": network().state_dict()}
    with pytest.raises(InputError, match="as wrn-994-999 for .*: it has [0-9,]+ weights, the file 78,337: give the network that"):
        load_model(saved(tmp_path, content), CIFAR)


def test_errors_of_others(tmp_path, monkeypatch):
    def make(num_classes):
        raise ValueError

    monkeypatch.setitem(sys.modules, "their_code", SimpleNamespace(make=make))
    with pytest.raises(InputError, match="as their_code:make for cifar10 .*: ValueError"):  # it has no message
        load_model(saved(tmp_path, network().state_dict()), CIFAR, "their_code:make")
    with pytest.raises(InputError, match="there is no such run or checkpoint"):
        load_model("x" * 300, CIFAR)


# ---- by command


def digits_run(folder, **options) -> Config:
    return settings(folder, model="small-cnn", epochs=1, val_steps=1, **options)


def test_fine_tuning_and_normalised_runs(tmp_path):
    theirs = create("small-cnn", 10, (1, 8, 8), mean=[0.3], std=[0.4])
    path = saved(tmp_path, {"net": theirs.state_dict()})
    config = digits_run(tmp_path / "run", init=path, mean=(0.3,), std=(0.4,), lr=1e-12)
    train(config)
    model, found = load_model(tmp_path / "run", load("digits"))
    assert normalisation(model) == "mean 0.3, std 0.4"
    assert found.init == path
    assert found.mean == (0.3,)
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value)
    assert not torch.equal(create("small-cnn", 10, (1, 8, 8)).classifier.weight, theirs.model.classifier.weight)

    with pytest.raises(InputError, match=r"--mean, --std: .* has others: give its own \(mean 0.3, std 0.4\)"):
        train(digits_run(tmp_path / "other", init=path, mean=(0.5,), std=(0.5,)))
    path.unlink()
    train(Config(**(vars(config) | {"resume": True})))  # the checkpoint wins
    with pytest.raises(InputError, match="--init: .*weights.pt: there is no such run or checkpoint"):
        train(digits_run(tmp_path / "other", init=path))
    saved(tmp_path, create("small-cnn", 3, (1, 8, 8)).state_dict())
    with pytest.raises(InputError, match="--init: checkpoint .*looks like 3 classes"):
        train(digits_run(tmp_path / "other", init=path))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5] * 3, None, r"mean=\[0.5, 0.5, 0.5\], std=None: give both"),
        ([0.5], [0.5], r"one number a channel \(3\)"),
        ([125.0] * 3, [63.0] * 3, r"for images in \[0, 1\]"),
        ([0.5] * 3, [0.0] * 3, "positive in std"),
        ([0.5] * 3, [-1.0] * 3, "positive in std"),
        ([0.5] * 3, [0.5] * 2, "positive in std"),
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


# ---- runs: who is to blame, and whose code runs


def a_run(tmp_path, net: nn.Module, **options):
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(json_files.to_bytes(Config(**options).to_dict()))
    own(folder, net, "best.pt", **options)
    return folder


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("wrn-10-1", {"num_classes": 7}, "these images or classes are others: give other --data"),
        ("wrn-10-1", {"image_shape": (1, 32, 32)}, "these images or classes are others: give other --data"),
        ("timm:no-such", {}, "name='timm:no-such'"),
        ("wrn-16-2", {}, "another depth"),
    ],
)
def test_other_data_are_blamed_where_they_are_the_reason(tmp_path, name, data, message):
    run = a_run(tmp_path, network("wrn-10-1"), model=name, data="cifar10")
    with pytest.raises(InputError, match=message) as caught:
        load_model(run, SimpleNamespace(**vars(CIFAR) | data))
    assert ("give other --data" in str(caught.value)) == bool(data)


def test_code_that_a_file_names_runs_only_when_repeated(tmp_path, monkeypatch, capsys):
    """The factory in the current folder leaves a file behind when it is imported."""
    from spat_train import cli
    from spat_train.papers.loaded_run import TestImages, open_model
    from spat_train.papers.options import Options
    from spat_train.papers.runs import Run

    (tmp_path / "their_code.py").write_text(
        "import pathlib\nfrom torch import nn\npathlib.Path('ran').touch()\n"
        "def make(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    code, net = "their_code:make", nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
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
    config = run_config(run)
    with pytest.raises(InputError, match=f"{shown} --model {code}"):
        open_model(Run(run, config), images, Options(device="cpu"))
    assert not (tmp_path / "ran").exists()

    repeated = Options(device="cpu", model=code)
    assert torch.equal(open_model(Run(run, config), images, repeated).model[1].weight, net[1].weight)
    assert (tmp_path / "ran").exists()
    del sys.modules["their_code"]

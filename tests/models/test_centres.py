"""Max-Mahalanobis centres: their geometry, the logits, where they go in a network, and runs that have them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("tyro")

import spat_kernels
import spat_train
from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.data.images import floats
from spat_train.errors import InputError
from spat_train.models import create
from spat_train.models.centres import DIMENSIONS, RADIUS, CentreClassifier, max_mahalanobis
from spat_train.models.checkpoints import load_model
from spat_train.papers.runs import settings as described
from spat_train.training.check import check
from spat_train.training.step import TrainStep
from spat_train.training.trainer import train
from tests.evaluation.helpers import command
from tests.models.helpers import build
from tests.training.helpers import settings


@pytest.mark.parametrize(
    ("classes", "dimensions"), [(2, 1), (2, 256), (3, 2), (5, 7), (10, 9), (10, 64), (10, 256), (100, 256), (257, 256)]
)
def test_centres_are_as_far_apart_as_can_be(classes, dimensions):
    centres = max_mahalanobis(classes, dimensions, 7.0)
    assert (centres.shape, centres.dtype) == ((classes, dimensions), torch.float64)
    gram = torch.full((classes, classes), -49 / (classes - 1), dtype=torch.float64).fill_diagonal_(49.0)
    torch.testing.assert_close(centres @ centres.T, gram, rtol=0, atol=1e-11)
    torch.testing.assert_close(centres.sum(0), torch.zeros(dimensions).double(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("classes", [1, 5])
def test_other_counts_of_classes_are_refused(classes):
    with pytest.raises(ValueError, match=f"classes={classes}: 3 dimensions have room for 2 to 4 centres: give more"):
        CentreClassifier(8, classes, 3)


def test_logits_are_the_negative_squared_distances():
    torch.manual_seed(0)
    head = CentreClassifier(12, 10)
    assert {name: t.shape for name, t in head.state_dict().items()} == {
        "linear.weight": (DIMENSIONS, 12), "linear.bias": (DIMENSIONS,), "centres": (10, DIMENSIONS),
    }  # fmt: skip
    x = torch.randn(6, 12)
    exact = -(head.double().linear(x.double())[:, None] - max_mahalanobis(10, DIMENSIONS)).square().sum(2)
    torch.testing.assert_close(head(x.double()), exact, rtol=0, atol=1e-4)  # its centres are those in fp32
    torch.testing.assert_close(head.float()(x).double(), exact, rtol=0, atol=1e-3)
    assert head.centres.norm(dim=1).sub(RADIUS).abs().max() < 1e-5


def test_small_distances_survive_half_precision():
    """Near a centre, z_y is what is left of numbers near 100, which bf16 knows to 0.25. Features alone are rounded."""
    head = CentreClassifier(DIMENSIONS, 10)
    nn.init.eye_(head.linear.weight)
    near = head.centres + 0.01
    with torch.autocast("cpu", torch.bfloat16):
        z = head(near)
    assert z.dtype == torch.float32
    assert (z.diagonal() <= 1e-3).all()
    assert (z.diagonal() + 0.0256).abs().max() < 0.02


@pytest.mark.parametrize("name", ["wrn-10-1", "dm-wrn-10-1", "mnist-cnn", "small-cnn", "timm:resnet10t", "torchvision:resnet18"])
def test_the_plan_keeps_every_convolution(name):
    """What is left to autograd beside what the network itself leaves: square, sum, and the subtraction of the norms."""
    x = torch.rand(2, 3, 32, 32)
    plain, ours = (spat_kernels.explain(build(name, classifier=c), x) for c in ("linear", "centres"))
    assert ours.path == "plan", ours.reason
    for what in ("convolutions", "folded into convolutions", "mask bytes per image"):
        assert ours.plan[what] == plain.plan[what]
    assert ours.plan["linear layers"] == plain.plan["linear layers"] + 1
    assert ours.plan["left to autograd"] == plain.plan["left to autograd"] + 3
    assert create(name, classifier="centres")(x).shape == (2, 10)


@pytest.mark.parametrize("name", ["wrn-10-1", "small-cnn"])
def test_the_plan_measures_distances_in_fp32(name):
    """In half precision too: logits differ by what the features do."""
    torch.manual_seed(0)
    model, x, y = create(name, classifier="centres").eval(), torch.rand(4, 3, 32, 32), torch.arange(4)
    plan = spat_kernels.explain(model, x, precision="bf16")
    assert (plan.path, plan.dtype) == ("plan", torch.bfloat16)
    results = [spat_kernels.pgd(model, x, y, 4 / 255, loss="mmc", random_start=False, precision=p) for p in ("fp32", "bf16")]
    fp32, bf16 = (-model(x_adv).gather(1, y[:, None]).mean() for x_adv in results)
    start = -model(x).gather(1, y[:, None]).mean()
    assert fp32 > start
    assert bf16 - start > 0.9 * (fp32 - start)


def test_more_classes_than_dimensions_get_more_dimensions():
    with torch.device("meta"):
        model = create("small-cnn", 300, (1, 8, 8), classifier="centres")
    assert model.classifier.centres.shape == (300, 299)


def two_heads(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), nn.ReLU(), nn.Linear(num_classes, num_classes))


def convolution(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, num_classes, 8), nn.Flatten())


def shared(num_classes: int) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    model.register_module("again", None)
    model.again = model[1]
    model.forward = lambda x: model[1](model[0](x))
    return model


def test_where_the_last_layer_is_not_clear():
    for name, count in (("two_heads", 2), ("convolution", 0)):
        with pytest.raises(
            ValueError, match=f"classifier='centres': .*{name} has {count} layers nn.Linear of 10 outputs.*: give"
        ):
            create(f"tests.models.test_centres:{name}", classifier="centres")
    model = create("tests.models.test_centres:shared", classifier="centres")
    assert model[1] is model.again
    assert isinstance(model.again, CentreClassifier)
    with pytest.raises(ValueError, match="classifier nearest: there is none"):
        create("small-cnn", classifier="nearest")
    with pytest.raises(InputError, match="--classifier linear: mmc needs distances to centres: leave it out"):
        check(Config(method="mmc", classifier="linear", device="cpu"))


def test_processes_average_statistics_and_not_what_is_fixed():
    model = create("wrn-10-1", classifier="centres", mean=[0.5] * 3, std=[0.25] * 3)
    names = {id(b): name for name, b in model.named_buffers()}
    averaged = [names[id(b)] for b in TrainStep(Config(method="mmc", device="cpu"), model).statistics]
    assert averaged == [name for name in names.values() if "running" in name]
    assert len(averaged) == len(names) - len(averaged) // 2 - 3  # counters, mean, std and the centres


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """mmc, whose centres are of the method, and madry with the option; and images."""
    folder = tmp_path_factory.mktemp("runs")
    train(settings(folder / "mmc", model="small-cnn", method="mmc", epochs=2, optimizer="adam", lr=2e-3, test=True))
    train(settings(folder / "madry", model="small-cnn", classifier="centres", epochs=1, ema=0.5))
    return folder


def linear_weights(folder) -> Path:
    torch.save(create("small-cnn", 10, (1, 8, 8)).state_dict(), folder / "linear.pt")
    return folder / "linear.pt"


@pytest.mark.parametrize("name", ["mmc", "madry"])
def test_a_run_its_export_and_its_plain_weights_give_the_same_network(runs, tmp_path, name):
    pytest.importorskip("safetensors")
    x, _ = floats(load("digits").test, torch.arange(20), "cpu", torch.contiguous_format)
    model, config = load_model(runs / name, load("digits"))
    assert isinstance(model.classifier, CentreClassifier)
    assert described(config)["classifier"] == "centres"
    out = spat_train.export(runs / name, tmp_path / "out")
    assert torch.equal(spat_train.from_folder(out)(x), model(x))
    assert "| classifier | centres |" in (out / "README.md").read_text()
    plain, _ = load_model(out / "model.pt", load("digits"), "small-cnn", classifier="centres")
    assert torch.equal(plain(x), model(x))
    again = spat_train.export(
        out / "model.pt", tmp_path / "again", dataset=load("digits"), model_name="small-cnn", classifier="centres"
    )
    assert torch.equal(spat_train.from_folder(again)(x), model(x))
    with pytest.raises(InputError, match="the file's model ends in Max-Mahalanobis .*create it with classifier='centres'"):
        load_model(out / "model.pt", load("digits"), "small-cnn")
    with pytest.raises(InputError, match="the model, not the file, ends in Max-Mahalanobis .*create it with classifier='linear'"):
        load_model(linear_weights(tmp_path), load("digits"), "small-cnn", classifier="centres")
    with pytest.raises(InputError, match="has a config that says them: leave them out"):
        load_model(runs / name, load("digits"), classifier="centres")


def test_all_kinds_of_attacks_on_a_run(runs, monkeypatch, tmp_path):
    attacks = "pgd:loss=mmc:steps=5,pgd:loss=mmc:target=random:steps=3,apgd:loss=mmc:steps=3,fgsm,square:queries=3,fab:steps=2"
    how = ("--limit", "20", "--no-alarms", "--device", "cpu", "--out", tmp_path / "out", "--model-name", "small-cnn")
    command(monkeypatch, "evaluate", runs / "mmc", "--attacks", attacks, *how)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(attacks.split(",")) <= found["results"].keys()
    assert "the label's logit" in found["attacks"]["pgd:loss=mmc:steps=5"]["settings"]

"""The table of methods: every method is in it, its numbers are those of the rows, and nothing is trained or timed twice."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import measure, methods, study
from spat_train.config import Config
from spat_train.data.datasets import load_npz
from spat_train.data.pseudo_labels import load_extra
from spat_train.errors import InputError
from spat_train.objectives import METHODS
from spat_train.runtime import logs
from spat_train.training.check import check
from tests.benchmarks.test_study import MACHINE


def arguments(npz, tmp_path, **options) -> methods.Arguments:
    small = {"images": 50, "epochs": 1, "test_images": 6, "autoattack": 2, "seconds": 0.0}
    return methods.Arguments(data=npz, out=tmp_path / "methods.json", runs=tmp_path / "runs", **small | options)


def test_every_method_is_trained(tiny_npz, tmp_path):
    args = arguments(tiny_npz, tmp_path)
    trainings = {row: methods.settings(args, row, seed=3) for row in args.rows}
    assert trainings.keys() == METHODS.keys() | methods.VARIANTS.keys()
    for row, config in trainings.items():
        check(config)
        assert methods.name_of(config.to_dict()) == row
        assert (config.method, config.seed, config.limit) == (row.partition("+")[0], 3, 50)
        assert (config.extra is not None) == METHODS[config.method].needs_extra
    assert len({config.out for config in trainings.values()}) == len(trainings)


class ByBrightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.linspace(0.49, 0.51, 10))

    def forward(self, x):
        return -((x.mean((1, 2, 3))[:, None] - self.at) ** 2)


def test_pseudo_labels_are_the_standard_model_s_of_other_images(tiny_npz, tmp_path, monkeypatch):
    args, trained, model = arguments(tiny_npz, tmp_path), [], ByBrightness()
    monkeypatch.setattr(study, "train", trained.append)
    monkeypatch.setattr(methods, "load_model", lambda folder, data: (model, None))
    data, config = load_npz(tiny_npz), methods.settings(args, "rst", seed=1)
    args.runs.mkdir()
    methods.pseudo_label(args, data, methods.settings(args, "madry", seed=1))
    assert not trained
    methods.pseudo_label(args, data, config)
    assert trained == [methods.settings(args, "standard", seed=1)]
    found = load_extra(config.extra, image_shape=data.image_shape, num_classes=10)
    used = {image.tobytes() for image in data.limited(50, 1).train.pixels.numpy()}
    given = {image.tobytes() for image in found.pixels.numpy()}
    assert len(given) == 50
    assert given <= {image.tobytes() for image in data.train.pixels.numpy()} - used
    assert found.labels.tolist() == model(found.pixels.permute(0, 3, 1, 2) / 255).argmax(1).tolist()


def row(correct: int, *, seed: int = 0, **options) -> dict:
    config = Config(
        **{"model": "small-cnn", "data": "there/mnist.npz", "limit": 2000, "eps": 51.0, "epochs": 15, "seed": seed} | options
    )
    test = {"accuracy": float(correct), "low": correct - 2.5, "high": correct + 1.5, "images": 100, "attack": "autoattack-fast"}
    evaluation = dict.fromkeys((*methods.COLUMNS, "AutoAttack"), test)
    return {"name": "", "config": config.to_dict() | {"batch_size": 50}, "evaluation": evaluation}


def test_table():
    steps = {"madry": {"median": 0.2}, "fgsm": {"median": 0.05}}
    rows = [
        row(30, method="fgsm", steps=2),
        row(60, alpha=0.2),
        row(80),
        row(70, awp=0.005, method="mart"),
        row(75, method="trades"),
    ]
    rows += [row(79, method="trades", seed=1), {**row(1, method="rst"), "evaluation": {}}]
    text = methods.table({"machine": MACHINE, "rows": rows, "steps": steps})
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [line.split(" | ")[0] for line in lines] == ["| Madry", "| TRADES", "| FGSM", "| Madry+SPAT(.2)", "| MART+AWP"]
    assert lines[0] == "| Madry | 1 " + "| 80.0 (77.5 to 81.5) " * 5 + "| 7.20 | 1.00 |"  # 36 steps
    assert lines[1] == "| TRADES | 2 " + "| 77.00 ± 2.83 " * 5 + "|  |  |"
    assert lines[2].endswith("| 1.80 | 0.25 |")
    assert "small-cnn on 2,000 images of mnist, 15 epochs, ε = 0.2. Test images: 100, of autoattack-fast 100." in text
    assert "FGSM alone: steps 2." in text
    assert text.count("alone") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ["mart+spta"]}, "--rows mart.spta: choose from standard, madry"),
        ({"rows": []}, "--rows : choose from"),
        ({"images": 61}, "--images 61: half of the 120 training images are the most"),
        ({"autoattack": 0}, "--autoattack 0: give at least 1"),
        ({"seeds": []}, "--seeds: give at least one"),
        ({"epochs": 0}, "--epochs 0"),
    ],
)
def test_refuses(tiny_npz, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        methods.prepared(arguments(tiny_npz, tmp_path, **options))


@pytest.mark.slow
def test_methods(tiny_npz, tmp_path, monkeypatch, one_thread):
    """Whatever is there is neither trained again nor timed again; a new row is timed in turns with all."""
    args = arguments(tiny_npz, tmp_path, rows=["rst", "fgsm"])
    methods.main(args)
    first = json.loads(args.out.read_text())
    assert [found["config"]["method"] for found in first["rows"]] == ["fgsm", "rst"]
    assert {c: e["images"] for c, e in first["rows"][0]["evaluation"].items()} == dict.fromkeys(methods.COLUMNS, 6) | {
        "AutoAttack": 2
    }
    assert first["steps"].keys() == {"rst", "fgsm"}
    assert all(len(found["seconds"]) >= 3 and np.median(found["seconds"]) == found["median"] for found in first["steps"].values())
    for folder in args.runs.glob("*/"):
        assert logs.read(folder, "start")[0]["steps_per_epoch"] == methods.steps_of_epoch(
            json.loads((folder / "config.json").read_text())
        )
    assert args.out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(args.runs)
    with monkeypatch.context() as patch:
        patch.setattr(study, "train", lambda config: pytest.fail("trained"))
        methods.main(args)
    assert json.loads(args.out.read_text()) == first
    methods.main(arguments(tiny_npz, tmp_path, rows=["standard"]))
    then = json.loads(args.out.read_text())
    assert then["steps"].keys() == {"rst", "fgsm", "standard"}
    assert then["steps"]["fgsm"] != first["steps"]["fgsm"]


@pytest.mark.parametrize(("option", "value"), [("eps", 25.5), ("epochs", 2), ("model", "mnist-cnn")])
def test_a_file_has_trainings_of_one_kind(tiny_npz, tmp_path, option, value):
    """The table takes rows of the same method for repeats from other seeds."""

    def fresh(**options) -> dict:
        about = methods.prepared(arguments(tiny_npz, tmp_path, **options)).about
        return measure.begun("methods", "cpu", **about, rows=[])

    out = tmp_path / "methods.json"
    measure.write(out, fresh())
    assert measure.continued(out, fresh(rows=["madry"]))["rows"] == []
    with pytest.raises(SystemExit, match=f"it holds other results .{option}: .*, now {value}"):
        measure.continued(out, fresh(**{option: value}))

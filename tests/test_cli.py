"""The command: presets are the thesis's settings, options override them, errors are one line, runs end in files and curves."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from spat_train import cli
from spat_train.config import Config
from spat_train.data.loader import Order
from spat_train.presets import PRESETS
from spat_train.runtime import logs
from spat_train.training.check import check
from spat_train.training.optim import learning_rate

SMALL = [
    "--data", "digits", "--model", "small-cnn", "--eps", "51", "--epochs", "2", "--limit", "120", "--batch-size", "32",
    "--lr", "0.05", "--device", "cpu", "--no-tensorboard", "--val-steps", "2", "--preset", "table6.1/mart+spat",
    "--milestones", "None",
]  # fmt: skip


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["spat-train", *map(str, arguments)])
    cli.main()


def error(monkeypatch, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_presets_are_the_settings_of_the_sources():
    """Written out from the thesis and the methods' code, not from the presets."""
    tables = {
        "table6.1/madry": ("madry", 0.0), "table6.1/trades": ("trades", 0.0), "table6.1/mart": ("mart", 0.0),
        "table6.1/trades+spat": ("trades", 0.1), "table6.1/mart+spat": ("mart", 0.3),
        "table6.2/madry": ("madry", 0.0), "table6.2/trades": ("trades", 0.0), "table6.2/mart": ("mart", 0.0),
        "table6.2/trades+spat": ("trades", 0.1), "table6.2/mart+spat": ("mart", 0.2),
        "table6.3/rst": ("rst", 0.0), "table6.3/mart": ("mart", 0.0),
        "table6.3/rst+spat": ("rst", 0.1), "table6.3/mart+spat": ("mart", 0.1),
        "table6.4/trades": ("trades", 0.0), "table6.4/mart": ("mart", 0.0),
        "table6.4/trades+spat": ("trades", 0.1), "table6.4/mart+spat": ("mart", 0.2),
    }  # fmt: skip
    assert {name: (c.method, c.alpha) for name, c in PRESETS.items() if name.startswith("table")} == tables
    forwards = {"trades": "clean-adv-clean", "rst": "adv-clean", "mart": "clean-adv"}
    for name, c in PRESETS.items():
        check(replace(c, extra=Path("500k.pickle")) if name.startswith("table6.3") else c)
        assert c.preset == name
        assert c.forwards == forwards.get(c.method, "clean-adv")
        eps, step_size, steps, start = c.attack_settings
        if name.startswith(("table6.1", "table6.2", "table6.4", "figure")):
            assert c.lr == 0.1
            assert c.momentum == 0.9
            assert c.optimizer == "sgd"
            assert start == "uniform"
            assert steps == 10
            assert step_size == pytest.approx(eps / 4)
            assert c.kl_weight == {"mart": 5, "trades": 6}.get(c.method)
        if name.startswith("table6.1"):
            assert (c.model, c.data, c.weight_decay, c.batch_size, eps) == ("wrn-34-10", "cifar10", 7e-4, 128, 8 / 255)
            assert c.milestones == (75, 90)
            assert c.epochs == 90
        if name.startswith("table6.2"):
            assert (c.model, c.data, c.weight_decay) == ("wrn-34-10", "cifar100", 7e-4 if c.method == "mart" else 2e-4)
            assert (c.epochs, c.milestones, c.batch_size) == (90, (75, 90), 128)  # "same settings except for weight decay"
        if name.startswith("table6.3"):
            assert (c.model, c.batch_size, c.epochs, c.schedule) == ("wrn-28-10", 256, 200, "cosine")
            assert (start, steps, c.holdout, c.extra_fraction) == ("normal", 10, 0, 0.5)
            assert len(Order(torch.arange(50_000), c.batch_size, 0, 500_000, c.extra_fraction).epoch(0)) == 196
            rates = [0.05 * (1 + math.cos((epoch - 1) / 200 * math.pi)) for epoch in range(1, 201)]  # RST's code counts from 1
            assert [learning_rate(c, epoch, 1.0) for epoch in range(200)] == pytest.approx(rates, rel=1e-12)
            assert c.nesterov
            assert c.weight_decay == 5e-4
            assert (eps, step_size) == (pytest.approx(0.031), pytest.approx(0.007))
        if name.startswith("table6.4"):
            assert (c.model, c.data, c.batch_size, c.epochs, c.pad, c.holdout) == ("resnet-18", "stl10", 32, 200, 4, 250)
        if name.startswith("figure"):
            assert c.evaluation_eps == 8
            assert c.milestones == (75, 90)
        if name.startswith("madry-mnist"):
            assert (c.optimizer, c.lr, eps, step_size, steps) == ("adam", 1e-4, 0.3, pytest.approx(0.01), 40)
            assert (c.model, c.batch_size, c.epochs * 59_000 // 50 // 1000, c.weight_decay) == ("mnist-cnn", 50, 100, 0)
        if name.startswith("madry-cifar10"):
            assert (c.model, c.data, eps, c.weight_decay, c.lr) == ("wrn-34-10", "cifar10", 8 / 255, 2e-4, 0.1)
            assert (step_size, steps, c.batch_size, c.bn_mode, c.decay_norm) == (pytest.approx(2 / 255), 7, 128, "train", False)
            updates = math.ceil(49_000 / 128)
            assert [round(epochs * updates, -3) for epochs in (c.milestones[0] - 1, c.milestones[1] - 1, c.epochs)] == [
                40_000, 60_000, 80_000
            ]  # fmt: skip
            assert c.pad == 2  # 32 of 36 pixels
    figures = {name: c for name, c in PRESETS.items() if name.startswith("figure")}
    grid = {(c.data, c.eps, c.alpha) for c in figures.values() if c.model == "resnet-50" and c.method == "madry"}
    assert len(figures) == 36
    assert grid == {(d, e, a) for d in ("cifar10", "cifar100") for e in (4, 8, 16) for a in (0, 0.2, 0.4, 0.6, 0.8, 1)}


def test_a_preset_is_the_default_of_every_option(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "run", lambda config: seen.append(config) or type("Done", (), {"summary": ""}))
    run(monkeypatch, "train", "--preset=table6.1/mart+spat", "--epochs", "7", "--flip", "False")
    assert seen[0] == Config(**vars(PRESETS["table6.1/mart+spat"]) | {"epochs": 7, "flip": False})
    run(monkeypatch, "train", "--method", "trades")
    assert seen[1] == Config(method="trades")


def test_train_writes_a_run(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "run"
    run(monkeypatch, "train", *SMALL, "--out", folder)
    out = capsys.readouterr().out
    names = {"config.json", "log.jsonl", "last.pt", "previous.pt", "best.pt", "result.json"}
    assert {path.name for path in folder.iterdir()} == names
    saved = json.loads((folder / "config.json").read_text())
    assert saved["method"] == "mart"
    assert saved["alpha"] == 0.3
    assert saved["eps"] == 51
    assert saved["weight_decay"] == 7e-4
    test = json.loads((folder / "result.json").read_text())["test"]
    found = ", ".join(f"{name} {value:.2f} %" for name, value in test.items())
    epoch = json.loads((folder / "result.json").read_text())["best"]["epoch"]
    assert out == f"{folder}: best.pt, of epoch {epoch} of 2: {found} on 120 test images\n"
    train, validation = logs.read(folder, "train"), logs.read(folder, "validation")
    assert all({"loss", "bce", "kl", "lr", "images_per_second"} <= event.keys() for event in train)
    assert [event["epoch"] for event in validation] == [1, 2]
    assert validation[0]["step"] == 4

    run(monkeypatch, "plot", folder, folder, "--out", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    run(monkeypatch, "plot", folder, "--out", tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")

    capsys.readouterr()
    err = error(monkeypatch, capsys, "train", *SMALL, "--out", folder)
    assert f"--out {folder}: it holds a run: add --resume" in err


def test_the_best_checkpoint_loads_into_its_model(monkeypatch, tmp_path):
    from spat_train.models.checkpoints import load_checkpoint
    from spat_train.models.registry import create

    run(monkeypatch, "train", *SMALL, "--out", tmp_path / "run", "--ema", "0.9", "--no-test")
    for name in ("best.pt", "last.pt"):
        model = create("small-cnn", 10, (1, 8, 8))
        load_checkpoint(model, tmp_path / "run" / name)
        state = torch.load(tmp_path / "run" / name, weights_only=True)
        expected = state["ema"] or state["model"]
        assert all(torch.equal(t, expected[key]) for key, t in model.state_dict().items())


def test_ctrl_c_while_a_command_reads_its_files_is_one_line(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "train", *SMALL)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "spat-train: interrupted\n"


def test_a_tensorboard_that_does_not_work_is_left_out(monkeypatch, capsys, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def broken(*args, **kwargs):
        raise TypeError("Descriptors cannot be created directly.\nIf this call came from")

    monkeypatch.setattr(tensorboard, "SummaryWriter", broken)
    run(monkeypatch, "train", *(a for a in SMALL if a != "--no-tensorboard"), "--no-test", "--out", tmp_path / "run")
    line = "spat-train: TensorBoard does not work here (TypeError: Descriptors cannot be created directly.): the run goes on"
    assert capsys.readouterr().err.count(line) == 1


def test_tensorboard_where_it_is_installed(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    arguments = [a for a in SMALL if a != "--no-tensorboard"]
    run(monkeypatch, "train", *arguments, "--no-test", "--out", tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "table6.1/mrt"], "--preset table6.1/mrt: there is none: did you mean table6.1/mart"),
        (["--preset", "table6.3/rst"], "--extra None: this needs pseudo-labelled images"),
        (["--data", "nowhere.npz"], "--data nowhere.npz: there is no such file"),
        (["--data", "digits", "--model", "wrn-33-10"], "--model wrn-33-10: .*6n"),
        (["--eps", "0.031"], "--eps 0.031: it is in 1/255"),
        (["--data", "cifar10", "--root", "empty"], "--download"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    if "cifar10" in arguments:
        pytest.importorskip("torchvision", exc_type=Exception)
    monkeypatch.chdir(tmp_path)
    err = error(monkeypatch, capsys, "train", *arguments)
    assert err.startswith("spat-train: error: ")
    assert re.search(message, err)


def test_a_mistyped_command(monkeypatch, capsys):
    assert "evalaute: there is no such command: did you mean evaluate? " in error(monkeypatch, capsys, "evalaute", "runs/mine")


def test_plot_refuses(monkeypatch, capsys, tmp_path):
    assert "name at least one folder" in error(monkeypatch, capsys, "plot")
    assert "no log.jsonl there" in error(monkeypatch, capsys, "plot", tmp_path)
    assert "ends in .png or .pdf" in error(monkeypatch, capsys, "plot", tmp_path, "--out", "curves.gif")
    (tmp_path / "log.jsonl").touch()
    assert "cannot be written" in error(monkeypatch, capsys, "plot", tmp_path, "--out", tmp_path / "nowhere" / "curves.png")


def test_help_says_the_units(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "train", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "in 1/255" in text
    assert "table6.1/mart+spat" in text
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert all(command in text for command in ("train", "evaluate", "attacks", "presets", "plot", "demo"))

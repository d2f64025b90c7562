"""The command: presets are the thesis's settings, options override them, errors are one line, runs end in files and curves."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
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
from spat_train.models.checkpoints import load_checkpoint
from spat_train.models.registry import create
from spat_train.presets import PRESETS
from spat_train.runtime import logs
from spat_train.training.check import check
from spat_train.training.optim import learning_rate
from tests.evaluation.helpers import command, error

SMALL = [
    "--data", "digits", "--model", "small-cnn", "--eps", "51", "--epochs", "2", "--limit", "120", "--batch-size", "32",
    "--lr", "0.05", "--device", "cpu", "--track=none", "--val-steps", "2", "--preset", "table6.1/mart+spat",
    "--milestones", "None",
]  # fmt: skip


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
    sgd = {"lr": 0.1, "momentum": 0.9, "optimizer": "sgd"}
    settings = {  # by the beginning of a preset's name
        "table6.1": sgd | {"model": "wrn-34-10", "data": "cifar10", "weight_decay": 7e-4, "batch_size": 128, "eps": 8,
                           "milestones": (75, 90), "epochs": 90},
        # "same settings except for weight decay"
        "table6.2": sgd | {"model": "wrn-34-10", "data": "cifar100", "batch_size": 128, "milestones": (75, 90), "epochs": 90},
        "table6.3": {"model": "wrn-28-10", "batch_size": 256, "epochs": 200, "schedule": "cosine", "holdout": 0,
                     "extra_fraction": 0.5, "nesterov": True, "weight_decay": 5e-4},
        "table6.4": sgd | {"model": "resnet-18", "data": "stl10", "batch_size": 32, "epochs": 200, "pad": 4, "holdout": 250},
        "figure": sgd | {"evaluation_eps": 8, "milestones": (75, 90)},
        "madry-mnist": {"model": "mnist-cnn", "optimizer": "adam", "lr": 1e-4, "batch_size": 50, "weight_decay": 0},
        "madry-cifar10": {"model": "wrn-34-10", "data": "cifar10", "weight_decay": 2e-4, "lr": 0.1, "batch_size": 128,
                          "bn_mode": "train", "decay_norm": False, "pad": 2},  # 32 of 36 pixels
        "single-step/free": sgd | {"model": "wrn-34-10", "weight_decay": 2e-4, "updates_per_batch": 8, "decay_norm": False},
        "single-step": {"model": "preactresnet-18", "lr": 0.2, "schedule": "cyclic", "epochs": 30, "weight_decay": 5e-4,
                        "bn_mode": "train", "overfitting_alarm": "warn"},
        "fastat": sgd | {"model": "resnet-18", "data": "cifar10", "schedule": "one-cycle", "weight_decay": 5e-4, "holdout": None,
                         "label_smoothing": 0.4, "batch_size": 128},
        "adt": sgd | {"model": "wrn-28-10", "data": "cifar10", "weight_decay": 2e-4, "batch_size": 64, "epochs": 76,
                      "lr_drops": (75,), "holdout": 0, "inner_lr": 0.3, "entropy": 0.01, "inner_samples": 5},
    }  # fmt: skip
    attacks = {  # eps, step size, steps, start
        "table6.3": (0.031, 0.007, 10, "normal"), "madry-mnist": (0.3, 0.01, 40, "uniform"),
        "madry-cifar10": (8 / 255, 2 / 255, 7, "uniform"), "adt": (8 / 255, 2 / 255, 7, "uniform"),
    }  # fmt: skip
    single_steps = {"fast": (8 / 255, 10 / 255, 1, "uniform"), "n-fgsm": (8 / 255, 8 / 255, 1, "wide")}
    for name, c in PRESETS.items():
        if name.startswith(("awp/", "imagenet/", "ares/")):  # they have tests of their own
            continue
        check(replace(c, extra=Path("500k.pickle")) if name.startswith("table6.3") else c)
        assert c.preset == name
        assert c.forwards == forwards.get(c.method, "clean-adv")
        kind = next(kind for kind in settings if name.startswith(kind))
        heeded = settings[kind].keys() - c.objective.idle.keys()
        assert {o: getattr(c, o) for o in heeded} == {o: settings[kind][o] for o in heeded}, name
        eps, step_size, *rest = c.attack_settings
        expected = attacks.get(kind) or single_steps.get(c.method, (c.eps / 255, c.eps / 255 / 4, 10, "uniform"))
        if c.method == "free":
            expected = 8 / 255, 8 / 255, 1, "clean"
        if c.objective.attacks:
            assert (eps, step_size) == pytest.approx(expected[:2]), name
            assert rest == list(expected[2:]), name
        if kind in ("table6.1", "table6.2", "table6.4", "figure"):
            assert c.kl_weight == {"mart": 5, "trades": 6}.get(c.method)
        if kind == "table6.2":
            assert c.weight_decay == (7e-4 if c.method == "mart" else 2e-4)
        if kind == "table6.3":
            assert len(Order(torch.arange(50_000), c.batch_size, 0, 500_000, c.extra_fraction).epoch(0)) == 196
            rates = [0.05 * (1 + math.cos((epoch - 1) / 200 * math.pi)) for epoch in range(1, 201)]  # RST's code counts from 1
            assert [learning_rate(c, epoch, 1.0) for epoch in range(200)] == pytest.approx(rates, rel=1e-12)
        if kind == "madry-mnist":
            assert c.epochs * 59_000 // 50 // 1000 == 100
        if kind == "madry-cifar10":
            ends = (c.milestones[0] - 1, c.milestones[1] - 1, c.epochs)
            assert [round(epochs * math.ceil(49_000 / 128), -3) for epochs in ends] == [40_000, 60_000, 80_000]
        if name == "single-step/free":
            ends = (c.milestones[0] - 1, c.milestones[1] - 1, c.epochs)
            assert [round(8 * epochs * math.ceil(49_000 / 128), -4) for epochs in ends] == [40_000, 60_000, 80_000]
        if kind == "fastat":
            assert (c.ema, c.val_every, c.epochs * c.updates_per_batch) == {
                "fastat/pgd-at": (0, 100, 100), "fastat/free": (0.9995, 1, 200)
            }.get(name, (0.9995, 1, 100))  # fmt: skip
            smoothing = c.alpha * 10 / 9  # of the examples, over all classes as PyTorch counts it
            assert smoothing == pytest.approx({"fast": 0.4, "n-fgsm": 0.4}.get(c.method, 0.2 * 10 / 9 if "spat" in name else 0))
    figures = {name: c for name, c in PRESETS.items() if name.startswith("figure")}
    grid = {(c.data, c.eps, c.alpha) for c in figures.values() if c.model == "resnet-50" and c.method == "madry"}
    assert len(figures) == 36
    assert grid == {(d, e, a) for d in ("cifar10", "cifar100") for e in (4, 8, 16) for a in (0, 0.2, 0.4, 0.6, 0.8, 1)}


@pytest.mark.parametrize("method", ["madry", "trades", "mart"])
def test_presets_of_awp_are_the_settings_of_its_code(method):
    c = PRESETS[f"awp/{method}"]
    check(c)
    assert (c.method, c.model, c.data, c.epochs, c.weight_decay) == (method, "wrn-34-10", "cifar10", 200, 5e-4)
    at, trades = method == "madry", method == "trades"
    # AT's code counts epochs from 0, that of TRADES from 1: it divides lr in epoch 100, and perturbs weights in epoch 10.
    drops = [epoch for epoch in range(1, 200) if learning_rate(c, epoch, 1.0) < learning_rate(c, epoch - 1, 1.0)]
    assert drops == ([100, 150] if at else [99, 149])
    assert (c.awp, c.awp_warmup) == (0.01 if at else 0.005, 9 if trades else 0)
    assert c.attack_settings == (8 / 255, 2 / 255, 10, "uniform" if at else "normal")
    assert (c.bn_mode, c.forwards) == ("train" if at else "eval", "adv-clean-clean" if trades else "clean-adv")
    assert (c.mean is None) is not at
    assert PRESETS[f"awp/{method}+spat"] == replace(
        c, alpha={"madry": 0.2, "trades": 0.1, "mart": 0.3}[method], preset=f"awp/{method}+spat"
    )


def test_a_preset_is_the_default_of_every_option(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "run", lambda config: seen.append(config) or type("Done", (), {"summary": ""}))
    command(monkeypatch, "train", "--preset=table6.1/mart+spat", "--epochs", "7", "--flip", "False")
    assert seen[0] == Config(**vars(PRESETS["table6.1/mart+spat"]) | {"epochs": 7, "flip": False})
    command(monkeypatch, "train", "--method", "trades")
    assert seen[1] == Config(method="trades")


def test_train_writes_a_run(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "run"
    command(monkeypatch, "train", *SMALL, "--out", folder, "--ema", "0.9")
    out = capsys.readouterr().out
    names = {"config.json", "log.jsonl", "last.pt", "previous.pt", "best.pt", "result.json"}
    assert {path.name for path in folder.iterdir()} == names
    saved = json.loads((folder / "config.json").read_text())
    assert [saved[name] for name in ("method", "alpha", "eps", "weight_decay")] == ["mart", 0.3, 51, 7e-4]
    test = json.loads((folder / "result.json").read_text())["test"]
    found = ", ".join(f"{name} {value:.2f} %" for name, value in test.items())
    epoch = json.loads((folder / "result.json").read_text())["best"]["epoch"]
    assert out == f"{folder}: best.pt, of epoch {epoch} of 2: {found} on 120 test images\n"
    train, validation = logs.read(folder, "train"), logs.read(folder, "validation")
    assert all({"loss", "bce", "kl", "lr", "images_per_second"} <= event.keys() for event in train)
    assert [event["epoch"] for event in validation] == [1, 2]
    assert validation[0]["step"] == 4
    for name in ("best.pt", "last.pt"):
        model = create("small-cnn", 10, (1, 8, 8))
        load_checkpoint(model, folder / name)
        state = torch.load(folder / name, weights_only=True)
        expected = state["ema"] or state["model"]
        assert all(torch.equal(t, expected[key]) for key, t in model.state_dict().items())

    for name, start in (("curves.png", b"\x89PNG"), ("curves.pdf", b"%PDF")):
        command(monkeypatch, "plot", folder, folder, "--out", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)

    capsys.readouterr()
    err = error(monkeypatch, capsys, "train", *SMALL, "--out", folder)
    assert f"--out {folder}: it holds a run: add --resume" in err


def test_ctrl_c_while_a_command_reads_its_files_is_one_line(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "train", *SMALL)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "spat-train: interrupted\n"


def test_ctrl_c_while_the_packages_are_imported_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'tyro':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[1])])
    command = [sys.executable, "-m", "spat_train", "train"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (130, "spat-train: interrupted\n")


def test_a_tensorboard_that_does_not_work_is_left_out(monkeypatch, capsys, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def broken(*args, **kwargs):
        raise TypeError("Descriptors cannot be created directly.\nIf this call came from")

    monkeypatch.setattr(tensorboard, "SummaryWriter", broken)
    command(monkeypatch, "train", *(a for a in SMALL if a != "--track=none"), "--no-test", "--out", tmp_path / "run")
    line = "spat-train: tensorboard does not work (TypeError: Descriptors cannot be created directly.): the run goes on without;"
    assert capsys.readouterr().err.count(line) == 1


def test_tensorboard_where_it_is_installed(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    arguments = [a for a in SMALL if a != "--track=none"]
    command(monkeypatch, "train", *arguments, "--no-test", "--out", tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("words", "track"),
    [
        (["--track", "tensorboard,wandb,mlflow"], "tensorboard,wandb,mlflow"),
        (["--tensorboard"], "auto"),
        (["--no-tensorboard"], "none"),
    ],
)
def test_track_and_its_names_before(words, track):
    assert cli.training_config(["--data", "digits", *words]).track == track


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "table6.1/mrt"], "--preset table6.1/mrt: there is none: did you mean table6.1/mart"),
        (["train", "--preset", "table6.3/rst"], "--extra None: this needs pseudo-labelled images"),
        (["train", "--data", "nowhere.npz"], "--data nowhere.npz: there is no such file"),
        (["train", "--data", "no\n\x1b[2J\udce9.npz"], r"--data no\\n\\x1b\[2J\\udce9.npz: there is no such file"),
        (["train", "--data", "digits", "--model", "wrn-33-10"], "--model wrn-33-10: .*6n"),
        (["train", "--eps", "0.031"], "--eps 0.031: it is in 1/255"),
        (["train", "--track", "wand"], "--track wand: there is none: did you mean wandb. give auto, none, or some of"),
        (["train", "--no-tensorboard", "--track=wandb"], "--no-tensorboard: it is --track=none now: give --track alone"),
        (["train", "--data", "cifar10", "--root", "empty"], "--download"),
        (["evalaute", "run"], "command evalaute: there is none: did you mean evaluate. there are train, sweep, evaluate, "),
        (["plot"], "name at least one folder"),
        (["plot", "."], "no log.jsonl there"),
        (["plot", "run", "--out", "curves.gif"], "ends in .png or .pdf"),
        (["plot", "run", "--out", "nowhere/curves.png"], "cannot be written"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    if "cifar10" in arguments:
        pytest.importorskip("torchvision", exc_type=Exception)
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/log.jsonl").touch()
    err = error(monkeypatch, capsys, *arguments)
    assert err.startswith("spat-train: error: ")
    assert re.search(message, err)


def help_text(monkeypatch, capsys, *arguments) -> str:
    with suppress(SystemExit):
        command(monkeypatch, *arguments, "--help")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "groups", "said"),
    [
        (
            "train",
            ["objective", "training attack", "model and data", "optimiser", "arithmetic", "running"],
            ["in 1/255", "table6.1/mart+spat", "Weight of the KL term. Default: ", "(default: 8.0)"],
        ),
        (
            "evaluate",
            ["attack", "data", "model", "source (black box)", "arithmetic", "running"],
            ["in 1/255", "PATH The folder of a run", "Default: that of the run, else 8.", "(default: fgsm,pgd-20,cw-30)"],
        ),
    ],
)
def test_help_has_groups_and_says_each_default_once(monkeypatch, capsys, name, groups, said):
    text = help_text(monkeypatch, capsys, name)
    assert re.findall(r"^ ([\w() ]+) options +$", text, re.MULTILINE) == groups
    words = " ".join(text.split())
    assert all(part in words for part in said)
    assert "# --" not in words
    assert not re.search(r"Default: [^-]*\(default: None\)", words)


def test_help_of_export(monkeypatch, capsys):
    words = " ".join(help_text(monkeypatch, capsys, "export").replace("│", "").split())
    for part in ("--out PATH", "to be loaded by spat_train.from_folder", "Default: that of the run.", "such as mit or cc-by-4.0"):
        assert part in words
    assert "(default: None)" not in words


def test_help_of_plot(monkeypatch, capsys):
    assert "(default: )" not in help_text(monkeypatch, capsys, "plot")


def test_commands_are_listed_by_purpose(monkeypatch, capsys):
    text = help_text(monkeypatch, capsys)
    assert [name for name in re.findall(r"^  (\w+) +[A-Z].*\.$", text, re.MULTILINE)] == list(cli.BY_NAME)
    assert [line for line in text.splitlines() if line in cli.COMMANDS] == list(cli.COMMANDS)

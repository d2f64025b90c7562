"""A good network on the digits without training, evaluations of it, and the command."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from spat_kernels.attacks._common import Result
from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.data.images import floats
from spat_train.evaluation.attack_specs import Attack
from spat_train.evaluation.attack_specs.attack import unchanged
from spat_train.evaluation.evaluate import evaluate
from spat_train.runtime import json_files
from spat_train.runtime.run_folder import FORMAT

EPS = 15.3 / 255
FEATURES = "tests.evaluation.helpers:Features"


class Features(nn.Module):
    """Random features of 8x8 digits, and a classifier that `fitted` solves for: a good network without training."""

    def __init__(self, num_classes: int = 10, width: int = 300):
        super().__init__()
        self.features = nn.Linear(64, width)
        self.classifier = nn.Linear(width, num_classes, bias=False)

    def forward(self, x):
        return self.classifier(self.features(x.flatten(1)).relu())


class Maps(nn.Module):
    """Convolutions, and the map of the last one as a vector by `view`, which takes contiguous ones alone."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.maps(x)
        return self.classifier(x.view(len(x), -1))


def fitted(seed: int = 0, dtype: torch.dtype = torch.float32) -> Features:
    torch.manual_seed(seed)
    x, y = floats(load("digits").train, torch.arange(1347), "cpu")
    model = Features().double()
    with torch.no_grad():
        hidden = model.features(x.double().flatten(1)).relu()
        target = 10 * nn.functional.one_hot(y, 10).double() - 1
        gram = hidden.T @ hidden + 0.1 * torch.eye(hidden.shape[1], dtype=torch.float64)
        model.classifier.weight.copy_(torch.linalg.solve(gram, hidden.T @ target).T)
    return model.to(dtype).eval()


def write_run(folder: Path, eps: float = 15.3) -> Path:
    """Make `folder` as a run leaves it, of a model that is fitted."""
    folder.mkdir()
    config = Config(data="digits", model=FEATURES, eps=eps)
    (folder / "config.json").write_bytes(json_files.to_bytes(config.to_dict()))
    content = {"format": FORMAT, "config": config.to_dict(), "model": fitted().state_dict(), "ema": None}
    torch.save(content, folder / "best.pt")
    return folder


def digits(count: int = 60, dtype: torch.dtype = torch.float32) -> tuple:
    x, y = floats(load("digits").test, torch.arange(count), "cpu", torch.contiguous_format)
    return x.to(dtype), y


def quiet(model, images, attacks, **how):
    return evaluate(model, images, attacks, **{"eps": EPS, "bar": None} | how)


@dataclass(frozen=True, kw_only=True)
class Escaping(Attack):
    """Leaves the ball by a level and a half, in one pixel of every other image."""

    family = "escaping"

    def _attack(self, model, x, y, eps, draws, run, how):
        x_adv, *passes = unchanged(x)
        x_adv[::2, 0, 4, 4] = (x[::2, 0, 4, 4] - eps - 1.5 / 255).abs().clamp(max=1)
        return Result(x_adv, *passes)

    def _describe(self):
        return ["escaping"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(monkeypatch, *arguments) -> None:
    from spat_train import cli  # takes seconds, and the children above need it not

    if "evaluate" in arguments and "--model-name" not in arguments:
        arguments += ("--model-name", FEATURES)  # code that a run names has to be repeated
    monkeypatch.setattr(sys, "argv", ["spat-train", *map(str, arguments)])
    cli.main()


def error(monkeypatch, capsys, *arguments) -> str:
    """What the command prints on stderr where it ends with an error, one line."""
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert (exit_info.value.code, out, err.count("\n")) == (2, "", 1)
    return err

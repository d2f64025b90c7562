"""Trainings on real data, small enough for a CPU, each measured on test images: `python -m benchmarks.evidence --help`.

    python -m benchmarks.evidence mnist --data mnist.npz --out results/cpu/mnist.json
    python -m benchmarks.evidence cifar10 --data cifar10.npz --out results/cpu/cifar10.json

mnist: Madry's CNN on 2,000 images, eps 0.3, PGD-10, Madry and Madry+SPAT. cifar10: WRN-10-2 on 5,000 images, eps 8/255, PGD-10,
MART and MART+SPAT(.3). Beside the JSON go the curves of training, a .png of the same name. The runs themselves (checkpoints,
logs) are kept in --runs, from where an interrupted command goes on.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks import measure
from spat_train.config import Config
from spat_train.data.datasets import load_npz
from spat_train.evaluation.evaluate import TEST, accuracies
from spat_train.presets import PRESETS
from spat_train.runtime import logs
from spat_train.training.curves import write_curves
from spat_train.training.trainer import train

_MNIST = replace(  # as the preset, at a scale of 2,000 images: fewer, so larger steps
    PRESETS["madry-mnist/madry"], preset="", limit=2000, holdout=200, steps=10, step_size=None, lr=1e-3, batch_size=50,
    epochs=30, schedule="one-cycle", val_every=3,
)  # fmt: skip
_CIFAR = Config(
    method="mart", model="wrn-10-2", limit=5000, holdout=500, epochs=6, batch_size=64, lr=0.1, schedule="one-cycle",
    nesterov=True, val_every=2,
)  # fmt: skip
EXPERIMENTS = {
    "mnist": {"Madry": _MNIST, "Madry+SPAT(.2)": replace(_MNIST, alpha=0.2)},
    "cifar10": {"MART": _CIFAR, "MART+SPAT(.3)": replace(_CIFAR, alpha=0.3)},
}


@dataclass
class Arguments:
    """Trainings on real data, small enough for a CPU."""

    experiment: tyro.conf.Positional[Literal["mnist", "cifar10"]]
    data: Path
    """The data set as an .npz file."""
    out: Path
    """JSON file to write; the curves go beside it."""
    runs: Path = Path("runs")
    """Where the folders of the runs go."""
    test_images: int = 1000
    """The first so many."""
    epochs: int | None = None
    """Fewer, for a rehearsal."""


def main(args: Arguments) -> None:
    folders, trainings, data = [], [], load_npz(args.data)
    for name, config in EXPERIMENTS[args.experiment].items():
        folder = args.runs / f"{args.experiment}-{name}"
        epochs = args.epochs or config.epochs
        config = replace(config, data=str(args.data), out=folder, resume=True, epochs=epochs, test=False)
        result = train(config)
        rows = torch.arange(min(args.test_images, len(data.test)))
        test = accuracies(result.model, data.test, TEST, config.eps / 255, rows=rows)
        events = logs.read(folder, "validation")
        trainings.append({"name": name, "test": test, "best": result.best, "validations": events, "config": vars(config)})
        folders.append(folder)
        print(name, test, flush=True)
    found = measure.describe("cpu") | {"experiment": args.experiment, "test_images": args.test_images, "trainings": trainings}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1, default=str) + "\n")
    write_curves(args.out.with_suffix(".png"), folders)


if __name__ == "__main__":
    main(tyro.cli(Arguments))

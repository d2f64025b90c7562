"""Small trained runs, for tests of what is made from them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from spat_train.config import Config
from spat_train.training.trainer import train
from tests.helpers import edit_json

EPS = 76.5
CLASSES = 4


def write_mnist(folder: Path) -> Path:
    """mnist.npz: noisy 28x28 images with a bright square whose place is their class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 120), ("test", 40)):
        labels = np.arange(count) % CLASSES
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 2)
            image[3 + 12 * row : 13 + 12 * row, 3 + 12 * column : 13 + 12 * column] += 150
        arrays |= {f"x_{split}": images, f"y_{split}": labels.astype(np.int64)}
    np.savez(folder / "mnist.npz", **arrays)
    return folder / "mnist.npz"


def write_runs(folder: Path) -> Path:
    """Runs with Madry's MNIST presets: standard, madry and madry-seed1 (mnist-cnn/1), b (mnist-b), wide and wide-standard
    (mnist-cnn/2)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = Config(
        preset="madry-mnist/madry", data=str(write_mnist(folder)), model="mnist-cnn/1", eps=EPS, steps=2, epochs=2,
        batch_size=16, optimizer="adam", lr=0.01, schedule="constant", weight_decay=0.0, holdout=8, val_steps=1, test=False,
        track="none", device="cpu",
    )  # fmt: skip
    natural = replace(base, preset="madry-mnist/natural", method="standard", steps=None)
    runs = {
        "standard": natural,
        "madry": base,
        "madry-seed1": replace(base, seed=1),
        "b": replace(natural, model="mnist-b", epochs=1, seed=2),
        "wide": replace(base, model="mnist-cnn/2"),
        "wide-standard": replace(natural, model="mnist-cnn/2"),
    }
    for name, config in runs.items():
        train(replace(config, out=folder / "runs" / name))
    torch.set_num_threads(threads)
    return folder / "runs"


def copy_run(source: Path, to: Path, **changes) -> Path:
    """A copy of a run with other settings in its config.json."""
    shutil.copytree(source, to)
    edit_json(to / "config.json", **changes)
    return to

"""Pictures: what attacks do to images at a large eps (thesis, Fig. 5.2), and the curves of runs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from spat_kernels import pgd, pgd_ls

from . import logs
from .images import Dataset, InputError, floats

ROWS = 5


def large_eps(eps: float, channels: int) -> float:
    """4 eps for colour (32/255 from 8/255), twice eps for grey, but below 0.5, where any image can be made flat grey."""
    return min(4 * eps if channels == 3 else 2 * eps, 0.45)


def one_per_class(y: Tensor, count: int) -> list[int]:
    """Index of the first image of each of the first `count` classes that occur in y [N]."""
    return [int((y == label).nonzero()[0]) for label in y.unique()[:count]]


def write_figure(path: Path, model: nn.Module, data: Dataset, eps: float, seed: int) -> None:
    """Write a PNG of `ROWS` test images, attacked on `model`, each titled with its predicted class (red: wrong)."""
    chosen = one_per_class(data.test.labels, ROWS)
    x, y = floats(data.test, torch.tensor(chosen), next(model.parameters()).device)
    settings = {"steps": 50, "step_size": eps / 10, "generator": torch.Generator().manual_seed(seed)}
    columns = {
        "original": x,
        "PGD-CE": pgd(model, x, y, eps, **settings),
        "PGD-LS(.2)": pgd_ls(model, x, y, eps, 0.2, **settings),
        "PGD-LS(.8)": pgd_ls(model, x, y, eps, 0.8, **settings),
    }
    figure = Figure(figsize=(2 * len(columns) + 0.6, 2.2 * len(chosen) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Attacks at eps = {eps:.3f} and what the Madry model predicts (red: wrong)")
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    for column, (name, images) in enumerate(columns.items()):
        with torch.no_grad():
            predicted = model(images).argmax(1)
        for row, image in enumerate(images.cpu()):
            ax = axes[row, column]
            # A single channel repeats to grey RGB.
            ax.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            color = "black" if predicted[row] == y[row] else "red"
            ax.set_title(data.classes[predicted[row]], color=color, parse_math=False)
            if row == 0:
                place = {"xy": (0.5, 1), "xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
                ax.annotate(name, xytext=(0, 26), weight="bold", **place)
            if column == 0:
                ax.set_ylabel(f"true: {data.classes[y[row]]}", parse_math=False)
    figure.savefig(path, dpi=120)


PANELS = {  # title: kind of event in the log, its value, unit
    "training loss": ("train", "loss", ""),
    "learning rate": ("train", "lr", ""),
    "held-out accuracy, clean": ("validation", "clean", "%"),
    "held-out accuracy, PGD": ("validation", "pgd", "%"),
}


def write_curves(path: Path, runs: Sequence[Path]) -> None:
    """Draw the curves of one or more runs, folders with a log.jsonl, against epochs; PNG or PDF by the name.

    Raises:
        InputError: a folder is no run, or `path` has another ending.
    """
    if path.suffix.lower() not in (".png", ".pdf"):
        raise InputError(f"--out {path}: give a name that ends in .png or .pdf")
    if not runs:
        raise InputError("plot: name at least one folder of a run")
    for run in runs:
        if not (run / "log.jsonl").is_file():
            raise InputError(f"{run}: no log.jsonl there: give the folder of a run")
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (title, (kind, value, unit)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for run, style in zip(runs, _styles(), strict=False):
            start = logs.read(run, "start")
            steps = start[0]["steps_per_epoch"] if start else 1
            events = logs.read(run, kind)
            ax.plot([e["step"] / steps for e in events], [e[value] for e in events], label=run.name, **style)
        ax.set_title(title)
        ax.set_xlabel("epoch")
        ax.set_ylabel(unit)
        ax.grid(alpha=0.3)
    figure.axes[0].legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}): give a file in a writable folder") from error


def _styles():
    """Okabe and Ito's colours, told apart by colour-blind readers, then again with other lines."""
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    return ({"color": colour, "linestyle": line} for line in ("-", "--", ":") for colour in colours)

"""How figures look, and each of them drawn from its numbers, in colours of Okabe and Ito; in grey markers and lines differ."""

import io
import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

from ..errors import InputError
from ..runtime import atomic_write as files
from ..runtime import logs

COLUMN, PAGE = 3.4, 7.0  # inches: a column and a page of a paper
DPI = 300
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "////", "....", "xxxx")
WRONG = COLOURS[1]
LEAST = 1e-4  # losses that are drawn on log scales
NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")  # 0.01, not 10 to the -2
LOOK: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.handlelength": 3.0, "figure.titlesize": 8,
    "lines.linewidth": 1.3, "lines.markersize": 4, "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.5,
    "axes.linewidth": 0.6, "legend.frameon": False, "pdf.fonttype": 42, "image.interpolation": "nearest",
}  # fmt: skip


def look():
    """Within: matplotlib's settings of all figures. They apply when something is drawn and when it is saved."""
    return matplotlib.rc_context(LOOK)


def new_figure(width: float, height: float) -> Figure:
    """In inches, and of no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, *paths: Path) -> None:
    """Write .png and .pdf files, whole or not at all, the same bytes for the same figure."""
    with look():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it stays as it was laid out now, which takes as long as drawing it
    for path in paths:
        kind = path.suffix.lower()[1:]
        content = io.BytesIO()
        with look():
            figure.savefig(
                content, format=kind, dpi=DPI, metadata={"CreationDate": None} if kind == "pdf" else {"Software": None}
            )
        files.write(path, content.getbuffer())


def styles(marked: bool = True) -> Iterable[dict]:
    """Colours, told apart by colour-blind readers, with markers and lines that go round at other lengths."""
    kinds = zip(cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False)
    return ({"color": c, "linestyle": line} | ({"marker": m} if marked else {}) for c, m, line in kinds)


# ---- pictures


def show(ax: Axes, image: Tensor) -> None:
    """An image [C, H, W] in [0, 1], C = 1 or 3, without ticks."""
    # A single channel repeats to grey RGB.
    ax.imshow(image.detach().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy())
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)


def picture_grid(columns: dict[str, Tensor], rows: Sequence[str], captions: dict[str, Sequence[tuple[str, bool]]]) -> Figure:
    """Images across by what was done to them, down by what they are.

    Args:
        columns: by title, images [R, C, H, W] in [0, 1].
        rows: what stands left of each row.
        captions: by column, what stands below each image and whether it is right; wrong ones get a cross. A column may have none.
    """
    side = 0.86
    figure = new_figure(side * len(columns) + 0.25, (side + 0.2 * bool(captions)) * len(rows) + 0.25)
    figure.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0.02, hspace=0.01)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for j, (title, images) in enumerate(columns.items()):
        axes[0, j].set_title(title, parse_math=False)
        for i, image in enumerate(images):
            show(axes[i, j], image)
            if title in captions:
                text, right = captions[title][i]
                axes[i, j].set_xlabel(
                    text if right else f"✗ {text}", color="black" if right else WRONG, labelpad=2, parse_math=False
                )
    for ax, name in zip(axes[:, 0], rows, strict=True):
        level = {"rotation": 0, "labelpad": 6, "va": "center"} if len(name) < 3 else {}
        ax.set_ylabel(name, parse_math=False, **level)
    return figure


def gradient_picture(gradient: Tensor) -> Tensor:
    """A gradient [C, H, W] as a picture in [0, 1]: 0 is grey, and three standard deviations reach black and white."""
    return (0.5 + gradient / (6 * gradient.std()).clamp(min=1e-30)).clamp(0, 1)


# ---- accuracy against something


def curve(ax: Axes, x: Sequence[float], points: Sequence[dict], **style) -> None:
    """Accuracies in percent with a band of their 95 % intervals."""
    ax.plot(x, [p["accuracy"] for p in points], **style)
    ax.fill_between(x, [p["low"] for p in points], [p["high"] for p in points], color=style["color"], alpha=0.15, linewidth=0)


def percent(ax: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    ax.set_ylim(-3, 103)
    ax.set_title(title, parse_math=False)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)


def only_ticks(ax: Axes, at: Sequence[float], names: Sequence[str] | None = None) -> None:
    """On the x axis."""
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(FixedLocator(at))
    ax.set_xticks(at, [f"{value:g}" for value in at] if names is None else names)


def log_ticks(axis: Axis, most: int) -> None:
    """Up to `most` ticks: at 1, 2 and 5 times powers of ten, else at powers of ten, else (a short range) at round values."""
    low, high = axis.get_view_interval()
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    sets = [[sub * power for power in powers for sub in (1, 2, 5)], powers, powers[::2], powers[1::2], powers[::3], powers[1::3]]
    seen = ([tick for tick in ticks if low <= tick <= high] for ticks in sets)
    axis.set_major_locator(FixedLocator(next((s for s in seen if 1 < len(s) <= most), MaxNLocator(most).tick_values(low, high))))
    axis.set_major_formatter(NUMBERS)
    axis.set_minor_locator(NullLocator())


def log_y(ax: Axes) -> None:
    """A log scale for what has been drawn."""
    ax.set_yscale("log")
    log_ticks(ax.yaxis, 5)


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def against_alpha(models: dict[str, dict]) -> Figure:
    """Figure 5.3. Of each model: alphas, pgd-ls (a point for each), clean and pgd-kl (a point)."""
    figure = new_figure(PAGE, 2.7)
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for ax, (name, numbers) in zip(axes, models.items(), strict=True):
        style = iter(styles())
        curve(ax, numbers["alphas"], numbers["pgd-ls"], label="PGD-LS", **next(style))
        for key, label, line in (("clean", "clean", "--"), ("pgd-kl", "PGD-KL", ":")):
            ax.axhline(numbers[key]["accuracy"], label=label, linestyle=line, color=next(style)["color"])
        percent(ax, name, "label smoothing α of the attack")
        only_ticks(ax, numbers["alphas"][::2])
    axes[0].set_ylabel("accuracy, %")
    legend_below(figure, axes[0], 3)
    return figure


def trained_with_alpha(lines: dict[str, dict], reported: dict[str, list[float]] | None = None) -> Figure:
    """Figures 6.1 and 6.2. Of each radius of training: alphas, clean and robust (a point for each); `reported`: the thesis's."""
    figure = new_figure(PAGE, 2.7)
    axes = figure.subplots(1, 2)
    for ax, kind in zip(axes, ("clean", "robust"), strict=True):
        for style, (name, numbers) in zip(styles(), lines.items(), strict=False):
            curve(ax, numbers["alphas"], numbers[kind], label=name, **style)
        if reported:
            ax.plot(reported["alphas"], reported[kind], "k*", markersize=8, label="thesis, its text: ε = 8/255")
        percent(ax, f"{kind} accuracy", "label smoothing α of the training", "accuracy, %")
        ax.autoscale(axis="y")
        only_ticks(ax, sorted({alpha for numbers in lines.values() for alpha in numbers["alphas"]}))
    legend_below(figure, axes[0], len(lines) + bool(reported))
    return figure


def against_budget(panels: dict[str, dict]) -> Figure:
    """Of each norm: radii, names (of the radii), trained (a radius or None), models: a point for each radius."""
    figure = new_figure(PAGE, 2.7)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (norm, panel) in zip(axes, panels.items(), strict=True):
        for style, (name, points) in zip(styles(), panel["models"].items(), strict=False):
            curve(ax, panel["radii"], points, label=name, **style)
        if panel["trained"] is not None:
            ax.axvline(panel["trained"], color="0.4", linewidth=0.8, linestyle=":", label="ε of the training")
        percent(ax, f"{norm}, {panel['attack']}", panel["label"])
        only_ticks(ax, panel["radii"], panel["names"])
    axes[0].set_ylabel("accuracy, %")
    legend_below(figure, axes[0], len(axes[0].get_legend_handles_labels()[0]))
    return figure


def against_steps(steps: Sequence[int], models: dict[str, list[dict]], label: str) -> Figure:
    """Of each model a point for each number of steps; 0 is clean."""
    figure = new_figure(COLUMN, 2.7)
    ax = figure.subplots()
    places = range(len(steps))
    for style, (name, points) in zip(styles(), models.items(), strict=False):
        curve(ax, places, points, label=name, **style)
    percent(ax, "", label, "accuracy, %")
    only_ticks(ax, places, ["clean" if n == 0 else str(n) for n in steps])
    legend_below(figure, ax, min(3, len(models)))
    return figure


def against_width(panels: dict[str, dict]) -> Figure:
    """Of each kind of training: widths, attacks (a point for each width), loss (a number for each)."""
    figure = new_figure(PAGE, 2.7)
    axes = figure.subplots(1, len(panels) + 1, sharex=True)
    for ax, (name, numbers) in zip(axes, panels.items(), strict=False):
        for style, (attack, points) in zip(styles(), numbers["attacks"].items(), strict=False):
            curve(ax, numbers["widths"], points, label=attack, **style)
        percent(ax, name, "width")
    axes[0].set_ylabel("accuracy on test images, %")
    for style, (name, numbers) in zip(styles(), panels.items(), strict=False):
        black = style | {"color": "black", "markerfacecolor": "white"}
        axes[-1].plot(numbers["widths"], numbers["loss"], label=f"loss, {name}", **black)
    axes[-1].set(title="loss at the end of training", xlabel="width")
    log_y(axes[-1])
    axes[0].set_xscale("log", base=2)
    widths = {width for numbers in panels.values() for width in numbers["widths"]}
    for ax in axes:
        only_ticks(ax, sorted(widths))
    handles = [handle for ax in (axes[0], axes[-1]) for handle in ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def training_losses(runs: dict[str, dict]) -> Figure:
    """Of each run: epochs and losses; log scale."""
    figure = new_figure(COLUMN, 2.7)
    ax = figure.subplots()
    for style, (name, numbers) in zip(styles(marked=False), runs.items(), strict=False):
        ax.plot(numbers["epochs"], numbers["losses"], label=name, **style)
    ax.set(xlabel="epoch", ylabel="loss on adversarial training images")
    log_y(ax)
    legend_below(figure, ax, 2)
    return figure


# ---- the landscape of the inner problem


def ascents(models: dict[str, np.ndarray], images: Sequence[Tensor], names: Sequence[str]) -> Figure:
    """Madry et al., Figure 1. Of each model losses [R, N, steps + 1]: N images across, models down, a line for each start."""
    figure = new_figure(PAGE, 1.25 * len(models) + 1.15)
    axes = figure.subplots(len(models) + 1, len(images), squeeze=False, sharey="row", height_ratios=[0.7] + [1] * len(models))
    for ax, image, name in zip(axes[0], images, names, strict=True):
        show(ax, image)
        ax.set_title(name, parse_math=False)
    for row, style, (name, losses) in zip(axes[1:], styles(), models.items(), strict=False):
        for j, ax in enumerate(row):
            ax.plot(losses[:, j].T.clip(LEAST), color=style["color"], linewidth=0.6, alpha=0.6)
        log_y(row[0])
        row[0].set_ylabel(f"loss, {name}", parse_math=False)
    for ax in axes[1:].flat:
        ax.xaxis.set_major_locator(MaxNLocator(max(1, 10 // len(names)), integer=True, steps=[1, 2, 5, 10]))
    for ax in axes[-1]:
        ax.set_xlabel("PGD step")
    return figure


def maxima(numbers: dict[str, dict], names: Sequence[str]) -> Figure:
    """Madry et al., Figure 5 and Appendix B. Of each model what `landscape.compare` gives; names of the images."""
    figure = new_figure(PAGE, 4.0)
    top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
    finals = [np.asarray(each["losses"]).clip(LEAST) for each in numbers.values()]
    bins = np.geomspace(min(f.min() for f in finals) / 1.5, max(f.max() for f in finals) * 1.5, 60)
    axes = top.subplots(1, len(names), squeeze=False, sharex=True, sharey=True)[0]
    for j, (ax, name) in enumerate(zip(axes, names, strict=True)):
        for style, hatch, final in zip(styles(), cycle(HATCHES), finals, strict=False):
            ax.hist(final[:, j], bins, color=style["color"], alpha=0.7, hatch=hatch, edgecolor="white", linewidth=0.2)
        ax.set(xscale="log", xlabel="final loss")
        ax.set_title(name, parse_math=False)
    log_ticks(axes[0].xaxis, max(2, 15 // len(names)))  # 15 over all panels
    axes[0].set_ylabel("restarts")

    left, middle, right = bottom.subplots(1, 3)
    for ax, key in ((left, "distances"), (middle, "cosines")):
        bins = np.histogram_bin_edges(np.concatenate([each[key] for each in numbers.values()]), 40)
        for style, (name, each) in zip(styles(marked=False), numbers.items(), strict=False):
            ax.hist(each[key], bins, histtype="step", density=True, label=name, **style)
    for style, each in zip(styles(marked=False), numbers.values(), strict=False):
        right.plot(np.linspace(0, 1, len(each["between"])), each["between"], **style)
    first = next(iter(numbers.values()))
    for ax, key in ((left, "distance"), (middle, "cosine")):
        for kind, what, line in (("random", "points", (0, (1, 1))), ("corner", "corners", (0, (6, 2)))):
            ax.axvline(first[f"{kind}_{key}"], color="black", linewidth=1, linestyle=line, label=f"random {what} of the ball")
    left.set(xlabel="L2 distance between two maxima", ylabel="density of pairs", yticks=[])
    middle.set(xlabel="cosine of the angle between two", yticks=[])
    right.set(xlabel="from one maximum to another", ylabel="loss, by that at both", ylim=(0, None))
    handles = [Line2D([], [], label=name, **style) for style, name in zip(styles(marked=False), numbers, strict=False)]
    bottom.legend(
        handles=handles + left.get_legend_handles_labels()[0][len(numbers) :], loc="outside lower center", ncols=len(numbers) + 2
    )
    return figure


def surfaces(models: dict[str, dict], radius: str) -> Figure:
    """Of each model what `landscape.surface` gives: panels of loss, and a line where the class changes."""
    figure = new_figure(min(PAGE, 3.2 * len(models) + 0.4), 2.9)
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for ax, (name, each) in zip(axes, models.items(), strict=True):
        losses, margins = np.asarray(each["losses"]), np.asarray(each["margins"])
        filled = ax.contourf(each["shares"], each["shares"], losses, levels=20, cmap="cividis")
        filled.set_edgecolor("face")  # else seams show in PDF
        if margins.min() < 0 < margins.max():
            ax.contour(each["shares"], each["shares"], margins, levels=[0], colors="white", linewidths=1.2)
        ax.plot(0, 0, marker="+", color="white", markersize=7)
        ticks = [-1, -0.5, 0, 0.5, 1]
        ax.set(xlabel=f"along the gradient's sign, in ε = {radius}", aspect="equal", xticks=ticks, yticks=ticks)
        ax.set_title(name, parse_math=False)
        ax.grid(False)
        figure.colorbar(filled, ax=ax, shrink=0.9, format=NUMBERS, ticks=MaxNLocator(5), label="loss")
    axes[0].set_ylabel("along a random sign, in ε")
    boundary, centre = (
        Line2D([], [], color="0.6", label="the class changes"),
        Line2D([], [], color="0.6", marker="+", linestyle=""),
    )
    centre.set_label("the image")
    figure.legend(handles=[boundary, centre], loc="outside lower center", ncols=2)
    return figure


# ---- the curves of runs, for spat-train plot

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
        for run, style in zip(runs, styles(marked=False), strict=False):
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

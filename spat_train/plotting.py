"""The drawing style of all figures: colours of Okabe and Ito, axes, grids of images, and saving.

Markers and lines differ too, so that figures can be read in grey.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

from .runtime import atomic_write

PAGE, COLUMN, HEIGHT = 7.0, 3.4, 2.7  # inches: a page and a column of a paper, and how high most figures are
DPI = 300
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", ":")
WRONG = COLOURS[1]  # captions of misclassified images
NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")  # 0.01 instead of 10 to the power of -2
STYLE: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.handlelength": 3.0, "figure.titlesize": 8,
    "lines.linewidth": 1.3, "lines.markersize": 4, "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.5,
    "axes.linewidth": 0.6, "legend.frameon": False, "pdf.fonttype": 42, "image.interpolation": "nearest",
}  # fmt: skip


def style():
    """Context manager: matplotlib's settings for all figures. They count when something is drawn and when it is saved."""
    return matplotlib.rc_context(STYLE)


def new_figure(width: float, height: float = HEIGHT) -> Figure:
    """An empty figure, in inches. It needs no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panel_row(count: int, *, sharex: bool = False, sharey: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """A figure as wide as a page with `count` panels beside each other."""
    figure = new_figure(PAGE)
    return figure, figure.subplots(1, count, squeeze=False, sharex=sharex, sharey=sharey)[0]


def save(figure: Figure, *paths: Path) -> None:
    """Write .png and .pdf files. The same figure gives the same bytes.

    Raises:
        SaveError: a file could not be written. What was there before is unchanged.
    """
    with style():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # keep this layout: to compute it again takes as long as drawing
    for path in paths:
        kind = path.suffix.lower()[1:]
        content = io.BytesIO()
        with style():
            metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
            figure.savefig(content, format=kind, dpi=DPI, metadata=metadata)
        atomic_write.write(path, content.getbuffer())


def line_styles(marked: bool = True) -> Iterator[dict]:
    """Endless keyword arguments of `Axes.plot`. Colours, markers and lines repeat at different lengths."""
    kinds = zip(cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False)
    return ({"color": c, "linestyle": line} | ({"marker": m} if marked else {}) for c, m, line in kinds)


# ---- images


def show(ax: Axes, image: Tensor) -> None:
    """Draw an image [C, H, W] in [0, 1], C = 1 or 3, without ticks."""
    ax.imshow(image.detach().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy())  # one channel repeats to grey RGB
    ax.set(xticks=[], yticks=[])
    ax.grid(False)


def image_grid(columns: dict[str, Tensor], rows: Sequence[str], captions: dict[str, Sequence[tuple[str, bool]]]) -> Figure:
    """A grid of images with a title for each column and a name for each row.

    Args:
        columns: by title, images [R, C, H, W] in [0, 1].
        rows: R names, shown on the left.
        captions: by title, a text below each image and whether it is right. Wrong ones get a cross. A column may have none.
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
                text, colour = (text, "black") if right else (f"✗ {text}", WRONG)
                axes[i, j].set_xlabel(text, color=colour, labelpad=2, parse_math=False)
    for ax, name in zip(axes[:, 0], rows, strict=True):
        horizontal = {"rotation": 0, "labelpad": 6, "va": "center"} if len(name) < 3 else {}
        ax.set_ylabel(name, parse_math=False, **horizontal)
    return figure


# ---- curves


def accuracy_curve(ax: Axes, x: Sequence[float], points: Sequence[dict], of: str = "accuracy", **style) -> None:
    """Accuracies (or `of`) in percent, with a band of their 95 % intervals: `points` have accuracy, low and high."""
    ax.plot(x, [p[of] for p in points], **style)
    ax.fill_between(x, [p["low"] for p in points], [p["high"] for p in points], color=style["color"], alpha=0.15, linewidth=0)


def interval_marks(ax: Axes, x: Sequence[float], points: Sequence[dict], of: str, **style) -> None:
    """Values with bars for their intervals: `points` have `of`, low and high."""
    values = [p[of] for p in points]
    below, above = ([abs(value - p[end]) for value, p in zip(values, points, strict=True)] for end in ("low", "high"))
    ax.errorbar(x, values, [below, above], capsize=2, elinewidth=0.8, **style)


def accuracy_curves(ax: Axes, x: Sequence[float], curves: Mapping[str, Sequence[dict]], title: str, xlabel: str) -> None:
    """`accuracy_curve` for each of `curves`, by label, on a y axis from 0 to 100 percent."""
    for kind, (label, points) in zip(line_styles(), curves.items(), strict=False):
        accuracy_curve(ax, x, points, label=label, **kind)
    ax.set_ylim(-3, 103)
    ax.set_title(title, parse_math=False)
    ax.set_xlabel(xlabel)


def x_ticks(ax: Axes, at: Sequence[float], names: Sequence[str] | None = None) -> None:
    """Ticks of the x axis at these places and nowhere else."""
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
    """Give the y axis a log scale. Call it after drawing: the ticks depend on the range."""
    ax.set_yscale("log")
    log_ticks(ax.yaxis, 5)


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """A legend of what `ax` shows, below the figure."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)

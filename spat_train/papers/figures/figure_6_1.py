"""Thesis, Figure 6.1: clean and robust accuracy against the label smoothing of the training examples, on CIFAR-10."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ...plotting import PAGE, accuracy_curve, legend_below, line_styles, new_figure, x_ticks
from ...presets import PRESETS
from ..figure import Drawing, FigureContext, PaperFigure
from ..loaded_run import open_model
from ..reported import FIGURE_61
from ..runs import Run, format_eps
from ..selection import RunSelector, RunSpec


def trainings(figure: str) -> RunSelector:
    """Madry and Madry+SPAT runs, one for each radius and alpha, by the presets of Figure 6.1 or 6.2."""

    def place(run: Run) -> tuple[float, float]:
        return run.config.eps, run.config.alpha

    def fits(runs: Sequence[Run]) -> bool:
        return all(run.config.method == "madry" for run in runs) and len(set(map(place, runs))) == len(runs) > 1

    specs = tuple(RunSpec(name) for name in PRESETS if name.startswith(f"figure{figure}/"))
    return RunSelector("Madry runs that differ in alpha, and in eps where that has several lines", fits, specs, place)


def radius(context: FigureContext) -> float:
    """--eps, else 8/255 on CIFAR, else the middle one of the trainings', as 8 of 4, 8 and 16. For images in [0, 1]."""
    radii = sorted(run.config.eps for run in context.runs)
    own = context.images.dataset.name in ("cifar10", "cifar100")
    return (context.options.eps or (8.0 if own else radii[len(radii) // 2])) / 255


def measure(context: FigureContext, eps: float) -> dict[str, dict]:
    """By radius of the training: alphas, and a point of clean and of PGD-20 accuracy for each."""
    lines: dict[str, dict] = {}
    for run in sorted(context.runs, key=lambda run: (run.config.eps, run.config.alpha)):
        line = lines.setdefault(f"trained with ε = {format_eps(run.config.eps)}", {"alphas": [], "clean": [], "robust": []})
        found = context.measure(open_model(run, context.images, context.options), ["clean", "pgd-20"], eps=eps)
        line["alphas"].append(run.config.alpha)
        line["clean"].append(found["clean"])
        line["robust"].append(found["pgd-20"])
    return lines


def plot(lines: dict[str, dict], reported: dict[str, list[float]] | None) -> Figure:
    """Panels of clean and robust accuracy, from what `measure` gives. `reported`: the thesis's own points."""
    figure = new_figure(PAGE)
    axes = figure.subplots(1, 2)
    for ax, kind in zip(axes, ("clean", "robust"), strict=True):
        for style, (name, numbers) in zip(line_styles(), lines.items(), strict=False):
            accuracy_curve(ax, numbers["alphas"], numbers[kind], label=name, **style)
        if reported:
            ax.plot(reported["alphas"], reported[kind], "k*", markersize=8, label="thesis, its text: ε = 8/255")
        ax.set(title=f"{kind} accuracy", xlabel="label smoothing α of the training", ylabel="accuracy, %")
        x_ticks(ax, sorted({alpha for numbers in lines.values() for alpha in numbers["alphas"]}))
    legend_below(figure, axes[0], len(lines) + bool(reported))
    return figure


def make(context: FigureContext) -> Drawing:
    eps = radius(context)
    numbers = measure(context, eps)
    reported = FIGURE_61 if context.images.dataset.name == "cifar10" and eps == 8 / 255 else None
    return {"": plot(numbers, reported)}, {"eps": eps, "lines": numbers, "source": reported}


FIGURE = PaperFigure("6.1", "thesis: clean and robust accuracy against alpha of the training, CIFAR-10", trainings("6.1"), make)

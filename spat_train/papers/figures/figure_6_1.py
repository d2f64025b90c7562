"""Thesis, Figures 6.1 and 6.2: clean and robust accuracy against the label smoothing of the training examples."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ...plotting import accuracy_curve, legend_below, line_styles, panel_row, x_ticks
from ...presets import PRESETS
from ..figure import Drawing, FigureContext, paper_figure
from ..reported import FIGURE_61
from ..runs import Run, eps_label, format_eps
from ..selection import RunSelector, RunSpec


def trainings(figure: str) -> RunSelector:
    """Madry and Madry+SPAT runs, one for each radius and alpha, by the presets of Figure 6.1 or 6.2."""

    def place(run: Run) -> tuple[float, float]:
        return run.config.eps, run.config.alpha

    def fits(runs: Sequence[Run]) -> bool:
        return all(run.config.method == "madry" for run in runs) and len(set(map(place, runs))) == len(runs) > 1

    specs = tuple(RunSpec(name) for name in PRESETS if name.startswith(f"figure{figure}/"))
    return RunSelector("Madry runs that differ in alpha, and in eps where that has several lines", fits, specs, place)


@paper_figure("6.1", "thesis: clean and robust accuracy against alpha of the training, CIFAR-10", trainings("6.1"))
@paper_figure("6.2", "thesis: the same on CIFAR-100", trainings("6.2"))
def make(context: FigureContext) -> Drawing:
    radii = sorted(run.config.eps for run in context.runs)
    own = 8.0 if context.images.dataset.name in ("cifar10", "cifar100") else radii[len(radii) // 2]  # 8 of 4, 8 and 16
    eps = (context.options.eps or own) / 255
    lines: dict[str, dict] = {}
    for run in sorted(context.runs, key=lambda run: (run.config.eps, run.config.alpha)):
        line = lines.setdefault(f"trained with ε = {format_eps(run.config.eps)}", {"alphas": [], "clean": [], "robust": []})
        values = run.config.alpha, *context.measure(run, ["clean", "pgd-20"], eps=eps)
        for found, value in zip(line.values(), values, strict=True):
            found.append(value)
    reported = FIGURE_61 if context.images.dataset.name == "cifar10" and eps == 8 / 255 else None
    drawn = draw(lines, reported)
    drawn.suptitle(f"attacked at {eps_label(eps)}")
    return {"": drawn}, {"eps": eps, "lines": lines, "source": reported}


def draw(lines: dict[str, dict], reported: dict | None = None) -> Figure:
    """Two panels, clean and robust accuracy in percent against alpha.

    Args:
        lines: by label, "alphas" in rising order; "clean" and "robust", each with accuracy, low and high.
        reported: the same of the thesis, at single points.
    """
    figure, axes = panel_row(2)
    for ax, (kind, title) in zip(axes, {"clean": "clean accuracy", "robust": "accuracy under PGD-20"}.items(), strict=True):
        for style, (name, line) in zip(line_styles(), lines.items(), strict=False):
            accuracy_curve(ax, line["alphas"], line[kind], label=name, **style)
        if reported:
            ax.plot(reported["alphas"], reported[kind], "k*", markersize=8, label="thesis, its text: ε = 8/255")
        ax.set(title=title, xlabel="label smoothing α of the training", ylabel="accuracy, %")
        x_ticks(ax, sorted({alpha for line in lines.values() for alpha in line["alphas"]}))
    legend_below(figure, axes[0], len(lines) + bool(reported))
    return figure

"""Thesis, Figure 5.3: accuracy under PGD-LS against its label smoothing, beside PGD-KL and clean accuracy."""

from matplotlib.figure import Figure

from ...plotting import COLOURS, PAGE, accuracy_curves, legend_below, new_figure, x_ticks
from ..figure import Drawing, FigureContext, PaperFigure
from ..loaded_run import LoadedRun
from ..selection import STANDARD_AND_ROBUST

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))


def measure(context: FigureContext, loaded: LoadedRun) -> dict:
    """Points (accuracy, low, high) by attack: one for each alpha of PGD-LS."""
    specs = [f"pgd-ls-20:alpha={alpha:g}" for alpha in ALPHAS]
    # Attack every image: alpha = 1 brings wrong ones back.
    found = context.measure(loaded, ["clean", "pgd-kl-20", *specs], attack_wrong=True)
    return {"alphas": ALPHAS, "pgd-ls": [found[spec] for spec in specs], "pgd-kl": found["pgd-kl-20"], "clean": found["clean"]}


def plot(models: dict[str, dict]) -> Figure:
    """A panel for each model, from what `measure` gives."""
    figure = new_figure(PAGE)
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for ax, (name, numbers) in zip(axes, models.items(), strict=True):
        accuracy_curves(ax, numbers["alphas"], {"PGD-LS": numbers["pgd-ls"]}, name, "label smoothing α of the attack")
        for key, label, line, colour in (("clean", "clean", "--", COLOURS[1]), ("pgd-kl", "PGD-KL", ":", COLOURS[2])):
            ax.axhline(numbers[key]["accuracy"], label=label, linestyle=line, color=colour)
        x_ticks(ax, numbers["alphas"][::2])
    axes[0].set_ylabel("accuracy, %")
    legend_below(figure, axes[0], 3)
    return figure


def make(context: FigureContext) -> Drawing:
    numbers = {each.name: measure(context, each) for each in context.loaded}
    return {"": plot(numbers)}, {"models": numbers}


FIGURE = PaperFigure("5.3", "thesis: accuracy under PGD-LS against its alpha, beside PGD-KL", STANDARD_AND_ROBUST, make)

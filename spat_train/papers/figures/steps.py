"""ARES: accuracy against the number of PGD steps, each of eps / 10."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ...plotting import COLUMN, accuracy_curves, legend_below, new_figure, x_ticks
from ..figure import Drawing, FigureContext, PaperFigure
from ..runs import format_eps
from ..selection import ANY_RUNS

STEPS = (0, 1, 2, 5, 10, 20, 50, 100)


def measure(context: FigureContext) -> dict:
    """By model, a point for each number of steps. 0 is clean accuracy."""
    specs = ["clean" if n == 0 else f"pgd-20:steps={n}" for n in STEPS]
    found = {each.name: context.measure(each, specs) for each in context.loaded}
    return {"steps": STEPS, "models": {name: [points[spec] for spec in specs] for name, points in found.items()}}


def plot(steps: Sequence[int], models: dict[str, list[dict]], eps: float) -> Figure:
    figure = new_figure(COLUMN)
    ax = figure.subplots()
    places = range(len(steps))
    accuracy_curves(ax, places, models, "", f"steps of PGD, each ε/10, at ε = {format_eps(255 * eps)}")
    ax.set_ylabel("accuracy, %")
    x_ticks(ax, places, ["clean" if n == 0 else str(n) for n in steps])
    legend_below(figure, ax, min(3, len(models)))
    return figure


def make(context: FigureContext) -> Drawing:
    numbers = measure(context)
    return {"": plot(numbers["steps"], numbers["models"], context.eps)}, numbers


FIGURE = PaperFigure("steps", "ARES: accuracy against the steps of PGD", ANY_RUNS, make)

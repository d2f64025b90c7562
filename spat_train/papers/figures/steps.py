"""ARES: accuracy against the number of PGD steps, each of eps / 10."""

from ...plotting import COLUMN, accuracy_curves, legend_below, new_figure, x_ticks
from ..figure import Drawing, FigureContext, paper_figure
from ..runs import eps_label
from ..selection import ANY_RUNS

STEPS = (0, 1, 2, 5, 10, 20, 50, 100)  # 0: clean accuracy


@paper_figure("steps", "ARES: accuracy against the steps of PGD", ANY_RUNS)
def make(context: FigureContext) -> Drawing:
    specs = [f"pgd-20:steps={n}" if n else "clean" for n in STEPS]
    models = {each.name: context.measure(each, specs) for each in context.loaded}
    figure = new_figure(COLUMN)
    ax = figure.subplots()
    places = range(len(STEPS))
    accuracy_curves(ax, places, models, "", f"steps of PGD, each ε/10, at {eps_label(context.eps)}")
    ax.set_ylabel("accuracy, %")
    x_ticks(ax, places, [str(n) if n else "clean" for n in STEPS])
    legend_below(figure, ax, min(3, len(models)))
    return {"": figure}, {"steps": STEPS, "models": models}

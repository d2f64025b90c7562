"""Thesis, Figure 5.3: accuracy under PGD-LS against its label smoothing, beside PGD-KL and clean accuracy."""

from ...plotting import COLOURS, accuracy_curves, legend_below, panel_row, x_ticks
from ..figure import Drawing, FigureContext, paper_figure
from ..runs import eps_label
from ..selection import STANDARD_AND_ROBUST

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))


@paper_figure("5.3", "thesis: accuracy under PGD-LS against its alpha, beside PGD-KL", STANDARD_AND_ROBUST)
def make(context: FigureContext) -> Drawing:
    models: dict[str, dict] = {}
    figure, axes = panel_row(len(context.loaded), sharey=True)
    for ax, each in zip(axes, context.loaded, strict=True):
        specs = ["clean", "pgd-kl-20", *(f"pgd-ls-20:alpha={alpha:g}" for alpha in ALPHAS)]
        # Attack every image: alpha = 1 brings wrong ones back.
        clean, kl, *smoothed = context.measure(each, specs, attack_wrong=True)
        models[each.name] = {"alphas": ALPHAS, "pgd-ls": smoothed, "pgd-kl": kl, "clean": clean}
        accuracy_curves(ax, ALPHAS, {"PGD-LS": smoothed}, each.name, "label smoothing α of the attack")
        for point, label, line, colour in ((clean, "clean", "--", COLOURS[1]), (kl, "PGD-KL", ":", COLOURS[2])):
            ax.axhline(point["accuracy"], label=label, linestyle=line, color=colour)
        x_ticks(ax, ALPHAS[::2])
    axes[0].set_ylabel("accuracy, %")
    legend_below(figure, axes[0], 3)
    figure.suptitle(eps_label(context.eps))
    return {"": figure}, {"models": models}

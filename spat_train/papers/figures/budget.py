"""Madry et al., Figure 6, and ARES: accuracy under PGD against the radius, in L-infinity and in L2."""

import math

from ...plotting import accuracy_curves, legend_below, panel_row, x_ticks
from ..figure import Drawing, FigureContext, paper_figure
from ..selection import ANY_RUNS

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # of the radius
L2_CORNER = 0.5  # the radius in L2 that stands for eps in L-infinity, as a share of the norm of a corner of that ball


def panels_of(eps: float, pixels: int, trained: bool) -> dict[str, dict]:
    """The radii of both norms, up to 1.5 `eps` and what stands for it in L2 for images of `pixels` numbers.

    Returns:
        By norm: attack and spec (names), radii and names of them, trained (the radius of the training, or None), label.
    """
    coarse = eps > 0.1  # shown in [0, 1] instead of 1/255
    radii = [share * eps for share in SHARES]
    quarter = float(f"{eps * math.sqrt(pixels) * L2_CORNER / 4:.1g}")  # a round number
    l2_radii = [round(4 * share * quarter, 9) for share in SHARES]
    names = [f"{r if coarse else 255 * r:.3g}" for r in radii]
    linf = {"spec": "pgd-20", "radii": radii, "trained": eps if trained else None, "label": "ε" if coarse else "ε, in 1/255"}
    l2 = {"spec": "pgd-l2-20", "radii": l2_radii, "trained": None, "label": "ε"}
    return {
        "L∞": {"attack": "PGD-20", **linf, "names": names},
        "L2": {"attack": "PGD-20", **l2, "names": [f"{r:g}" for r in l2_radii]},
    }


@paper_figure("budget", "Madry et al., Fig. 6; ARES: accuracy against eps, L-infinity and L2", ANY_RUNS)
def make(context: FigureContext) -> Drawing:
    trained = any(not run.standard for run in context.runs)
    panels = panels_of(context.eps, math.prod(context.images.dataset.image_shape), trained)
    figure, axes = panel_row(len(panels), sharey=True)
    for ax, (norm, panel) in zip(axes, panels.items(), strict=True):
        specs = ["clean", *(f"{panel['spec']}:eps={r:.6g}" for r in panel["radii"][1:])]
        panel["models"] = {each.name: context.measure(each, specs) for each in context.loaded}
        accuracy_curves(ax, panel["radii"], panel["models"], f"{norm}, {panel['attack']}", panel["label"])
        if panel["trained"] is not None:
            ax.axvline(panel["trained"], color="0.4", linewidth=0.8, linestyle=":", label="ε of the training")
        x_ticks(ax, panel["radii"], panel["names"])
    axes[0].set_ylabel("accuracy, %")
    legend_below(figure, axes[0], len(axes[0].get_legend_handles_labels()[0]))
    return {"": figure}, {"panels": panels}

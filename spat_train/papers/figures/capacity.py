"""Madry et al., Figure 4: accuracy and loss against the width of the network, of standard and of adversarial training."""

import re
from collections.abc import Sequence

from ...plotting import accuracy_curves, line_styles, log_y, panel_row, x_ticks
from ..figure import Drawing, FigureContext, paper_figure
from ..runs import Run, eps_label
from ..selection import STANDARD_AND_ROBUST, RunSelector
from .training_loss import training_loss

ATTACKS = {"clean": "clean", "FGSM": "fgsm", "PGD-20": "pgd-20"}


def family_and_width(model: str) -> tuple[str, int | None]:
    """("wrn-34-", 10) for wrn-34-10 and ("mnist-cnn/", 16) for mnist-cnn, whose default is 16; None for others."""
    found = re.fullmatch(r"(wrn-\d+-|mnist-cnn/)(\d+)", "mnist-cnn/16" if model == "mnist-cnn" else model)
    return (found[1], int(found[2])) if found else (model, None)


def _place(run: Run) -> tuple | None:
    family, width = family_and_width(run.config.model)
    return (run.standard, family, width) if width else None


def _fits(runs: Sequence[Run]) -> bool:
    families, widths = zip(*(family_and_width(run.config.model) for run in runs), strict=True) if runs else ((), ())
    return len(set(families)) == 1 and None not in widths and len(set(widths)) > 1


_PLAIN = tuple(s for s in STANDARD_AND_ROBUST.specs if s.config.method in ("standard", "madry") and not s.config.alpha)
WIDTHS = RunSelector("runs of wrn-DEPTH-WIDTH or mnist-cnn/WIDTH of different widths", _fits, _PLAIN, _place)


@paper_figure("capacity", "Madry et al., Fig. 4: accuracy against width, standard and adversarial training", WIDTHS)
def make(context: FigureContext) -> Drawing:
    panels: dict[str, dict] = {}
    widths = {run.folder: family_and_width(run.config.model)[1] for run in context.runs}
    for run in sorted(context.runs, key=lambda run: (not run.standard, widths[run.folder])):
        kind = "standard training" if run.standard else "adversarial training"
        panel = panels.setdefault(kind, {"widths": [], "attacks": {name: [] for name in ATTACKS}, "loss": []})
        panel["widths"].append(widths[run.folder])
        panel["loss"].append(training_loss(run)["losses"][-1])  # at the end of training
        for points, point in zip(panel["attacks"].values(), context.measure(run, [*ATTACKS.values()]), strict=True):
            points.append(point)

    figure, axes = panel_row(len(panels) + 1, sharex=True)
    for ax, style, (name, panel) in zip(axes, line_styles(), panels.items(), strict=False):
        accuracy_curves(ax, panel["widths"], panel["attacks"], name, "width")
        black = style | {"color": "black", "markerfacecolor": "white"}
        axes[-1].plot(panel["widths"], panel["loss"], label=f"loss, {name}", **black)
    axes[0].set_ylabel("accuracy on test images, %")
    axes[-1].set(title="loss at the end of training", xlabel="width")
    log_y(axes[-1])
    axes[0].set_xscale("log", base=2)
    for ax in axes:
        x_ticks(ax, sorted({width for panel in panels.values() for width in panel["widths"]}))
    handles = [handle for ax in (axes[0], axes[-1]) for handle in ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(eps_label(context.eps))
    return {"": figure}, {"panels": panels}

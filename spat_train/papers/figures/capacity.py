"""Madry et al., Figure 4: accuracy and loss against the width of the network, of standard and of adversarial training."""

import re
from collections.abc import Sequence

from matplotlib.figure import Figure

from ...plotting import PAGE, accuracy_curves, line_styles, log_y, new_figure, x_ticks
from ..figure import Drawing, FigureContext, PaperFigure
from ..loaded_run import open_model
from ..runs import Run
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


def measure(context: FigureContext) -> dict[str, dict]:
    """By kind of training: widths, attacks (a point for each width), loss at the end of training (a number for each)."""
    panels: dict[str, dict] = {}
    widths = {run.folder: family_and_width(run.config.model)[1] for run in context.runs}
    for run in sorted(context.runs, key=lambda run: (not run.standard, widths[run.folder])):
        kind = "standard training" if run.standard else "adversarial training"
        panel = panels.setdefault(kind, {"widths": [], "attacks": {name: [] for name in ATTACKS}, "loss": []})
        found = context.measure(open_model(run, context.images, context.options), list(ATTACKS.values()))
        panel["widths"].append(widths[run.folder])
        panel["loss"].append(training_loss(run)["losses"][-1])
        for name, spec in ATTACKS.items():
            panel["attacks"][name].append(found[spec])
    return panels


def plot(panels: dict[str, dict]) -> Figure:
    """Panels of accuracy and one of losses, from what `measure` gives."""
    figure = new_figure(PAGE)
    axes = figure.subplots(1, len(panels) + 1, sharex=True)
    for ax, (name, numbers) in zip(axes, panels.items(), strict=False):
        accuracy_curves(ax, numbers["widths"], numbers["attacks"], name, "width")
    axes[0].set_ylabel("accuracy on test images, %")
    for style, (name, numbers) in zip(line_styles(), panels.items(), strict=False):
        black = style | {"color": "black", "markerfacecolor": "white"}
        axes[-1].plot(numbers["widths"], numbers["loss"], label=f"loss, {name}", **black)
    axes[-1].set(title="loss at the end of training", xlabel="width")
    log_y(axes[-1])
    axes[0].set_xscale("log", base=2)
    for ax in axes:
        x_ticks(ax, sorted({width for numbers in panels.values() for width in numbers["widths"]}))
    handles = [handle for ax in (axes[0], axes[-1]) for handle in ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def make(context: FigureContext) -> Drawing:
    numbers = measure(context)
    return {"": plot(numbers)}, {"panels": numbers}


FIGURE = PaperFigure("capacity", "Madry et al., Fig. 4: accuracy against width, standard and adversarial training", WIDTHS, make)

"""Madry et al., Figure 2: the loss on adversarial images during training."""

from ...errors import InputError
from ...plotting import COLUMN, legend_below, line_styles, log_y, new_figure
from ...runtime import logs
from ..figure import Drawing, FigureContext, paper_figure
from ..runs import Run
from ..selection import ROBUST_RUNS

ADVERSARIAL = ("adv_ce", "bce", "adv_mmc")  # terms of the loss on adversarial images, as the log calls them


def training_loss(run: Run) -> dict:
    """The mean loss of each epoch on adversarial images, or in standard training on the images themselves.

    Raises:
        InputError: the run has no log.
    """
    if not (run.folder / "log.jsonl").is_file():
        raise InputError(f"{run.folder}: no log.jsonl there: give the folder of a run that has its log")
    epochs: dict[int, list[tuple[int, float]]] = {}
    before = 0
    for event in logs.read(run.folder, "train"):
        term = next((name for name in ADVERSARIAL if name in event), "loss")
        if event["step"] <= before:
            raise InputError(f"{run.folder}: the steps in its log.jsonl do not rise: restore it, or leave out the run")
        epochs.setdefault(event["epoch"], []).append((event["step"] - before, event[term]))
        before = event["step"]
    if not epochs:
        raise InputError(f"{run.folder}: its log has no losses yet: give a run that has trained")
    means = [sum(n * loss for n, loss in parts) / sum(n for n, _ in parts) for parts in epochs.values()]
    return {"epochs": list(epochs), "losses": means, "term": term}


@paper_figure("training-loss", "Madry et al., Fig. 2: adversarial loss during training", ROBUST_RUNS)
def make(context: FigureContext) -> Drawing:
    runs = {each.name: training_loss(each.run) for each in context.loaded}
    figure = new_figure(COLUMN)
    ax = figure.subplots()
    for style, (name, numbers) in zip(line_styles(marked=False), runs.items(), strict=False):
        ax.plot(numbers["epochs"], numbers["losses"], label=name, **style)
    ax.set(xlabel="epoch", ylabel="loss on adversarial training images")
    log_y(ax)
    legend_below(figure, ax, 2)
    return {"": figure}, {"models": runs}

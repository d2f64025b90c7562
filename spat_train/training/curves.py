"""Training curves of runs, drawn from their logs (`spat-train plot`)."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..plotting import PAGE, line_styles, new_figure, save, style
from ..runtime import logs
from ..runtime.atomic_write import SaveError

PANELS = {  # title: kind of event in the log, its value, unit
    "training loss": ("train", "loss", ""),
    "learning rate": ("train", "lr", ""),
    "held-out accuracy, clean": ("validation", "clean", "%"),
    "held-out accuracy, PGD": ("validation", "pgd", "%"),
}


def write_curves(path: Path, runs: Sequence[Path]) -> None:
    """Draw the training curves of one or more runs against epochs.

    Args:
        path: a .png or .pdf file.
        runs: folders that have a log.jsonl.

    Raises:
        InputError: a folder is no run, or `path` has another ending or cannot be written.
    """
    if path.suffix.lower() not in (".png", ".pdf"):
        raise InputError(f"--out {path}: give a name that ends in .png or .pdf")
    if not runs:
        raise InputError("plot: name at least one folder of a run")
    if missing := [run for run in runs if not (run / "log.jsonl").is_file()]:
        raise InputError(f"{missing[0]}: no log.jsonl there: give the folder of a run")
    with style():
        figure = new_figure(PAGE, 4.6)
        for ax, (title, (kind, value, unit)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
            for run, line_style in zip(runs, line_styles(marked=False), strict=False):
                start = logs.read(run, "start")
                steps = start[0]["steps_per_epoch"] if start else 1
                events = logs.read(run, kind)
                ax.plot([e["step"] / steps for e in events], [e[value] for e in events], label=run.name, **line_style)
            ax.set(title=title, xlabel="epoch", ylabel=unit)
        figure.axes[0].legend()
    try:
        save(figure, path)
    except SaveError as error:
        reason = getattr(error.__cause__, "strerror", error)
        raise InputError(f"--out {path}: cannot be written ({reason}): give a file in a writable folder") from error

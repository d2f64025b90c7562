"""Finished runs on disk, and how their settings are written."""

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..config import Config
from ..errors import InputError
from ..models.run_config import run_config
from ..objectives import METHODS
from ..runtime import logs

CHECKPOINTS = ("best.pt", "last.pt")


@dataclass(frozen=True)
class Run:
    """A run is what its config.json says, whatever its folder is called."""

    folder: Path
    config: Config

    @property
    def standard(self) -> bool:
        return self.config.method == "standard"

    @cached_property
    def epochs(self) -> float:
        """Epochs trained so far, by the log. A run without a log counts as finished."""
        if not (self.folder / "log.jsonl").is_file():
            return float(self.config.epochs)
        starts, events = logs.read(self.folder, "start"), logs.read(self.folder, "train")
        return events[-1]["step"] / starts[-1]["steps_per_epoch"] if starts and events else 0.0

    @property
    def finished(self) -> bool:
        return self.epochs >= self.config.epochs

    def __str__(self) -> str:
        return f"{self.folder} ({title(self.config)}, {self.config.model})"


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        InputError: there is none, or it has no checkpoint yet.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json there: give the folder of a run")
    if not _has_checkpoint(folder):
        raise InputError(f"{folder}: neither {' nor '.join(CHECKPOINTS)} there: give the folder of a run that has trained")
    if (config := run_config(folder)) is None:
        raise InputError(f"{folder / 'config.json'}: it is no run's: give the folder of a run")
    return Run(folder, config)


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CHECKPOINTS)


def find_runs(folder: Path | None) -> list[Run]:
    """All runs in `folder` that have a checkpoint, by name. One that cannot be read is left out and reported on stderr."""
    runs = []
    for path in sorted(folder.glob("*/config.json")) if folder else []:
        if _has_checkpoint(path.parent):
            try:
                runs.append(read_run(path.parent))
            except InputError as error:
                print(f"spat-train: left out {path.parent}: {error}", file=sys.stderr)
    return runs


def data_name(data: str) -> str:
    """cifar10 for cifar10 and for /somewhere/cifar10.npz."""
    return Path(data).stem


def format_eps(eps: float) -> str:
    """A radius in 1/255 as text: 8/255, or 0.3 for 76.5."""
    return f"{eps:g}/255" if eps == round(eps, 1) and eps < 64 else f"{eps / 255:.3g}"


def title(config: Config) -> str:
    """The method as the thesis writes it: MART+SPAT(.3)."""
    return METHODS[config.method].title + (f"+SPAT({config.alpha:g})".replace("(0.", "(.") if config.alpha else "")

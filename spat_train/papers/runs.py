"""Finished runs on disk: how their settings are written, and where they differ from a source's."""

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
PLAIN = {  # by name, the options whose value is shown as it is
    "held-out images": "holdout", "padding before crops": "pad", "flips": "flip", "forwards": "forwards",
    "optimiser": "optimizer", "schedule": "schedule", "momentum": "momentum", "Nesterov": "nesterov", "batch size": "batch_size",
    "weight decay": "weight_decay", "decay of biases and norms": "decay_norm", "weight averaging": "ema", "AWP": "awp",
    "label smoothing": "label_smoothing", "activation": "activation", "classifier": "last_layer", "mean": "mean", "std": "std",
    "first weights": "init", "precision": "precision", "inner lr": "inner_lr", "entropy": "entropy",
    "inner samples": "inner_samples", "layer decay": "layer_decay", "training sizes": "train_sizes",
    "RandAugment": "rand_augment", "parts of a batch": "accumulate", "warm-up": "warmup",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run is what its config.json says, whatever its folder is called."""

    folder: Path
    config: Config

    @property
    def standard(self) -> bool:
        return not self.config.objective.attacks

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

    @cached_property
    def held_out(self) -> float | None:
        """The best PGD accuracy on held-out images, in percent; None where the log has none."""
        if not (self.folder / "log.jsonl").is_file():
            return None
        return max((event["pgd"] for event in logs.read(self.folder, "validation")), default=None)

    def __str__(self) -> str:
        return f"{self.folder} ({title(self.config)}, {self.config.model})"


def read_run(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
        InputError: there is none, or it has no checkpoint yet.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json there: give the folder of a run")
    if not any((folder / name).is_file() for name in CHECKPOINTS):
        raise InputError(f"{folder}: neither {' nor '.join(CHECKPOINTS)} there: give the folder of a run that has trained")
    if (config := run_config(folder)) is None:
        raise InputError(f"{folder / 'config.json'}: it is no run's: give the folder of a run")
    return Run(folder, config)


def find_runs(folder: Path | None) -> list[Run]:
    """All runs in `folder` that have a checkpoint, by name. One that cannot be read is left out and reported on stderr."""
    runs = []
    trained = {path.parent for name in CHECKPOINTS for path in folder.glob(f"*/{name}")} if folder else set()
    for path in sorted(path for path in trained if (path / "config.json").is_file()):
        try:
            runs.append(read_run(path))
        except InputError as error:
            print(f"spat-train: left out {path}: {error}", file=sys.stderr)
    return runs


def data_name(data: str) -> str:
    """cifar10 for cifar10 and for /somewhere/cifar10.npz."""
    return Path(data).name.removesuffix(".npz")


def format_eps(eps: float) -> str:
    """A radius in 1/255 as text: 8/255, or 0.3 for 76.5."""
    return f"{eps:g}/255" if eps == round(eps, 1) and eps < 64 else f"{eps / 255:.3g}"


def eps_label(eps: float) -> str:
    """A radius for images in [0, 1] as figures name it: ε = 8/255."""
    return f"ε = {format_eps(255 * eps)}"


def title(config: Config) -> str:
    """The method as the thesis writes it: MART+SPAT(.3)."""
    return METHODS[config.method].title + (f"+SPAT({config.alpha:g})".replace("(0.", "(.") if config.alpha else "")


def settings(c: Config) -> dict[str, str]:
    """What changes the weights, as text, with the defaults filled in that follow from other options."""
    _, step_size, steps, start = c.attack_settings
    drops = ", ".join(f"{100 * epoch / c.epochs:.0f} %" for epoch in c.lr_drops if c.schedule == "piecewise") or "none"
    attack = {
        "attack": c.objective.attack if c.attack == "pgd" else c.attack,
        "eps": format_eps(c.eps), "attack steps": f"{steps}", "step size": format_eps(255 * step_size), "start": start,
        "inner loss": c.inner_loss, "mode in attacks": c.bn_mode, "updates with a batch": f"{c.updates_per_batch}",
    }  # fmt: skip
    if c.objective.attack == "adt":  # which starts at x, and has steps of its own
        attack |= {"step size": "none", "start": "none"}
    elif c.attack == "apgd":
        attack["step size"] = "none"
    return {
        "method": METHODS[c.method].title,
        "data": data_name(c.data),
        "model": c.model.removesuffix("/16") if c.model.startswith("mnist-cnn") else c.model,
        "training images": "all" if c.limit is None else f"{c.limit:,}",
        "pseudo-labelled images": "some" if c.extra or c.preset.startswith("table6.3/") else "none",
        "epochs": f"{c.epochs}",
        "alpha": f"{c.alpha:g}",
        **(dict.fromkeys(attack, "none") if not c.objective.attacks else attack),
        "beta": "none" if c.kl_weight is None else f"{c.kl_weight:g}",
        "lr": f"{c.peak_lr:g}",
        "beta2": "none" if c.optimizer == "sgd" else f"{c.beta2:g}",
        "lr drops": drops,
        "crops": c.crop or "padded",
        "on overfitting": c.overfitting_alarm if c.overfitting_alarm in ("stop", "rollback") else "go on",
        **{name: _text(getattr(c, option)) for name, option in PLAIN.items()},
    }


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "default" if value is None else f"{value:g}" if isinstance(value, (int, float)) else str(value)


def differences(run: Run, source: Config) -> list[str]:
    """Settings of `run` that differ from `source`, whose own are in brackets, and how far it is, where it is unfinished."""
    ours, theirs = settings(run.config), settings(source)
    found = [f"{name} {ours[name]} ({theirs[name]})" for name in ours if ours[name] != theirs[name]]
    if not run.finished:
        found.append(f"stopped after {run.epochs:.3g} of its {run.config.epochs} epochs")
    return found

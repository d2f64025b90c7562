"""Where a run was trained otherwise than in the source."""

from collections.abc import Callable

from ..config import Config
from .runs import METHODS, Run, data_name, format_eps


def _attack(text: Callable[[Config], str]) -> Callable[[Config], str]:
    """A setting of the attack in training, which standard training does not have."""
    return lambda c: "none" if c.method == "standard" else text(c)


def _option(name: str) -> Callable[[Config], str]:
    """A number or a switch. "default" where it follows from the data."""
    words = {None: "default", True: "on", False: "off"}
    return lambda c: words[value] if (value := getattr(c, name)) is None or isinstance(value, bool) else f"{value:g}"


def _drops(c: Config) -> str:
    """In percent of the epochs."""
    return ", ".join(f"{100 * epoch / c.epochs:.0f} %" for epoch in c.lr_drops) if c.schedule == "piecewise" else "none"


READINGS: dict[str, Callable[[Config], str]] = {  # the settings that change the weights, by name, as text
    "method": lambda c: METHODS[c.method],
    "data": lambda c: data_name(c.data),
    "model": lambda c: "mnist-cnn" if c.model == "mnist-cnn/16" else c.model,
    "training images": lambda c: "all" if c.limit is None else f"{c.limit:,}",
    "held-out images": _option("holdout"),
    "padding before crops": _option("pad"),
    "flips": _option("flip"),
    "pseudo-labelled images": lambda c: "some" if c.extra or c.preset.startswith("table6.3/") else "none",
    "epochs": lambda c: f"{c.epochs}",
    "alpha": lambda c: f"{c.alpha:g}",
    "eps": _attack(lambda c: format_eps(c.eps)),
    "attack steps": _attack(lambda c: f"{c.attack_settings[2]}"),
    "step size": _attack(lambda c: format_eps(255 * c.attack_settings[1])),
    "start": _attack(lambda c: c.attack_settings[3]),
    "inner loss": _attack(lambda c: c.inner_loss),
    "mode in attacks": _attack(lambda c: c.bn_mode),
    "forwards": lambda c: c.forwards,
    "beta": lambda c: f"{c.kl_weight:g}" if c.method in ("trades", "rst", "mart") else "none",
    "optimiser": lambda c: c.optimizer,
    "lr": lambda c: f"{c.peak_lr:g}",
    "schedule": lambda c: c.schedule,
    "lr drops": _drops,
    "momentum": _option("momentum"),
    "Nesterov": _option("nesterov"),
    "batch size": lambda c: f"{c.batch_size}",
    "weight decay": _option("weight_decay"),
    "decay of biases and norms": _option("decay_norm"),
    "weight averaging": _option("ema"),
    "AWP": _option("awp"),
    "label smoothing": _option("label_smoothing"),
    "activation": lambda c: c.activation,
    "normalisation": lambda c: "none" if c.mean is None else f"{c.mean}, {c.std}",
    "first weights": lambda c: "random" if c.init is None else f"{c.init}",
    "precision": lambda c: c.precision,
}


def differences(run: Run, source: Config) -> list[str]:
    """Settings of `run` that differ from `source`, whose own are in brackets, and how far it is, where it is unfinished."""
    settings = [(name, text(run.config), text(source)) for name, text in READINGS.items()]
    found = [f"{name} {ours} ({theirs})" for name, ours, theirs in settings if ours != theirs]
    if not run.finished:
        found.append(f"stopped after {run.epochs:.3g} of its {run.config.epochs} epochs")
    return found

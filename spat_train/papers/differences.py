"""Where a run was trained otherwise than in the source."""

from ..config import Config
from ..objectives import METHODS
from .runs import Run, data_name, format_eps

PLAIN = {  # by name, the options whose value is shown as it is
    "held-out images": "holdout", "padding before crops": "pad", "flips": "flip", "forwards": "forwards",
    "optimiser": "optimizer", "schedule": "schedule", "momentum": "momentum", "Nesterov": "nesterov", "batch size": "batch_size",
    "weight decay": "weight_decay", "decay of biases and norms": "decay_norm", "weight averaging": "ema", "AWP": "awp",
    "label smoothing": "label_smoothing", "activation": "activation", "mean": "mean", "std": "std", "first weights": "init",
    "precision": "precision",
}  # fmt: skip


def settings(c: Config) -> dict[str, str]:
    """What changes the weights, as text, with the defaults filled in that follow from other options."""
    _, step_size, steps, start = c.attack_settings
    drops = ", ".join(f"{100 * epoch / c.epochs:.0f} %" for epoch in c.lr_drops) if c.schedule == "piecewise" else "none"
    attack = {
        "eps": format_eps(c.eps), "attack steps": f"{steps}", "step size": format_eps(255 * step_size), "start": start,
        "inner loss": c.inner_loss, "mode in attacks": c.bn_mode,
    }  # fmt: skip
    return {
        "method": METHODS[c.method].title,
        "data": data_name(c.data),
        "model": c.model.removesuffix("/16") if c.model.startswith("mnist-cnn") else c.model,
        "training images": "all" if c.limit is None else f"{c.limit:,}",
        "pseudo-labelled images": "some" if c.extra or c.preset.startswith("table6.3/") else "none",
        "epochs": f"{c.epochs}",
        "alpha": f"{c.alpha:g}",
        **(dict.fromkeys(attack, "none") if c.method == "standard" else attack),
        "beta": "none" if c.kl_weight is None else f"{c.kl_weight:g}",
        "lr": f"{c.peak_lr:g}",
        "lr drops": drops,
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

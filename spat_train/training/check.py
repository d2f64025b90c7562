"""Refuses the options of a run that do not fit, before any work. One line each: option, value, remedy."""

import math
from collections.abc import Callable
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from spat_kernels import losses

from ..config import Config, check_device
from ..errors import InputError, check_eps, check_seed
from ..models.external import import_own

Need = Callable[[bool, str, str], None]  # (condition, option, remedy)


def check(config: Config) -> None:
    """Raise InputError for an option that does not fit, or not with the others."""

    def need(condition: bool, option: str, remedy: str) -> None:
        if not condition:
            raise InputError(f"--{option.replace('_', '-')} {getattr(config, option)}: {remedy}")

    for option, choices in CHOICES.items():
        need(getattr(config, option) in choices, option, f"choose one of {', '.join(map(str, choices))}")
    check_numbers(config, need)
    check_objective(config, need)
    check_schedule(config, need)
    check_hardware(config, need)


def _choices(kind: object) -> tuple:
    """The values that a Literal, or an optional one, allows."""
    parts = [kind] if get_origin(kind) is Literal else [part for part in get_args(kind) if get_origin(part) is Literal]
    return tuple(choice for part in parts for choice in get_args(part)) + (None,) * (type(None) in get_args(kind) and bool(parts))


CHOICES = {name: _choices(kind) for name, kind in get_type_hints(Config).items() if _choices(kind)}


def check_numbers(c: Config, need: Need) -> None:
    for option in ("epochs", "batch_size", "val_every", "val_steps", "log_every"):
        need(getattr(c, option) >= 1, option, "give at least 1")
    for option in ("steps", "limit", "patience", "image_size", "eval_batch_size"):
        need(getattr(c, option) is None or getattr(c, option) >= 1, option, "give at least 1, or leave it out")
    for option in ("holdout", "pad"):
        need(getattr(c, option) is None or getattr(c, option) >= 0, option, "give at least 0, or leave it out")
    for option in ("workers", "awp_warmup"):
        need(getattr(c, option) >= 0, option, "give at least 0")
    for option in ("alpha", "extra_fraction", "label_smoothing", "momentum", "ema"):
        need(0 <= getattr(c, option) <= 1, option, "give a number in [0, 1]")
    for option in ("lr", "gamma", "checkpoint_minutes"):
        need(0 < getattr(c, option) < math.inf, option, "give a number above 0")
    for option in ("weight_decay", "warmup", "awp", "beta"):
        value = getattr(c, option)
        need(value is None or 0 <= value < math.inf, option, "give a number of at least 0")
    need(c.momentum < 1, "momentum", "give a number below 1")
    need(c.ema < 1, "ema", "give a decay below 1, such as 0.9995")
    check_seed(c.seed)
    check_eps("--eps", c.eps)
    check_eps("--eval-eps", c.eval_eps)
    check_eps("--step-size", c.step_size, least=0.05)


def check_objective(c: Config, need: Need) -> None:
    """The method, its attack, and the images that it needs."""
    try:
        import_own(c.model)  # it may register the loss
    except ValueError as error:
        raise InputError(f"--model {c.model}: {error}") from error
    smoothed = c.inner_loss in losses.ALIASES
    need(smoothed or c.alpha == 0, "inner", f"alpha = {c.alpha} needs lsce: leave out --inner, or --alpha")
    try:
        maximised = c.maximised
    except ValueError as error:
        raise InputError(f"--inner {c.inner}: {error}") from error
    method = c.objective
    need(method.attacks or c.alpha == 0, "alpha", f"{c.method} training attacks nothing: choose another --method")
    vanishes = maximised.needs_random_start and c.attack_settings.start == "clean"
    need(not vanishes, "start", f"the gradient of {c.inner_loss} is 0 at x itself: choose uniform or normal")
    needs_extra = method.needs_extra or c.preset.startswith("table6.3/")
    need(c.extra is not None or not needs_extra, "extra", "this needs pseudo-labelled images: give RST's pickle, or an .npz")
    need(c.extra is None or 0 < c.extra_fraction < 1, "extra_fraction", "give a number between 0 and 1, such as 0.5")
    labelled = round(c.batch_size * (1 - c.extra_fraction))
    need(c.extra is None or 0 < labelled < c.batch_size, "extra_fraction", f"of {c.batch_size} images it leaves one kind none")
    need(c.beta is None or method.beta is not None, "beta", f"{c.method} has no KL term: leave it out")
    single = len(method.reads) == 1
    need(not single or c.forwards == "clean-adv", "forwards", f"{c.method} has one forward: give clean-adv")
    need(c.awp > 0 or not c.awp_warmup, "awp_warmup", "it needs --awp")


def check_schedule(c: Config, need: Need) -> None:
    need(not c.nesterov or (c.momentum > 0 and c.optimizer == "sgd"), "nesterov", "it is SGD's, with a momentum above 0")
    need(c.schedule != "one-cycle" or c.warmup == 0, "warmup", "one-cycle warms up by itself: leave it out")
    need(c.warmup < c.epochs, "warmup", f"it must be shorter than the {c.epochs} epochs")
    rising = list(c.lr_drops) == sorted(set(c.lr_drops)) and min(c.lr_drops, default=1) >= 1
    need(rising, "milestones", "give rising epochs, counted from 1, such as 75 90")
    late = c.schedule == "piecewise" and max(c.lr_drops, default=0) > c.epochs
    need(not late, "milestones", f"not all come by epoch {c.epochs}: give others, or --milestones None for 75 % and 90 % of them")
    need(c.patience is None or c.holdout != 0, "patience", "it needs held-out images: give --holdout")


def check_hardware(c: Config, need: Need) -> None:
    check_device(c.device)
    cuda = c.device.startswith("cuda") if c.device else torch.cuda.is_available()
    for option in ("precision", "attack_precision"):
        need(cuda or getattr(c, option) != "tf32", option, "TF32 is for GPUs: use fp32 or bf16")
    need(cuda or not c.sync_bn, "sync_bn", "PyTorch has it for GPUs alone: leave it out")

"""Refuses the options of a run that do not fit, before any work. One line each: option, value, remedy."""

import math
from collections.abc import Callable
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from spat_kernels import losses

from ..config import Config, check_device
from ..data.sizes import parse_sizes
from ..errors import InputError, check_eps, check_seed
from ..models.external import import_own
from ..runtime import trackers

# options, what holds for their values unless these are None, remedy
RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    ("epochs batch_size accumulate val_steps log_every", lambda v: v >= 1, "give at least 1"),
    ("val_every", lambda v: v >= 1, "give at least 1, or --holdout 0 for no validation"),
    (
        "steps limit patience image_size eval_batch_size replays inner_samples",
        lambda v: v >= 1,
        "give at least 1, or leave it out",
    ),
    ("holdout pad", lambda v: v >= 0, "give at least 0, or leave it out"),
    ("workers awp_warmup", lambda v: v >= 0, "give at least 0"),
    ("alpha extra_fraction label_smoothing momentum beta2 ema", lambda v: 0 <= v <= 1, "give a number in [0, 1]"),
    ("lr gamma checkpoint_minutes inner_lr", lambda v: 0 < v < math.inf, "give a number above 0"),
    ("weight_decay warmup awp beta entropy", lambda v: 0 <= v < math.inf, "give a number of at least 0"),
    ("momentum beta2", lambda v: v < 1, "give a number below 1"),
    ("layer_decay", lambda v: 0 < v <= 1, "give a number in (0, 1], such as 0.8"),
    ("ema", lambda v: v < 1, "give a decay below 1, such as 0.9995"),
]


def check(c: Config) -> None:
    """Raise InputError for an option that does not fit, or not with the others."""

    def need(condition: bool, option: str, remedy: str) -> None:
        if not condition:
            raise InputError(f"--{option.replace('_', '-')} {getattr(c, option)}: {remedy}")

    for option, kind in get_type_hints(Config).items():
        if choices := _choices(kind):
            need(getattr(c, option) in choices, option, f"choose one of {', '.join(map(str, choices))}")
    for options, holds, remedy in RANGES:
        for option in options.split():
            value = getattr(c, option)
            need(value is None or holds(value), option, remedy)
    check_seed(c.seed)
    for option, value, least in (("--eps", c.eps, 0.5), ("--eval-eps", c.eval_eps, 0.5), ("--step-size", c.step_size, 0.05)):
        check_eps(option, value, least)
    check_device(c.device)
    trackers.chosen(c.track)
    sizes = parse_sizes(c.train_sizes)
    late = bool(sizes) and sizes[-1][1] > c.epochs
    need(not late, "train_sizes", f"{sizes[-1][0] if late else ''} would begin after the last epoch, {c.epochs}: give others")
    try:
        import_own(c.model)  # it may register the loss
    except ValueError as error:
        raise InputError(f"--model {c.model}: {error}") from error
    for condition, option, remedy in _relations(c):
        need(condition, option, remedy)


def _choices(kind: object) -> tuple:
    """The values that a Literal, or an optional one, allows; () for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next(((*get_args(part), None) for part in get_args(kind) if get_origin(part) is Literal), ())


def _relations(c: Config) -> list[tuple[bool, str, str]]:
    """What must hold between options: (whether it does, the option that does not fit, remedy)."""
    method, labelled = c.objective, round(c.batch_size * (1 - c.extra_fraction))
    smoothed = c.inner_loss in losses.ALIASES
    needs_extra = method.needs_extra or c.preset.startswith("table6.3/")
    drops, last_drop = list(c.lr_drops), max(c.lr_drops, default=0)
    rising = drops == sorted(set(drops)) and min(drops, default=1) >= 1
    late = f"not all come by epoch {c.epochs}: give others, or --milestones None for 75 % and 90 % of them"
    augmented = c.rand_augment
    unwatched, start = c.catastrophic_overfitting in (None, "off"), c.attack_settings.start
    one_step = method.attacks and method.steps == 1  # by its definition; with more steps it would be another method
    pgd = f"{c.method} takes one step: leave it out, or give --method madry --start {start} for PGD on CE(x')"
    pgd_steps = c.attack == "pgd"
    gpu = c.device.startswith("cuda") if c.device else torch.cuda.is_available()
    try:
        vanishes = (smoothed or c.alpha == 0) and c.maximised.needs_random_start and start == "clean"
    except ValueError as error:
        raise InputError(f"--inner {c.inner}: {error}") from error
    return [
        # the method, its attack, and the images that it needs
        (smoothed or c.alpha == 0, "inner", f"alpha = {c.alpha} needs lsce: leave out --inner, or --alpha"),
        *((getattr(c, o) == getattr(Config, o), o, f"{c.method} {why}: {_unset(o)}") for o, why in method.idle.items()),
        (not one_step or c.steps in (None, 1), "steps", pgd),
        (pgd_steps or not one_step, "attack", f"{c.method} takes a step of its own: give --method madry, or leave it out"),
        (pgd_steps or c.step_size is None, "step_size", "apgd chooses its own: leave it out"),
        (pgd_steps or start in ("uniform", "clean"), "start", "apgd has clean and uniform: choose one of these"),
        (c.train_sizes is None or method.replays is None, "train_sizes", f"{c.method} keeps perturbations: leave it out"),
        (not vanishes, "start", f"the gradient of {c.inner_loss} is 0 at x itself: choose uniform, normal or wide"),
        (c.extra is not None or not needs_extra, "extra", "this needs pseudo-labelled images: give RST's pickle, or an .npz"),
        (c.extra is None or 0 < c.extra_fraction < 1, "extra_fraction", "give a number between 0 and 1, such as 0.5"),
        (c.extra is None or 0 < labelled < c.batch_size, "extra_fraction", f"of {c.batch_size} images it leaves one kind none"),
        (method.classifier in ("linear", c.last_layer), "classifier", f"{c.method} needs distances to centres: leave it out"),
        (c.awp > 0 or not c.awp_warmup, "awp_warmup", "it needs --awp"),
        (c.crop != "resized" or not c.pad, "pad", "--crop resized has no padding: leave out either"),
        (not augmented or (augmented[0] >= 1 and 0 <= augmented[1] <= 30), "rand_augment", "give 1 or more, and 0 to 30: 2 9"),
        # the optimiser and the schedule
        (c.beta2 == Config.beta2 or c.optimizer != "sgd", "beta2", f"it is Adam's: {_unset('beta2')}"),
        (not c.nesterov or (c.momentum > 0 and c.optimizer == "sgd"), "nesterov", "it is SGD's, with a momentum above 0"),
        (c.schedule not in ("one-cycle", "cyclic") or c.warmup == 0, "warmup", f"{c.schedule} warms up by itself: leave it out"),
        (c.warmup < c.epochs, "warmup", f"it must be shorter than the {c.epochs} epochs: give --warmup 0"),
        (rising, "milestones", "give rising epochs, counted from 1, such as 75 90"),
        (c.schedule != "piecewise" or last_drop <= c.epochs, "milestones", late),
        (c.patience is None or c.holdout != 0, "patience", "it needs held-out images: give --holdout"),
        (unwatched or c.holdout != 0, "catastrophic_overfitting", "it needs held-out images: give --holdout"),
        (unwatched or method.attacks, "catastrophic_overfitting", f"{c.method} training attacks nothing: leave it out"),
        # the hardware
        (gpu or c.precision != "tf32", "precision", "TF32 is for GPUs: use fp32 or bf16"),
        (gpu or c.attack_precision != "tf32", "attack_precision", "TF32 is for GPUs: use fp32 or bf16"),
        (
            not (c.compile and c.checkpoint_activations),
            "checkpoint_activations",
            "--compile recomputes by itself: leave out one",
        ),
        (not (c.fsdp and c.compile), "fsdp", "it works without --compile: leave out one"),
        (not c.fsdp or c.input_gradient != "plan", "fsdp", "the plan reads whole weights: give --input-gradient auto"),
        (not c.fsdp or c.precision != "fp16", "fsdp", "it does not scale the loss, as fp16 needs: give --precision bf16"),
        (not c.fsdp or c.overfitting_alarm != "rollback", "fsdp", "it cannot roll back: give --catastrophic-overfitting stop"),
        (gpu or not c.sync_bn, "sync_bn", "PyTorch has it for GPUs alone: leave it out"),
    ]


def _unset(option: str) -> str:
    """How to leave out an option, which a preset may have set."""
    return f"leave it out, or give {getattr(Config, option)}"

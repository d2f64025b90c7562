"""PGD as functions, one call an attack: `pgd_ls` (SPAT), `pgd`, `pgd_kl` (TRADES), `fgsm` and `cw_linf`."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import checks
from ..losses import KLDivergence, LabelSmoothedCE, LossLike, Margin
from ..settings import BNMode, CommonSettings, Fuse, GradientPath, Graph, Norm, PGDSettings, Precision, Select, Stop
from .pgd import PGD

LEAST_ALPHA = 0.02  # below it stands for a step size, as other libraries call it
OTHER_NAMES = {
    "alpha": "step_size (the label smoothing alpha is that of pgd_ls)", "epsilon": "eps", "x_init": "start", "init": "start",
    "num_steps": "steps", "iters": "steps", "max_iter": "steps",
}  # fmt: skip


def pgd_ls(
    model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    alpha: float,
    *,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    random_start: bool = True,
    norm: Norm = "linf",
    targeted: bool = False,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    precision: Precision | None = None,
    input_gradient: GradientPath = "auto",
    fuse: Fuse = "auto",
    bn_mode: BNMode = "eval",
    select: Select = "success",
    stop: Stop | None = None,
    budget: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    graph: Graph = "auto",
    start: Tensor | None = None,
) -> Tensor:
    """PGD on label-smoothed cross-entropy: the training examples of SPAT (thesis, Eq. 4.1-4.3).

    `alpha` in [0, 1] is the label smoothing (not the step size): the label gets 1 - alpha, every other class alpha / (K - 1).
    0 is cross-entropy; the larger, the weaker the attack, and above (K - 1) / K the label gets less than the others. The thesis
    takes 0.1 for TRADES, 0.1 to 0.3 for MART, and 0.2 for Madry's networks on MNIST. Where p_y > 1 - alpha this loss pulls
    *towards* the true class: it makes training examples that keep their meaning, and is too weak to measure robustness with (use
    `pgd`, `cw_linf` and AutoAttack).

    The other arguments, the result, errors and warnings are those of `PGD`.
    """
    loss = LabelSmoothedCE(alpha)
    if 0 < alpha < LEAST_ALPHA:
        checks.warn(f"alpha={alpha:g} is a label smoothing, which changes next to nothing: step_size is the length of a step")
    attack = PGD(
        eps, loss=loss, steps=steps, step_size=step_size, random_start=random_start, norm=norm,
        targeted=targeted, restarts=restarts, bounds=bounds, precision=precision, input_gradient=input_gradient, fuse=fuse,
        bn_mode=bn_mode, select=select, stop=stop, budget=budget, generator=generator, graph=graph,
    )  # fmt: skip
    return attack(model, x, y, start=start)


def pgd(
    model,
    x: Tensor,
    y: Tensor | None,
    eps: float | Tensor,
    *,
    loss: LossLike = "ce",
    start: Tensor | None = None,
    **settings: Unpack[PGDSettings],
) -> Tensor:
    """PGD on `loss`: a name, an object of `losses`, or a callable. Everything else as in `PGD`, which `settings` go to."""
    return _attack("pgd", eps, loss=loss, **settings)(model, x, y, start=start)


def pgd_kl(
    model, x: Tensor, y: Tensor | None, eps: float | Tensor, *, start: Tensor | None = None, **settings: Unpack[PGDSettings]
) -> Tensor:
    """PGD on KL(p(x) || p(x_adv)), the inner attack of TRADES (arXiv 1901.08573). y may be None. `settings` as in `pgd`."""
    return _attack("pgd_kl", eps, loss=KLDivergence(), **settings)(model, x, y, start=start)


def fgsm(
    model,
    x: Tensor,
    y: Tensor | None,
    eps: float | Tensor,
    *,
    loss: LossLike = "ce",
    step_size: float | Tensor | None = None,
    random_start: bool = False,
    start: Tensor | None = None,
    **settings: Unpack[CommonSettings],
) -> Tensor:
    """One step of length eps (or `step_size`), by default from x itself (Goodfellow et al., arXiv 1412.6572).

    `settings` as in `pgd`, except `steps`.
    """
    step_size = eps if step_size is None else step_size
    attack = _attack("fgsm", eps, loss=loss, steps=1, step_size=step_size, random_start=random_start, **settings)
    return attack(model, x, y, start=start)


def cw_linf(
    model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    kappa: float = 50.0,
    steps: int = 30,
    step_size: float | Tensor | None = None,
    random_start: bool = True,
    start: Tensor | None = None,
    **settings: Unpack[CommonSettings],
) -> Tensor:
    """C&W-infinity: PGD on the margin loss (Madry et al., section 5; the thesis runs it for 30 steps).

    kappa = 0 stops at the first misclassification; 50 continues as the public code does. `settings` as in `pgd`.
    """
    attack = _attack("cw_linf", eps, loss=Margin(kappa), steps=steps, step_size=step_size, random_start=random_start, **settings)
    return attack(model, x, y, start=start)


def _attack(function: str, eps: float | Tensor, **settings: Any) -> PGD:
    """`PGD` with these settings, of which one that it does not know is an error of `function`."""
    known = {field.name for field in fields(PGD)}
    for name in settings.keys() - known:
        near = OTHER_NAMES.get(name) or next(iter(get_close_matches(name, known, n=1)), None)
        hint = f"use {near}" if near else f"see help(spat_kernels.{function})"
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}: {hint}")
    return PGD(eps, **settings)

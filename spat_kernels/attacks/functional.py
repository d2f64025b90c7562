"""PGD as functions, one call an attack: `pgd_ls` (SPAT), `pgd`, `pgd_kl` (TRADES), `fgsm` and `cw_linf`."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..losses import KLDivergence, LabelSmoothedCE, LossLike, Margin
from ..settings import BNMode, CommonSettings, Fuse, GradientPath, Graph, Norm, PGDSettings, Precision, Select, Stop
from .pgd import PGD


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
    0 is cross-entropy. Where p_y > 1 - alpha this loss pulls *towards* the true class: it makes training examples that keep their
    meaning, and is too weak to measure robustness with (use `pgd`, `cw_linf` and AutoAttack).

    The other arguments, the result, errors and warnings are those of `PGD`.
    """
    attack = PGD(
        eps, loss=LabelSmoothedCE(alpha), steps=steps, step_size=step_size, random_start=random_start, norm=norm,
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
    return PGD(eps, loss=loss, **settings)(model, x, y, start=start)


def pgd_kl(
    model, x: Tensor, y: Tensor | None, eps: float | Tensor, *, start: Tensor | None = None, **settings: Unpack[PGDSettings]
) -> Tensor:
    """PGD on KL(p(x) || p(x_adv)), the inner attack of TRADES (arXiv 1901.08573). y may be None. `settings` as in `pgd`."""
    return pgd(model, x, y, eps, loss=KLDivergence(), start=start, **settings)


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
    attack = PGD(eps, loss=loss, steps=1, step_size=step_size, random_start=random_start, **settings)
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
    attack = PGD(eps, loss=Margin(kappa), steps=steps, step_size=step_size, random_start=random_start, **settings)
    return attack(model, x, y, start=start)

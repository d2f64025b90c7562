"""Which path an attack takes through a model: the input-gradient plan where the model allows it, else autograd."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import checks
from ..model_state.borrow import borrowed
from ..precision import half_dtype
from ..settings import BN_MODES, GRADIENT_PATHS, PRECISIONS, BNMode, Fuse, GradientPath, Precision
from .autograd import InputGradient
from .nodes import CannotPlan
from .plan_cache import plan_and_dtype, unwrapped
from .planned_gradient import PlannedGradient


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        path: "plan" or "autograd".
        reason: why not the plan, "" where it is taken.
        dtype: what the convolutions run in: a torch dtype, or None where autograd leaves it to the model.
        plan: counts of what the plan consists of; {} without one.
        fused: what kernels do convolutions and the passes next to them, in sentences; () where there is nothing to choose.
    """

    path: str
    reason: str
    dtype: torch.dtype | None
    plan: dict[str, int] = field(default_factory=dict)
    fused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.path == "autograd":
            return f"autograd, because {self.reason}"
        counts = ", ".join(f"{count} {what}" for what, count in self.plan.items())
        return "; ".join((f"plan in {self.dtype}: {counts}", *self.fused))


def explain(
    model,
    x: Tensor,
    *,
    precision: Precision | None = None,
    input_gradient: GradientPath = "auto",
    fuse: Fuse = "auto",
    bn_mode: BNMode = "eval",
) -> Explanation:
    """Which path an attack with these settings takes on `model` at images like `x` [B, ...], and why.

    Where kernels may do convolutions together with their passes, they are chosen now, for a batch like this one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.
    """
    check_path(precision, input_gradient)
    checks.check_auto_or_flag("fuse", fuse)
    checks.check_choice("bn_mode", bn_mode, BN_MODES)
    checks.check_images(x)
    checks.check_model(model, x)
    check_precision(precision, x)
    if len(x) == 0:
        raise ValueError("x holds no image: give at least one like those to attack")
    with torch.inference_mode(False), torch.no_grad(), borrowed(model, bn_mode):
        x = x.detach().clone() if x.is_inference() else x.detach()
        try:
            if input_gradient == "autograd":
                raise CannotPlan("input_gradient='autograd' asks for it")
            plan, dtype = plan_and_dtype(model, x, precision)
        except CannotPlan as reason:
            return Explanation("autograd", str(reason), half_dtype(precision, x.device.type))
        gradient = PlannedGradient(plan, unwrapped(model), x.dtype, dtype, len(x), precision, fuse=fuse)
        fused = _explain_fused(gradient, x) if gradient.engines.active else ()
    return Explanation("plan", "", dtype, plan.summary(), fused)


def _explain_fused(gradient: PlannedGradient, x: Tensor) -> tuple[str, ...]:
    """Which engines do the convolutions, after one forward and backward in which they are chosen."""
    with gradient.arithmetic(x.device.type):
        gradient.prepare()
        logits = gradient.forward(x)
        gradient.backward(torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=x.device).view_as(logits))
    return gradient.engines.describe(gradient.plan.steps)


def check_path(precision: Precision | None, input_gradient: GradientPath) -> None:
    checks.check_choice("precision", precision, (None, *PRECISIONS))
    checks.check_choice("input_gradient", input_gradient, GRADIENT_PATHS)


def check_precision(precision: Precision | None, x: Tensor) -> None:
    """That `precision` goes with the images."""
    if precision is not None and x.dtype != torch.float32:
        raise ValueError(f"precision={precision!r} is for float32 images, got {x.dtype}: use x.float(), or precision=None")
    if precision == "tf32" and x.device.type != "cuda":
        raise ValueError(f"precision='tf32' is for CUDA tensors, x is on {x.device}: use precision='fp32'")


def input_gradient(
    model,
    x: Tensor,
    path: GradientPath = "auto",
    precision: Precision | None = None,
    highest_label: int = -1,
    fuse: Fuse = "auto",
) -> InputGradient | PlannedGradient:
    """The way to differentiate `model`, which is borrowed (frozen, in the mode of the attack), at images like `x`.

    Raises:
        ValueError: `path` is "plan" and the model does not take it.
    """
    if path != "autograd":
        try:
            plan, dtype = plan_and_dtype(model, x, precision)
            return PlannedGradient(plan, unwrapped(model), x.dtype, dtype, len(x), precision, highest_label, fuse)
        except CannotPlan as reason:
            if path == "plan":
                raise ValueError(f"input_gradient='plan', but {reason}: use 'auto' or 'autograd'") from reason
    return InputGradient(model, precision, highest_label, x)

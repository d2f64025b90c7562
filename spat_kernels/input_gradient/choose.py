"""Which path an attack takes through a model: the input-gradient plan where the model allows it, else what is asked for: compiled
graphs, or autograd."""

import sys
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import checks
from ..interrupts import deferred
from ..model_state.borrow import borrowed
from ..precision import half_dtype
from ..settings import BN_MODES, GRADIENT_PATHS, PRECISIONS, BNMode, Fuse, GradientPath, Precision
from .autograd import InputGradient
from .compiled import CannotCompile, CompiledGradient
from .nodes import CannotPlan
from .plan_cache import plan_and_dtype, unwrapped
from .planned_gradient import PlannedGradient


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        path: "plan", "compile" or "autograd".
        reason: why not the plan (and, where it was to be compiled, why it is not), "" where the plan is taken.
        dtype: what the convolutions run in: a torch dtype, or None where that is left to the model.
        plan: counts of what the plan consists of; {} without one.
        fused: what kernels do convolutions and the passes next to them, in sentences; () where there is nothing to choose.
    """

    path: str
    reason: str
    dtype: torch.dtype | None
    plan: dict[str, int] = field(default_factory=dict)
    fused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.path != "plan":
            no_plan = self.path == "compile" and not self.reason.startswith("input_gradient=")
            return f"{self.path}, because {'there is no plan: ' * no_plan}{self.reason}"
        counts = ", ".join(f"{count} {what}" for what, count in self.plan.items() if count or what == "left to autograd")
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

    A plan is made at the first call, or attack, for a model and a size of images, which takes seconds. Where kernels may do
    convolutions together with their passes, they are chosen now, for a batch like this one. Where the model is to be compiled,
    that is done now, and attacks on batches like this one need not wait for it.

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
    with deferred, torch.inference_mode(False), torch.no_grad(), borrowed(model, bn_mode):
        x = x.detach().clone() if x.is_inference() else x.detach()
        try:
            if input_gradient in ("compile", "autograd"):
                raise CannotPlan(f"input_gradient={input_gradient!r} asks for it")
            plan, dtype = plan_and_dtype(model, x, precision)
        except CannotPlan as reason:
            path, why = "autograd", str(reason)
            if _is_to_compile(model, input_gradient):
                failure = _compile(model, x, precision)
                path, why = ("autograd", f"torch.compile fails: {failure}") if failure else ("compile", why)
            return Explanation(path, why, half_dtype(precision, x.device.type))
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


def _compile(model, x: Tensor, precision: Precision | None) -> str | None:
    """Compile `model`, borrowed, for batches like x. Returns why that fails, or None."""
    try:
        gradient = CompiledGradient(model, x, precision)
        with gradient.arithmetic(x.device.type):
            gradient.prepare()
            gradient.forward(x)
    except CannotCompile as reason:
        return str(reason)
    return gradient.failure


def compile_auto() -> bool:
    """`spat_kernels.compile_auto`, as it is set now.

    Raises:
        TypeError: it is no bool.
    """
    value = sys.modules["spat_kernels"].compile_auto
    checks.check_flag("spat_kernels.compile_auto", value)
    return value


def _is_to_compile(model, path: GradientPath) -> bool:
    """Whether a model without a plan is to be compiled."""
    return path == "compile" or (path == "auto" and compile_auto() and isinstance(model, nn.Module))


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

    Warns:
        RuntimeWarning: the model is to be compiled and cannot be.
    """
    if path in ("auto", "plan"):
        try:
            plan, dtype = plan_and_dtype(model, x, precision)
            return PlannedGradient(plan, unwrapped(model), x.dtype, dtype, len(x), precision, highest_label, fuse)
        except CannotPlan as reason:
            if path == "plan":
                raise ValueError(f"input_gradient='plan', but {reason}: use 'auto', 'compile' or 'autograd'") from reason
    if _is_to_compile(model, path):
        with suppress(CannotCompile):  # a warning says so
            return CompiledGradient(model, x, precision, highest_label)
    return InputGradient(model, precision, highest_label, x)

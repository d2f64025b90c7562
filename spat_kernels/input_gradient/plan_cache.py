"""Plans, made once for a model and an image size, and compared with autograd before they are used."""

import weakref
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import interrupts, rng
from ..model_state.structure import Structure
from ..precision import HALVES, arithmetic, half_dtype
from ..settings import Precision
from .autograd import InputGradient
from .nodes import CannotPlan
from .plan import Plan
from .planned_gradient import PlannedGradient
from .trace import check_hooks, first_line, trace

IMAGE_SIZES = 16  # for which plans of a model are kept
TRIES = 3  # at a trace during which nobody draws random numbers on the host: other threads may

_plans: "weakref.WeakKeyDictionary[nn.Module, dict]" = weakref.WeakKeyDictionary()
_lock = interrupts.lock()


def plan_and_dtype(model, x: Tensor, precision: Precision | None) -> tuple[Plan, torch.dtype]:
    """The plan of `model` for images like `x`, and what its convolutions run in.

    Raises:
        CannotPlan: with the reason.
    """
    if not isinstance(model, nn.Module):
        raise CannotPlan("it is a plain callable and no torch.nn.Module")
    inner = unwrapped(model)
    dtype = _weights_dtype(inner, x)
    plan = _plan(inner, x)
    half = half_dtype(precision, x.device.type)
    if half and dtype == torch.float32 and not plan.all_exact:
        dtype = half
    if dtype in HALVES:
        with _lock:
            if dtype not in plan.half_errors:
                plan.half_errors[dtype] = plan.no_half or _half_error(plan, inner, x, dtype)
        if reason := plan.half_errors[dtype]:
            raise CannotPlan(f"in half precision {reason}")
    return plan, dtype


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP, DataParallel and torch.compile, whose work an attack does not need."""
    while True:
        if type(model) in (nn.parallel.DistributedDataParallel, nn.DataParallel):
            inner = model.get_submodule("module")
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
            inner = model.get_submodule("_orig_mod")
        else:
            return model
        check_hooks(model)
        model = inner


def _weights_dtype(model: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype of the model's weights, if they are all alike and fit the images."""
    kinds = {(p.dtype, p.device) for p in model.parameters()}
    if kinds != {(x.dtype, x.device)}:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none at all"
        raise CannotPlan(f"its parameters are {found} for images in {x.dtype} on {x.device}")
    return x.dtype


def is_planned(model, x: Tensor) -> bool:
    """Whether a plan has been made for images like `x`. Whether it still fits the model is not looked at."""
    try:
        plans = _plans.get(unwrapped(model), {}) if isinstance(model, nn.Module) else {}
    except CannotPlan:  # it has hooks
        return False
    return isinstance(plans.get(_like(x), (None, None))[1], Plan)


def _like(x: Tensor) -> tuple:
    return tuple(x.shape[1:]), x.dtype


def _plan(model: nn.Module, x: Tensor) -> Plan:
    key = _like(x)
    with _lock:
        structure, made = _plans.setdefault(model, {}).get(key, (None, None))
        if structure is None or not structure.matches(model):
            try:
                structure, made = Structure(model, addresses=False), _make_plan(model, x)
            except TypeError as error:
                raise CannotPlan(str(error)) from error
            plans = _plans[model]
            plans[key] = structure, made
            if len(plans) > IMAGE_SIZES:
                del plans[next(iter(plans))]
    if isinstance(made, str):
        raise CannotPlan(made)
    return made


def _make_plan(model: nn.Module, x: Tensor) -> Plan | str:
    """A plan that gives what autograd gives on two of the images, or why there is none. No random number is lost."""
    exact = partial(arithmetic, "fp32" if x.dtype == torch.float32 else None, x.device.type, autocast=False)
    try:
        for _ in range(TRIES):
            random_states = rng.states()
            try:
                with exact(), torch.random.fork_rng([x.device] if x.is_cuda else []):
                    plan = Plan(trace(model, x))
            finally:
                drawn = rng.restore(random_states)
            if not drawn:
                with exact():
                    _compare(plan, model, _two(x))
                return plan
        return "its forward draws random numbers on the host, which the plan would not draw again"
    except CannotPlan as reason:
        return str(reason)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # autograd may still do it; `explain` gives this reason, and input_gradient="plan" raises it
        interrupts.reraise(error)
        return f"the plan fails on it: {first_line(error)}"


def _half_error(plan: Plan, model: nn.Module, x: Tensor, dtype: torch.dtype) -> str | None:
    """Why `plan` does not run in half precision `dtype`: not every function does."""
    try:
        with arithmetic(None, x.device.type, autocast=False):
            gradient = PlannedGradient(plan, model, x.dtype, dtype, len(x))
            gradient.prepare()
            gradient.backward(gradient.forward(_two(x)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        interrupts.reraise(error)
        return f"it fails: {first_line(error)}"
    return None


def _two(x: Tensor) -> Tensor:
    return x[torch.arange(2, device=x.device) % len(x)]


def _compare(plan: Plan, model: nn.Module, x: Tensor) -> None:
    """Compare the plan with autograd, since code may depend on what symbols do not show."""
    ours, theirs = PlannedGradient(plan, model, x.dtype, x.dtype, len(x)), InputGradient(model)
    ours.prepare()
    logits, expected = (v.forward(x).double().nan_to_num() for v in (ours, theirs))
    half = x.dtype in HALVES
    if (logits - expected).norm() > (0.1 if half else 0.001) * expected.norm():
        raise CannotPlan("the logits of the traced model are not those of the model itself")
    dlogits = torch.linspace(-1, 1, logits.numel(), device=x.device).view_as(logits)
    gradients = (v.backward(dlogits.to(dtype)).double() for v, dtype in ((ours, ours.logits_dtype), (theirs, x.dtype)))
    # By direction, since samples may be scaled. ReLUs so close to 0 that fp32 does not know their sign turn gradients a little.
    a, b = (F.normalize(g.nan_to_num().flatten(1), eps=1e-300) for g in gradients)
    if ((a - b).norm(dim=1) > (0.9 if half else 0.3)).any():
        raise CannotPlan("the input gradients of the traced model are not those of the model itself")

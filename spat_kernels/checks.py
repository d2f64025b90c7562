"""Checks of what a caller gives to an attack: each error names the argument, its value and the remedy."""

import math
import sys
import warnings
from collections.abc import Callable
from numbers import Real
from types import NoneType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .balls import box
from .settings import NORMS, Norm


def warn(text: str) -> None:
    """A RuntimeWarning, shown at the line of the caller's code that called into this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("spat_kernels", "torch", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def short(value) -> str:
    text = " ".join(repr(value).split())
    return f"{text[:60]}{'...' if len(text) > 60 else ''}"


def kind(value) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {short(value)}"


def check_choice(name: str, value, choices) -> None:
    """All choices are strings or None: what compares otherwise, such as an array, is none of them."""
    if not isinstance(value, (str, NoneType)) or value not in tuple(choices):
        raise ValueError(f"{name}={short(value)}: choose one of {', '.join(map(repr, choices))}")


def check_dense(name: str, t: Tensor) -> None:
    if t.is_nested or t.layout != torch.strided:
        found = "a nested one" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {found}: use {name}.to_dense()")


def as_float(value: Real) -> float:
    """Infinity for an int that no float reaches."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def as_norm(value):
    """ "linf", "l2" or "l1" of what other libraries call them, "Linf", "L2", "L1" and "L∞"; other values as they are."""
    name = value.lower().replace("∞", "inf") if isinstance(value, str) else ""
    return name if name in NORMS else value


def check_auto_or_flag(name: str, value) -> None:
    if not isinstance(value, bool) and not (isinstance(value, str) and value == "auto"):
        raise ValueError(f"{name}={short(value)}: choose one of 'auto', True, False")


def check_flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {kind(value)}")


def check_count(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {kind(value)}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def check_number(name: str, value, fits: Callable[[float], bool], where: str) -> None:
    """That `value` is a number, and one that `fits`. `where` says which do, as in "in [0, 1]"."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number {where}, got {kind(value)}")
    if not fits(as_float(value)):
        raise ValueError(f"{name}={short(value)} must be {where}")


def check_length(name: str, value) -> float:
    """The largest of a number or a tensor of numbers, finite and >= 0. Waits for the device of a tensor."""
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name} must be a number or a tensor with one value per sample, got {kind(value)}")
    if isinstance(value, Tensor):
        check_dense(name, value)
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a tensor of numbers, got {kind(value)}")
    values = torch.as_tensor(value if isinstance(value, Tensor) else as_float(value), dtype=torch.float64)
    least, most = torch.stack(values.aminmax()).tolist() if values.numel() else (0.0, 0.0)
    if not 0 <= least <= most < math.inf:  # NaN fails too
        raise ValueError(f"{name}={short(value)} must be finite and >= 0, in the units of x (8/255 for images in [0, 1])")
    return most


def check_budget(value) -> None:
    """None, an int, or int64 [B]."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.ndim > 1:
            raise TypeError(f"budget must be an int, or int64 [B] with one for each sample, got {kind(value)}")
        if value.numel() and int(value.min()) < 1:
            raise ValueError(f"budget={int(value.min())} must be at least 1: None is no limit")
    elif value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"budget must be an int, or int64 [B] with one for each sample, got {kind(value)}")
    elif value is not None and value < 1:
        raise ValueError(f"budget={value} must be at least 1: None is no limit")


def check_generator(generator) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {kind(generator)}: torch.Generator().manual_seed(0)")


def check_bounds(bounds) -> tuple[float, float]:
    """Two numbers, which may come as tensors without dimensions."""
    found = bounds if isinstance(bounds, (tuple, list)) else ()
    found = tuple(b.item() if isinstance(b, Tensor) and b.ndim == 0 else b for b in found)
    if len(found) != 2 or not all(isinstance(b, Real) for b in found) or not found[0] < found[1]:
        raise ValueError(f"bounds must be two numbers (lo, hi) with lo < hi, got {kind(bounds)}: use .item() on tensors")
    return found


def check_reach(name: str, eps: float, bounds: tuple[float, float], values: int = 1, norm: Norm = "l2") -> None:
    """Check `eps` against the diagonal of the box in L2 or L1. `values`: how many a sample has; 1 for L-infinity."""
    reach = (bounds[1] - bounds[0]) * (values if norm == "l1" else math.sqrt(values))
    if eps > reach:
        size = "width" if values == 1 else f"diagonal, {reach:g},"
        meant = f" ({eps:g}/255 for images in [0, 1])" if 1 < eps < 256 and tuple(bounds) == (0, 1) and norm != "l1" else ""
        raise ValueError(f"{name}={eps:g} exceeds the {size} of bounds={bounds}: it is in the units of x{meant}")


def check_range(low: float, high: float, bounds: tuple[float, float], dtype: torch.dtype, fixed: bool = False) -> None:
    """That images of `dtype` with values from `low` to `high` lie inside `bounds`, which are the caller's unless `fixed`."""
    lo, hi = box(bounds, dtype)
    if lo <= low and high <= hi:
        return
    over = max(lo - low, high - hi)
    if over <= 1e-3 * (hi - lo) < math.inf:
        raise ValueError(f"x exceeds bounds={bounds} by {over:.2g}, as de-normalising does: use x.clamp{bounds}")
    found, remedy = (
        f"values from {low:g} to {high:g}",
        "normalise inside the model, nn.Sequential(spat_kernels.Normalize(mean, std), net)",
    )
    if low != low:
        found, remedy = "NaN", "repair or leave out those samples"
    elif low >= 0 and high > 2 >= hi:
        remedy = "divide 8-bit images by 255"
    elif not fixed:
        remedy += ", or, if they are no normalised images, give the bounds"
    raise ValueError(f"x must lie inside bounds={bounds}, found {found}: {remedy}")


def check_images(x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a floating-point tensor, got {kind(x)}: use torch.as_tensor(x)")
    check_dense("x", x)
    if x.is_meta:
        raise ValueError("x is on meta, where tensors have no values: make it on the device of the model")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {kind(x)}: convert 8-bit images by x.float() / 255")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}: use x.float()")
    if x.ndim < 2:
        raise ValueError(f"x must be a batch [B, ...], got shape {list(x.shape)}: use x.unsqueeze(0) for one sample")


def check_labels(y, x: Tensor) -> None:
    if isinstance(y, Tensor):
        check_dense("y", y)
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y must be an int64 tensor of class indices, got {kind(y)}: {_as_indices(y)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape [{len(x)}] like the batch of x, got {list(y.shape)}: {_as_indices(y)}")
    if y.device != x.device:
        raise ValueError(f"y is on {y.device} and x on {x.device}: move one of them by .to(device)")


def _as_indices(y) -> str:
    if not isinstance(y, Tensor):
        return "use torch.as_tensor(y).long()"
    if y.ndim == 0:
        return "use y[None].long(), and x[None] if x is one image"
    if y.ndim == 1:
        return "use y.long()" if y.dtype != torch.int64 else "give one label for each sample (and x[None] if x is one image)"
    if y.shape[1] == 1:
        return "use y[:, 0].long()"
    own = "loss=lambda z, _: F.cross_entropy(z, y, reduction='none')"
    return f"use y.argmax(1), and for soft or multi-label targets a loss of your own in pgd, such as {own}"


def check_per_sample(name: str, value, x: Tensor) -> None:
    if isinstance(value, Tensor) and value.numel() != 1 and value.shape != x.shape[:1]:
        raise ValueError(f"{name} has shape {list(value.shape)}: give a number, or one value per sample, [{len(x)}]")


def check_start(start, x: Tensor) -> None:
    if isinstance(start, Tensor):
        check_dense("start", start)
    if not isinstance(start, Tensor) or start.shape != x.shape or start.device != x.device or not start.is_floating_point():
        raise ValueError(f"start must be a tensor like x ({kind(x)}), got {kind(start)}")


def check_callable(model) -> None:
    if not callable(model):
        raise TypeError(f"model must be a module or a callable x -> logits, got {kind(model)}")


def check_model(model, x: Tensor) -> None:
    """Looks at every tensor of the model, so replays, which compare the model with the captured one, leave it out."""
    check_callable(model)
    if isinstance(model, nn.Module):
        held = (tensors for m in model.modules() for tensors in (m._parameters, m._buffers))  # a third of parameters()' time
        tensors = [t for named in held for t in named.values() if t is not None]
        if any(map(is_lazy, tensors)):
            raise ValueError("model has lazy layers, whose weights have no shape yet: call model(x) once first")
        if any(t.is_inference() for t in tensors):
            raise ValueError("model was made inside torch.inference_mode(), so autograd refuses it: make or load it outside")
        devices = {t.device for t in tensors}
        if devices and x.device not in devices:
            where = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"x is on {x.device} and model on {where}: move one of them by .to(device)")


class Values:
    """What is in x, y and start: their extremes, computed on the device where these are.

    To `read` them waits for the device. So an attack whose kernels bear any values is launched before that.
    """

    def __init__(self, x: Tensor, y: Tensor | None, start: Tensor | None, bounds: tuple[float, float]):
        self._bounds, self._dtype = bounds, x.dtype
        self._has_labels, self._has_start = y is not None, start is not None
        given = [t.detach() for t in (x, y, start) if t is not None]
        self._extremes = torch.stack([v.double() for t in given for v in t.aminmax()])

    def read(self, *counts: Tensor) -> tuple[int, ...]:
        """Wait, and check: the largest label (-1 without labels), then `counts`, integers [], read in the same wait."""
        values = torch.cat((self._extremes, *(c.double().view(1) for c in counts))) if counts else self._extremes
        x_min, x_max, *rest = values.tolist()
        check_range(x_min, x_max, self._bounds, self._dtype)
        y_min, y_max = map(int, rest[:2]) if self._has_labels else (0, -1)
        rest = rest[2 * self._has_labels :]
        if self._has_start and any(v - v != 0 for v in rest[:2]):
            raise ValueError("start holds NaN or infinite values")
        if y_min < 0:
            raise ValueError(f"y must hold class indices in [0, K), found {y_min}: drop ignored samples before the attack")
        return y_max, *map(int, rest[2 * self._has_start :])


def check_classes(highest_label: int, classes: int | None) -> None:
    """None: no forward has run, so the number of classes is not known."""
    if classes is not None and highest_label >= classes:
        raise ValueError(f"y holds class {highest_label}, outside [0, {classes}) of the model: check the labels")

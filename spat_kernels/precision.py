"""The arithmetic that a model runs in during an attack. Image, step and projection stay fp32 whatever it is."""

import threading
from contextlib import contextmanager
from typing import Any

import torch

backends: Any = torch.backends  # whose type hints do not know `fp32_precision`
HALVES = (torch.float16, torch.bfloat16)
FP16_SCALE = 128.0


def half_dtype(precision: str | None, device_type: str) -> torch.dtype | None:
    """The half precision that `precision` asks for, or the caller's autocast where it is None; None for a full one.

    "half" is fp16 on GPUs (three more bits than bf16, and gradients are scaled) and bf16 on CPUs, which have units for it.
    """
    if precision is None:
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "half": torch.bfloat16 if device_type == "cpu" else torch.float16}
    return named.get(precision)


def logit_gradient_scale(dtype: torch.dtype) -> float:
    """What to multiply gradients at logits of `dtype` by: keeps those of confident samples out of fp16's denormals."""
    return FP16_SCALE if dtype == torch.float16 else 1.0


@contextmanager
def arithmetic(precision: str | None, device_type: str, *, autocast: bool = True):
    """Within: `precision` by autocast and the TF32 switches. `autocast=False` turns autocast off: the model casts by itself."""
    half = half_dtype(precision, device_type)
    if precision is None and autocast:
        yield
        return
    # Without the weight cache: what was cast before a CUDA graph's capture must not be read inside.
    with (
        torch.autocast(device_type, half, enabled=autocast and half is not None, cache_enabled=False),
        tf32_switches(precision, device_type),
    ):
        yield


_lock = threading.Lock()
_open: dict[object, str] = {}  # contexts in all threads, as opened, with what each wants: the switches are the process's
_back: dict[Any, str] = {}  # what sets each switch back that one of them changed


@contextmanager
def tf32_switches(precision: str | None, device_type: str):
    """Within, on CUDA: TF32 everywhere for "tf32", nowhere for "fp32"; other precisions leave the switches alone.

    Contexts nest: what the outer one wants is set again after the inner one.
    """
    if precision not in ("fp32", "tf32") or device_type != "cuda":
        yield
        return
    key = object()
    with _lock:
        _open[key] = "tf32" if precision == "tf32" else "ieee"
        _set_switches()
    try:
        yield
    finally:
        with _lock:
            del _open[key]
            _set_switches()


def _set_switches() -> None:
    """To what the context opened last wants, or back."""
    if not _open:
        for switch, value in _back.items():
            switch.fp32_precision = value
        _back.clear()
        return
    wanted = next(reversed(_open.values()))
    for switch in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        value = switch.fp32_precision
        if value != wanted:
            inherited = value in (backends.fp32_precision, backends.cudnn.fp32_precision)
            _back.setdefault(switch, "none" if inherited else value)
            switch.fp32_precision = wanted

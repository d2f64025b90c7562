"""Logits, then d(logits) -> d(input): the one interface between an attack and the model it attacks, by autograd."""

import weakref
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..checks import check_classes, warn
from ..interrupts import check
from ..precision import HALVES, arithmetic, half_dtype

CHANNELS_LAST = torch.channels_last
IN_PLACE = "model changes its input in place, and so the images: let it work on x.clone()"
UNSEEN = (
    "model changes its input in place where autograd does not see it: the gradient does not know of that, and attacks may be "
    "weak: let it work on x.clone(), outside of torch.no_grad()"
)
CUT_OFF = (
    "the model's logits do not depend on x by differentiable operations (is there a detach, a no_grad or inference_mode, NumPy, "
    "8-bit images or an argmax inside?), so there is no gradient to follow; Square needs none"
)
INFERENCE = (
    "model computes with tensors made in torch.inference_mode(), which autograd refuses: take x through none inside of it, and "
    "make or clone its weights outside"
)
RECURRENT = (
    "model: cuDNN does not differentiate recurrent layers in eval mode: attack within "
    "torch.backends.cudnn.flags(enabled=False), or with bn_mode='train'"
)
CHECKPOINT = (
    "model is a plain callable with re-entrant checkpoints, whose backward would write the .grad of its parameters: give an "
    "nn.Module that holds them, or checkpoint(..., use_reentrant=False)"
)
OTHER_SHAPE = (
    "model was exported for images of another shape than x, or for one number of them: export it with dynamic_shapes, or pad x"
)
EXPLAINED = {  # what PyTorch says, and what it means for an attack
    "a leaf Variable that requires grad": IN_PLACE,
    "Can't call numpy() on Tensor that requires grad": CUT_OFF,
    "Inference tensors cannot be saved for backward": INFERENCE,
    "Guard failed: ": OTHER_SHAPE,
    "RNN backward can only be called in training mode": RECURRENT,
}
# Where avg_pool2d with padding has a wrong gradient in channels_last: torch 2.11's CUDA kernel leaves the padding out of its
# coordinates (pytorch/pytorch#188344).
POOLS_IN_NCHW = {"cuda"}
_contiguous_only: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # models that failed on activations in channels_last
# Modules and functions that did not write on their input, by mode.
_only_read: "dict[bool, weakref.WeakSet]" = {False: weakref.WeakSet(), True: weakref.WeakSet()}


class InputGradient:
    """`forward(x)` gives the logits; `backward(dlogits)` the gradient at that x, by the vector-Jacobian product.

    Only the input is differentiated: no weight gradient is computed, and no `.grad` is written. In half precision convolutional
    models run in channels_last, for which GPUs have their fastest kernels: images come in it (`laid_out`), and convolutions get
    copies of their weights, cast once an attack instead of in every forward (`_Convolutions`). Models that fail on activations in
    that format get contiguous ones; code that takes them for contiguous without noticing (as_strided) would compute nonsense.

    Args:
        model: module or callable, borrowed.
        precision: as the caller asked for it.
        highest_label: the largest class that the labels name, to be checked against the number of classes.
        x: images like those to come; without them the model runs in the layout that it is given.

    Attributes:
        forwards, backwards: how many there have been.
    """

    factor = None  # as of a `PlannedGradient`: gradients are what they are
    independent_samples = False  # batch norm in train mode, or any code of the model's, may couple the samples of a batch
    deterministic = False  # and draw random numbers
    forwards = backwards = 0

    def __init__(self, model, precision: str | None = None, highest_label: int = -1, x: Tensor | None = None):
        self.model, self.precision = model, precision
        self.highest_label = highest_label
        self._to_leaf, self._looked = _grad_to_leaf, False
        self._half, self._weights, self._format = None, [], None
        if x is not None and x.ndim == 4:
            self._half = half_dtype(precision, x.device.type) or (x.dtype if x.dtype in HALVES else None)
        if self._half and (weights := _convolution_weights(model)):
            self._weights, self._format = weights, CHANNELS_LAST
        self._convolutions: AbstractContextManager = nullcontext()
        self._tried = self._format is None  # whether the model is known to bear the format
        if self._format and model in _contiguous_only:
            self._keep_contiguous()

    def arithmetic(self, device_type: str):
        """The context that `prepare`, `logits`, `forward` and `backward` are called in."""
        return arithmetic(self.precision, device_type)

    def prepare(self) -> None:
        """Called first in every run: take the weights as they are now."""
        if self._weights and self._half:
            self._convolutions = _Convolutions(self._weights, self._half)

    def laid_out(self, x: Tensor) -> Tensor:
        """Images in the memory format in which the model reads them fastest."""
        return x if self._format is None else x.contiguous(memory_format=self._format)

    def release(self) -> None:
        """Forget the model, but nothing that kernels launched so far read or write: a capture of them lives on."""
        self.model, self._weights, self._convolutions = None, [], nullcontext()

    def logits(self, x: Tensor) -> Tensor:
        """Logits of `x`, contiguous [B, K], without a graph."""
        check()
        self.forwards += 1
        with torch.no_grad():
            return check_logits(self._call(x, False)[1], x, self.highest_label).contiguous()

    def _call(self, x: Tensor, differentiate: bool) -> tuple[Tensor, Any]:
        """What the model is given, a copy of `x` (it may write on it), and what it returns.

        The copy is contiguous, if the model fails on channels_last.
        """
        images = x.clone(memory_format=self._format or torch.preserve_format).requires_grad_(differentiate)
        try:
            with self._convolutions:
                outputs = self._outputs(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if explanation := self._explanation(error, x.dtype):
                raise ValueError(explanation) from error
            if self._tried:
                raise
        else:
            if differentiate:
                self._look_for_writes(images, x)
            return images, outputs
        self._keep_contiguous()
        called = self._call(x, differentiate)  # an error now has nothing to do with the format
        _contiguous_only.add(self.model)
        return called

    def _outputs(self, images: Tensor) -> Any:
        return self.model(images)

    def _look_for_writes(self, images: Tensor, x: Tensor) -> None:
        """Warn if the model wrote on `images`, its copy of `x`: autograd has not seen that. It waits for the device, so it is
        done once an attack, and once at all for a module or function that does not write."""
        known = _only_read[getattr(self.model, "training", False)] if isinstance(self.model, (nn.Module, FunctionType)) else ()
        if self._looked or self.model in known or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self._looked = True
        if ((images != x) & (x == x)).any():  # that x holds no NaN may be checked later
            warn(UNSEEN)
        elif isinstance(known, weakref.WeakSet):
            known.add(self.model)

    def _explanation(self, error: Exception, dtype: torch.dtype) -> str | None:
        """What an error of the model at images of `dtype` means, if that is known."""
        text = str(error)
        if isinstance(error, RuntimeError) and isinstance(self.model, nn.Module):
            own = {p.dtype for p in self.model.parameters()}
            if len(own) == 1 and dtype not in own and any(t in text for t in ("dtype", "scalar type", "Input type")):
                return f"x must be {(wanted := own.pop())} like the model, got {dtype}: use x.to({wanted})"
        return next((meaning for said, meaning in EXPLAINED.items() if said in text), None)

    def _keep_contiguous(self) -> None:
        self._weights, self._convolutions, self._format, self._tried = [], nullcontext(), torch.contiguous_format, True

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `x`, contiguous [B, K], detached; the graph is kept for `backward`."""
        check()
        self.forwards += 1
        with torch.enable_grad():
            self._given = x.detach()
            self._x, logits = self._call(self._given, True)
            self._logits = check_logits(logits, x, self.highest_label)
        return self._logits.detach().contiguous()

    def backward(self, dlogits: Tensor, keep: bool = False) -> Tensor:
        """Gradient at the x of the last `forward`, whose graph is freed, unless `keep`."""
        self.backwards += 1
        given, x, logits = self._given, self._x, self._logits
        if not keep:
            del self._given, self._x, self._logits
        try:
            grad = self._to_leaf(logits, x, dlogits, keep) if logits.requires_grad else None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if explanation := self._explanation(error, x.dtype):
                raise ValueError(explanation) from error
            # Re-entrant checkpointing cannot be limited to some inputs.
            if self._to_leaf is _grad_to_leaf and "checkpoint" in str(error).lower():
                if not isinstance(self.model, nn.Module):
                    raise ValueError(CHECKPOINT) from error
                self._to_leaf = _backward_to_leaf
            elif not self._tried:
                self._keep_contiguous()
                _contiguous_only.add(self.model)
            else:
                raise
        else:
            if grad is None:  # autograd found no way from the logits to x, which is not a gradient of 0
                raise ValueError(CUT_OFF)
            self._tried = True
            return grad
        self.forward(given)
        return self.backward(dlogits, keep)


def _convolution_weights(model) -> list[nn.Parameter]:
    """The weights of the model's plain convolutions. None where a compiler looks at what these are called with."""
    if not isinstance(model, nn.Module):
        return []
    modules = list(model.modules())
    if any(m._compiled_call_impl or type(m).__name__ == "OptimizedModule" for m in modules):
        return []
    found = (m._parameters.get("weight") for m in modules if type(m) is nn.Conv2d)
    return [weight for weight in found if type(weight) is nn.Parameter and weight.ndim == 4]


class _Convolutions(TorchFunctionMode):
    """Within: convolutions by `weights` get copies in channels_last and `dtype`, where autocast would cast them to that anyway.
    Average pooling with padding gets images that it can differentiate (`POOLS_IN_NCHW`).

    The model keeps its own weights, for whoever else looks at them.
    """

    def __init__(self, weights: list[nn.Parameter], dtype: torch.dtype):
        super().__init__()
        self._own = weights  # alive, so that their ids are theirs
        self._copies = {
            id(w): w.detach().to(dtype, memory_format=CHANNELS_LAST) for w in weights if w.dtype in (torch.float32, dtype)
        }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d and len(args) > 1 and id(args[1]) in self._copies:
            x, weight, *rest = args
            copy, device = self._copies[id(weight)], weight.device.type
            if weight.dtype == copy.dtype or (
                torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == copy.dtype
            ):
                args = x, copy, *rest
        elif function is F.avg_pool2d and args and args[0].device.type in POOLS_IN_NCHW and _padding(*args, **(kwargs or {})):
            args = args[0].contiguous(), *args[1:]
        return function(*args, **(kwargs or {}))


def _padding(x, kernel_size, stride=None, padding=0, *rest, **others) -> bool:
    return bool(padding if isinstance(padding, int) else any(padding))


def check_logits(logits, x: Tensor, highest_label: int) -> Tensor:
    """`logits` if they are what a classifier of K >= 2 classes returns for `x`; TypeError or ValueError if not."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"model must return a floating-point tensor of logits [B, K], got {got}: wrap it to return that alone")
    if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] < 2:
        one_logit = {(len(x),): "torch.stack([-z, z], 1) / 2", (len(x), 1): "torch.cat([-z, z], 1) / 2"}.get(tuple(logits.shape))
        remedy = f": return {one_logit} for a logit z of two classes" if one_logit else ""
        raise ValueError(f"model must return logits [B, K] with B={len(x)} and K >= 2, got shape {tuple(logits.shape)}{remedy}")
    if logits.device != x.device:
        raise ValueError(f"model returned logits on {logits.device} for x on {x.device}: put both on one device")
    check_classes(highest_label, logits.shape[1])
    return logits


def _grad_to_leaf(logits: Tensor, x: Tensor, dlogits: Tensor, keep: bool) -> Tensor | None:
    (grad,) = torch.autograd.grad(logits, x, dlogits, retain_graph=keep, allow_unused=True)
    return grad


def _backward_to_leaf(logits: Tensor, x: Tensor, dlogits: Tensor, keep: bool) -> Tensor | None:
    x.grad = None
    torch.autograd.backward(logits, dlogits, retain_graph=keep)  # into x alone: `borrowed` has frozen the parameters
    return x.grad

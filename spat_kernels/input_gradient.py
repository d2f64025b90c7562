"""Logits, then d(logits) -> d(input): the one interface between an attack and the model it attacks, by autograd."""

import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .checks import check_classes
from .precision import HALVES, arithmetic, half_dtype

CHANNELS_LAST = torch.channels_last
_contiguous_only: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # models that failed on activations in channels_last


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
    """

    factor = None  # as of a `PlannedGradient`: gradients are what they are
    independent_samples = False  # batch norm in train mode, or any code of the model's, may couple the samples of a batch
    deterministic = False  # and draw random numbers

    def __init__(self, model, precision: str | None = None, highest_label: int = -1, x: Tensor | None = None):
        self.model, self.precision = model, precision
        self.highest_label = highest_label
        self._to_leaf = _grad_to_leaf
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
        """Logits of `x`, contiguous [B, K], without a graph. On a copy: a model may work in place."""
        with torch.no_grad():
            return check_logits(self._outputs(x.clone()), x, self.highest_label).contiguous()

    def _outputs(self, x: Tensor):
        """What the model returns; for contiguous images, if it fails on channels_last."""
        try:
            with self._convolutions:
                return self.model(self.laid_out(x))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if "a leaf Variable that requires grad" in str(error):
                raise ValueError("model changes its input in place, and so the images: let it work on x.clone()") from error
            if self._tried:
                raise
        self._keep_contiguous()
        outputs = self._outputs(x)  # an error now has nothing to do with the format
        _contiguous_only.add(self.model)
        return outputs

    def _keep_contiguous(self) -> None:
        self._weights, self._convolutions, self._format, self._tried = [], nullcontext(), torch.contiguous_format, True

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `x`, contiguous [B, K], detached; the graph is kept for `backward`."""
        with torch.enable_grad():
            self._x = x.detach().requires_grad_()
            self._logits = check_logits(self._outputs(self._x), x, self.highest_label)
        return self._logits.detach().contiguous()

    def backward(self, dlogits: Tensor, keep: bool = False) -> Tensor:
        """Gradient at the x of the last `forward`, whose graph is freed, unless `keep`."""
        x, logits = self._x, self._logits
        if not keep:
            del self._x, self._logits
        if not logits.requires_grad:
            raise ValueError(
                "model: its logits do not depend on x by differentiable operations (is there a detach, a no_grad or an "
                "argmax inside?), so there is no gradient to follow"
            )
        try:
            grad = self._to_leaf(logits, x, dlogits, keep)
            self._tried = True
            return grad
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Re-entrant checkpointing refuses to be told for which inputs to differentiate.
            if self._to_leaf is _grad_to_leaf and "checkpoint" in str(error).lower():
                self._to_leaf = _backward_to_leaf
            elif not self._tried:
                self._keep_contiguous()
                _contiguous_only.add(self.model)
            else:
                raise
        self.forward(x)
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
        return function(*args, **(kwargs or {}))


def check_logits(logits, x: Tensor, highest_label: int) -> Tensor:
    """`logits` if they are what a classifier of K >= 2 classes returns for `x`; TypeError or ValueError if not."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"model must return a floating-point tensor of logits [B, K], got {got}: wrap it to return that alone")
    if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] < 2:
        raise ValueError(f"model must return logits [B, K] with B={x.shape[0]} and K >= 2, got shape {tuple(logits.shape)}")
    if logits.device != x.device:
        raise ValueError(f"model returned logits on {logits.device} for x on {x.device}: put both on one device")
    check_classes(highest_label, logits.shape[1])
    return logits


def _grad_to_leaf(logits: Tensor, x: Tensor, dlogits: Tensor, keep: bool) -> Tensor:
    (grad,) = torch.autograd.grad(logits, x, dlogits, retain_graph=keep, allow_unused=True, materialize_grads=True)
    return grad


def _backward_to_leaf(logits: Tensor, x: Tensor, dlogits: Tensor, keep: bool) -> Tensor:
    x.grad = None
    torch.autograd.backward(logits, dlogits, retain_graph=keep)  # into x alone: `borrowed` has frozen the parameters
    return torch.zeros_like(x) if x.grad is None else x.grad

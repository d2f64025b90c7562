"""Logits, then d(logits) -> d(input): the one interface between an attack and the model it attacks, by autograd."""

import weakref
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .checks import check_classes
from .precision import HALVES, arithmetic, half_dtype

CHANNELS_LAST = torch.channels_last
_views: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # models that take their activations for contiguous


class InputGradient:
    """`forward(x)` gives the logits; `backward(dlogits)` the gradient at that x, by the vector-Jacobian product.

    Only the input is differentiated: no weight gradient is computed, and no `.grad` is written. In half precision convolutional
    models run in channels_last, for which GPUs have their fastest kernels: images come in it (`laid_out`), and copies stand in
    for the convolutions' weights, cast once an attack instead of in every forward.

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
        self._half = None
        if x is not None and x.ndim == 4:
            self._half = half_dtype(precision, x.device.type) or (x.dtype if x.dtype in HALVES else None)
        self._weights = _convolution_weights(model) if self._half else {}
        self._copies: dict[nn.Conv2d, Tensor] = {}  # what stands in for them
        self._contiguous = False

    @contextmanager
    def arithmetic(self, device_type: str):
        """The context that `prepare`, `logits`, `forward` and `backward` are called in."""
        _set_weights(self._copies)
        try:
            with arithmetic(self.precision, device_type):
                yield
        finally:
            _set_weights(self._weights)

    def prepare(self) -> None:
        """Called first in every run: take the weights as they are now."""
        self._copies = {m: w.detach().to(self._half, memory_format=CHANNELS_LAST) for m, w in self._weights.items()}
        _set_weights(self._copies)

    def laid_out(self, x: Tensor) -> Tensor:
        """Images in the memory format in which the model reads them fastest."""
        return x.contiguous(memory_format=CHANNELS_LAST) if self._weights else x

    def release(self) -> None:
        """Forget the model, but nothing that kernels launched so far read or write: a capture of them lives on."""
        self.model, self._weights, self._copies = None, {}, {}

    def logits(self, x: Tensor) -> Tensor:
        """Logits of `x`, contiguous [B, K], without a graph. On a copy: a model may work in place."""
        with torch.no_grad():
            return check_logits(self._outputs(x.clone()), x, self.highest_label).contiguous()

    def _outputs(self, x: Tensor):
        """What the model returns; in the layout that it was given, if it cannot read channels_last."""
        try:
            return self.model(x.contiguous() if self._contiguous else x)
        except RuntimeError as error:
            if not self._copies or "view size is not compatible" not in str(error):
                raise
        _views.add(self.model)
        _set_weights(self._weights)
        self._weights, self._copies, self._contiguous = {}, {}, True
        return self._outputs(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `x`, contiguous [B, K], detached; the graph is kept for `backward`."""
        with torch.enable_grad():
            self._x = x.detach().requires_grad_()
            try:
                self._logits = check_logits(self._outputs(self._x), x, self.highest_label)
            except RuntimeError as error:
                if "a leaf Variable that requires grad" not in str(error):
                    raise
                raise ValueError("model changes its input in place, and so the images: let it work on x.clone()") from error
        return self._logits.detach().contiguous()

    def backward(self, dlogits: Tensor, keep: bool = False) -> Tensor:
        """Gradient at the x of the last `forward`, whose graph is freed, unless `keep`."""
        x, logits = self._x, self._logits
        if not keep:
            self._x = self._logits = None
        if not logits.requires_grad:
            raise ValueError(
                "model: its logits do not depend on x by differentiable operations (is there a detach, a no_grad or an "
                "argmax inside?), so there is no gradient to follow"
            )
        try:
            return self._to_leaf(logits, x, dlogits, keep)
        except RuntimeError as error:
            # Re-entrant checkpointing refuses to be told for which inputs to differentiate.
            if self._to_leaf is _backward_to_leaf or "checkpoint" not in str(error).lower():
                raise
        self._to_leaf = _backward_to_leaf
        self.forward(x)
        return self.backward(dlogits, keep)


def _convolution_weights(model) -> dict[nn.Conv2d, nn.Parameter]:
    """The weights that copies may stand in for: of plain convolutions, where no compiler or replica looks at them as well."""
    if not isinstance(model, nn.Module) or model in _views:
        return {}
    modules = list(model.modules())
    if any(isinstance(m, nn.DataParallel) or m._compiled_call_impl or type(m).__name__ == "OptimizedModule" for m in modules):
        return {}
    found = {m: m._parameters.get("weight") for m in modules if type(m) is nn.Conv2d}
    return {m: weight for m, weight in found.items() if type(weight) is nn.Parameter}


def _set_weights(weights: dict[nn.Conv2d, Tensor]) -> None:
    for m, weight in weights.items():
        m._parameters["weight"] = weight


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

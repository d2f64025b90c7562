"""Logits, then d(logits) -> d(input): the one interface between an attack and the model it attacks, by autograd."""

import torch
from torch import Tensor

from .checks import check_classes
from .precision import arithmetic


class InputGradient:
    """`forward(x)` gives the logits; `backward(dlogits)` the gradient at that x, by the vector-Jacobian product.

    Only the input is differentiated: no weight gradient is computed, and no `.grad` is written. `highest_label` is the largest
    class that the labels name, to be checked against the number of classes.
    """

    factor = None  # as of a `PlannedGradient`: gradients are what they are
    independent_samples = False  # batch norm in train mode, or any code of the model's, may couple the samples of a batch
    deterministic = False  # and draw random numbers

    def __init__(self, model, precision: str | None = None, highest_label: int = -1):
        self.model, self.precision = model, precision
        self.highest_label = highest_label
        self._to_leaf = _grad_to_leaf

    def arithmetic(self, device_type: str):
        """The context that `prepare`, `logits`, `forward` and `backward` are called in."""
        return arithmetic(self.precision, device_type)

    def prepare(self) -> None:
        """Called first in every run: where weights are transformed, transform them anew. Autograd takes them as they are."""

    def release(self) -> None:
        """Forget the model, but nothing that kernels launched so far read or write: a capture of them lives on."""
        self.model = None

    def logits(self, x: Tensor) -> Tensor:
        """Logits of `x`, contiguous [B, K], without a graph. On a copy: a model may work in place."""
        with torch.no_grad():
            return check_logits(self.model(x.clone()), x, self.highest_label).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `x`, contiguous [B, K], detached; the graph is kept for `backward`."""
        with torch.enable_grad():
            self._x = x.detach().requires_grad_()
            try:
                self._logits = check_logits(self.model(self._x), x, self.highest_label)
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

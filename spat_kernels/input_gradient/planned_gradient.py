"""Running a plan: logits, then d(logits) -> d(input), step by step, with the interface of `InputGradient`.

In half precision (fp16, bf16) the image is not rounded: the first convolution reads it as two halves (ops.split_image). From the
pooled features on, values are fp32, and there the gradient of each sample is scaled to a largest element of 1: samples are
independent, only directions count, and neither the factors 1/B and 1 - p_y nor small weights can push it out of fp16's range.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..interrupts import check
from ..ops._common import acc_dtype
from ..precision import HALVES, arithmetic
from ..settings import Fuse
from . import token_steps
from .autograd import check_logits
from .conv_steps import conv_backward, conv_forward, pointwise_backward, pointwise_forward
from .fused_steps import Engines
from .gate_steps import (
    mean_backward,
    mean_forward,
    multiply_backward,
    multiply_forward,
    response_norm_backward,
    response_norm_forward,
)
from .gradients import Grads, give, rows, take
from .join_steps import cat_backward, cat_forward, index_backward, index_forward, pad_backward, pad_forward
from .plan import Plan
from .pool_steps import group_norm_backward, group_norm_forward, pool_backward, pool_forward
from .steps import (
    Cat,
    Conv,
    FusedConv,
    GroupNorm,
    Index,
    Linear,
    Local,
    Mean,
    Multiply,
    Pad,
    Pointwise,
    Pool,
    PoolLinear,
    Reshape,
    ResponseNorm,
    Step,
)
from .weights import CHANNELS_LAST, LinearWeights, Weights

Saved = Any  # what a step's forward keeps for its backward


class PlannedGradient:
    """A `Plan` bound to a model's weights, for one attack in one thread.

    Args:
        plan: made for this model and image size.
        model: where the weights are read, at every `prepare`.
        image_dtype: of the images.
        dtype: of the convolutions.
        batch: samples that the attack begins with. Later ones may be fewer.
        precision: as the caller asked for it, for the TF32 switches.
        highest_label: the largest class that the labels name, to be checked against the number of classes.
        fuse: whether engines may do convolutions together with the passes next to them, as the caller asked.

    Attributes:
        bound: what each step reads of the model (weights.py).
        engines: who does the convolutions (fused_steps.py).
        factor: [B], by which samples of the last `backward` are to be multiplied where lengths count; None is 1.
        keep: whether that `backward` may be called again.
        products: value of a product -> the gradient of it and the gate, until the gradient of the gate's mean is there.
        forwards, backwards: how many there have been.
    """

    independent_samples = deterministic = True
    factor: Tensor | None = None
    keep = False
    forwards = backwards = 0

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        image_dtype: torch.dtype,
        dtype: torch.dtype,
        batch: int,
        precision: str | None = None,
        highest_label: int = -1,
        fuse: Fuse = False,
    ):
        self.plan, self.image_dtype, self.dtype = plan, image_dtype, dtype
        self.precision, self.highest_label = precision, highest_label
        self.logits_dtype = acc_dtype(dtype)
        self._weights = Weights(plan, model, image_dtype, dtype, batch)
        self.device = self._weights.device
        self.engines = Engines(fuse, self.device)
        self.products: dict[int, tuple[Tensor, Tensor]] = {}
        self._saved: list = [None] * len(plan.steps)

    def arithmetic(self, device_type: str):
        """The context that `prepare`, `logits`, `forward` and `backward` are called in."""
        return arithmetic(self.precision, device_type, autocast=False)

    def laid_out(self, x: Tensor) -> Tensor:
        """Images in the memory format in which the plan reads them fastest."""
        return rows(x) if self.plan.reads_rows else x

    def release(self) -> None:
        """Forget the model, but nothing that kernels launched so far read or write: a capture of them lives on."""
        self._weights.release()

    def prepare(self) -> None:
        """Fold and cast the weights as they are now."""
        self.bound = self._weights.bind()
        self.engines.prepare()

    def logits(self, x: Tensor) -> Tensor:
        """Logits of `x`, contiguous [B, K]; nothing is kept."""
        return self.forward(x, keep=False)

    def forward(self, x: Tensor, keep: bool = True) -> Tensor:
        """Logits of `x`, contiguous [B, K]; what `backward` needs is kept, if `keep`."""
        check()
        self.forwards += 1
        self.engines.begin()
        values: list = [None] * len(self.plan.nodes)  # Tensors, as long as a step still reads them
        values[0] = x
        for i, step in enumerate(self.plan.steps):
            result, saved = FORWARD[type(step)](self, step, self.bound[i], values, keep)
            values[step.out] = result
            if keep:
                self._saved[i] = saved
            for j in step.frees:
                values[j] = None
        logits = values[self.plan.last].to(self.logits_dtype).contiguous()
        return check_logits(logits, x, self.highest_label)

    def backward(self, dlogits: Tensor, keep: bool = False) -> Tensor:
        """Gradient at the x of the last `forward`, to be multiplied by `factor`; what was kept is dropped, unless `keep`."""
        self.factor, self.keep = None, keep
        self.backwards += 1
        grads: Grads = [[] for _ in self.plan.nodes]
        self.products = {}
        grads[self.plan.last] = [(dlogits if self.plan.last in self.plan.exact else self.into_network(dlogits), False)]
        for i in reversed(range(len(self.plan.steps))):
            step, saved = self.plan.steps[i], self._saved[i]
            if not keep:
                self._saved[i] = None
            BACKWARD[type(step)](self, step, self.bound[i], saved, grads)
        return take(grads, 0)[0]

    def mask(self, i: int) -> Tensor | None:
        """The bits that the last `forward` kept of the Pointwise step i."""
        return self._saved[i]

    def kept_bytes(self) -> int:
        """Bytes that the last `forward` keeps for `backward`."""
        return sum(t.numel() * t.element_size() for s in self._saved for t in _tensors(s))

    def enters(self, step: Step) -> bool:
        """Does the gradient leave the fp32 head behind this step?"""
        return step.out in self.plan.exact and step.inputs[0] not in self.plan.exact

    def into_network(self, grad: Tensor) -> Tensor:
        """A gradient [B, ...] that leaves the fp32 head: in half precision each sample is scaled to a largest element of 1."""
        if self.dtype not in HALVES:
            return grad
        largest = grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny)
        self.factor = largest
        return (grad / largest.view(-1, *[1] * (grad.ndim - 1))).to(self.dtype)


# ---- the steps --------------------------------------------------------------------------------------------------------------


def _tensors(saved) -> list[Tensor]:
    if isinstance(saved, Tensor):
        return [saved]
    return [t for s in saved for t in _tensors(s)] if isinstance(saved, (tuple, list)) else []


def _linear_forward(run: PlannedGradient, step: Linear, bound: LinearWeights, values, keep):
    return bound.forward(values[step.inputs[0]].to(bound.weight.dtype)), None


def _linear_backward(run: PlannedGradient, step: Linear, bound: LinearWeights, saved, grads):
    grad, _ = take(grads, step.out)
    dx = bound.gradient(grad)
    grads[step.inputs[0]].append((run.into_network(dx) if run.enters(step) else dx, True))


def _pool_linear_forward(run: PlannedGradient, step: PoolLinear, bound: LinearWeights, values, keep):
    x, (weight, bias) = rows(values[step.inputs[0]]), bound[:2]
    logits = torch.empty(len(x), len(weight), dtype=weight.dtype, device=x.device)
    return ops.pool_linear(x, weight, logits, bias=bias), (x.shape, x.dtype)


def _pool_linear_backward(run: PlannedGradient, step: PoolLinear, bound: LinearWeights, saved, grads):
    shape, dtype = saved
    grad = take(grads, step.out)[0].contiguous()
    dx = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=CHANNELS_LAST)
    if run.dtype in HALVES and run.enters(step):  # scaled as in `into_network`
        run.factor = torch.empty(len(grad), dtype=grad.dtype, device=grad.device)
    if step.pointwise is None:
        ops.pool_linear_grad(grad, bound.weight, dx, factor=run.factor)
        grads[step.inputs[0]].append((dx, True))
    else:
        mask, scale = run.mask(step.pointwise), run.bound[step.pointwise].scale
        ops.pool_linear_grad(grad, bound.weight, dx, mask=mask, scale=scale, factor=run.factor)
        give(run.plan.steps[step.pointwise], dx, True, grads)


def _reshape_forward(run: PlannedGradient, step: Reshape, bound, values, keep):
    x = values[step.inputs[0]]
    dtype = acc_dtype(x.dtype) if run.enters(step) else x.dtype
    return x.reshape(len(x), *step.shape).to(dtype), x.shape


def _reshape_backward(run: PlannedGradient, step: Reshape, bound, shape, grads):
    grad, fresh = take(grads, step.out)
    grad = grad.reshape(shape)
    grads[step.inputs[0]].append((run.into_network(grad), False) if run.enters(step) else (grad, fresh))


def _local_forward(run: PlannedGradient, step: Local, bound, values, keep):
    inputs = [values[j] for j in step.inputs]
    if not keep:
        return step.function(*inputs, *bound), None
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = step.function(*leaves, *bound)
    return y.detach(), (leaves, y)


def _local_backward(run: PlannedGradient, step: Local, bound, saved, grads):
    leaves, y = saved
    grad, _ = take(grads, step.out)
    for j, dx in zip(step.inputs, torch.autograd.grad(y, leaves, grad, retain_graph=run.keep), strict=True):
        grads[j].append((dx, False))


def _attention_forward(run: PlannedGradient, step: token_steps.Attention, bound, values, keep):
    inputs = [values[j] for j in step.inputs]
    if not step.function.is_written_out(inputs[1]):
        return _local_forward(run, step, bound, values, keep)
    return step.function.forward(*inputs, *bound)


def _attention_backward(run: PlannedGradient, step: token_steps.Attention, bound, saved, grads):
    if len(saved) == 2:  # by autograd
        _local_backward(run, step, bound, saved, grads)
        return
    for j, dx in zip(step.inputs, step.function.backward(take(grads, step.out)[0], *saved), strict=True):
        grads[j].append((dx, True))


# (run, step, what is bound to it, values, whether to keep what the backward needs) -> the step's value, what was kept
FORWARD: dict[type[Step], Callable[..., tuple[Tensor, Saved]]] = {
    Conv: conv_forward, FusedConv: conv_forward, Pointwise: pointwise_forward, Linear: _linear_forward,
    PoolLinear: _pool_linear_forward, Mean: mean_forward, Reshape: _reshape_forward, Local: _local_forward,
    Multiply: multiply_forward, Cat: cat_forward, Index: index_forward, Pad: pad_forward, Pool: pool_forward,
    GroupNorm: group_norm_forward, ResponseNorm: response_norm_forward,
    token_steps.Attention: _attention_forward, **token_steps.FORWARD,
}  # fmt: skip
# (run, step, what is bound to it, what was kept, grads) -> None; the gradients of the step's inputs are added to grads
BACKWARD: dict[type[Step], Callable[..., None]] = {
    Conv: conv_backward, FusedConv: conv_backward, Pointwise: pointwise_backward, Linear: _linear_backward,
    PoolLinear: _pool_linear_backward, Mean: mean_backward, Reshape: _reshape_backward, Local: _local_backward,
    Multiply: multiply_backward, Cat: cat_backward, Index: index_backward, Pad: pad_backward, Pool: pool_backward,
    GroupNorm: group_norm_backward, ResponseNorm: response_norm_backward,
    token_steps.Attention: _attention_backward, **token_steps.BACKWARD,
}  # fmt: skip

"""Products of values in a plan: squeeze-and-excitation, where each channel of a sample is multiplied by a gate of its own.

    forward:   out = x * gate                      gate: [B, C, 1, 1], or any shape that broadcasts against x
    backward:  dx = grad * gate,   dgate = the sum of grad * x over the pixels that share the gate

Where the gate was made from the mean of x over its pixels, dx waits for the mean's gradient, and both are written in one pass.
"""

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops._common import acc_dtype
from ..precision import HALVES
from .gradients import Grads, rows, take
from .steps import Mean, Multiply

if TYPE_CHECKING:
    from .planned_gradient import PlannedGradient


def multiply_forward(run: "PlannedGradient", step: Multiply, bound, values, keep):
    a, b = (values[j] for j in step.inputs)
    return a * b, (a, b)


def multiply_backward(run: "PlannedGradient", step: Multiply, bound, saved: tuple[Tensor, Tensor], grads: Grads):
    (a, b), (j, k) = saved, step.inputs
    grad, _ = take(grads, step.out)
    if step.pooled:
        run.products[step.out] = grad, b
    else:
        grads[j].append((_factor(grad, b, a), True))
    grads[k].append((_factor(grad, a, b), True))


def _factor(grad: Tensor, other: Tensor, like: Tensor) -> Tensor:
    """grad * other, summed to the shape of `like`."""
    return (grad * other).sum_to_size(like.shape)


def mean_forward(run: "PlannedGradient", step: Mean, bound, values, keep):
    x = values[step.inputs[0]]
    dtype = acc_dtype(x.dtype) if step.out in run.plan.exact else x.dtype
    return x.mean(step.dims, dtype=dtype).view(len(x), *step.shape), x.shape


def mean_backward(run: "PlannedGradient", step: Mean, bound, shape, grads: Grads):
    grad, _ = take(grads, step.out)
    grad = grad.reshape([1 if d in step.dims else n for d, n in enumerate(shape)])
    # The factor 1 / (H W) is one of those that do not count where each sample is scaled anyway.
    scaled = run.dtype in HALVES and run.enters(step)
    pixels = prod(shape[d] for d in step.dims)
    if scaled:
        grad = run.into_network(grad)
        run.factor = run.factor / pixels
    else:
        grad = grad / pixels
    if step.gates is not None:
        product, gate = run.products.pop(step.gates)
        dx = torch.addcmul(grad, rows(product), gate)
    else:
        dx = grad.expand(shape)
        dx = rows(dx) if step.dims == (2, 3) else dx.contiguous()
    grads[step.inputs[0]].append((dx, True))

"""Products of values in a plan, where each channel of a sample is multiplied by a gate of its own.

Squeeze-and-excitation (Hu et al., arXiv 1709.01507) and other products:

    forward:   out = x * gate                      gate: [B, C, 1, 1], or any shape that broadcasts against x
    backward:  dx = grad * gate,   dgate = the sum of grad * x over the pixels that share the gate

Where the gate was made from the mean of x over its pixels, dx waits for the mean's gradient, and both are written in one pass.

Global response normalisation (Woo et al., arXiv 2301.00808), with sums over the pixels of a channel and means over the channels:

    forward:   g = sqrt(sum x^2),  n = g / (mean(g) + eps),  out = x (1 + weight n) + bias
    backward:  d = weight sum(grad x) / (mean(g) + eps),     dx = grad (1 + weight n) + x (d - mean(d n)) / g      0 where g is
"""

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops._common import acc_dtype
from ..precision import HALVES
from .gradients import Grads, rows, take
from .steps import Mean, Multiply, ResponseNorm

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


def response_norm_forward(run: "PlannedGradient", step: ResponseNorm, bound, values, keep):
    x, (weight, bias) = values[step.inputs[0]], bound
    along, pixels = _dimensions(step)
    g = torch.linalg.vector_norm(x, dim=pixels, keepdim=True, dtype=weight.dtype)
    mean = g.mean(step.channels + 1, keepdim=True) + step.eps
    gate = torch.addcmul(torch.ones_like(weight), weight, (g / mean).view(len(x), -1)).view(g.shape).to(x.dtype)
    return torch.addcmul(bias.view(along).to(x.dtype), x, gate), (x, g, mean, gate)


def response_norm_backward(run: "PlannedGradient", step: ResponseNorm, bound, saved, grads: Grads):
    (x, g, mean, gate), (along, pixels) = saved, _dimensions(step)
    grad, _ = take(grads, step.out)
    d = (grad * x).sum(pixels, keepdim=True, dtype=g.dtype) * bound[0].view(along) / mean
    d = d - (d * (g / mean)).mean(step.channels + 1, keepdim=True)
    dx = torch.addcmul(grad * gate, x, (d / g).masked_fill_(g == 0, 0).to(x.dtype))
    grads[step.inputs[0]].append((dx, True))


def _dimensions(step: ResponseNorm) -> tuple[list[int], list[int]]:
    """The shape of one number for each channel, and the dimensions of the pixels."""
    every = range(1, len(step.shape) + 1)
    return [-1 if d == step.channels + 1 else 1 for d in every], [d for d in every if d != step.channels + 1]

"""Steps of a plan that one function of ATen does, and another the way back: Pool and GroupNorm.

The way back of an average or a resizing needs the shape alone, that of a maximum where it was found, that of GroupNorm what it
read.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .autograd import POOLS_IN_NCHW
from .gradients import Grads, rows, take
from .steps import GroupNorm, Pool

if TYPE_CHECKING:
    from .planned_gradient import PlannedGradient

aten = torch.ops.aten


def pool_forward(run: "PlannedGradient", step: Pool, bound, values, keep):
    x, pool = rows(values[step.inputs[0]]), step.pool
    indices = None
    if keep and isinstance(pool, nn.MaxPool2d):
        out, indices = aten.max_pool2d_with_indices(
            x, _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), _pair(pool.dilation), pool.ceil_mode
        )
    elif keep and isinstance(pool, nn.AdaptiveMaxPool2d):
        out, indices = aten.adaptive_max_pool2d(x, step.shape[1:])
    else:
        out = pool(x)
    return out, (x.shape, indices)


def pool_backward(run: "PlannedGradient", step: Pool, bound, saved: tuple[torch.Size, Tensor | None], grads: Grads):
    shape, indices = saved
    grad = rows(take(grads, step.out)[0])
    unread = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    grads[step.inputs[0]].append((_pool_gradient(step.pool, grad, unread, indices), True))


def _pool_gradient(pool: nn.Module, grad: Tensor, x: Tensor, indices: Tensor | None) -> Tensor:
    """`x` gives the shape and the layout."""
    if isinstance(pool, nn.MaxPool2d):
        window = _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding), _pair(pool.dilation), pool.ceil_mode
        return aten.max_pool2d_with_indices_backward(grad, x, *window, indices)
    if isinstance(pool, nn.AdaptiveMaxPool2d):
        return aten.adaptive_max_pool2d_backward(grad, x, indices)
    if isinstance(pool, nn.AvgPool2d):
        kernel, stride, padding = map(_pair, (pool.kernel_size, pool.stride, pool.padding))
        if any(padding) and grad.device.type in POOLS_IN_NCHW:
            grad, x = grad.contiguous(), x.contiguous()
        dx = aten.avg_pool2d_backward(
            grad, x, kernel, stride, padding, pool.ceil_mode, pool.count_include_pad, pool.divisor_override
        )
        return dx.contiguous(memory_format=torch.channels_last)
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        return aten._adaptive_avg_pool2d_backward(grad, x)
    assert isinstance(pool, nn.Upsample)
    if pool.mode == "nearest":
        return aten.upsample_nearest2d_backward(grad, grad.shape[2:], x.shape, None, None)
    return aten.upsample_bilinear2d_backward(grad, grad.shape[2:], x.shape, bool(pool.align_corners), None, None)


def _pair(v) -> list[int]:
    return [v, v] if isinstance(v, int) else list(v)


def group_norm_forward(run: "PlannedGradient", step: GroupNorm, bound, values, keep):
    x = values[step.inputs[0]]
    x = rows(x)
    batch, channels = x.shape[:2]
    out, mean, rstd = aten.native_group_norm(x, None, None, batch, channels, x[0, 0].numel(), step.groups, step.eps)
    return out, (x, mean, rstd)


def group_norm_backward(run: "PlannedGradient", step: GroupNorm, bound, saved: tuple[Tensor, Tensor, Tensor], grads: Grads):
    x, mean, rstd = saved
    grad, only_input = rows(take(grads, step.out)[0]), [True, False, False]
    batch, channels = x.shape[:2]
    dx, _, _ = aten.native_group_norm_backward(
        grad, x, mean, rstd, None, batch, channels, x[0, 0].numel(), step.groups, only_input
    )
    grads[step.inputs[0]].append((dx, True))

"""The convolutions of a plan and the passes between them: forward, and back to their inputs.

Each runs alone here. Where an engine does a convolution, maybe with the pass next to it (`fused_steps`), what follows finds that
done: the pass its value, and backward nothing left in `grads`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from . import fused_steps
from .gradients import Grads, flat, give, rows, sum_, take, unflat
from .grouping import stream
from .steps import Conv, Pointwise
from .weights import CHANNELS_LAST, ConvWeights, PointwiseWeights

if TYPE_CHECKING:
    from .planned_gradient import PlannedGradient


def conv_forward(run: "PlannedGradient", step: Conv, bound: ConvWeights, values, keep):
    x = _read(run, bound, values[step.inputs[0]])
    if run.engines.active and (done := fused_steps.forward(run, step, bound, x, values, keep)):
        return done
    if bound.winograd is not None:
        y = bound.winograd.forward(x)
        return (y if bound.bias is None else y.add_(bound.bias.view(-1, 1, 1))), x.shape
    if bound.dense is not None:
        return bound.dense.forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), x.shape
    if bound.whole is not None:
        return bound.whole.forward(x.flatten(1))[:, :, None, None], x.shape
    c = step.conv
    y = torch.conv2d(x, bound.weight, bound.bias, c["stride"], c["padding"], c["dilation"], c["groups"])
    return rows(y), x.shape


def _read(run: "PlannedGradient", bound: ConvWeights, x: Tensor) -> Tensor:
    """What a convolution reads of a value: split into halves or normalised where it is to be, in the convolutions' dtype."""
    x = rows(x)
    if bound.splits:
        shape = len(x), bound.weight.shape[1], *x.shape[2:]
        wide = torch.empty(shape, dtype=run.dtype, device=x.device, memory_format=CHANNELS_LAST)
        x = ops.split_image(x, wide, scale=bound.scale, shift=bound.shift)
    elif bound.scale is not None or bound.shift is not None:
        x = ops.scale_shift_relu(x, torch.empty_like(x), scale=bound.scale, shift=bound.shift, relu=False)
    return x.to(run.dtype, memory_format=bound.layout)


def conv_backward(run: "PlannedGradient", step: Conv, bound: ConvWeights, shape, grads: Grads):
    grad = take(grads, step.out)[0].contiguous(memory_format=bound.layout)
    dx = None
    if run.engines.active:
        if fused_steps.gradient_with_pass(run, step, bound, grad, shape, grads):
            return
        dx = fused_steps.gradient(run, step, bound, grad, shape)
    if dx is None and bound.winograd is not None:
        dx = bound.winograd.gradient(grad)
    elif dx is None and bound.dense is not None:
        dx = bound.dense.gradient(grad.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    elif dx is None and bound.whole is not None:
        dx = bound.whole.gradient(grad.flatten(1)).view(shape)
    elif dx is None and bound.patches is not None:
        dx = _joined(grad.permute(0, 2, 3, 1) @ bound.patches, step.conv["stride"])
    elif dx is None:
        weight = bound.weight if bound.wide is None else bound.wide
        unread = torch.empty(shape, dtype=weight.dtype, device=grad.device, memory_format=bound.layout)
        c, only_input = step.conv, [True, False, False]
        dx, _, _ = torch.ops.aten.convolution_backward(
            grad.to(weight.dtype), unread, weight, None, c["stride"], c["padding"], c["dilation"], False, [0, 0], c["groups"],
            only_input,
        )  # fmt: skip
        dx = dx.to(grad.dtype)
    if bound.splits and bound.patches is None:
        dx = dx[:, : run.plan.nodes[step.inputs[0]].shape[0]]
    if bound.scale is not None:
        dx = dx * bound.scale.view(-1, 1, 1).to(dx.dtype)
    if step.inputs[0] != 0 and step.inputs[0] in run.plan.exact:
        dx = dx.to(run.image_dtype)  # other gradients meet it there
    grads[step.inputs[0]].append((dx, not bound.splits))


def _joined(patches: Tensor, sizes) -> Tensor:
    """Patches [B, H, W, h w C] as images [B, C, H h, W w] in channels_last."""
    (batch, height, width, _), (h, w) = patches.shape, sizes
    images = patches.view(batch, height, width, h, w, -1).transpose(2, 3)
    return images.reshape(batch, height * h, width * w, -1).permute(0, 3, 1, 2)


def pointwise_forward(run: "PlannedGradient", step: Pointwise, bound: PointwiseWeights, values, keep):
    if step.out in run.engines.masks:  # the convolution has done it
        return values[step.out], run.engines.masks.pop(step.out)
    a, b = values[step.inputs[0]], values[step.inputs[1]] if len(step.inputs) > 1 else None
    a, b = _laid(step, a), b if b is None else _laid(step, b)
    mask = None
    if keep and step.relu:
        pixels = a.numel() // a.shape[1]
        mask = torch.empty(pixels, -(-a.shape[1] // 8), dtype=torch.uint8, device=a.device)
    total = None
    if step.total is not None:
        total = a if step.in_place else torch.empty_like(a)
        values[step.total] = _shaped(step, total)
    out = a if step.in_place and total is None else torch.empty_like(a)
    maps = {"scale": bound.scale, "shift": bound.shift}
    if step.act:
        slope = torch.empty_like(a) if keep else None
        ops.scale_shift_act(a, out, act=step.act.name, b=b, **maps, total=total, slope=slope, negative=bound.negative)
        return _shaped(step, out), slope
    ops.scale_shift_relu(a, out, b=b, **maps, total=total, mask=mask, relu=step.relu)
    return _shaped(step, out), mask


def _laid(step: Pointwise, t: Tensor) -> Tensor:
    return rows(t) if step.of_images else flat(t, step.channels)


def _shaped(step: Pointwise, t: Tensor) -> Tensor:
    return t if step.of_images else unflat(t, step.shape, step.channels)


def pointwise_backward(run: "PlannedGradient", step: Pointwise, bound: PointwiseWeights, saved, grads: Grads):
    if not grads[step.out]:  # the head has done it, or a convolution
        return
    outs, grads[step.out] = grads[step.out], []
    if len(outs) > 2:
        outs = [sum_(outs[1:]), outs[0]]
    before = stream(step)
    residual, residual_fresh = take(grads, before) if before is not None and grads[before] else (None, False)
    outs = [(_laid(step, g), fresh) for g, fresh in outs]
    if saved is None and bound.scale is None and residual is None and len(outs) == 1:
        dx, fresh = outs[0]  # a bare addition
    else:
        (grad, _), grad2 = outs[0], outs[1][0] if len(outs) > 1 else None
        reusable = [g for g, fresh in outs if fresh]
        if residual is not None:
            residual = _laid(step, residual)
            reusable += [residual] * residual_fresh
        target = reusable[0] if reusable else torch.empty_like(grad)
        if step.act:
            dx = ops.scale_shift_act_grad(grad, saved, target, grad2=grad2, residual=residual)
        else:
            dx = ops.scale_shift_relu_grad(grad, target, grad2=grad2, mask=saved, scale=bound.scale, residual=residual)
        fresh = True
    give(step, _shaped(step, dx), fresh, grads)

"""What puts values of a plan together and takes them apart: Cat and Split along the channels, and Pad. Backward: slices."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .gradients import Grads, rows, take
from .steps import Cat, Pad, Split

if TYPE_CHECKING:
    from .planned_gradient import PlannedGradient


def cat_forward(run: "PlannedGradient", step: Cat, bound, values, keep):
    parts = [rows(values[j]) for j in step.inputs]
    return torch.cat(parts, 1), [p.shape[1] for p in parts]


def cat_backward(run: "PlannedGradient", step: Cat, bound, sizes: list[int], grads: Grads):
    grad, _ = take(grads, step.out)
    for j, part in zip(step.inputs, grad.split(sizes, 1), strict=True):
        grads[j].append((part, False))


def split_forward(run: "PlannedGradient", step: Split, bound, values, keep):
    x = values[step.inputs[0]]
    for out, (first, last) in zip(step.outs, step.bounds, strict=True):
        values[out] = x[:, first:last]
    return values[step.out], x.shape


def split_backward(run: "PlannedGradient", step: Split, bound, shape: torch.Size, grads: Grads):
    parts = [(*ends, take(grads, out)[0]) for ends, out in sorted(zip(step.bounds, step.outs, strict=True))]
    edges = [0, *(last for _, last, _ in parts)]
    if edges == [*(first for first, _, _ in parts), shape[1]]:  # side by side
        dx = torch.cat([rows(part) for _, _, part in parts], 1)
    else:
        dx = rows(parts[0][2].new_zeros(shape))
        for first, last, part in parts:
            dx[:, first:last] += part
    grads[step.inputs[0]].append((dx, True))


def pad_forward(run: "PlannedGradient", step: Pad, bound, values, keep):
    return F.pad(rows(values[step.inputs[0]]), step.sides, value=step.value), None


def pad_backward(run: "PlannedGradient", step: Pad, bound, saved, grads: Grads):
    grad, _ = take(grads, step.out)
    grads[step.inputs[0]].append((F.pad(grad, [-side for side in step.sides]), False))

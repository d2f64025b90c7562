"""What puts values of a plan together and takes them apart: Cat, Index and Pad. Backward: parts."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..ops._common import acc_dtype
from .gradients import Grads, rows, take
from .steps import Cat, Index, Pad

if TYPE_CHECKING:
    from .planned_gradient import PlannedGradient


def cat_forward(run: "PlannedGradient", step: Cat, bound, values, keep):
    inputs = [values[j] for j in step.inputs]
    if len(step.shape) == 3 and step.channels == 0:
        inputs = [rows(x) for x in inputs]
    parts = [
        inputs[p] if isinstance(p, int) else bound[i].expand(len(inputs[0]), *bound[i].shape[1:])
        for i, p in enumerate(step.parts)
    ]
    return torch.cat(parts, step.dim), [p.shape[step.dim] for p in parts]


def cat_backward(run: "PlannedGradient", step: Cat, bound, sizes: list[int], grads: Grads):
    grad, _ = take(grads, step.out)
    for p, part in zip(step.parts, grad.split(sizes, step.dim), strict=True):
        if isinstance(p, int):
            grads[step.inputs[p]].append((part, False))


def index_forward(run: "PlannedGradient", step: Index, bound, values, keep):
    x = values[step.inputs[0]]
    y, like = x[step.items], (x.shape, x.stride())
    return (y.to(acc_dtype(x.dtype)) if run.enters(step) else y), like


def index_backward(run: "PlannedGradient", step: Index, bound, like, grads: Grads):
    """A part's gradient goes into that of the whole, which the last of its parts begins."""
    (shape, stride), source = like, step.inputs[0]
    grad, _ = take(grads, step.out)
    grad = run.into_network(grad) if run.enters(step) else grad
    whole = next((t for t, fresh in grads[source] if fresh and t.dtype == grad.dtype), None)
    if step.group > 1 and whole is not None:
        whole[step.items] = grad
    elif whole is not None:
        whole[step.items] += grad
    else:
        whole = torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device)
        if step.group == 1:
            whole.zero_()
        whole[step.items] = grad
        grads[source].append((whole, True))


def pad_forward(run: "PlannedGradient", step: Pad, bound, values, keep):
    return F.pad(values[step.inputs[0]], step.sides, value=step.value), None


def pad_backward(run: "PlannedGradient", step: Pad, bound, saved, grads: Grads):
    grad, _ = take(grads, step.out)
    grads[step.inputs[0]].append((F.pad(grad, [-side for side in step.sides]), False))

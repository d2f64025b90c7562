"""The steps of networks that look at tokens, or keep their channels last: what they are, forward, and back to their inputs.

LayerNorm   over the channels of each token, with the residual addition in front (ops.layer_norm)
Permute, Moved    views, and what changes the places of values
Combine           arithmetic with a constant of any shape, as a position embedding
Attention, MatMul, Softmax    scaled_dot_product_attention, back to q, k and v alone; or its parts, where they are written out
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..ops._common import acc_dtype
from .attention import Attend, laid
from .gradients import Grads, flat, give, sum_, take, unflat
from .grouping import stream
from .nodes import Constant, Node, Term
from .steps import Cat, Index, Local, ResponseNorm, Step

if TYPE_CHECKING:
    from .planned_gradient import PlannedGradient


@dataclass(kw_only=True)
class LayerNorm(Step):
    weight: Constant | None
    bias: Constant | None
    eps: float
    channels: int  # the dimension of a sample
    total: int | None = None  # the value inputs[0] + inputs[1], where somebody else reads it


@dataclass(kw_only=True)
class Permute(Step):
    dims: tuple[int, ...]


@dataclass(kw_only=True)
class Moved(Step):
    function: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class Combine(Step):
    term: Term


@dataclass(kw_only=True)
class Attention(Local):
    function: Attend


@dataclass
class MatMul(Step):
    pass


@dataclass(kw_only=True)
class Softmax(Step):
    dim: int


@dataclass(kw_only=True)
class Normalize(Step):
    dim: int
    eps: float


def make(node: Node, i: int) -> Step | None:
    """The step of node i, if it is one of these."""
    what = node.inputs, i, node.name, node.shape
    if node.kind == "layer_norm":
        return LayerNorm(*what, weight=node.weight, bias=node.bias, eps=node.eps, channels=node.channels)
    if node.kind == "response_norm":
        assert node.weight is not None
        assert node.bias is not None
        return ResponseNorm(*what, weight=node.weight, bias=node.bias, eps=node.eps, channels=node.channels)
    if node.kind == "permute":
        return Permute(*what, dims=node.dims)
    if node.kind == "moved":
        assert node.function is not None
        assert node.back is not None
        return Moved(*what, function=node.function, back=node.back)
    if node.kind == "index":
        return Index(*what, items=node.dims)
    if node.kind == "cat":
        return Cat(*what, dim=node.dims[0], parts=node.dims[1:], channels=node.channels)
    if node.kind == "combine":
        assert isinstance(node.norm, Term)
        return Combine(*what, term=node.norm)
    if node.kind == "matmul":
        return MatMul(*what)
    if node.kind == "softmax":
        return Softmax(*what, dim=node.dims[0])
    if node.kind == "normalize":
        return Normalize(*what, dim=node.dims[0], eps=node.eps)
    if node.kind == "attention":
        assert isinstance(node.function, Attend)
        return Attention(*what, function=node.function, constants=node.constants)
    return None


def make_up(parts: list[Index], shape: tuple[int, ...]) -> bool:
    """Whether the parts of a value with samples of `shape` do not overlap and leave nothing out."""
    seen = torch.zeros(1, *shape, dtype=torch.uint8)
    for part in parts:
        seen[part.items] += 1
    return bool((seen == 1).all())


# ---- LayerNorm --------------------------------------------------------------------------------------------------------------


def layer_norm_forward(run: "PlannedGradient", step: LayerNorm, bound, values, keep):
    a, *b = (flat(values[j], step.channels) for j in step.inputs)
    weight, bias = bound
    mean = rstd = None
    if keep:
        mean, rstd = (torch.empty(len(a), dtype=acc_dtype(a.dtype), device=a.device) for _ in range(2))
    total = torch.empty_like(a) if b and (keep or step.total is not None) else None
    out, norm = torch.empty_like(a), {"weight": weight, "bias": bias, "eps": step.eps}
    ops.layer_norm(a, out, **norm, b=b[0] if b else None, total=total, mean=mean, rstd=rstd)
    if step.total is not None:
        assert total is not None
        values[step.total] = unflat(total, step.shape, step.channels)
    return unflat(out, step.shape, step.channels), (a if total is None else total, mean, rstd)


def layer_norm_backward(run: "PlannedGradient", step: LayerNorm, bound, saved, grads: Grads):
    t, mean, rstd = saved
    outs, grads[step.out] = grads[step.out], []
    if len(outs) > 2:
        outs = [sum_(outs[1:]), outs[0]]
    before = stream(step)
    residual, residual_fresh = take(grads, before) if before is not None and grads[before] else (None, False)
    residual = residual if residual is None else flat(residual, step.channels)
    grad, *grad2 = (flat(g, step.channels) for g, _ in outs)
    reusable = [g for g, (_, fresh) in zip((grad, *grad2), outs, strict=True) if fresh]
    if residual is not None and residual_fresh:
        reusable.append(residual)
    target = reusable[0] if reusable else torch.empty_like(grad)
    dx = ops.layer_norm_grad(grad, t, mean, rstd, target, weight=bound[0], grad2=grad2[0] if grad2 else None, residual=residual)
    give(step, unflat(dx, step.shape, step.channels), True, grads)


# ---- views ------------------------------------------------------------------------------------------------------------------


def permute_forward(run: "PlannedGradient", step: Permute, bound, values, keep):
    return values[step.inputs[0]].permute(step.dims), None


def permute_backward(run: "PlannedGradient", step: Permute, bound, saved, grads: Grads):
    grad, fresh = take(grads, step.out)
    inverse = sorted(range(len(step.dims)), key=step.dims.__getitem__)
    grads[step.inputs[0]].append((grad.permute(inverse), fresh))


def moved_forward(run: "PlannedGradient", step: Moved, bound, values, keep):
    return step.function(values[step.inputs[0]]), None


def moved_backward(run: "PlannedGradient", step: Moved, bound, saved, grads: Grads):
    grads[step.inputs[0]].append((step.back(take(grads, step.out)[0]), False))


# ---- constants --------------------------------------------------------------------------------------------------------------


FUNCTIONS: dict[str, Callable] = {k: getattr(torch, k) for k in ("add", "sub", "mul", "div", "rsub")}


def combine_forward(run: "PlannedGradient", step: Combine, bound, values, keep):
    x, kind = values[step.inputs[0]], step.term.kind
    return FUNCTIONS[kind](x, bound), None


def combine_backward(run: "PlannedGradient", step: Combine, bound, saved, grads: Grads):
    grad, fresh = take(grads, step.out)
    if step.term.kind in ("mul", "div"):
        grad, fresh = (grad * bound if step.term.kind == "mul" else grad / bound), True
    elif step.term.kind == "rsub":
        grad, fresh = -grad, True
    grads[step.inputs[0]].append((grad, fresh))


# ---- attention --------------------------------------------------------------------------------------------------------------


def matmul_forward(run: "PlannedGradient", step: MatMul, bound, values, keep):
    a, b = (laid(values[j]) for j in step.inputs)
    return a @ b, (a, b)


def matmul_backward(run: "PlannedGradient", step: MatMul, bound, saved, grads: Grads):
    grad, _ = take(grads, step.out)
    (a, b), grad = saved, laid(grad)
    grads[step.inputs[0]].append((grad @ b.mT, True))
    grads[step.inputs[1]].append((a.mT @ grad, True))


def softmax_forward(run: "PlannedGradient", step: Softmax, bound, values, keep):
    y = values[step.inputs[0]].softmax(step.dim)
    return y, y


def softmax_backward(run: "PlannedGradient", step: Softmax, bound, y, grads: Grads):
    grad, _ = take(grads, step.out)
    grads[step.inputs[0]].append((torch.ops.aten._softmax_backward_data(grad, y, step.dim, y.dtype), True))


def normalize_forward(run: "PlannedGradient", step: Normalize, bound, values, keep):
    x = values[step.inputs[0]]
    length = torch.linalg.vector_norm(x, dim=step.dim, keepdim=True)
    y = x / length.clamp_min(step.eps)
    return y, (y, length)


def normalize_backward(run: "PlannedGradient", step: Normalize, bound, saved, grads: Grads):
    """dx = (g - y (y . g)) / length, or g / eps where the length is below eps."""
    grad, _ = take(grads, step.out)
    y, length = saved
    along = (y * grad).sum(step.dim, keepdim=True).masked_fill_(length < step.eps, 0)
    dx = torch.addcmul(grad, y, along, value=-1).div_(length.clamp_min(step.eps))
    grads[step.inputs[0]].append((dx, True))


FORWARD: dict[type[Step], Callable] = {
    LayerNorm: layer_norm_forward, Permute: permute_forward, Moved: moved_forward,
    Combine: combine_forward, MatMul: matmul_forward, Softmax: softmax_forward,
    Normalize: normalize_forward,
}  # fmt: skip
BACKWARD: dict[type[Step], Callable] = {
    LayerNorm: layer_norm_backward, Permute: permute_backward, Moved: moved_backward,
    Combine: combine_backward, MatMul: matmul_backward, Softmax: softmax_backward,
    Normalize: normalize_backward,
}  # fmt: skip

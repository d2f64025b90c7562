"""`ops.scale_shift_act` and its way back, in PyTorch."""

import torch
from torch import Tensor

from ..ops._common import Maybe, acc_dtype, as_rows

aten = torch.ops.aten
# name -> (the function of v, its backward of a gradient and v)
_FUNCTIONS = {
    "gelu": (aten.gelu, aten.gelu_backward),
    "gelu_tanh": (
        lambda v: aten.gelu(v, approximate="tanh"),
        lambda g, v: aten.gelu_backward(g, v, approximate="tanh"),
    ),
    "silu": (aten.silu, aten.silu_backward),
    "sigmoid": (aten.sigmoid, lambda g, v: aten.sigmoid_backward(g, v.sigmoid())),
    "hardswish": (aten.hardswish, aten.hardswish_backward),
    "hardsigmoid": (aten.hardsigmoid, aten.hardsigmoid_backward),
    "relu6": (lambda v: aten.hardtanh(v, 0, 6), lambda g, v: aten.hardtanh_backward(g, v, 0, 6)),
    "tanh": (aten.tanh, lambda g, v: aten.tanh_backward(g, v.tanh())),
    "mish": (aten.mish, aten.mish_backward),
}
ACTIVATIONS = (*_FUNCTIONS, "leaky_relu")


def scale_shift_act(
    a: Tensor, out: Tensor, *, act: str, b: Maybe = None, scale: Maybe = None, shift: Maybe = None, total: Maybe = None,
    slope: Maybe = None, negative: Maybe = None,
) -> Tensor:  # fmt: skip
    t = as_rows(a).to(acc_dtype(a.dtype))
    t = t if b is None else t + as_rows(b)
    v = t if scale is None else t * scale
    v = v if shift is None else v + shift
    if total is not None:
        as_rows(total).copy_(t)
    if act == "leaky_relu":
        values, gradient = torch.where(v > 0, v, v * negative), torch.where(v > 0, torch.ones_like(v), negative)
        gradient = gradient if scale is None else gradient * scale
    else:
        function, backward = _FUNCTIONS[act]
        values = function(v)
        gradient = backward(torch.ones_like(v) if scale is None else scale.expand_as(v), v) if slope is not None else None
    if slope is not None:
        as_rows(slope).copy_(gradient)
    as_rows(out).copy_(values)
    return out


def scale_shift_act_grad(grad: Tensor, slope: Tensor, dx: Tensor, *, grad2: Maybe = None, residual: Maybe = None) -> Tensor:
    g = as_rows(grad).to(acc_dtype(grad.dtype))
    g = g if grad2 is None else g + as_rows(grad2)
    g = g * as_rows(slope)
    as_rows(dx).copy_(g if residual is None else g + as_rows(residual))
    return dx

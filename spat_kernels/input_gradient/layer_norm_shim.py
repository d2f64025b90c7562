"""`ops.layer_norm` and its gradient by PyTorch's own kernels, on rows [R, C]."""

import torch
from torch import Tensor

Maybe = Tensor | None


def layer_norm(
    a: Tensor, out: Tensor, *, eps: float, weight: Maybe = None, bias: Maybe = None, b: Maybe = None, total: Maybe = None,
    mean: Maybe = None, rstd: Maybe = None,
) -> Tensor:  # fmt: skip
    t = a if b is None else torch.add(a, b, out=torch.empty_like(a) if total is None else total)
    weight, bias = (v if v is None else v.to(a.dtype) for v in (weight, bias))
    y, m, r = torch.native_layer_norm(t, a.shape[-1:], weight, bias, eps)
    if mean is not None and rstd is not None:
        mean.copy_(m.view(-1))
        rstd.copy_(r.view(-1))
    return y


def layer_norm_grad(
    grad: Tensor, t: Tensor, mean: Tensor, rstd: Tensor, dx: Tensor, *, weight: Maybe = None, grad2: Maybe = None,
    residual: Maybe = None,
) -> Tensor:  # fmt: skip
    grad = grad if grad2 is None else grad + grad2
    weight = weight if weight is None else weight.to(t.dtype)
    mean, rstd = mean.view(-1, 1), rstd.view(-1, 1)
    if t.is_cuda or t.dtype != torch.float64:
        mean, rstd = (v.to(torch.float32 if t.is_cuda or t.dtype == torch.float32 else t.dtype) for v in (mean, rstd))
    only_input = [True, False, False]
    inner, _, _ = torch.ops.aten.native_layer_norm_backward(grad, t, t.shape[-1:], mean, rstd, weight, None, only_input)
    return inner if residual is None else inner.add_(residual)

"""What logits say: the class that a model predicts, and the others by how likely they are.

Every attack, and every count of what is misclassified, asks here.
"""

import torch
from torch import Tensor

from . import ops
from .interrupts import deferred
from .model_state.borrow import borrowed
from .ops._common import acc_dtype
from .precision import tf32_switches


def predictions(logits: Tensor) -> Tensor:
    """Classes, int64 [B], of logits [B, K]; -1 where one is NaN: that is no prediction, so it is wrong whatever the label."""
    largest, classes = logits.max(1)  # NaN, if there is one
    return classes.masked_fill_(largest.isnan(), -1)


def other_classes(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All classes but y, the likeliest first, int64 [B, K - 1]; and which of them are possible, bool: -inf rules a class out."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    y_last = (order == y[:, None]).byte().argsort(dim=1, stable=True)  # by its index: others may have y's logit, also -inf
    others = order.gather(1, y_last)[:, :-1]
    return others, logits.gather(1, others) > -torch.inf


def probability_lead(logits: Tensor, y: Tensor) -> Tensor:
    """p_y - max_{k != y} p_k of logits [B, K]: [B] in fp32 (fp64), the negative of the loss "pma". NaN without a softmax."""
    value = torch.empty(len(logits), dtype=acc_dtype(logits.dtype), device=logits.device)
    ops.pma_grad(logits.contiguous(), y, torch.empty_like(logits), value)
    return -value


def model_logits(model, x: Tensor) -> Tensor:
    """What `model` answers in eval mode, in fp32 without TF32; on a copy of x, since it may write on its input."""
    with deferred, torch.no_grad(), tf32_switches("fp32", x.device.type), borrowed(model, "eval"):
        return model(x.clone())

"""Which wrong class a targeted attack goes to first.

confidence   the likeliest one: by falling z_k
malt         the one whose boundary is nearest: by rising (z_y - z_k) / ||d(z_y - z_k)/dx|| (MALT; Melamed et al., NeurIPS 2024,
             arXiv 2407.02240), which is the distance to the boundary of a model that is linear up to there

The norm is the dual one of the ball's, as in the authors' code: within a ball of radius eps a linear function changes by eps
times that norm of its gradient: L1 for L-infinity, L2 for L2, L-infinity for L1. As there, MALT orders the 100 likeliest classes,
which costs a backward each, all from one forward. Less likely ones follow by confidence.
"""

from collections.abc import Iterator
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ..input_gradient.choose import input_gradient
from ..interrupts import deferred
from ..model_state.borrow import borrowed
from ..ops._common import acc_dtype
from ..precision import logit_gradient_scale, tf32_switches
from ..predictions import other_classes
from ..settings import GradientPath, Norm
from ._common import as_dense

CANDIDATES = 100
DUAL: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": inf}  # the norm that gradients are measured in


def malt_passes(classes: int) -> int:
    """Forwards and backwards that MALT's order takes."""
    return 1 + min(classes - 1, CANDIDATES)


def boundaries(gradient, logits: Tensor, y: Tensor, others: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """How far from and how steep the boundaries to other classes are: z_k - z_y [B] and its gradient [B, n], in `dtype`.

    Args:
        gradient: an `InputGradient` or a `PlannedGradient`, whose last `forward` gave `logits` [B, K].
        y: int64 [B].
        others: int64 [B, T], the classes k of each sample; they come one column after the other.
    """
    scale = logit_gradient_scale(logits.dtype)
    own, z_y = F.one_hot(y, logits.shape[1]), logits.gather(1, y[:, None])
    for i, k in enumerate(others.T, 1):
        dlogits = ((F.one_hot(k, logits.shape[1]) - own) * scale).to(logits.dtype)
        w = gradient.backward(dlogits, keep=i < others.shape[1]).flatten(1).to(dtype)
        w = w / scale if gradient.factor is None else w * (gradient.factor / scale)[:, None]
        yield (logits.gather(1, k[:, None]) - z_y)[:, 0].to(dtype), w


def nearest_classes(gradient, logits: Tensor, y: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `other_classes`, in MALT's order. Classes at equal distances are in that of confidence, as are, behind the others, those
    whose distance is unknown, since a gradient is 0, NaN or infinite.

    Args:
        gradient: an `InputGradient` or a `PlannedGradient`, whose last `forward` gave `logits` [B, K].
        y: int64 [B].
        norm: of the ball.
        dtype: to compute in.
    """
    others, possible = other_classes(logits, y)
    distances = torch.full(others.shape, torch.inf, dtype=dtype, device=logits.device)
    for i, (gap, w) in enumerate(boundaries(gradient, logits, y, others[:, :CANDIDATES], dtype)):
        steepness = torch.linalg.vector_norm(w, DUAL[norm], dim=1)
        known = (steepness > 0) & steepness.isfinite() & ~gap.isnan()
        distances[:, i] = torch.where(known, -gap / steepness, torch.inf)
    order = distances.argsort(dim=1, stable=True)
    return others.gather(1, order), possible.gather(1, order)


def nearest_classes_of(model, x: Tensor, y: Tensor, norm: Norm, path: GradientPath = "auto") -> tuple[Tensor, Tensor]:
    """`nearest_classes` of a model in eval mode at the images x [B, ...] with labels y, int64 [B], in fp32 without TF32."""
    with deferred, torch.inference_mode(False), torch.no_grad(), tf32_switches("fp32", x.device.type), borrowed(model, "eval"):
        x, y = as_dense(x, y)
        gradient = input_gradient(model, x, path, None, int(y.max()) if len(y) else -1)
        with gradient.arithmetic(x.device.type):
            gradient.prepare()
            return nearest_classes(gradient, gradient.forward(x), y, norm, acc_dtype(x.dtype))

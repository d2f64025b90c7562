"""Signs of gradient masking, where attacks by gradients say little. AutoAttack warns of them, `spat_train` counts them.

The signs are those of AutoAttack's authors (arXiv 2003.01690 and its code). See also Athalye et al., arXiv 1802.00420, and
Carlini et al., arXiv 1902.06705.
"""

import torch
from torch import Tensor

from ..precision import logit_gradient_scale

ROUNDING = 1e-4  # of the largest logit. Sums in another order differ by some 1e-6 of it, also in deep networks.
RULED_OUT = 1e3  # Constants larger than others by this, such as -1e9, rule classes out and say nothing of the logits' size.
SQUARE_SHARE = 0.002  # share of the images that Square alone may break by luck


def logit_difference(logits: Tensor, again: Tensor) -> tuple[float, float]:
    """The largest difference of the logits of the same images, [B, K] each, and the largest that rounding explains.

    A NaN is no different from another; of a NaN and a number the difference is infinite.
    """
    rounding = max(ROUNDING, 2 * torch.finfo(logits.dtype).eps)
    logits, again = logits.double(), again.double()
    same = (logits == again) | (logits.isnan() & again.isnan())
    largest = (logits - again).abs().nan_to_num(torch.inf).masked_fill(same, 0).max()
    sizes = logits.masked_fill(~logits.isfinite(), 0).abs()
    differing = sizes.masked_fill(same, 0).max()
    scale = sizes.masked_fill(same & (sizes > RULED_OUT * differing), 0).max()
    return float(largest), rounding * float(scale)


def are_probabilities(logits: Tensor) -> bool:
    """Whether all rows of `logits` [B, K] lie in [0, 1] and have the sum 1."""
    rows, rounding = logits.double(), 1e-5 + torch.finfo(logits.dtype).eps
    return bool(((rows >= -rounding) & (rows <= 1 + rounding)).all() & ((rows.sum(1) - 1).abs() <= rounding).all())


def has_no_gradient(gradient, x: Tensor, y: Tensor) -> Tensor:
    """bool [B]: where the gradient of the margin z_y - max_{k != y} z_k is NaN, or 0 everywhere.

    The margin does not saturate, as cross-entropy does.

    Args:
        gradient: an `InputGradient` or a `PlannedGradient`, prepared, the model borrowed.
        x: images [B, ...]. y: int64 [B].
    """
    logits = gradient.forward(x)
    other = logits.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    scale = logit_gradient_scale(logits.dtype)
    dlogits = torch.zeros_like(logits).scatter_(1, other, -scale).scatter_(1, y[:, None], scale)
    grad = gradient.backward(dlogits).flatten(1)
    return (grad == 0).all(1) | grad.isnan().any(1)

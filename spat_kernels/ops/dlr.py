"""Difference-of-logits ratio at the logits, untargeted and targeted (AutoAttack, arXiv 2003.01690, Eq. 6 and 7).

    L = -(z_y - max_{k != y} z_k) / (z_1 - z_3 + 1e-12)               z_1 >= z_2 >= ... the sorted logits
    L = -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2 + 1e-12)                with a target t

Equal logits are sorted by index. Invariant to shifts and positive scales of the logits. Where the denominator is not finite, as
-inf leaves fewer classes than it takes, it counts as 1, and where the numerator is not, as constant: what is left is the margin.

logits: [B, K] contiguous in {fp32, bf16, fp16, fp64}, K >= 3, with targets K >= 4; labels, targets: int64 [B] or targets None;
dlogits: like logits, scale * dL/dz; loss: fp32 [B] (fp64 for fp64) or None. A label or target outside [0, K) or a NaN logit
makes its row NaN. Moves 2 * B * K * itemsize bytes: the four passes that find the ranks read from cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import Maybe, acc_dtype, check_rows, divide, is_class, launch_rows, safe_labels
from .margin import next_ranked, without_nan

# --- reference ---


def dlr_grad_ref(logits: Tensor, labels: Tensor, targets: Maybe, dlogits: Tensor, loss: Maybe, scale: float) -> None:
    check_dlr(logits, labels, targets, dlogits, loss)
    classes = logits.shape[1]
    valid = is_class(labels, classes) & (is_class(targets, classes) if targets is not None else True)
    valid = valid & ~logits.isnan().any(1)
    y = labels.where(valid, 0)[:, None]
    z = logits.to(acc_dtype(logits.dtype))
    top_z, top = z.sort(dim=1, descending=True, stable=True)
    if targets is None:
        up = torch.where(top[:, :1] == y, top[:, 1:2], top[:, :1])
        denominator = top_z[:, :1] - top_z[:, 2:3] + 1e-12
    else:
        up = targets.where(valid, 0)[:, None]
        denominator = top_z[:, :1] - (top_z[:, 2:3] + top_z[:, 3:4]) / 2 + 1e-12
    defined = denominator.isfinite()
    denominator = denominator.where(defined, 1)
    value = (z.gather(1, up) - z.gather(1, y)) / denominator
    ratio = torch.where(defined & value.isfinite(), value / denominator, 0)
    grad = torch.zeros_like(z).scatter_add_(1, up, 1 / denominator).scatter_add_(1, y, -1 / denominator)
    grad.scatter_add_(1, top[:, :1], -ratio)
    if targets is None:
        grad.scatter_add_(1, top[:, 2:3], ratio)
    else:
        grad.scatter_add_(1, top[:, 2:4], ratio.expand(-1, 2) / 2)
    dlogits.copy_((scale * grad).where(valid[:, None], torch.nan))
    if loss is not None:
        loss.copy_(value[:, 0].where(valid, torch.nan))


def check_dlr(logits: Tensor, labels: Tensor, targets: Maybe, dlogits: Tensor, loss: Maybe) -> None:
    named = {"labels": labels} if targets is None else {"labels": labels, "targets": targets}
    check_rows(logits, dlogits, loss, min_classes=3 if targets is None else 4, **named)


# --- Triton ---


@triton.jit
def dlr_grad_kernel(
    logits_ptr, labels_ptr, targets_ptr, dlogits_ptr, loss_ptr, B, scale: tl.float64,
    TARGETED: tl.constexpr, WITH_LOSS: tl.constexpr,
    K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_y, valid = safe_labels(labels_ptr, i_b, B, K)
    valid = valid & without_nan(logits_ptr, i_b, B, K, BLOCK_B, BLOCK_K, ACC)
    b_zy = tl.load(logits_ptr + i_b * K + b_y, mask=i_b < B, other=0.0).to(ACC)
    none = tl.full([BLOCK_B], -1, tl.int64)
    ahead = tl.full([BLOCK_B], float("inf"), ACC)
    z1, k1 = next_ranked(logits_ptr, i_b, ahead, none, none, B, K, BLOCK_B, BLOCK_K, ACC)
    z2, k2 = next_ranked(logits_ptr, i_b, z1, k1, none, B, K, BLOCK_B, BLOCK_K, ACC)
    z3, k3 = next_ranked(logits_ptr, i_b, z2, k2, none, B, K, BLOCK_B, BLOCK_K, ACC)
    if TARGETED:
        z4, k4 = next_ranked(logits_ptr, i_b, z3, k3, none, B, K, BLOCK_B, BLOCK_K, ACC)
        k_up, target_valid = safe_labels(targets_ptr, i_b, B, K)
        valid = valid & target_valid
        z_up = tl.load(logits_ptr + i_b * K + k_up, mask=i_b < B, other=0.0).to(ACC)
        b_d = z1 - (z3 + z4) * 0.5 + 1e-12
    else:
        k_up, z_up = tl.where(k1 == b_y, k2, k1), tl.where(k1 == b_y, z2, z1)
        b_d = z1 - z3 + 1e-12
    defined = b_d - b_d == 0
    b_d = tl.where(defined, b_d, 1.0)
    b_loss = divide(z_up - b_zy, b_d)
    b_slope = divide(tl.full([BLOCK_B], 1.0, ACC), b_d)[:, None]
    b_ratio = tl.where(defined & (b_loss - b_loss == 0), divide(b_loss, b_d), 0.0)[:, None]
    for first in range(0, K, BLOCK_K):
        i_k = first + tl.arange(0, BLOCK_K)[None, :]
        b_g = tl.where(i_k == k_up[:, None], b_slope, 0.0) - tl.where(i_k == b_y[:, None], b_slope, 0.0)
        b_g -= tl.where(i_k == k1[:, None], b_ratio, 0.0)
        if TARGETED:
            b_g += tl.where((i_k == k3[:, None]) | (i_k == k4[:, None]), b_ratio * 0.5, 0.0)
        else:
            b_g += tl.where(i_k == k3[:, None], b_ratio, 0.0)
        b_g = tl.where(valid[:, None], tl.cast(scale, ACC) * b_g, float("nan"))
        tl.store(dlogits_ptr + i_b[:, None] * K + i_k, b_g, mask=(i_b < B)[:, None] & (i_k < K))
    if WITH_LOSS:
        tl.store(loss_ptr + i_b, tl.where(valid, b_loss, float("nan")), mask=i_b < B)


# --- launcher ---


def dlr_grad_triton(logits: Tensor, labels: Tensor, targets: Maybe, dlogits: Tensor, loss: Maybe, scale: float) -> None:
    check_dlr(logits, labels, targets, dlogits, loss)
    launch_rows(dlr_grad_kernel, logits, labels, targets, dlogits, loss, numbers=(scale,), TARGETED=targets is not None)


# --- registration ---

_dlr_grad = define(
    "dlr_grad(Tensor logits, Tensor labels, Tensor? targets, Tensor(a!) dlogits, Tensor(b!)? loss, float scale)",
    dlr_grad_ref,
    dlr_grad_triton,
)

# --- public ---


def dlr_grad(
    logits: Tensor, labels: Tensor, dlogits: Tensor, loss: Maybe = None, *, targets: Maybe = None, scale: float = 1.0
) -> Tensor:
    """Write the gradient of the DLR loss (with `targets`, of its targeted form) into `dlogits`, and its values into `loss`.

    Returns `dlogits`. Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _dlr_grad(logits, labels, targets, dlogits, loss, scale)
    return dlogits

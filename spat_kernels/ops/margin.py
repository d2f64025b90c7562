"""Margin loss at the logits, "C&W-infinity" when maximised by PGD (Carlini & Wagner 2017; Madry et al., section 5).

    L = min(z_j - z_y, kappa),   j = argmax_{k != y} z_k   (the lowest index among equals)
    dL/dz = +1 at j, -1 at y, 0 where kappa clips

`targeted` gives what a targeted attack maximises, min(z_y - z_j, kappa). kappa = 0 stops at the first misclassification.

logits: [B, K >= 2] contiguous in {fp32, bf16, fp16, fp64}; labels: int64 [B]; dlogits: like logits, scale * dL/dz; loss: fp32 [B]
(fp64 for fp64) or None. A label outside [0, K) or a NaN logit makes its row NaN. Moves 2 * B * K * itemsize bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import Maybe, acc_dtype, check_rows, is_class, launch_rows, load_rows, safe_labels

# --- reference ---


def margin_grad_ref(
    logits: Tensor, labels: Tensor, dlogits: Tensor, loss: Maybe, kappa: float, targeted: bool, scale: float
) -> None:
    check_rows(logits, dlogits, loss, labels=labels)
    valid = is_class(labels, logits.shape[1]) & ~logits.isnan().any(1)
    y = labels.where(valid, 0)[:, None]
    z = logits.to(acc_dtype(logits.dtype))
    z_other, other = z.scatter(1, y, -torch.inf).max(1, keepdim=True)
    sign = -1.0 if targeted else 1.0
    margin = sign * (z_other - z.gather(1, y))
    slope = torch.full_like(margin, sign * scale).masked_fill_(margin > kappa, 0).to(dlogits.dtype)
    dlogits.zero_().scatter_(1, other, slope).scatter_(1, y, -slope)
    dlogits.masked_fill_(~valid[:, None], torch.nan)
    if loss is not None:
        loss.copy_(margin[:, 0].clamp(max=kappa).where(valid, torch.nan))


# --- Triton ---


@triton.jit
def next_ranked(
    logits_ptr, i_b, b_prev_z, b_prev_k, skip, B, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr
):
    """Value and class of the first logit after (b_prev_z, b_prev_k) by falling value, then rising index, skip left out."""
    b_best_z = tl.full([BLOCK_B], float("-inf"), ACC)
    b_best_k = tl.zeros([BLOCK_B], tl.int64) + K
    for first in range(0, K, BLOCK_K):
        i_k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        b_z, m = load_rows(logits_ptr, i_b, first + tl.arange(0, BLOCK_K), B, K, float("-inf"), ACC)
        after = (b_z < b_prev_z[:, None]) | ((b_z == b_prev_z[:, None]) & (i_k > b_prev_k[:, None]))
        use = m & after & (i_k != skip[:, None])
        b_top = tl.max(tl.where(use, b_z, float("-inf")), 1)
        b_top_k = tl.min(tl.where(use & (b_z == b_top[:, None]), i_k, K), 1)
        b_best_k = tl.where(b_top > b_best_z, b_top_k, tl.where(b_top == b_best_z, tl.minimum(b_best_k, b_top_k), b_best_k))
        b_best_z = tl.maximum(b_best_z, b_top)
    return b_best_z, b_best_k


@triton.jit
def without_nan(logits_ptr, i_b, B, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """Whether a row has no NaN: ranks pass over it, and it must not pass for a result."""
    b_nan = tl.zeros([BLOCK_B], tl.int32)
    for first in range(0, K, BLOCK_K):
        b_z, m = load_rows(logits_ptr, i_b, first + tl.arange(0, BLOCK_K), B, K, 0.0, ACC)
        b_nan += tl.sum((b_z != b_z).to(tl.int32), 1)
    return b_nan == 0


@triton.jit
def margin_grad_kernel(
    logits_ptr, labels_ptr, dlogits_ptr, loss_ptr, B, kappa: tl.float64, scale: tl.float64, sign: tl.float64,
    WITH_LOSS: tl.constexpr, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_y, valid = safe_labels(labels_ptr, i_b, B, K)
    valid = valid & without_nan(logits_ptr, i_b, B, K, BLOCK_B, BLOCK_K, ACC)
    kappa, sign = tl.cast(kappa, ACC), tl.cast(sign, ACC)
    ahead_z, ahead_k = tl.full([BLOCK_B], float("inf"), ACC), tl.full([BLOCK_B], -1, tl.int64)
    b_other_z, b_other_k = next_ranked(logits_ptr, i_b, ahead_z, ahead_k, b_y, B, K, BLOCK_B, BLOCK_K, ACC)
    b_margin = sign * (b_other_z - tl.load(logits_ptr + i_b * K + b_y, mask=i_b < B, other=0.0).to(ACC))
    b_slope = tl.where(b_margin > kappa, 0.0, sign * tl.cast(scale, ACC))
    for first in range(0, K, BLOCK_K):
        i_k = first + tl.arange(0, BLOCK_K)
        m = (i_b < B)[:, None] & (i_k < K)[None, :]
        b_g = tl.where(i_k[None, :] == b_other_k[:, None], b_slope[:, None], 0.0)
        b_g = tl.where(i_k[None, :] == b_y[:, None], -b_slope[:, None], b_g)
        tl.store(dlogits_ptr + i_b[:, None] * K + i_k[None, :], tl.where(valid[:, None], b_g, float("nan")), mask=m)
    if WITH_LOSS:
        tl.store(loss_ptr + i_b, tl.where(valid, tl.minimum(b_margin, kappa), float("nan")), mask=i_b < B)


# --- launcher ---


def margin_grad_triton(
    logits: Tensor, labels: Tensor, dlogits: Tensor, loss: Maybe, kappa: float, targeted: bool, scale: float
) -> None:
    check_rows(logits, dlogits, loss, labels=labels)
    numbers = kappa, scale, -1.0 if targeted else 1.0
    launch_rows(margin_grad_kernel, logits, labels, dlogits, loss, numbers=numbers)


# --- registration ---

_margin_grad = define(
    "margin_grad(Tensor logits, Tensor labels, Tensor(a!) dlogits, Tensor(b!)? loss, float kappa, bool targeted, float scale)",
    margin_grad_ref,
    margin_grad_triton,
)

# --- public ---


def margin_grad(
    logits: Tensor,
    labels: Tensor,
    dlogits: Tensor,
    loss: Maybe = None,
    *,
    kappa: float = 0.0,
    targeted: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Write the gradient of the margin loss into `dlogits`, and its values into `loss` if given.

    Returns `dlogits`. Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _margin_grad(logits, labels, dlogits, loss, kappa, targeted, scale)
    return dlogits

"""Probability margin at the logits, what the probability margin attack maximises (PMA; Xie et al., CVPR 2025, arXiv 2411.15210).

    L = p_m - p_y,   p = softmax(z),   m = argmax_{k != y} z_k   (the lowest index among equals)
    dL/dz = p_m (1 - p_m + p_y) at m,   -p_y (1 - p_y + p_m) at y,   p_k (p_y - p_m) elsewhere

`targeted` gives what a targeted attack maximises, p_y - p_m. L is in [-1, 1].

No difference of probabilities is taken. Let w be the likelier of y and m and l the other one, so that L = +-(p_w - p_l), and

    e_k = e^(z_k - max_{j != w} z_j),   S = sum_{k != w} e_k,   g = e^(max_{j != w} z_j - z_w),   d = 1 - e^(z_l - z_w) by expm1

Then p_k = p_w g e_k for k != w, 1 / p_w = 1 + g S and p_w - p_l = p_w d. Since 1 - p_w = p_w g S and 1 - p_l = p_w (d + g S),

    d(p_w - p_l)/dz = c at w,   -c e_l (d + 1 + g S) / (e_l + S) at l,   -c e_k d / (e_l + S) elsewhere,
    c = p_w (1 - p_w + p_l) = p_w^2 g (e_l + S)

Every term is positive, so each element has the relative precision of the arithmetic. `normalize` leaves out c, which is positive
and is the largest element of its row: the row is then 1 at w, its other elements add up to -1, and since some e_k is 1 they do
not vanish however sure the model is, right or wrong (dL/dz itself is 0 in fp32 from a gap of 104 on). A row whose logits other
than z_w are all -inf has no direction: its gradient is 0. L itself is -1 in fp32 from z_y - z_m = 17 on.

logits: [B, K >= 2] contiguous in {fp32, bf16, fp16, fp64}; labels: int64 [B]; dlogits: like logits, scale * dL/dz; loss: fp32 [B]
(fp64 for fp64) or None. Arithmetic is fp32 (fp64). A label outside [0, K), or logits without a softmax (NaN, +inf, all -inf) make
their row NaN. Moves 2 * B * K * itemsize bytes: the passes that find m and S read from cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import Maybe, acc_dtype, check_rows, divide, is_class, launch_rows, load_rows, safe_labels
from .lsce import online_softmax
from .margin import next_ranked

# --- reference ---


def pma_grad_ref(
    logits: Tensor, labels: Tensor, dlogits: Tensor, loss: Maybe, targeted: bool, scale: float, normalize: bool
) -> None:
    check_rows(logits, dlogits, loss, labels=labels)
    z = logits.to(acc_dtype(logits.dtype))
    valid = is_class(labels, logits.shape[1])[:, None]
    y = labels[:, None].where(valid, 0)
    z_y, (z_m, m) = z.gather(1, y), z.scatter(1, y, -torch.inf).max(1, keepdim=True)
    wrong = z_m > z_y
    first, second = torch.where(wrong, m, y), torch.where(wrong, y, m)  # w and l
    z_w, z_l = torch.where(wrong, z_m, z_y), torch.where(wrong, z_y, z_m)
    sign = torch.where(wrong != targeted, 1.0, -1.0).to(z.dtype)
    others = z.scatter(1, first, -torch.inf)
    top = others.amax(1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    e, e_l, beside = (others - top).exp(), (z_l - top).exp(), (top - z_w).exp()
    lead, total = -(z_l - z_w).expm1(), 1 + beside * e.sum(1, keepdim=True)
    valid = valid & z_w.isfinite() & total.isfinite()
    divisor = e_l + e.sum(1, keepdim=True)
    factor = (divisor > 0).to(z.dtype) if normalize else beside * divisor / total.square()
    divisor = divisor.where(divisor > 0, 1)
    grad = (e * -lead).scatter(1, second, -e_l * (lead + total)).scatter(1, first, divisor) / divisor
    dlogits.copy_((sign * scale * factor * grad).where(valid, torch.nan))
    if loss is not None:
        loss.copy_((sign * lead / total).where(valid, torch.nan)[:, 0])


# --- Triton ---


@triton.jit
def one_minus_exp(b_x):
    """1 - e^x for x <= 0 without cancellation: near 0 by its series, whose first omitted term is x^13 / 13!."""
    b_series = tl.full(b_x.shape, 1.0, b_x.dtype)
    for n in tl.static_range(12, 1, -1):
        b_series = 1.0 + divide(b_series * b_x, n)
    return tl.where(b_x > -0.25, -b_x * b_series, 1.0 - tl.exp(b_x))


@triton.jit
def pma_grad_kernel(
    logits_ptr, labels_ptr, dlogits_ptr, loss_ptr, B, scale: tl.float64,
    TARGETED: tl.constexpr, NORMALIZE: tl.constexpr, WITH_LOSS: tl.constexpr,
    K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_y, valid = safe_labels(labels_ptr, i_b, B, K)
    b_zy = tl.load(logits_ptr + i_b * K + b_y, mask=i_b < B, other=0.0).to(ACC)
    ahead_z, ahead_k = tl.full([BLOCK_B], float("inf"), ACC), tl.full([BLOCK_B], -1, tl.int64)
    b_zm, b_m = next_ranked(logits_ptr, i_b, ahead_z, ahead_k, b_y, B, K, BLOCK_B, BLOCK_K, ACC)
    # losses.h has the same
    wrong = b_zm > b_zy
    b_w, b_l = tl.where(wrong, b_m, b_y), tl.where(wrong, b_y, b_m)
    b_zw, b_zl = tl.where(wrong, b_zm, b_zy), tl.where(wrong, b_zy, b_zm)
    b_top, b_sum = online_softmax(logits_ptr, i_b, b_w, B, K, BLOCK_B, BLOCK_K, ACC)
    b_el, b_beside = tl.exp(b_zl - b_top), tl.exp(b_top - b_zw)
    b_lead, b_total = one_minus_exp(b_zl - b_zw), 1.0 + b_beside * b_sum
    valid = valid & (b_sum - b_sum == 0) & (b_zw - b_zw == 0)
    b_divisor = b_el + b_sum
    b_sign = tl.where(wrong != TARGETED, 1.0, -1.0).to(ACC)
    b_factor = tl.where(b_divisor > 0, 1.0, 0.0) if NORMALIZE else divide(b_beside * b_divisor, b_total * b_total)
    b_at_w = b_sign * tl.cast(scale, ACC) * b_factor
    b_divisor = tl.where(b_divisor > 0, b_divisor, 1.0)
    b_per_e = divide(-b_at_w * b_lead, b_divisor)
    b_at_l = -b_at_w * divide(b_el * (b_lead + b_total), b_divisor)
    for first in range(0, K, BLOCK_K):
        i_k = first + tl.arange(0, BLOCK_K)
        b_z, m = load_rows(logits_ptr, i_b, i_k, B, K, 0.0, ACC)
        b_g = b_per_e[:, None] * tl.exp(b_z - b_top[:, None])
        b_g = tl.where(i_k[None, :] == b_l[:, None], b_at_l[:, None], b_g)
        b_g = tl.where(i_k[None, :] == b_w[:, None], b_at_w[:, None], b_g)
        tl.store(dlogits_ptr + i_b[:, None] * K + i_k[None, :], tl.where(valid[:, None], b_g, float("nan")), mask=m)
    if WITH_LOSS:
        tl.store(loss_ptr + i_b, tl.where(valid, divide(b_sign * b_lead, b_total), float("nan")), mask=i_b < B)


# --- launcher ---


def pma_grad_triton(
    logits: Tensor, labels: Tensor, dlogits: Tensor, loss: Maybe, targeted: bool, scale: float, normalize: bool
) -> None:
    check_rows(logits, dlogits, loss, labels=labels)
    launch_rows(pma_grad_kernel, logits, labels, dlogits, loss, numbers=(scale,), TARGETED=targeted, NORMALIZE=normalize)


# --- registration ---

_pma_grad = define(
    "pma_grad(Tensor logits, Tensor labels, Tensor(a!) dlogits, Tensor(b!)? loss, bool targeted, float scale, bool normalize)",
    pma_grad_ref,
    pma_grad_triton,
)

# --- public ---


def pma_grad(
    logits: Tensor,
    labels: Tensor,
    dlogits: Tensor,
    loss: Maybe = None,
    *,
    targeted: bool = False,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Write the gradient of the probability margin into `dlogits`, and its values into `loss` if given.

    normalize: divide each row of the gradient by its largest element. Returns `dlogits`. Shapes and dtypes: see the module.
    Raises RuntimeError where they do not fit.
    """
    _pma_grad(logits, labels, dlogits, loss, targeted, scale, normalize)
    return dlogits

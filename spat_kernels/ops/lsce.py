"""Label-smoothed cross-entropy at the logits (thesis, Eq. 4.1-4.2): loss and gradient in one pass over each row.

    L = -sum_k t_k log p_k,   p = softmax(z),   t = 1 - alpha on y and alpha / (K - 1) on every other class
    dL/dz = p - t

alpha = 0 is cross-entropy. PyTorch's `label_smoothing=s` spreads s/K over all classes: it is the same loss at s = alpha*K/(K-1).
At the label the gradient is computed as alpha - sum_{k != y} p_k, which does not cancel when p_y is close to 1.

`normalize`, for alpha = 0, divides each row by its factor 1 - p_y > 0, which leaves sign(dL/dx) alone where nothing underflows:

    dL/dz_k / (1 - p_y) = softmax over the classes other than y, of z_k;   -1 at y

It is of the same size however confident the sample is (dL/dz itself is 0 in fp32 from z_y - z_k = 104 on), as a half-precision
backward pass needs it. Exponentials are relative to the largest *other* logit throughout, so z_y cannot make them vanish. A row
whose other logits are all -inf has no direction: its gradient is 0. The loss does not change.

logits: [B, K >= 2] contiguous in {fp32, bf16, fp16, fp64}; labels: int64 [B]; dlogits: like logits; loss: fp32 [B] (fp64 for
fp64) or None. Arithmetic is fp32 (fp64). dlogits is scale * dL/dz of the sum over the batch; `targeted` negates loss and
gradient, so that both always describe what is to be maximised. A label outside [0, K) makes its row NaN. Moves 2 * B * K *
itemsize bytes: the second read of a row comes from cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import Maybe, acc_dtype, check, check_rows, divide, is_class, launch_rows, load_rows, safe_labels

# --- reference ---


def check_lsce(logits: Tensor, labels: Tensor, dlogits: Tensor, loss: Maybe, alpha: float, normalize: bool) -> None:
    check_rows(logits, dlogits, loss, labels=labels)
    check(not normalize or alpha == 0, "normalize goes with alpha = 0")


def lsce_grad_ref(
    logits: Tensor, labels: Tensor, dlogits: Tensor, loss: Maybe, alpha: float, targeted: bool, scale: float, normalize: bool
) -> None:
    check_lsce(logits, labels, dlogits, loss, alpha, normalize)
    classes = logits.shape[1]
    log_p = logits.to(acc_dtype(logits.dtype)).log_softmax(1)
    valid = is_class(labels, classes)
    y = labels.where(valid, 0)[:, None]
    target = torch.full_like(log_p, alpha / (classes - 1)).scatter_(1, y, 1 - alpha)
    sign = -1.0 if targeted else 1.0
    grad = log_p.exp() - target
    if normalize:
        others = logits.to(log_p.dtype).scatter(1, y, -torch.inf)
        directed = (others != -torch.inf).any(1, keepdim=True)
        grad = others.softmax(1).scatter(1, y, -1).where(directed, 0)
        grad += 0 * logits.gather(1, y).clamp(min=0)  # NaN where z_y is NaN or +inf
    dlogits.copy_((grad * (sign * scale)).where(valid[:, None], torch.nan))
    if loss is not None:
        ce = -log_p.gather(1, y)[:, 0]
        gaps = (log_p.gather(1, y) - log_p).sum(1)
        smoothed = ce + alpha / (classes - 1) * gaps if alpha > 0 else ce  # 0 * inf where a logit is -inf
        loss.copy_((sign * smoothed).where(valid, torch.nan))


# --- Triton ---


@triton.jit
def online_softmax(logits_ptr, i_b, b_y, B, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """Row maxima and row sums of e^(z - max), both over the classes other than b_y, in one pass."""
    b_max = tl.full([BLOCK_B], -3.4028234663852886e38, ACC)
    b_sum = tl.zeros([BLOCK_B], ACC)
    for first in range(0, K, BLOCK_K):
        i_k = first + tl.arange(0, BLOCK_K)
        b_z, m = load_rows(logits_ptr, i_b, i_k, B, K, float("-inf"), ACC)
        b_z = tl.where(i_k[None, :] == b_y[:, None], float("-inf"), b_z)
        b_new = tl.maximum(b_max, tl.max(b_z, 1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_z - b_new[:, None]), 1)
        b_max = b_new
    return b_max, b_sum


@triton.jit
def lsce_grad_kernel(
    logits_ptr, labels_ptr, dlogits_ptr, loss_ptr, B,
    alpha: tl.float64, off_target: tl.float64, scale: tl.float64, sign: tl.float64,
    WITH_LOSS: tl.constexpr, SMOOTH: tl.constexpr, NORMALIZE: tl.constexpr,
    K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_y, valid = safe_labels(labels_ptr, i_b, B, K)
    alpha, off_target = tl.cast(alpha, ACC), tl.cast(off_target, ACC)
    scale = tl.cast(scale, ACC) * tl.cast(sign, ACC)
    b_zy = tl.load(logits_ptr + i_b * K + b_y, mask=i_b < B, other=0.0).to(ACC)
    b_top, b_sum = online_softmax(logits_ptr, i_b, b_y, B, K, BLOCK_B, BLOCK_K, ACC)
    # p_k = e^(z_k - top) * factor / divisor; losses.h has the same
    b_max = tl.maximum(b_top, b_zy)
    b_factor = tl.exp(b_top - b_max)
    b_others = b_sum * b_factor
    b_total = b_others + tl.exp(b_zy - b_max)
    b_divisor = b_total
    if NORMALIZE:
        b_factor = tl.full([BLOCK_B], 1.0, ACC)
        b_divisor = tl.where(b_sum == 0, 1.0, b_sum) + (b_total - b_total)
    b_label_grad = tl.where(valid, alpha - divide(b_sum * b_factor, b_divisor), float("nan"))
    b_gaps = tl.zeros([BLOCK_B], ACC)
    for first in range(0, K, BLOCK_K):
        i_k = first + tl.arange(0, BLOCK_K)
        b_z, m = load_rows(logits_ptr, i_b, i_k, B, K, 0.0, ACC)
        b_g = divide(tl.exp(b_z - b_top[:, None]) * b_factor[:, None], b_divisor[:, None]) - off_target
        b_g = tl.where(i_k[None, :] == b_y[:, None], b_label_grad[:, None], tl.where(valid[:, None], b_g, float("nan")))
        tl.store(dlogits_ptr + i_b[:, None] * K + i_k[None, :], scale * b_g, mask=m)
        b_gaps += tl.sum(tl.where(m, b_zy[:, None] - b_z, 0.0), 1)
    if WITH_LOSS:
        # log(1 + others) keeps what 1 + others would round away; a Taylor term is enough below 1e-4 (error others^3 / 3)
        b_log1p = tl.where(b_others < 1e-4, b_others - 0.5 * b_others * b_others, tl.log(1.0 + b_others))
        b_loss = tl.where(b_zy == b_max, b_log1p, (b_max - b_zy) + tl.log(b_total))
        if SMOOTH:
            b_loss += off_target * b_gaps
        tl.store(loss_ptr + i_b, tl.where(valid, tl.cast(sign, ACC) * b_loss, float("nan")), mask=i_b < B)


# --- launcher ---


def lsce_grad_triton(
    logits: Tensor, labels: Tensor, dlogits: Tensor, loss: Maybe, alpha: float, targeted: bool, scale: float, normalize: bool
) -> None:
    check_lsce(logits, labels, dlogits, loss, alpha, normalize)
    numbers = alpha, alpha / (logits.shape[1] - 1), scale, -1.0 if targeted else 1.0
    launch_rows(lsce_grad_kernel, logits, labels, dlogits, loss, numbers=numbers, SMOOTH=alpha > 0, NORMALIZE=normalize)


# --- registration ---

_lsce_grad = define(
    "lsce_grad(Tensor logits, Tensor labels, Tensor(a!) dlogits, Tensor(b!)? loss, float alpha, bool targeted, float scale, "
    "bool normalize)",
    lsce_grad_ref,
    lsce_grad_triton,
)

# --- public ---


def lsce_grad(
    logits: Tensor,
    labels: Tensor,
    dlogits: Tensor,
    loss: Maybe = None,
    *,
    alpha: float = 0.0,
    targeted: bool = False,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Write the gradient of label-smoothed cross-entropy into `dlogits`, and its values into `loss` if given.

    normalize: divide each row of the gradient by 1 - p_y; for alpha = 0 alone. Returns `dlogits`. Shapes and dtypes: see the
    module. Raises RuntimeError where they do not fit.
    """
    _lsce_grad(logits, labels, dlogits, loss, alpha, targeted, scale, normalize)
    return dlogits

"""Kullback-Leibler divergence against fixed probabilities, at the logits (the inner loss of TRADES).

    L = sum_k q_k (log q_k - log p_k),   p = softmax(z),   0 log 0 = 0
    dL/dz = p - q

logits: [B, K >= 2] contiguous in {fp32, bf16, fp16, fp64}; probs: q, contiguous [B, K] in fp32 (fp64 for fp64 logits), rows
summing to 1; dlogits: like logits, scale * dL/dz; loss: fp32 [B] (fp64) or None. Arithmetic is fp32 (fp64).
Moves B * K * (2 * itemsize + 4) bytes.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import Maybe, acc_dtype, check, check_rows, divide, launch_rows, load_rows
from .lsce import online_softmax

# --- reference ---


def kl_grad_ref(logits: Tensor, probs: Tensor, dlogits: Tensor, loss: Maybe, scale: float) -> None:
    check_kl(logits, probs, dlogits, loss)
    log_p = logits.to(probs.dtype).log_softmax(1)
    dlogits.copy_((log_p.exp() - probs) * scale)
    if loss is not None:
        loss.copy_((probs * (probs.log() - log_p)).where(probs > 0, 0).sum(1))


def check_kl(logits: Tensor, probs: Tensor, dlogits: Tensor, loss: Maybe) -> None:
    check_rows(logits, dlogits, loss)
    check(probs.shape == logits.shape and probs.is_contiguous(), "probs must be contiguous with logits' shape")
    check(probs.dtype == acc_dtype(logits.dtype), f"probs must be {acc_dtype(logits.dtype)}")


# --- Triton ---


@triton.jit
def kl_grad_kernel(
    logits_ptr, probs_ptr, dlogits_ptr, loss_ptr, B, scale: tl.float64,
    WITH_LOSS: tl.constexpr, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    no_label = tl.full([BLOCK_B], -1, tl.int64)
    b_max, b_total = online_softmax(logits_ptr, i_b, no_label, B, K, BLOCK_B, BLOCK_K, ACC)
    b_log_total = b_max + tl.log(b_total)
    b_loss = tl.zeros([BLOCK_B], ACC)
    for first in range(0, K, BLOCK_K):
        i_k = first + tl.arange(0, BLOCK_K)
        b_z, m = load_rows(logits_ptr, i_b, i_k, B, K, 0.0, ACC)
        b_q, m = load_rows(probs_ptr, i_b, i_k, B, K, 0.0, ACC)
        b_g = divide(tl.exp(b_z - b_max[:, None]), b_total[:, None]) - b_q
        tl.store(dlogits_ptr + i_b[:, None] * K + i_k[None, :], tl.cast(scale, ACC) * b_g, mask=m)
        if WITH_LOSS:
            b_log_q = tl.log(tl.where(b_q > 0, b_q, 1.0))
            b_loss += tl.sum(tl.where(b_q > 0, b_q * (b_log_q - (b_z - b_log_total[:, None])), 0.0), 1)
    if WITH_LOSS:
        tl.store(loss_ptr + i_b, b_loss, mask=i_b < B)


# --- launcher ---


def kl_grad_triton(logits: Tensor, probs: Tensor, dlogits: Tensor, loss: Maybe, scale: float) -> None:
    check_kl(logits, probs, dlogits, loss)
    launch_rows(kl_grad_kernel, logits, probs, dlogits, loss, numbers=(scale,))


# --- registration ---

_kl_grad = define(
    "kl_grad(Tensor logits, Tensor probs, Tensor(a!) dlogits, Tensor(b!)? loss, float scale)", kl_grad_ref, kl_grad_triton
)

# --- public ---


def kl_grad(logits: Tensor, probs: Tensor, dlogits: Tensor, loss: Maybe = None, *, scale: float = 1.0) -> Tensor:
    """Write the gradient of KL(probs || softmax(logits)) into `dlogits`, and its values into `loss` if given.

    Returns `dlogits`. Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _kl_grad(logits, probs, dlogits, loss, scale)
    return dlogits

"""Restarts: keep, per sample, the better of two adversarial images, in place.

    better = success > best_success, or success == best_success and loss > best_loss         (a NaN loss is never better)

best, x_adv: [B, ...], dense, equal strides, one dtype of {fp32, bf16, fp16, fp64}. loss, best_loss: fp32 [B] (fp64 for fp64).
success, best_success: bool [B], or both None to go by loss alone. Moves 2 * itemsize bytes an element of the samples that change.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import Maybe, acc_dtype, broadcast, check, check_alike

# --- reference ---


def keep_best_ref(best: Tensor, best_loss: Tensor, best_success: Maybe, x_adv: Tensor, loss: Tensor, success: Maybe) -> None:
    check_keep_best(best, best_loss, best_success, x_adv, loss, success)
    better = loss > best_loss
    if success is not None:
        assert best_success is not None
        better = torch.where(success.eq(best_success), better, success)
        best_success.copy_(success.where(better, best_success))
    best_loss.copy_(loss.where(better, best_loss))
    best.copy_(x_adv.where(broadcast(better, best), best))


def check_keep_best(best: Tensor, best_loss: Tensor, best_success: Maybe, x_adv: Tensor, loss: Tensor, success: Maybe) -> None:
    check_alike(best=best, x_adv=x_adv)
    check((success is None) == (best_success is None), "best_success and success go together")
    vectors = [("loss", loss), ("best_loss", best_loss), ("success", success), ("best_success", best_success)]
    for name, t in vectors:
        dtype = acc_dtype(best.dtype) if "loss" in name else torch.bool
        if t is not None:
            fits = t.dtype == dtype and t.shape == best.shape[:1] and t.is_contiguous()
            check(fits, f"{name} must be contiguous {dtype} [{len(best)}]")


# --- Triton ---


@triton.jit
def keep_best_kernel(
    best_ptr, best_loss_ptr, best_success_ptr, x_adv_ptr, loss_ptr, success_ptr,
    BY_SUCCESS: tl.constexpr, n: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_sample = tl.program_id(0).to(tl.int64)
    loss = tl.load(loss_ptr + i_sample)
    better = loss > tl.load(best_loss_ptr + i_sample)
    if BY_SUCCESS:
        success, best_success = tl.load(success_ptr + i_sample), tl.load(best_success_ptr + i_sample)
        better = tl.where(success == best_success, better, success != 0)
    tl.debug_barrier()  # every warp has read before one writes
    if better:
        tl.store(best_loss_ptr + i_sample, loss)
        if BY_SUCCESS:
            tl.store(best_success_ptr + i_sample, success)
        for first in range(0, n, BLOCK):
            o = first + tl.arange(0, BLOCK).to(tl.int64)
            b_x = tl.load(x_adv_ptr + i_sample * n + o, mask=o < n)
            tl.store(best_ptr + i_sample * n + o, b_x, mask=o < n)


# --- launcher ---


def keep_best_triton(best: Tensor, best_loss: Tensor, best_success: Maybe, x_adv: Tensor, loss: Tensor, success: Maybe) -> None:
    check_keep_best(best, best_loss, best_success, x_adv, loss, success)
    if len(best):
        n = best.numel() // len(best)
        with torch.cuda.device_of(best):
            keep_best_kernel[(len(best),)](
                best, best_loss, best_success, x_adv, loss, success,
                BY_SUCCESS=success is not None, n=n, BLOCK=min(triton.next_power_of_2(max(n, 1)), 2048),
            )  # fmt: skip


# --- registration ---

_keep_best = define(
    "keep_best_(Tensor(a!) best, Tensor(b!) best_loss, Tensor(c!)? best_success, Tensor x_adv, Tensor loss, Tensor? success)",
    keep_best_ref,
    keep_best_triton,
)

# --- public ---


def keep_best_(
    best: Tensor, best_loss: Tensor, best_success: Maybe, x_adv: Tensor, loss: Tensor, success: Maybe = None
) -> Tensor:
    """Take over into `best`, `best_loss` and `best_success` the samples where `x_adv` is better; returns `best`.

    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _keep_best(best, best_loss, best_success, x_adv, loss, success)
    return best

"""L2 ball: normalised-gradient step and projection, in place.

    v     <- x_adv + step_size * grad / ||grad||
    x_adv <- clamp(x + (v - x) * min(1, eps / ||v - x||), lo, hi)                         norms over each sample

Arguments as in linf.py. A sample whose gradient is zero everywhere stays where it is, to the bit if that is inside the ball.
Gradient elements that are NaN or infinite count as 0 and set nan_seen.

With d = x_adv - x one pass gives <g,g>, <g,d> and <d,d>, and from them ||v - x||: fp64 sums, so that the squares of the
smallest fp32 gradients do not vanish (fp64 gradients should lie within 1e-150 and 1e150). A second pass, out of cache, moves.
Device memory sees 3 reads + 1 write of the image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import EXACT, Maybe, broadcast, check_step, clamp, per_sample, tl_acc
from .linf import memory_order

# --- reference ---


def l2_step_ref(
    x_adv: Tensor, x: Tensor, grad: Tensor, eps: Tensor, step_size: Tensor, lo: float, hi: float, nan_seen: Maybe
) -> None:
    check_step(x_adv, x, grad, eps, step_size, lo, hi, nan_seen)
    if not x.numel():
        return
    clean, adv, g = (memory_order(t).double().flatten(1) for t in (x, x_adv, grad))
    unusable = ~g.isfinite()
    g = g.masked_fill(unusable, 0)
    norm = g.norm(dim=1, keepdim=True)
    v = adv + broadcast(step_size, g) * torch.where(norm > 0, g / norm, 0)
    shrink = (broadcast(eps, g) / (v - clean).norm(dim=1, keepdim=True)).clamp(max=1).nan_to_num(1)  # 0 / 0 where v is x
    memory_order(x_adv).copy_((shrink * v + (1 - shrink) * clean).clamp(lo, hi).view_as(memory_order(x)))
    if nan_seen is not None:
        nan_seen |= unusable.any(1)


# --- Triton ---


@triton.jit
def l2_direction(grad_ptr, o, m, ACC: tl.constexpr):
    """Gradient at offsets o, 0 where it is not finite; and where it is not finite."""
    b_grad = tl.load(grad_ptr + o, mask=m, other=0.0).to(ACC)
    bad = b_grad - b_grad != 0
    return tl.where(bad, 0.0, b_grad).to(tl.float64), bad


@triton.jit
def l2_step_kernel(
    x_adv_ptr, x_ptr, grad_ptr, eps_ptr, step_ptr, nan_seen_ptr, lo: tl.float64, hi: tl.float64,
    EPS_VARIES: tl.constexpr, STEP_VARIES: tl.constexpr, COUNT_NAN: tl.constexpr,
    n: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_sample = tl.program_id(0).to(tl.int64)
    start = i_sample * n
    eps = per_sample(eps_ptr, i_sample, True, EPS_VARIES).to(tl.float64)
    step = per_sample(step_ptr, i_sample, True, STEP_VARIES).to(tl.float64)
    b_gg = tl.zeros([BLOCK], tl.float64)
    b_gd = tl.zeros([BLOCK], tl.float64)
    b_dd = tl.zeros([BLOCK], tl.float64)
    b_bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        o_sample = first + tl.arange(0, BLOCK).to(tl.int64)
        m = o_sample < n
        o = start + o_sample
        b_g, bad = l2_direction(grad_ptr, o, m, ACC)
        b_adv, b_x = tl.load(x_adv_ptr + o, mask=m, other=0.0).to(ACC), tl.load(x_ptr + o, mask=m, other=0.0).to(ACC)
        b_d = (b_adv - b_x).to(tl.float64)
        b_gg += b_g * b_g
        b_gd += b_g * b_d
        b_dd += b_d * b_d
        b_bad += bad.to(tl.int32)
    gg, gd, dd = tl.sum(b_gg), tl.sum(b_gd), tl.sum(b_dd)
    if COUNT_NAN and tl.sum(b_bad) > 0:
        tl.store(nan_seen_ptr + i_sample, tl.full([], 1, tl.uint8))
    along = tl.where(gg > 0, step / tl.sqrt(tl.where(gg > 0, gg, 1.0)), 0.0)
    norm = tl.sqrt(tl.maximum(dd + 2 * along * gd + along * along * gg, 0.0))
    shrink = tl.where(norm > eps, eps / tl.where(norm > 0, norm, 1.0), 1.0)
    for first in range(0, n, BLOCK):
        o_sample = first + tl.arange(0, BLOCK).to(tl.int64)
        m = o_sample < n
        o = start + o_sample
        b_g, _ = l2_direction(grad_ptr, o, m, ACC)
        b_adv, b_x = tl.load(x_adv_ptr + o, mask=m).to(tl.float64), tl.load(x_ptr + o, mask=m).to(tl.float64)
        b_moved = (shrink * (b_adv + along * b_g) + (1 - shrink) * b_x).to(ACC)
        tl.store(x_adv_ptr + o, clamp(b_moved, tl.cast(lo, ACC), tl.cast(hi, ACC)), mask=m)


# --- launcher ---


def l2_step_triton(
    x_adv: Tensor, x: Tensor, grad: Tensor, eps: Tensor, step_size: Tensor, lo: float, hi: float, nan_seen: Maybe
) -> None:
    check_step(x_adv, x, grad, eps, step_size, lo, hi, nan_seen)
    if x_adv.numel():
        n = x_adv.numel() // len(x_adv)
        with torch.cuda.device_of(x_adv):
            l2_step_kernel[(len(x_adv),)](
                x_adv, x, grad, eps, step_size, nan_seen, lo, hi,
                EPS_VARIES=eps.numel() > 1, STEP_VARIES=step_size.numel() > 1, COUNT_NAN=nan_seen is not None,
                n=n, BLOCK=min(triton.next_power_of_2(n), 2048), ACC=tl_acc(x.dtype), num_warps=8, **EXACT,
            )  # fmt: skip


# --- registration ---

_step = define(
    "l2_step_(Tensor(a!) x_adv, Tensor x, Tensor grad, Tensor eps, Tensor step_size, float lo, float hi, Tensor(b!)? nan_seen)",
    l2_step_ref,
    l2_step_triton,
)

# --- public ---


def l2_step_(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: Tensor,
    step_size: Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
    nan_seen: Maybe = None,
) -> Tensor:
    """Step `x_adv` by `step_size` along the normalised gradient, then project onto the L2 ball and the box; returns `x_adv`.

    A zero gradient only projects. Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _step(x_adv, x, grad, eps, step_size, lo, hi, nan_seen)
    return x_adv

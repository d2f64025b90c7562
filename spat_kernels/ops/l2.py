"""L2 ball: normalised-gradient step and projection, in place.

    v     <- x_adv + step_size * grad / ||grad||
    x_adv <- clamp(x + (v - x) * min(1, eps / ||v - x||), lo, hi)                         norms over each sample

Arguments as in linf.py. A sample whose gradient is zero everywhere takes a random direction instead: signs from the Philox stream
of `seed`, by the element's place in its sample (so a sample moves alike whatever batch it is in). Elements of the gradient that
are NaN or infinite count as 0 and set nan_seen.

With d = x_adv - x one pass gives <g,g>, <g,d> and <d,d>, and from them ||v - x||: fp64 sums, so that the squares of the
smallest fp32 gradients do not vanish (fp64 gradients should lie within 1e-150 and 1e150). A second pass, out of cache, moves.
Device memory sees 3 reads + 1 write of the image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import EXACT, broadcast, check_step, per_sample, tl_acc
from .linf import memory_order, philox_ref

# --- reference ---


def l2_step_ref(
    x_adv: Tensor, x: Tensor, grad: Tensor, eps: Tensor, step_size: Tensor, seed: Tensor, lo: float, hi: float,
    nan_seen: Tensor | None,
) -> None:  # fmt: skip
    check_step(x_adv, x, grad, eps, step_size, nan_seen)
    if not x.numel():
        return
    clean, adv, g = (memory_order(t).double().flatten(1) for t in (x, x_adv, grad))
    unusable = ~g.isfinite()
    g = g.masked_fill(unusable, 0)
    n = g.shape[1]
    words = philox_ref(seed, -(-n // 4)).flatten()[:n]
    no_direction = (g == 0).all(1, keepdim=True) & ~unusable.any(1, keepdim=True)
    g = torch.where(no_direction, 1.0 - 2.0 * (words >> 31), g)
    norm = g.norm(dim=1, keepdim=True)
    delta = adv - clean + broadcast(step_size, g) * torch.where(norm > 0, g / norm, 0)
    delta *= (broadcast(eps, g) / delta.norm(dim=1, keepdim=True)).clamp(max=1)  # 0 / 0 = NaN only where delta is 0
    memory_order(x_adv).copy_((clean + delta.nan_to_num(0)).clamp(lo, hi).view_as(memory_order(x)))
    if nan_seen is not None:
        nan_seen |= unusable.any(1)


# --- Triton ---


@triton.jit
def l2_direction(grad_ptr, o, o_sample, m, key, counter, random, ACC: tl.constexpr):
    """Gradient at offsets o, 0 where it is not finite, or random signs; and where it is not finite."""
    b_grad = tl.load(grad_ptr + o, mask=m, other=0.0).to(ACC)
    bad = b_grad - b_grad != 0
    b_grad = tl.where(bad, 0.0, b_grad)
    if random:
        i_call = o_sample // 4
        r0, r1, r2, r3 = tl.philox(
            key, i_call.to(tl.uint32), (i_call >> 32).to(tl.uint32), counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
        )
        lane = o_sample % 4
        word = tl.where(lane == 0, r0, tl.where(lane == 1, r1, tl.where(lane == 2, r2, r3)))
        b_grad = tl.where(m, 1.0 - 2.0 * (word >> 31).to(ACC), 0.0)
    return b_grad, bad


@triton.jit
def l2_sums(x_adv_ptr, x_ptr, grad_ptr, start, key, counter, random, n: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """<g, g>, <g, d>, <d, d> in fp64, and the number of gradient elements that are not finite."""
    b_gg = tl.zeros([BLOCK], tl.float64)
    b_gd = tl.zeros([BLOCK], tl.float64)
    b_dd = tl.zeros([BLOCK], tl.float64)
    b_bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        o_sample = first + tl.arange(0, BLOCK).to(tl.int64)
        m = o_sample < n
        o = start + o_sample
        b_grad, bad = l2_direction(grad_ptr, o, o_sample, m, key, counter, random, ACC)
        b_adv, b_x = tl.load(x_adv_ptr + o, mask=m, other=0.0).to(ACC), tl.load(x_ptr + o, mask=m, other=0.0).to(ACC)
        b_g, b_d = b_grad.to(tl.float64), (b_adv - b_x).to(tl.float64)
        b_gg += b_g * b_g
        b_gd += b_g * b_d
        b_dd += b_d * b_d
        b_bad += bad.to(tl.int32)
    return tl.sum(b_gg), tl.sum(b_gd), tl.sum(b_dd), tl.sum(b_bad)


@triton.jit
def l2_step_kernel(
    x_adv_ptr, x_ptr, grad_ptr, eps_ptr, step_ptr, seed_ptr, nan_seen_ptr, lo: tl.float64, hi: tl.float64,
    EPS_VARIES: tl.constexpr, STEP_VARIES: tl.constexpr, COUNT_NAN: tl.constexpr,
    n: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_sample = tl.program_id(0).to(tl.int64)
    start = i_sample * n
    key, counter = tl.load(seed_ptr), tl.load(seed_ptr + 1)
    eps = per_sample(eps_ptr, i_sample, True, EPS_VARIES).to(tl.float64)
    step = per_sample(step_ptr, i_sample, True, STEP_VARIES).to(tl.float64)
    gg, gd, dd, n_bad = l2_sums(x_adv_ptr, x_ptr, grad_ptr, start, key, counter, False, n, BLOCK, ACC)
    if COUNT_NAN and n_bad > 0:
        tl.store(nan_seen_ptr + i_sample, tl.full([], 1, tl.uint8))
    random = (gg == 0) & (n_bad == 0)
    if random:
        gg, gd, dd, n_bad = l2_sums(x_adv_ptr, x_ptr, grad_ptr, start, key, counter, True, n, BLOCK, ACC)
    along = tl.where(gg > 0, step / tl.sqrt(tl.where(gg > 0, gg, 1.0)), 0.0)
    norm = tl.sqrt(tl.maximum(dd + 2 * along * gd + along * along * gg, 0.0))
    shrink = tl.where(norm > eps, eps / tl.where(norm > 0, norm, 1.0), 1.0)
    for first in range(0, n, BLOCK):
        o_sample = first + tl.arange(0, BLOCK).to(tl.int64)
        m = o_sample < n
        o = start + o_sample
        b_grad, bad = l2_direction(grad_ptr, o, o_sample, m, key, counter, random, ACC)
        b_adv, b_x = tl.load(x_adv_ptr + o, mask=m).to(ACC), tl.load(x_ptr + o, mask=m).to(ACC)
        b_delta = shrink * ((b_adv - b_x).to(tl.float64) + along * b_grad.to(tl.float64))
        b_moved = (b_x.to(tl.float64) + b_delta).to(ACC)
        tl.store(x_adv_ptr + o, tl.minimum(tl.maximum(b_moved, tl.cast(lo, ACC)), tl.cast(hi, ACC)), mask=m)


# --- launcher ---


def l2_step_triton(
    x_adv: Tensor, x: Tensor, grad: Tensor, eps: Tensor, step_size: Tensor, seed: Tensor, lo: float, hi: float,
    nan_seen: Tensor | None,
) -> None:  # fmt: skip
    check_step(x_adv, x, grad, eps, step_size, nan_seen)
    if x_adv.numel():
        n = x_adv.numel() // len(x_adv)
        with torch.cuda.device_of(x_adv):
            l2_step_kernel[(len(x_adv),)](
                x_adv, x, grad, eps, step_size, seed, nan_seen, lo, hi,
                EPS_VARIES=eps.numel() > 1, STEP_VARIES=step_size.numel() > 1, COUNT_NAN=nan_seen is not None,
                n=n, BLOCK=min(triton.next_power_of_2(n), 2048), ACC=tl_acc(x.dtype), num_warps=8, **EXACT,
            )  # fmt: skip


# --- registration ---

_step = define(
    "l2_step_(Tensor(a!) x_adv, Tensor x, Tensor grad, Tensor eps, Tensor step_size, Tensor seed, float lo, float hi, "
    "Tensor(b!)? nan_seen)",
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
    seed: Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
    nan_seen: Tensor | None = None,
) -> Tensor:
    """Step `x_adv` by `step_size` along the normalised gradient, then project onto the L2 ball and the box; returns `x_adv`.

    seed: int64 [2], for samples whose gradient is zero. Shapes and dtypes: see the module. Raises RuntimeError where they do
    not fit.
    """
    _step(x_adv, x, grad, eps, step_size, seed, lo, hi, nan_seen)
    return x_adv

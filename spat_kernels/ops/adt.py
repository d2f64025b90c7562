"""Adversarial distributions of perturbations: a sample of each image, and the step of their parameters, in place.

    sample:  x_adv <- clamp(x + eps * tanh(a), lo, hi),  a = mu + sigma * r,  sigma = softplus(rho),  r ~ N(0, 1)
    step:    mu <- mu + lr * g_mu / (|g_mu| + 1e-8), and so rho; then the next draw's sample     (Dong et al., arXiv 2002.05999)

The gradients are those of L + entropy * (log sigma + log(1 - tanh(a)^2)); grad * factor is dL/dx_adv at the sample of `draw`:

    g_mu  = eps * factor * grad * t - entropy * 2 tanh(a) t / (t + 1e-8),  t = 1 - tanh(a)^2
    g_rho = (g_mu * r + entropy / (sigma + 1e-8)) * sigmoid(rho)

The first term of g_mu is 0 where the box clips.

The step is that of Adam without averages, betas = (0, 0). With sum_mu and sum_rho the gradients are added to them first. `last`
says whether that was the last one: then the sums step and become 0, else mu and rho stay. All noise is drawn again from the seed,
so none of it is stored. r of element i is the normal quantile of one word of Philox4x32-10 with key seed[0] and counter
(i // 4, seed[1] + draw), i in the order of the memory.

x_adv, x, grad: [B, ...], dense, equal strides, dtypes as in linf.py. x_adv is only written. mu, rho, sum_mu, sum_rho: like them
in fp32 (fp64 for fp64 images); eps, factor: [1] or [B] in that dtype; seed: int64 [2]. nan_seen, uint8 [B], is set to 1 for
samples with a gradient that is NaN, infinite or above 2^120 / (eps factor), which counts as 0. A step moves 28 bytes an element
in fp32, 44 with sums; a sample 16.

All arithmetic, exp, log and normal quantiles too, is additions, products and quotients, so fp32 is equal to the bit everywhere.
In fp64 exp and log1p are the library's, which differ by an ulp or two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import (
    EXACT,
    Maybe,
    acc_dtype,
    broadcast,
    check,
    check_grad,
    check_images,
    check_int64,
    clamp,
    divide,
    per_sample,
    same_layout,
    tl_acc,
)
from .linf import memory_order, philox_at

BLOCK = 1024

# --- reference ---


def check_sample(
    x_adv: Tensor, x: Tensor, seed: Tensor, lo: float, hi: float, per_sample: dict[str, Tensor], **like_images: Maybe
) -> None:
    check_images(x_adv, x, lo, hi, **per_sample)
    check_int64(2, seed=seed)
    for name, t in like_images.items():
        if t is not None:
            check(t.dtype == acc_dtype(x.dtype), f"{name} must be {acc_dtype(x.dtype)}, got {t.dtype}")
            check(same_layout(x_adv, t), f"{name} must have the shape and the strides of x_adv")


def check_sums(sum_mu: Maybe, sum_rho: Maybe, last: bool) -> None:
    check((sum_mu is None) == (sum_rho is None), "sum_mu and sum_rho go together")
    check(sum_mu is not None or last, "last=False needs sum_mu and sum_rho")


def polynomial(v: Tensor, *coefficients: float) -> Tensor:
    value = torch.full_like(v, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = c + v * value
    return value


def exp_nonpositive(v: Tensor) -> Tensor:
    """e^v for v <= 0, as in losses.h."""
    if v.dtype == torch.float64:
        return v.exp()
    shifted = v * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = (v - n * 0.693359375) + n * 2.12194440e-4
    q = polynomial(r, 0.5, 0.166665763, 0.0416664667, 0.00836317986, 0.00139334088)
    scale = ((shifted.view(torch.int32) << 23) + (191 << 23)).view(torch.float32)
    return (((r * r * q + r) + 1) * scale * 2.0**-64).masked_fill(v < -104, 0)


def log1p_unit(v: Tensor) -> Tensor:
    """log(1 + v) for v in [0, 1], as in losses.h."""
    if v.dtype == torch.float64:
        return v.log1p()
    coefficients = -0.499995023, 0.333192706, -0.248443693, 0.191114306, -0.136747703, 0.0783616677, -0.0295885075, 0.00525345793
    return v * polynomial(v, 1.0, *coefficients)


def normal(words: Tensor) -> Tensor:
    """The normal quantiles of 32-bit words, int64, in fp32, as in adt.h."""
    u = ((words >> 8) * 2 + 1 - 2**24).float() * 2.0**-24
    v = ((1 - u) * (1 + u)).view(torch.int32)
    mantissa = ((v & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    w = (127 - (v >> 23)).float() * 0.693147182 - log1p_unit(mantissa - 1)
    top = polynomial(w, 1.25331450, 0.498157412, 0.102273889, 0.0136757540, 0.00114193687, 1.04918448e-5)
    return u * top / polynomial(w, 1.0, 0.135679796, 0.0330215730, 0.00317485281, 0.000122292346)


def normals(like: Tensor, seed: Tensor, draw: int) -> Tensor:
    """The noise of a draw, like the parameters `like`."""
    calls = torch.arange(-(-like.numel() // 4), device=like.device)
    words = philox_at(torch.stack((seed[0], seed[1] + draw)), calls).flatten()[: like.numel()]
    noise = torch.empty_like(like)
    memory_order(noise).copy_(normal(words).view(memory_order(like).shape))
    return noise


def perturbation(mu: Tensor, rho: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sigma, its derivative, tanh(mu + sigma r), and its derivative."""
    e = exp_nonpositive(-rho.abs())
    sigma = rho.clamp_min(0) + log1p_unit(e)
    a = mu + sigma * r
    q = exp_nonpositive(-2 * a.abs())
    total = 1 + q
    return sigma, torch.where(rho > 0, 1, e) / (1 + e), torch.where(a < 0, q - 1, 1 - q) / total, 4 * q / (total * total)


def adt_sample_ref(
    x_adv: Tensor, mu: Tensor, rho: Tensor, x: Tensor, eps: Tensor, seed: Tensor, draw: int, lo: float, hi: float
) -> None:
    check_sample(x_adv, x, seed, lo, hi, {"eps": eps}, mu=mu, rho=rho)
    _, _, tanh, _ = perturbation(mu, rho, normals(mu, seed, draw))
    x_adv.copy_((x.to(eps.dtype) + broadcast(eps, x) * tanh).clamp(lo, hi))


def adt_step_ref(
    x_adv: Tensor,
    mu: Tensor,
    rho: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: Tensor,
    factor: Tensor,
    seed: Tensor,
    draw: int,
    lr: float,
    entropy: float,
    lo: float,
    hi: float,
    nan_seen: Maybe = None,
    sum_mu: Maybe = None,
    sum_rho: Maybe = None,
    last: bool = True,
) -> None:
    check_sample(x_adv, x, seed, lo, hi, {"eps": eps, "factor": factor}, mu=mu, rho=rho, sum_mu=sum_mu, sum_rho=sum_rho)
    check_grad(x_adv, grad, nan_seen)
    check_sums(sum_mu, sum_rho, last)
    r = normals(mu, seed, draw)
    sigma, sigma_slope, tanh, tanh_slope = perturbation(mu, rho, r)
    moved = x.to(eps.dtype) + broadcast(eps, x) * tanh
    along = grad.to(eps.dtype) * broadcast(factor, x) * broadcast(eps, x)
    usable = along.abs() <= 2.0**120
    through = torch.where(usable & (moved >= lo) & (moved <= hi), along * tanh_slope, 0)
    g_mu = through - entropy * (2 * tanh * tanh_slope / (tanh_slope + 1e-8))
    g_rho = (g_mu * r + torch.full_like(sigma, entropy) / (sigma + 1e-8)) * sigma_slope  # a number would be times 1 / sigma
    for value, total, g in ((mu, sum_mu, g_mu), (rho, sum_rho, g_rho)):
        if total is not None:
            g = total.add_(g)
        if last:
            value += lr * (g / (g.abs() + 1e-8))
            if total is not None:
                total.zero_()
    if nan_seen is not None:
        nan_seen |= ~usable.flatten(1).all(1) if x.numel() else False
    adt_sample_ref(x_adv, mu, rho, x, eps, seed, draw + 1, lo, hi)


# --- Triton ---


@triton.jit
def exp_of_nonpositive(v):
    if v.dtype == tl.float64:
        e = tl.exp(v)
    else:
        shifted = v * 1.44269504 + 12582912.0
        n = shifted - 12582912.0
        r = (v - n * 0.693359375) + n * 2.12194440e-4
        q = 0.5 + r * (0.166665763 + r * (0.0416664667 + r * (0.00836317986 + r * 0.00139334088)))
        scale = ((shifted.to(tl.uint32, bitcast=True) << 23) + 1602224128).to(tl.float32, bitcast=True)
        e = tl.where(v < -104.0, 0.0, (1.0 + (r + r * r * q)) * scale * 5.421010862427522e-20)
    return e


@triton.jit
def log1p_of_unit(v):
    if v.dtype == tl.float64:
        w = 1.0 + v  # log(w) / (w - 1) bears the rounding of w
        log = tl.where(w == 1.0, v, tl.log(w) * (v / tl.where(w == 1.0, 1.0, w - 1.0)))
    else:
        high = -0.136747703 + v * (0.0783616677 + v * (-0.0295885075 + v * 0.00525345793))
        log = v * (1.0 + v * (-0.499995023 + v * (0.333192706 + v * (-0.248443693 + v * (0.191114306 + v * high)))))
    return log


@triton.jit
def normals_of_block(seed_ptr, draw, BLOCK: tl.constexpr):
    i_call = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    counter = tl.load(seed_ptr + 1) + draw
    r0, r1, r2, r3 = tl.philox(
        tl.load(seed_ptr),
        i_call.to(tl.uint32), (i_call >> 32).to(tl.uint32), counter.to(tl.uint32), (counter >> 32).to(tl.uint32),
    )  # fmt: skip
    b_word = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    u = ((b_word >> 8).to(tl.int32) * 2 + 1 - 16777216).to(tl.float32) * 5.9604644775390625e-08
    v = ((1.0 - u) * (1.0 + u)).to(tl.int32, bitcast=True)
    mantissa = ((v & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    w = (127 - (v >> 23)).to(tl.float32) * 0.693147182 - log1p_of_unit(mantissa - 1.0)
    top = 0.102273889 + w * (0.0136757540 + w * (0.00114193687 + w * 1.04918448e-5))
    bottom = 0.0330215730 + w * (0.00317485281 + w * 0.000122292346)
    return divide(u * (1.25331450 + w * (0.498157412 + w * top)), 1.0 + w * (0.135679796 + w * bottom))


@triton.jit
def perturbation_of(b_mu, b_rho, b_r):
    e = exp_of_nonpositive(-tl.abs(b_rho))
    sigma = tl.maximum(b_rho, 0.0) + log1p_of_unit(e)
    a = b_mu + sigma * b_r
    q = exp_of_nonpositive(-2.0 * tl.abs(a))
    total = 1.0 + q
    slope = divide(tl.where(b_rho > 0, 1.0, e), 1.0 + e)
    return sigma, slope, divide(tl.where(a < 0, q - 1.0, 1.0 - q), total), divide(4.0 * q, total * total)


@triton.jit
def sample_of(b_x, b_mu, b_rho, b_r, b_eps, lo, hi):
    _, _, tanh, _ = perturbation_of(b_mu, b_rho, b_r)
    return clamp(b_x + b_eps * tanh, lo, hi)


@triton.jit
def adt_sample_kernel(
    x_adv_ptr, mu_ptr, rho_ptr, x_ptr, eps_ptr, seed_ptr, draw, numel, sample_numel, lo: tl.float64, hi: tl.float64,
    VARIES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_eps, b_x = per_sample(eps_ptr, o // sample_numel, m, VARIES), tl.load(x_ptr + o, mask=m).to(ACC)
    b_mu, b_rho = tl.load(mu_ptr + o, mask=m), tl.load(rho_ptr + o, mask=m)
    b_r = normals_of_block(seed_ptr, draw, BLOCK).to(ACC)
    tl.store(x_adv_ptr + o, sample_of(b_x, b_mu, b_rho, b_r, b_eps, tl.cast(lo, ACC), tl.cast(hi, ACC)), mask=m)


@triton.jit
def adt_step_kernel(
    x_adv_ptr, mu_ptr, rho_ptr, x_ptr, grad_ptr, eps_ptr, factor_ptr, seed_ptr, nan_seen_ptr, sum_mu_ptr, sum_rho_ptr, draw,
    numel, sample_numel, lr: tl.float64, entropy: tl.float64, lo: tl.float64, hi: tl.float64, EPS_VARIES: tl.constexpr,
    FACTOR_VARIES: tl.constexpr, COUNT_NAN: tl.constexpr, SUMS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    i_sample = o // sample_numel
    low, high, rate, weight = tl.cast(lo, ACC), tl.cast(hi, ACC), tl.cast(lr, ACC), tl.cast(entropy, ACC)
    b_eps, b_factor = per_sample(eps_ptr, i_sample, m, EPS_VARIES), per_sample(factor_ptr, i_sample, m, FACTOR_VARIES)
    b_x, b_grad = tl.load(x_ptr + o, mask=m).to(ACC), tl.load(grad_ptr + o, mask=m, other=0.0).to(ACC)
    b_mu, b_rho = tl.load(mu_ptr + o, mask=m, other=0.0), tl.load(rho_ptr + o, mask=m, other=0.0)
    b_r = normals_of_block(seed_ptr, draw, BLOCK).to(ACC)
    sigma, sigma_slope, tanh, tanh_slope = perturbation_of(b_mu, b_rho, b_r)
    moved, along = b_x + b_eps * tanh, b_grad * b_factor * b_eps
    usable = tl.abs(along) <= 1.329227995784916e36
    if COUNT_NAN:
        tl.store(nan_seen_ptr + i_sample, tl.full([BLOCK], 1, tl.uint8), mask=m & (usable == 0))
    through = tl.where(usable & (moved >= low) & (moved <= high), along * tanh_slope, 0.0)
    b_g_mu = through - weight * divide(2.0 * tanh * tanh_slope, tanh_slope + 1e-8)
    b_g_rho = (b_g_mu * b_r + divide(weight, sigma + 1e-8)) * sigma_slope
    if SUMS:
        b_g_mu += tl.load(sum_mu_ptr + o, mask=m, other=0.0)
        b_g_rho += tl.load(sum_rho_ptr + o, mask=m, other=0.0)
        tl.store(sum_mu_ptr + o, tl.zeros_like(b_g_mu) if LAST else b_g_mu, mask=m)
        tl.store(sum_rho_ptr + o, tl.zeros_like(b_g_rho) if LAST else b_g_rho, mask=m)
    if LAST:
        b_mu += rate * divide(b_g_mu, tl.abs(b_g_mu) + 1e-8)
        b_rho += rate * divide(b_g_rho, tl.abs(b_g_rho) + 1e-8)
        tl.store(mu_ptr + o, b_mu, mask=m)
        tl.store(rho_ptr + o, b_rho, mask=m)
    b_r = normals_of_block(seed_ptr, draw + 1, BLOCK).to(ACC)
    tl.store(x_adv_ptr + o, sample_of(b_x, b_mu, b_rho, b_r, b_eps, low, high), mask=m)


# --- launchers ---


def adt_sample_triton(
    x_adv: Tensor, mu: Tensor, rho: Tensor, x: Tensor, eps: Tensor, seed: Tensor, draw: int, lo: float, hi: float
) -> None:
    check_sample(x_adv, x, seed, lo, hi, {"eps": eps}, mu=mu, rho=rho)
    if numel := x_adv.numel():
        with torch.cuda.device_of(x_adv):
            adt_sample_kernel[(triton.cdiv(numel, BLOCK),)](
                x_adv, mu, rho, x, eps, seed, draw, numel, numel // len(x), lo, hi,
                VARIES=eps.numel() > 1, BLOCK=BLOCK, ACC=tl_acc(x.dtype), **EXACT,
            )  # fmt: skip


def adt_step_triton(
    x_adv: Tensor,
    mu: Tensor,
    rho: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: Tensor,
    factor: Tensor,
    seed: Tensor,
    draw: int,
    lr: float,
    entropy: float,
    lo: float,
    hi: float,
    nan_seen: Maybe = None,
    sum_mu: Maybe = None,
    sum_rho: Maybe = None,
    last: bool = True,
) -> None:
    check_sample(x_adv, x, seed, lo, hi, {"eps": eps, "factor": factor}, mu=mu, rho=rho, sum_mu=sum_mu, sum_rho=sum_rho)
    check_grad(x_adv, grad, nan_seen)
    check_sums(sum_mu, sum_rho, last)
    if numel := x_adv.numel():
        with torch.cuda.device_of(x_adv):
            adt_step_kernel[(triton.cdiv(numel, BLOCK),)](
                x_adv, mu, rho, x, grad, eps, factor, seed, nan_seen, sum_mu, sum_rho, draw, numel, numel // len(x), lr, entropy,
                lo, hi, EPS_VARIES=eps.numel() > 1, FACTOR_VARIES=factor.numel() > 1, COUNT_NAN=nan_seen is not None,
                SUMS=sum_mu is not None, LAST=last, BLOCK=BLOCK, ACC=tl_acc(x.dtype), **EXACT,
            )  # fmt: skip


# --- registration ---

_sample = define(
    "adt_sample_(Tensor(a!) x_adv, Tensor mu, Tensor rho, Tensor x, Tensor eps, Tensor seed, int draw, float lo, float hi)",
    adt_sample_ref,
    adt_sample_triton,
)
_step = define(
    "adt_step_(Tensor(a!) x_adv, Tensor(b!) mu, Tensor(c!) rho, Tensor x, Tensor grad, Tensor eps, Tensor factor, Tensor seed, "
    "int draw, float lr, float entropy, float lo, float hi, Tensor(d!)? nan_seen=None, Tensor(e!)? sum_mu=None, "
    "Tensor(f!)? sum_rho=None, bool last=True)",
    adt_step_ref,
    adt_step_triton,
)

# --- public ---


def adt_sample_(
    x_adv: Tensor, mu: Tensor, rho: Tensor, x: Tensor, eps: Tensor, seed: Tensor, draw: int, lo: float = 0.0, hi: float = 1.0
) -> Tensor:
    """Write the sample of a draw, int >= 0, into `x_adv`; returns `x_adv`.

    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _sample(x_adv, mu, rho, x, eps, seed, draw, lo, hi)
    return x_adv


def adt_step_(
    x_adv: Tensor,
    mu: Tensor,
    rho: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: Tensor,
    factor: Tensor,
    seed: Tensor,
    draw: int,
    lr: float,
    entropy: float,
    lo: float = 0.0,
    hi: float = 1.0,
    nan_seen: Maybe = None,
    sum_mu: Maybe = None,
    sum_rho: Maybe = None,
    last: bool = True,
) -> Tensor:
    """Step `mu` and `rho` along the gradients at the sample of `draw`, and write the next one into `x_adv`; returns `x_adv`.

    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _step(x_adv, mu, rho, x, grad, eps, factor, seed, draw, lr, entropy, lo, hi, nan_seen, sum_mu, sum_rho, last)
    return x_adv

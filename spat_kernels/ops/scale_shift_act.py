"""The pointwise work between the layers of an input-gradient network with an activation other than ReLU, in one pass each way.

    forward:   t = a + b,   v = scale_c t + shift_c,   out = act(v);   total = t;   slope = scale_c act'(v)
    backward:  dx = slope * (grad + grad2) + residual

What is absent drops out of its formula. `slope` is all that the way back needs, rounded once to the images' dtype. Activations are
torch's:

    gelu         v Phi(v), Phi the normal distribution          relu6        min(max(v, 0), 6)
    gelu_tanh    v sigmoid(2 sqrt(2/pi) (v + 0.044715 v^3))     leaky_relu   v where v > 0, else negative_c v (PReLU, too)
    silu         v sigmoid(v)                                   tanh
    sigmoid      1 / (1 + e^-v)                                 mish         v tanh(softplus(v))
    hardswish    v hardsigmoid(v)                               elu          v where v > 0, else e^v - 1
    hardsigmoid  min(max(v + 3, 0), 6) / 6                      softplus     v where v > 20, else log(1 + e^v)

GELU: Hendrycks and Gimpel, arXiv 1606.08415. SiLU: Elfwing et al., arXiv 1702.03118. Hard swish: Howard et al., arXiv 1905.02244.
Mish: Misra, arXiv 1908.08681. Values at +-inf are torch's (gelu(-inf) is NaN). Derivatives there are their limits, where torch's
may be NaN.

Images: one shape [N, C, ...] and one dtype of {fp32, bf16, fp16, fp64}, channels innermost in memory (channels_last, or
contiguous [N, C]). scale, shift: contiguous [C] in fp32 (fp64 for fp64 images); negative: [C] or [1] like them, with leaky_relu
alone. Arithmetic is fp32 (fp64) and rounds once, on the store: v continues from the unrounded t. Results may be the same memory
as inputs (`out` as `a` or `b`, `dx` as any input).

All arithmetic, exp, log and Phi too, is additions, products and quotients, so fp32 is equal to the bit everywhere. A value or
derivative is at most 4e-7 off, relative to the largest of its terms (2e-7 z more where GELU vanishes like e^-z). In fp64 exp, erf
and the like are the library's, which differ by an ulp or two.

Each image given moves itemsize bytes an element, once: 12 bytes in fp32 for an activation and its derivative, and back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import EXACT, Maybe, acc_dtype, as_rows, check, check_channels, check_per_channel, divide, tl_acc
from .adt import exp_nonpositive, exp_of_nonpositive, exp_rest, exp_rest_of, log1p_of_unit, log1p_unit, polynomial

ACTIVATIONS = (
    "gelu", "gelu_tanh", "silu", "sigmoid", "hardswish", "hardsigmoid", "relu6", "leaky_relu", "tanh", "mish", "elu", "softplus",
)  # fmt: skip
LEAKY = ACTIVATIONS.index("leaky_relu")
BLOCK = 1024

# --- reference ---


def check_forward(
    a: Tensor, b: Maybe, scale: Maybe, shift: Maybe, negative: Maybe, total: Maybe, out: Tensor, slope: Maybe, act: int
) -> None:
    check_channels(a=a, b=b, total=total, out=out, slope=slope)
    check_per_channel(a, scale=scale, shift=shift)
    check(0 <= act < len(ACTIVATIONS), f"act must be the index of one of ACTIVATIONS, got {act}")
    check((negative is not None) == (act == LEAKY), "negative goes with leaky_relu")
    if negative is not None:
        check(negative.ndim == 1, f"negative must be [1] or [{a.shape[1]}]")
        check_per_channel(a, negative=negative.expand(a.shape[1]).contiguous() if negative.numel() == 1 else negative)


def check_backward(grad: Tensor, grad2: Maybe, slope: Tensor, residual: Maybe, dx: Tensor) -> None:
    check_channels(grad=grad, grad2=grad2, slope=slope, residual=residual, dx=dx)


def clamped(v: Tensor, lo: float, hi: float) -> Tensor:
    """NaN and -0 stay, as in math.h."""
    v = torch.where(v < lo, lo, v)
    return torch.where(v > hi, hi, v)


def expm1_nonpositive(v: Tensor, e: Tensor) -> Tensor:
    if v.dtype == torch.float64:
        return v.expm1()
    return torch.where(v > -0.34, v * (1 + v * exp_rest(v)), e - 1)


def normal_tail(x: Tensor, e: Tensor) -> Tensor:
    """Phi(-x) for x in [0, 15], with e = e^(-x^2/2), as in activations.h."""
    if x.dtype == torch.float64:
        return 0.5 * torch.erfc(x * 0.7071067811865476)
    top = polynomial(x, 0.5, 0.439284386, 0.183969845, 0.0408813655, 0.00415326482)
    return e * (top / polynomial(x, 1.0, 1.67645378, 1.20555122, 0.471410563, 0.102480503, 0.0104105794))


def sigmoid(v: Tensor) -> tuple[Tensor, Tensor]:
    q = exp_nonpositive(-v.abs())
    share = 1 / (1 + q)
    return torch.where(v < 0, q * share, share), q * share * share


def gelu(v: Tensor) -> tuple[Tensor, Tensor]:
    c = clamped(v, -15, 15)
    e = exp_nonpositive(c * c * -0.5)
    tail = normal_tail(c.abs(), e)
    cdf = torch.where(v < 0, tail, 1 - tail)
    return v * cdf, cdf + c * e * 0.3989422804014327


def gelu_tanh(v: Tensor) -> tuple[Tensor, Tensor]:
    c = clamped(v, -15, 15)
    square = c * c
    s, s_slope = sigmoid(c * (square * 0.07135481627260025 + 1.5957691216057308))
    return v * s, s + c * (square * 0.21406444881780074 + 1.5957691216057308) * s_slope


def silu(v: Tensor) -> tuple[Tensor, Tensor]:
    s, s_slope = sigmoid(v)
    return v * s, s + clamped(v, -1000, 1000) * s_slope


def hardsigmoid(v: Tensor) -> tuple[Tensor, Tensor]:
    return clamped(v + 3, 0, 6) / 6, torch.where((v > -3) & (v < 3), torch.full_like(v, 1 / 6), 0)


def hardswish(v: Tensor) -> tuple[Tensor, Tensor]:
    return v * hardsigmoid(v)[0], torch.where(v <= -3, 0, torch.where(v >= 3, 1, v / 3 + 0.5))


def relu6(v: Tensor) -> tuple[Tensor, Tensor]:
    return clamped(v, 0, 6), ((v > 0) & (v < 6)).to(v.dtype)


def tanh(v: Tensor) -> tuple[Tensor, Tensor]:
    x = -2 * v.abs()
    q = exp_nonpositive(x)
    share = 1 / (1 + q)
    size = -expm1_nonpositive(x, q) * share
    return torch.where(v < 0, -size, torch.where(v > 0, size, v)), 4 * q * share * share


def mish(v: Tensor) -> tuple[Tensor, Tensor]:
    q = exp_nonpositive(-v.abs())
    n, d = torch.where(v < 0, q * (q + 2), 1 + 2 * q), torch.where(v < 0, 2, 2 * q * q)
    share = 1 / (n + d)
    t = n * share
    return v * t, t + clamped(v, -1000, 1000) * (4 * torch.where(v < 0, q, q * q) * (1 + q) * share * share)


def elu(v: Tensor) -> tuple[Tensor, Tensor]:
    below = torch.where(v > 0, 0, v)
    e = exp_nonpositive(below)
    return torch.where(v > 0, v, expm1_nonpositive(below, e)), e


def softplus(v: Tensor) -> tuple[Tensor, Tensor]:
    q = exp_nonpositive(-v.abs())
    s = torch.where(v < 0, q, 1) / (1 + q)
    return torch.where(v > 20, v, torch.where(v > 0, v, 0) + log1p_unit(q)), torch.where(v > 20, 1, s)


FUNCTIONS = {f.__name__: f for f in (gelu, gelu_tanh, silu, sigmoid, hardswish, hardsigmoid, relu6, tanh, mish, elu, softplus)}


def activated(v: Tensor, act: int, negative: Maybe) -> tuple[Tensor, Tensor]:
    """act(v) and act'(v)."""
    if negative is not None:
        return torch.where(v > 0, v, v * negative), torch.where(v > 0, 1, negative)
    return FUNCTIONS[ACTIVATIONS[act]](v)


def scale_shift_act_ref(
    a: Tensor, b: Maybe, scale: Maybe, shift: Maybe, negative: Maybe, total: Maybe, out: Tensor, slope: Maybe, act: int
) -> None:
    check_forward(a, b, scale, shift, negative, total, out, slope, act)
    acc = acc_dtype(a.dtype)
    t = as_rows(a).to(acc)
    t = t if b is None else t + as_rows(b).to(acc)
    v = t if scale is None else t * scale
    v = v if shift is None else v + shift
    value, derivative = activated(v, act, negative)
    if total is not None:
        as_rows(total).copy_(t)
    if slope is not None:
        as_rows(slope).copy_(derivative if scale is None else derivative * scale)
    as_rows(out).copy_(value)


def scale_shift_act_grad_ref(grad: Tensor, grad2: Maybe, slope: Tensor, residual: Maybe, dx: Tensor) -> None:
    check_backward(grad, grad2, slope, residual, dx)
    acc = acc_dtype(grad.dtype)
    g = as_rows(grad).to(acc)
    g = g if grad2 is None else g + as_rows(grad2).to(acc)
    g = g * as_rows(slope).to(acc)
    as_rows(dx).copy_(g if residual is None else g + as_rows(residual).to(acc))


# --- Triton ---


@triton.jit
def clamp_of(v, lo, hi):
    v = tl.where(v < lo, lo, v)
    return tl.where(v > hi, hi, v)


@triton.jit
def expm1_of_nonpositive(v, e):
    e -= 1.0
    if v.dtype != tl.float64:
        e = tl.where(v > -0.34, v * (1.0 + v * exp_rest_of(v)), e)
    return e


@triton.jit
def normal_tail_of(x, e):
    if x.dtype == tl.float64:
        tail = 0.5 * (1.0 - tl.erf(x * 0.7071067811865476))
    else:
        top = 0.5 + x * (0.439284386 + x * (0.183969845 + x * (0.0408813655 + x * 0.00415326482)))
        high = 0.471410563 + x * (0.102480503 + x * 0.0104105794)
        tail = e * divide(top, 1.0 + x * (1.67645378 + x * (1.20555122 + x * high)))
    return tail


@triton.jit
def share_of(q):
    """1 / (1 + q)"""
    return divide(tl.full(q.shape, 1.0, q.dtype), 1.0 + q)


@triton.jit
def sigmoid_of(v):
    q = exp_of_nonpositive(-tl.abs(v))
    share = share_of(q)
    return tl.where(v < 0, q * share, share), q * share * share


@triton.jit
def activated_of(v, negative, ACT: tl.constexpr):
    if ACT == 0:  # gelu
        c = clamp_of(v, -15.0, 15.0)
        e = exp_of_nonpositive(c * c * -0.5)
        tail = normal_tail_of(tl.abs(c), e)
        cdf = tl.where(v < 0, tail, 1.0 - tail)
        value, slope = v * cdf, cdf + c * e * 0.3989422804014327
    elif ACT == 1:  # gelu_tanh
        c = clamp_of(v, -15.0, 15.0)
        square = c * c
        s, s_slope = sigmoid_of(c * (1.5957691216057308 + square * 0.07135481627260025))
        value, slope = v * s, s + c * (1.5957691216057308 + square * 0.21406444881780074) * s_slope
    elif ACT == 2:  # silu
        s, s_slope = sigmoid_of(v)
        value, slope = v * s, s + clamp_of(v, -1000.0, 1000.0) * s_slope
    elif ACT == 3:  # sigmoid
        value, slope = sigmoid_of(v)
    elif ACT == 4:  # hardswish
        value = v * divide(clamp_of(v + 3.0, 0.0, 6.0), tl.full(v.shape, 6.0, v.dtype))
        slope = tl.where(v <= -3, 0.0, tl.where(v >= 3, 1.0, divide(v, tl.full(v.shape, 3.0, v.dtype)) + 0.5))
    elif ACT == 5:  # hardsigmoid
        value = divide(clamp_of(v + 3.0, 0.0, 6.0), tl.full(v.shape, 6.0, v.dtype))
        slope = tl.where((v > -3) & (v < 3), tl.full(v.shape, 0.16666666666666666, v.dtype), 0.0)
    elif ACT == 6:  # relu6
        value, slope = clamp_of(v, 0.0, 6.0), tl.where((v > 0) & (v < 6), 1.0, tl.zeros_like(v))
    elif ACT == 7:  # leaky_relu
        value, slope = tl.where(v > 0, v, v * negative), tl.where(v > 0, 1.0, negative)
    elif ACT == 8:  # tanh
        x = -2.0 * tl.abs(v)
        q = exp_of_nonpositive(x)
        share = share_of(q)
        size = -expm1_of_nonpositive(x, q) * share
        value, slope = tl.where(v < 0, -size, tl.where(v > 0, size, v)), 4.0 * q * share * share
    elif ACT == 9:  # mish
        q = exp_of_nonpositive(-tl.abs(v))
        n, d = tl.where(v < 0, q * (q + 2.0), 1.0 + 2.0 * q), tl.where(v < 0, 2.0, 2.0 * q * q)
        share = divide(tl.full(v.shape, 1.0, v.dtype), n + d)
        t = n * share
        rest = 4.0 * tl.where(v < 0, q, q * q) * (1.0 + q) * share * share
        value, slope = v * t, t + clamp_of(v, -1000.0, 1000.0) * rest
    elif ACT == 10:  # elu
        below = tl.where(v > 0, 0.0, v)
        slope = exp_of_nonpositive(below)
        value = tl.where(v > 0, v, expm1_of_nonpositive(below, slope))
    else:  # softplus
        q = exp_of_nonpositive(-tl.abs(v))
        s = divide(tl.where(v < 0, q, 1.0), 1.0 + q)
        value = tl.where(v > 20, v, tl.where(v > 0, v, 0.0) + log1p_of_unit(q))
        slope = tl.where(v > 20, 1.0, s)
    return value, slope


@triton.jit
def scale_shift_act_kernel(
    a_ptr, b_ptr, scale_ptr, shift_ptr, negative_ptr, total_ptr, out_ptr, slope_ptr, numel, C,
    VARIES: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    i_c = o % C
    b_v = tl.load(a_ptr + o, mask=m, other=0.0).to(ACC)
    if b_ptr is not None:
        b_v += tl.load(b_ptr + o, mask=m, other=0.0).to(ACC)
    if total_ptr is not None:
        tl.store(total_ptr + o, b_v, mask=m)
    if scale_ptr is not None:
        b_v *= tl.load(scale_ptr + i_c, mask=m, other=0.0)
    if shift_ptr is not None:
        b_v += tl.load(shift_ptr + i_c, mask=m, other=0.0)
    b_negative = tl.zeros([BLOCK], ACC)
    if negative_ptr is not None:
        b_negative += tl.load(negative_ptr + i_c, mask=m, other=0.0) if VARIES else tl.load(negative_ptr)
    b_value, b_slope = activated_of(b_v, b_negative, ACT)
    tl.store(out_ptr + o, b_value, mask=m)
    if slope_ptr is not None:
        if scale_ptr is not None:
            b_slope *= tl.load(scale_ptr + i_c, mask=m, other=0.0)
        tl.store(slope_ptr + o, b_slope, mask=m)


@triton.jit
def scale_shift_act_grad_kernel(
    grad_ptr, grad2_ptr, slope_ptr, residual_ptr, dx_ptr, numel, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_g = tl.load(grad_ptr + o, mask=m, other=0.0).to(ACC)
    if grad2_ptr is not None:
        b_g += tl.load(grad2_ptr + o, mask=m, other=0.0).to(ACC)
    b_g *= tl.load(slope_ptr + o, mask=m, other=0.0).to(ACC)
    if residual_ptr is not None:
        b_g += tl.load(residual_ptr + o, mask=m, other=0.0).to(ACC)
    tl.store(dx_ptr + o, b_g, mask=m)


# --- launchers ---


def scale_shift_act_triton(
    a: Tensor, b: Maybe, scale: Maybe, shift: Maybe, negative: Maybe, total: Maybe, out: Tensor, slope: Maybe, act: int
) -> None:
    check_forward(a, b, scale, shift, negative, total, out, slope, act)
    if numel := a.numel():
        with torch.cuda.device_of(a):
            scale_shift_act_kernel[(triton.cdiv(numel, BLOCK),)](
                a, b, scale, shift, negative, total, out, slope, numel, a.shape[1],
                VARIES=negative is not None and negative.numel() > 1, ACT=act, BLOCK=BLOCK, ACC=tl_acc(a.dtype), **EXACT,
            )  # fmt: skip


def scale_shift_act_grad_triton(grad: Tensor, grad2: Maybe, slope: Tensor, residual: Maybe, dx: Tensor) -> None:
    check_backward(grad, grad2, slope, residual, dx)
    if numel := grad.numel():
        with torch.cuda.device_of(grad):
            scale_shift_act_grad_kernel[(triton.cdiv(numel, BLOCK),)](
                grad, grad2, slope, residual, dx, numel, BLOCK=BLOCK, ACC=tl_acc(grad.dtype), **EXACT
            )


# --- registration ---

_forward = define(
    "scale_shift_act(Tensor a, Tensor? b, Tensor? scale, Tensor? shift, Tensor? negative, Tensor(a!)? total, Tensor(b!) out, "
    "Tensor(c!)? slope, int act)",
    scale_shift_act_ref,
    scale_shift_act_triton,
)
_backward = define(
    "scale_shift_act_grad(Tensor grad, Tensor? grad2, Tensor slope, Tensor? residual, Tensor(a!) dx)",
    scale_shift_act_grad_ref,
    scale_shift_act_grad_triton,
)

# --- public ---


def scale_shift_act(
    a: Tensor,
    out: Tensor,
    *,
    act: str,
    b: Maybe = None,
    scale: Maybe = None,
    shift: Maybe = None,
    total: Maybe = None,
    slope: Maybe = None,
    negative: Maybe = None,
) -> Tensor:
    """Write act((a + b) * scale + shift) into `out`, a + b into `total` and the derivative by a into `slope`; returns `out`.

    act: one of ACTIVATIONS. negative: leaky_relu's slope below 0, and for it alone.
    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    check(act in ACTIVATIONS, f"act={act!r}: give one of {', '.join(ACTIVATIONS)}")
    _forward(a, b, scale, shift, negative, total, out, slope, ACTIVATIONS.index(act))
    return out


def scale_shift_act_grad(grad: Tensor, slope: Tensor, dx: Tensor, *, grad2: Maybe = None, residual: Maybe = None) -> Tensor:
    """Write slope * (grad + grad2) + residual into `dx`; returns `dx`.

    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _backward(grad, grad2, slope, residual, dx)
    return dx

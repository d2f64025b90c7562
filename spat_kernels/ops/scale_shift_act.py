"""The pointwise work between the layers of an input-gradient network with an activation other than ReLU, in one pass each way.

    forward:   t = a + b,   v = scale_c t + shift_c,   out = act(v);   total = t;   slope = scale_c act'(v)
    backward:  dx = slope * (grad + grad2) + residual

What is absent drops out of its formula. `slope` is all that the way back needs, rounded once to the images' dtype. The functions
are torch's:

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
derivative is at most 4e-7 off, relative to the largest of its terms (2e-7 z more where it vanishes like e^-z). In fp64 exp, erf
and the like are the library's, which differ by an ulp or two.

Each image given moves itemsize bytes an element, once: 12 bytes in fp32 for an activation and its derivative, and back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import EXACT, Maybe, acc_dtype, as_rows, check, check_channels, check_per_channel, divide, tl_acc
from .adt import log1p_of_unit, log1p_unit, polynomial

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


def power_of_2(y: Tensor) -> tuple[Tensor, Tensor]:
    """2^y and 2^y - 1 for y in [-127.4, 0], as in activations.h."""
    if y.dtype == torch.float64:
        return y.exp2(), (y * 0.6931471805599453).expm1()
    shifted = y + (12582912.0 + 127.0)
    f = y - (shifted - (12582912.0 + 127.0))
    rest = f * polynomial(f, 0.693147182, 0.240226492, 0.0555035733, 0.00961823761, 0.00133907353, 0.000154034948)
    scale = (shifted.view(torch.int32) << 23).view(torch.float32)
    rest = scale * rest
    return scale + rest, (scale - 1) + rest


def size_of(v: Tensor, most: float, most_in_fp64: float) -> Tensor:
    """|v|, or where a power of 2 is 0."""
    size, end = v.abs(), most_in_fp64 if v.dtype == torch.float64 else most
    return torch.where(size > end, end, size)


def decayed(v: Tensor) -> Tensor:
    """e^-|v|"""
    return power_of_2(size_of(v, 88.1, 800.0) * -1.4426950408889634)[0]


def normal_tail(x: Tensor, e: Tensor) -> Tensor:
    """Phi(-x) for x in [0, 13.3], with e = e^(-x^2/2), as in activations.h."""
    if x.dtype == torch.float64:
        return 0.5 * torch.erfc(x * 0.7071067811865476)
    top = polynomial(x, 49.6175079, 43.2354584, 17.9920673, 3.96785927, 0.398947954)
    return e * (top / polynomial(x, 99.2350159, 165.649033, 118.535027, 46.0830231, 9.94668102, 1.0))


def gelu(v: Tensor) -> tuple[Tensor, Tensor]:
    x = size_of(v, 13.28, 40.0)
    e, _ = power_of_2(x * x * -0.7213475204444817)
    tail = normal_tail(x, e)
    cdf = torch.where(v < 0, tail, 1 - tail)
    return v * cdf, cdf + x.copysign(v) * (e * 0.3989422804014327)


def gated(v: Tensor, x: Tensor, q: Tensor, w_slope: Tensor | float) -> tuple[Tensor, Tensor]:
    """v s and its derivative for the sigmoid s of a function w of v, by q = e^-|w|, as in activations.h."""
    share = 1 / (1 + q)
    small = q * share
    s = torch.where(v < 0, small, share)
    return v * s, s + x.copysign(v) * w_slope * (small * share)


def gelu_tanh(v: Tensor) -> tuple[Tensor, Tensor]:
    x = size_of(v, 10.04, 25.0)
    square = x * x
    q, _ = power_of_2(x * (square * -0.1029432395800235 + -2.302208198144325))
    return gated(v, x, q, square * 0.21406444881780074 + 1.5957691216057308)


def silu(v: Tensor) -> tuple[Tensor, Tensor]:
    return gated(v, size_of(v, 88.1, 800.0), decayed(v), 1.0)


def sigmoid(v: Tensor) -> tuple[Tensor, Tensor]:
    q = decayed(v)
    share = 1 / (1 + q)
    small = q * share
    return torch.where(v < 0, small, share), small * share


def hardsigmoid(v: Tensor) -> tuple[Tensor, Tensor]:
    return clamped(v + 3, 0, 6) * (1 / 6), torch.where((v > -3) & (v < 3), torch.full_like(v, 1 / 6), 0)


def hardswish(v: Tensor) -> tuple[Tensor, Tensor]:
    return v * hardsigmoid(v)[0], torch.where(v <= -3, 0, torch.where(v >= 3, 1, v * (1 / 3) + 0.5))


def relu6(v: Tensor) -> tuple[Tensor, Tensor]:
    return clamped(v, 0, 6), ((v > 0) & (v < 6)).to(v.dtype)


def tanh(v: Tensor) -> tuple[Tensor, Tensor]:
    q, minus_1 = power_of_2(size_of(v, 44.05, 400.0) * -2.8853900817779268)
    share = 1 / (1 + q)
    return (-minus_1 * share).copysign(v), 4 * q * share * share


def mish(v: Tensor) -> tuple[Tensor, Tensor]:
    q = decayed(v)
    n, d = torch.where(v < 0, q * (q + 2), 1 + 2 * q), torch.where(v < 0, 2, 2 * q * q)
    share = 1 / (n + d)
    t = n * share
    return v * t, t + size_of(v, 88.1, 800.0).copysign(v) * (4 * torch.where(v < 0, q, q * q) * (1 + q) * share * share)


def elu(v: Tensor) -> tuple[Tensor, Tensor]:
    e, minus_1 = power_of_2(size_of(torch.where(v < 0, v, 0), 88.1, 800.0) * -1.4426950408889634)
    return torch.where(v < 0, minus_1, v), e


def softplus(v: Tensor) -> tuple[Tensor, Tensor]:
    q = decayed(v)
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
def power_of_2_of(y):
    if y.dtype == tl.float64:
        value = tl.exp2(y)
        minus_1 = value - 1.0
    else:
        shifted = y + 12583039.0
        f = y - (shifted - 12583039.0)
        high = 0.00961823761 + f * (0.00133907353 + f * 0.000154034948)
        rest = f * (0.693147182 + f * (0.240226492 + f * (0.0555035733 + f * high)))
        scale = (shifted.to(tl.uint32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        rest = scale * rest
        value, minus_1 = scale + rest, (scale - 1.0) + rest
    return value, minus_1


@triton.jit
def bounded(v, most: tl.constexpr, most_in_fp64: tl.constexpr):
    size = tl.abs(v)
    end: tl.constexpr = most_in_fp64 if v.dtype == tl.float64 else most
    return tl.where(size > end, end, size)


@triton.jit
def decayed_of(v):
    value, _ = power_of_2_of(bounded(v, 88.1, 800.0) * -1.4426950408889634)
    return value


@triton.jit
def normal_tail_of(x, e):
    if x.dtype == tl.float64:
        tail = 0.5 * (1.0 - tl.erf(x * 0.7071067811865476))
    else:
        top = 49.6175079 + x * (43.2354584 + x * (17.9920673 + x * (3.96785927 + x * 0.398947954)))
        high = 118.535027 + x * (46.0830231 + x * (9.94668102 + x))
        tail = e * divide(top, 99.2350159 + x * (165.649033 + x * high))
    return tail


@triton.jit
def inverse(v):
    return divide(tl.full(v.shape, 1.0, v.dtype), v)


@triton.jit
def gated_of(v, x, q, w_slope):
    share = inverse(1.0 + q)
    small = q * share
    s = tl.where(v < 0, small, share)
    return v * s, s + tl.where(v < 0, -x, x) * w_slope * (small * share)


@triton.jit
def activated_of(v, negative, ACT: tl.constexpr):
    if ACT == 0:  # gelu
        x = bounded(v, 13.28, 40.0)
        e, _ = power_of_2_of(x * x * -0.7213475204444817)
        tail = normal_tail_of(x, e)
        cdf = tl.where(v < 0, tail, 1.0 - tail)
        value, slope = v * cdf, cdf + tl.where(v < 0, -x, x) * (e * 0.3989422804014327)
    elif ACT == 1:  # gelu_tanh
        x = bounded(v, 10.04, 25.0)
        square = x * x
        q, _ = power_of_2_of(x * (-2.302208198144325 + square * -0.1029432395800235))
        value, slope = gated_of(v, x, q, 1.5957691216057308 + square * 0.21406444881780074)
    elif ACT == 2:  # silu
        value, slope = gated_of(v, bounded(v, 88.1, 800.0), decayed_of(v), 1.0)
    elif ACT == 3:  # sigmoid
        q = decayed_of(v)
        share = inverse(1.0 + q)
        small = q * share
        value, slope = tl.where(v < 0, small, share), small * share
    elif ACT == 4:  # hardswish
        value = v * (clamp_of(v + 3.0, 0.0, 6.0) * 0.16666666666666666)
        slope = tl.where(v <= -3, 0.0, tl.where(v >= 3, 1.0, v * 0.3333333333333333 + 0.5))
    elif ACT == 5:  # hardsigmoid
        value = clamp_of(v + 3.0, 0.0, 6.0) * 0.16666666666666666
        slope = tl.where((v > -3) & (v < 3), tl.full(v.shape, 0.16666666666666666, v.dtype), 0.0)
    elif ACT == 6:  # relu6
        value, slope = clamp_of(v, 0.0, 6.0), tl.where((v > 0) & (v < 6), 1.0, tl.zeros_like(v))
    elif ACT == 7:  # leaky_relu
        value, slope = tl.where(v > 0, v, v * negative), tl.where(v > 0, 1.0, negative)
    elif ACT == 8:  # tanh
        q, minus_1 = power_of_2_of(bounded(v, 44.05, 400.0) * -2.8853900817779268)
        share = inverse(1.0 + q)
        size = -minus_1 * share
        value, slope = tl.where(v < 0, -size, tl.where(v > 0, size, v)), 4.0 * q * share * share
    elif ACT == 9:  # mish
        q = decayed_of(v)
        n, d = tl.where(v < 0, q * (q + 2.0), 1.0 + 2.0 * q), tl.where(v < 0, 2.0, 2.0 * q * q)
        share = inverse(n + d)
        t = n * share
        x, rest = bounded(v, 88.1, 800.0), 4.0 * tl.where(v < 0, q, q * q) * (1.0 + q) * share * share
        value, slope = v * t, t + tl.where(v < 0, -x, x) * rest
    elif ACT == 10:  # elu
        slope, minus_1 = power_of_2_of(bounded(tl.where(v < 0, v, 0.0), 88.1, 800.0) * -1.4426950408889634)
        value = tl.where(v < 0, minus_1, v)
    else:  # softplus
        q = decayed_of(v)
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
    shared="a b total out slope",
)
_backward = define(
    "scale_shift_act_grad(Tensor grad, Tensor? grad2, Tensor slope, Tensor? residual, Tensor(a!) dx)",
    scale_shift_act_grad_ref,
    scale_shift_act_grad_triton,
    shared="grad grad2 slope residual dx",
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

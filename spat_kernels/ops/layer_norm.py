"""LayerNorm over the channels, with the residual addition in front, in one pass each way (Ba, Kiros and Hinton, 2016, arXiv
1607.06450). Its backward goes to the input alone.

    forward:   t = a + b,   mean, var of t over the C channels of a row,   rstd = 1 / sqrt(var + eps)
               out = (t - mean) * rstd * weight_c + bias_c;   total = t
    backward:  g = (grad + grad2) * weight_c,   xhat = (t - mean) * rstd
               dx = rstd * (g - mean_c(g) - xhat * mean_c(g * xhat)) + residual

What is absent drops out of its formula. var is the mean of (t - mean)^2, in a second pass over a row that is kept on the chip: no
difference of large numbers. That pass corrects the mean, too, by the mean of t - mean (Chan, Golub and LeVeque, The American
Statistician, 1983), so that a constant row gives `bias`. A row that holds NaN or an infinity becomes NaN, and no other row does.

Images: one shape and one dtype of {fp32, bf16, fp16, fp64}, channels innermost in memory. `channels` says which dimension they
are: -1, the last (contiguous [B, N, C], [B, H, W, C] or [rows, C]), or 1 (channels_last [B, C, H, W]). 1 <= C <= MAX_CHANNELS.
weight, bias: contiguous [C]. mean, rstd: contiguous [rows], in the order of memory. These four are in the arithmetic's dtype,
fp32 (fp64 for fp64 images). Images are rounded once, on the store: out continues from the unrounded t. Results may be the same
memory as images that are read. A row's sums have one order on a device, for any batch, alignment and number of threads.

Each image given moves itemsize bytes an element, once: in fp32 8 bytes forward, 12 backward, and 8 a row for mean and rstd.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import EXACT, Maybe, acc_dtype, as_rows, check, check_channels, check_per_channel, divide, tl_acc

MAX_CHANNELS = 8192  # eight in the registers of each of 1024 threads
TILE = 2048  # elements that a program holds at once

# --- reference ---


def channels_first(channels: int, **images: Maybe) -> dict[str, Maybe]:
    """Views of the images as [N, C, ...]."""
    check(channels in (1, -1), f"channels must be -1 (the last dimension) or 1 (channels_last images), got {channels}")
    for name, t in images.items():
        check(t is None or t.ndim >= 2, f"{name} must have at least two dimensions, the rows and the channels")
        dense = channels == 1 or t is None or t.is_contiguous()
        check(dense, f"{name} must be contiguous, with the channels last (channels=1 takes channels_last images)")
    return {name: t if t is None or channels == 1 else t.movedim(-1, 1) for name, t in images.items()}


def check_images(channels: int, weight: Maybe, bias: Maybe, mean: Maybe, rstd: Maybe, **images: Maybe) -> list:
    """Each image as rows [rows, C], None where it is absent. The first one is the model of the others."""
    images = channels_first(channels, **images)
    name, first = next(iter(images.items()))
    assert first is not None
    check_channels(**{name: first})
    check(1 <= first.shape[1] <= MAX_CHANNELS, f"{name} must have 1 to {MAX_CHANNELS} channels, got {first.shape[1]}")
    check_channels(**images)
    check_per_channel(first, weight=weight, bias=bias)
    rows, acc = first.numel() // first.shape[1], acc_dtype(first.dtype)
    for what, t in {"mean": mean, "rstd": rstd}.items():
        if t is not None:
            check(t.dtype == acc, f"{what} must be {acc}, got {t.dtype}")
            check(t.shape == (rows,) and t.is_contiguous(), f"{what} must be contiguous [{rows}]")
    return [None if t is None else as_rows(t) for t in images.values()]


def layer_norm_ref(
    a: Tensor,
    b: Maybe,
    weight: Maybe,
    bias: Maybe,
    total: Maybe,
    out: Tensor,
    mean: Maybe,
    rstd: Maybe,
    eps: float,
    channels: int,
) -> None:
    rows_a, rows_b, rows_total, rows_out = check_images(channels, weight, bias, mean, rstd, a=a, b=b, total=total, out=out)
    t = rows_a.to(acc_dtype(a.dtype))
    t = t if rows_b is None else t + rows_b.to(t.dtype)
    means = t.mean(1, keepdim=True)
    means = means + (t - means).mean(1, keepdim=True)
    centred = t - means
    rstds = 1 / (centred.square().mean(1, keepdim=True) + eps).sqrt()
    v = centred * rstds
    v = v if weight is None else v * weight
    v = v if bias is None else v + bias
    for result, value in ((rows_total, t), (rows_out, v), (mean, means[:, 0]), (rstd, rstds[:, 0])):
        if result is not None:
            result.copy_(value)


def layer_norm_grad_ref(
    grad: Tensor, grad2: Maybe, t: Tensor, mean: Tensor, rstd: Tensor, weight: Maybe, residual: Maybe, dx: Tensor, channels: int
) -> None:
    images = check_images(channels, weight, None, mean, rstd, grad=grad, grad2=grad2, t=t, residual=residual, dx=dx)
    rows_grad, rows_grad2, rows_t, rows_residual, rows_dx = images
    g = rows_grad.to(acc_dtype(grad.dtype))
    g = g if rows_grad2 is None else g + rows_grad2.to(g.dtype)
    g = g if weight is None else g * weight
    xhat = (rows_t.to(g.dtype) - mean[:, None]) * rstd[:, None]
    v = rstd[:, None] * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
    rows_dx.copy_(v if rows_residual is None else v + rows_residual.to(g.dtype))


# --- Triton ---


@triton.jit
def tile_of(rows, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows, channels and offsets of this program's tile, and what of the rows and of the tile exists."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_c = tl.arange(0, BLOCK_C)[None, :]
    m_row = i_row < rows
    return i_row, i_c, i_row[:, None] * C + i_c, m_row, m_row[:, None] & (i_c < C)


@triton.jit
def layer_norm_kernel(
    a_ptr, b_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, mean_ptr, rstd_ptr, eps: tl.float64, rows,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_row, i_c, o, m_row, m = tile_of(rows, C, BLOCK_R, BLOCK_C)
    b_v = tl.load(a_ptr + o, mask=m, other=0.0).to(ACC)
    if b_ptr is not None:
        b_v += tl.load(b_ptr + o, mask=m, other=0.0).to(ACC)
    if total_ptr is not None:
        tl.store(total_ptr + o, b_v, mask=m)
    b_mean = divide(tl.sum(b_v, 1), C)
    b_v = tl.where(m, b_v - b_mean[:, None], 0.0)
    b_correction = divide(tl.sum(b_v, 1), C)
    b_var = divide(tl.sum(b_v * b_v, 1), C)
    b_var += tl.cast(eps, ACC)
    b_rstd = divide(tl.full([BLOCK_R], 1.0, ACC), tl.sqrt(b_var) if b_var.dtype == tl.float64 else tl.sqrt_rn(b_var))
    if mean_ptr is not None:
        tl.store(mean_ptr + i_row, b_mean + b_correction, mask=m_row)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + i_row, b_rstd, mask=m_row)
    b_v = (b_v - b_correction[:, None]) * b_rstd[:, None]
    if weight_ptr is not None:
        b_v *= tl.load(weight_ptr + i_c, mask=i_c < C, other=0.0)
    if bias_ptr is not None:
        b_v += tl.load(bias_ptr + i_c, mask=i_c < C, other=0.0)
    tl.store(out_ptr + o, b_v, mask=m)


@triton.jit
def layer_norm_grad_kernel(
    grad_ptr, grad2_ptr, t_ptr, mean_ptr, rstd_ptr, weight_ptr, residual_ptr, dx_ptr, rows,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_row, i_c, o, m_row, m = tile_of(rows, C, BLOCK_R, BLOCK_C)
    b_g = tl.load(grad_ptr + o, mask=m, other=0.0).to(ACC)
    if grad2_ptr is not None:
        b_g += tl.load(grad2_ptr + o, mask=m, other=0.0).to(ACC)
    if weight_ptr is not None:
        b_g *= tl.load(weight_ptr + i_c, mask=i_c < C, other=0.0)
    b_mean = tl.load(mean_ptr + i_row, mask=m_row, other=0.0)[:, None]
    b_rstd = tl.load(rstd_ptr + i_row, mask=m_row, other=0.0)[:, None]
    b_xhat = tl.where(m, (tl.load(t_ptr + o, mask=m, other=0.0).to(ACC) - b_mean) * b_rstd, 0.0)
    b_mean_g = divide(tl.sum(b_g, 1), C)[:, None]
    b_mean_gx = divide(tl.sum(b_g * b_xhat, 1), C)[:, None]
    b_dx = b_rstd * (b_g - b_mean_g - b_xhat * b_mean_gx)
    if residual_ptr is not None:
        b_dx += tl.load(residual_ptr + o, mask=m, other=0.0).to(ACC)
    tl.store(dx_ptr + o, b_dx, mask=m)


# --- launchers ---


def row_tile(image: Tensor) -> tuple[tuple[int], dict]:
    """C is a compile-time constant (a model has few widths), and a program does whole rows."""
    rows, channels = image.shape
    block_c = triton.next_power_of_2(channels)
    block_r = max(1, TILE // block_c)
    sizes = {"rows": rows, "C": channels, "BLOCK_R": block_r, "BLOCK_C": block_c, "ACC": tl_acc(image.dtype)}
    return (triton.cdiv(rows, block_r),), sizes | {"num_warps": 4 if block_c <= TILE else 8} | EXACT


def layer_norm_triton(
    a: Tensor,
    b: Maybe,
    weight: Maybe,
    bias: Maybe,
    total: Maybe,
    out: Tensor,
    mean: Maybe,
    rstd: Maybe,
    eps: float,
    channels: int,
) -> None:
    image, *_ = check_images(channels, weight, bias, mean, rstd, a=a, b=b, total=total, out=out)
    if a.numel():
        grid, arguments = row_tile(image)
        with torch.cuda.device_of(a):
            layer_norm_kernel[grid](a, b, weight, bias, total, out, mean, rstd, eps, **arguments)


def layer_norm_grad_triton(
    grad: Tensor, grad2: Maybe, t: Tensor, mean: Tensor, rstd: Tensor, weight: Maybe, residual: Maybe, dx: Tensor, channels: int
) -> None:
    image, *_ = check_images(channels, weight, None, mean, rstd, grad=grad, grad2=grad2, t=t, residual=residual, dx=dx)
    if grad.numel():
        grid, arguments = row_tile(image)
        with torch.cuda.device_of(grad):
            layer_norm_grad_kernel[grid](grad, grad2, t, mean, rstd, weight, residual, dx, **arguments)


# --- registration ---

_forward = define(
    "layer_norm(Tensor a, Tensor? b, Tensor? weight, Tensor? bias, Tensor(a!)? total, Tensor(b!) out, Tensor(c!)? mean, "
    "Tensor(d!)? rstd, float eps, int channels)",
    layer_norm_ref,
    layer_norm_triton,
    shared="a b total out",
)
_backward = define(
    "layer_norm_grad(Tensor grad, Tensor? grad2, Tensor t, Tensor mean, Tensor rstd, Tensor? weight, Tensor? residual, "
    "Tensor(a!) dx, int channels)",
    layer_norm_grad_ref,
    layer_norm_grad_triton,
    shared="grad grad2 t residual dx",
)

# --- public ---


def layer_norm(
    a: Tensor,
    out: Tensor,
    *,
    eps: float,
    weight: Maybe = None,
    bias: Maybe = None,
    b: Maybe = None,
    total: Maybe = None,
    mean: Maybe = None,
    rstd: Maybe = None,
    channels: int = -1,
) -> Tensor:
    """Write the LayerNorm of a + b into `out`, a + b into `total`, and what the backward needs into `mean` and `rstd`.

    Returns `out`. Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _forward(a, b, weight, bias, total, out, mean, rstd, eps, channels)
    return out


def layer_norm_grad(
    grad: Tensor,
    t: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    *,
    weight: Maybe = None,
    grad2: Maybe = None,
    residual: Maybe = None,
    channels: int = -1,
) -> Tensor:
    """Write the gradient at `t`, the forward's input or `total`, for grad + grad2 at its result, plus `residual`, into `dx`.

    `mean` and `rstd` are the forward's. Returns `dx`. Shapes and dtypes: see the module. Raises RuntimeError where they do not
    fit.
    """
    _backward(grad, grad2, t, mean, rstd, weight, residual, dx, channels)
    return dx

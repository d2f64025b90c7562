"""The head of a network, average pooling and the last linear layer, in one pass each way.

    forward:   pooled = mean of x over its pixels,   logits = pooled @ weight^T + bias
    backward:  g = dlogits @ weight;   dx[b, c, pixel] = mask * (g_bc / d_b) * scale_c

d_b is the number of pixels. With `factor` it is instead the largest |g_bc| of the sample, at least the smallest normal number,
and dx is to be multiplied by factor_b = d_b / pixels: the gradient enters a half-precision network at a size of 1. A NaN among
the g_bc makes factor_b NaN.

mask and scale are those of the `scale_shift_relu` that made x, whose way back is done here too. A masked-out element of dx is
exactly 0, whatever g is. What is absent drops out of its formula.

x, dx: [B, C <= 4096, ...] of {fp32, bf16, fp16, fp64}, channels innermost in memory (channels_last, or contiguous [B, C]).
weight [K, C], bias [K], logits and dlogits [B, K], scale [C], factor [B]: contiguous, in fp32 (fp64 for fp64 images), the
arithmetic's dtype too. mask: uint8 [B * pixels, ceil(C / 8)], as in scale_shift_relu. dx is rounded once.

Moves the images once, itemsize bytes an element, and on the way back 1/8 byte of mask. The weights come from L2 for every sample,
so this is for small heads (MAX_WEIGHTS). Large ones are a matrix product.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import EXACT, FLOATS, Maybe, acc_dtype, as_rows, check, check_layout, check_per_channel, divide, tl_acc
from .scale_shift_relu import check_mask, unpack_bits

MAX_CHANNELS = 4096  # in the shared memory of a block, 32 KiB of fp64
# A matrix product reads the weights once for many samples, these ops for one (CUDA) or four. On a CPU, at 128 samples of 512x4x4,
# they are 1.2 (forward) and 1.6 times as fast as PyTorch's passes with 64 Ki weights, and 0.9 times with 500 Ki. On a GPU, 64 Ki
# are 32 MiB from L2 for 128 samples.
MAX_WEIGHTS = 64 * 1024
TILE = 4096  # elements of the images or weights that a program holds at once

# --- reference ---


def check_ranks(images: Tensor, name: str, weight: Tensor) -> None:
    check_layout(**{name: images})
    check(weight.ndim == 2, f"weight must be contiguous [K, {images.shape[1]}]")


def check_head(images: Tensor, name: str, weight: Tensor, **tensors: tuple[Maybe, tuple[int, ...]]) -> None:
    check(images.dtype in FLOATS, f"{name} must be float32, float16, bfloat16 or float64, got {images.dtype}")
    channels, acc = images.shape[1], acc_dtype(images.dtype)
    check(images.numel() > 0 or len(images) == 0, f"{name} must have at least one channel and one pixel")
    check(channels <= MAX_CHANNELS, f"{name} must have at most {MAX_CHANNELS} channels, got {channels}")
    check(weight.shape[1] == channels, f"weight must be contiguous [K, {channels}]")
    for what, (t, shape) in {"weight": (weight, tuple(weight.shape)), **tensors}.items():
        if t is not None:
            check(t.dtype == acc, f"{what} must be {acc}, got {t.dtype}")
            check(t.shape == shape and t.is_contiguous(), f"{what} must be contiguous {list(shape)}")


def check_forward(x: Tensor, weight: Tensor, bias: Maybe, logits: Tensor) -> None:
    check_ranks(x, "x", weight)
    check_head(x, "x", weight, bias=(bias, (len(weight),)), logits=(logits, (len(x), len(weight))))


def check_backward(dlogits: Tensor, weight: Tensor, mask: Maybe, scale: Maybe, factor: Maybe, dx: Tensor) -> None:
    check_ranks(dx, "dx", weight)
    check_head(dx, "dx", weight, dlogits=(dlogits, (len(dx), len(weight))), factor=(factor, (len(dx),)))
    check_per_channel(dx, scale=scale)
    check_mask(mask, dx)


def pixels_of(images: Tensor) -> int:
    return images.shape[2:].numel()


def pool_linear_ref(x: Tensor, weight: Tensor, bias: Maybe, logits: Tensor) -> None:
    check_forward(x, weight, bias, logits)
    pooled = as_rows(x).view(len(x), pixels_of(x), x.shape[1]).mean(1, dtype=weight.dtype)
    logits.copy_(F.linear(pooled, weight, bias))


def pool_linear_grad_ref(dlogits: Tensor, weight: Tensor, mask: Maybe, scale: Maybe, factor: Maybe, dx: Tensor) -> None:
    check_backward(dlogits, weight, mask, scale, factor, dx)
    if not len(dx):
        return
    pixels = pixels_of(dx)
    g = dlogits @ weight
    if factor is None:
        g = g / pixels
    else:
        largest = g.abs().amax(1).clamp_min(torch.finfo(g.dtype).tiny)
        factor.copy_(largest / pixels)
        g = g / largest[:, None]
    g = g if scale is None else g * scale
    g = g.repeat_interleave(pixels, 0)
    as_rows(dx).copy_(g if mask is None else g.where(unpack_bits(mask, dx.shape[1]), 0))


# --- Triton ---


@triton.jit
def pool_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, logits_ptr,
    PIXELS: tl.constexpr, CLASSES: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_n, i_c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)[None, :]
    b_sum = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for first in range(0, PIXELS, BLOCK_N):
        i_p = first + i_n[:, None]
        b_sum += tl.load(x_ptr + (i_b * PIXELS + i_p) * C + i_c, mask=(i_p < PIXELS) & (i_c < C), other=0.0).to(ACC)
    b_pooled = divide(tl.sum(b_sum, 0)[None, :], PIXELS)
    for first in range(0, CLASSES, BLOCK_N):
        i_k = first + i_n
        b_w = tl.load(weight_ptr + i_k[:, None] * C + i_c, mask=(i_k < CLASSES)[:, None] & (i_c < C), other=0.0)
        b_logits = tl.sum(b_w * b_pooled, 1)
        if bias_ptr is not None:
            b_logits += tl.load(bias_ptr + i_k, mask=i_k < CLASSES, other=0.0)
        tl.store(logits_ptr + i_b * CLASSES + i_k, b_logits, mask=i_k < CLASSES)


@triton.jit
def pool_linear_grad_kernel(
    dlogits_ptr, weight_ptr, mask_ptr, scale_ptr, factor_ptr, dx_ptr, tiny: tl.float64,
    PIXELS: tl.constexpr, CLASSES: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_n, i_c = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_C)[None, :]
    b_sum = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for first in range(0, CLASSES, BLOCK_N):
        i_k = first + i_n
        b_d = tl.load(dlogits_ptr + i_b * CLASSES + i_k, mask=i_k < CLASSES, other=0.0)
        b_w = tl.load(weight_ptr + i_k * C + i_c, mask=(i_k < CLASSES) & (i_c < C), other=0.0)
        b_sum += tl.where(i_c < C, b_d * b_w, 0.0)  # inf * 0 behind the last channel
    b_g = tl.sum(b_sum, 0)[None, :]
    b_divisor = tl.full([1, 1], PIXELS, ACC)
    if factor_ptr is not None:
        b_nan = tl.sum(tl.where(b_g != b_g, 1, 0)) > 0  # which a maximum may pass over
        b_largest = tl.where(b_nan, float("nan"), tl.maximum(tl.max(tl.abs(b_g)), tl.cast(tiny, ACC)))
        tl.store(factor_ptr + i_b, divide(b_largest, PIXELS))
        b_divisor = b_divisor * 0 + b_largest
    b_g = divide(b_g, b_divisor)
    if scale_ptr is not None:
        b_g *= tl.load(scale_ptr + i_c, mask=i_c < C, other=0.0)
    b_g = tl.broadcast_to(b_g, [BLOCK_N, BLOCK_C])
    for first in range(0, PIXELS, BLOCK_N):
        i_row = i_b * PIXELS + first + i_n
        m = (first + i_n < PIXELS) & (i_c < C)
        b_dx = b_g
        if mask_ptr is not None:
            b_byte = tl.load(mask_ptr + i_row * ((C + 7) // 8) + i_c // 8, mask=m, other=0).to(tl.int32)
            b_dx = tl.where((b_byte >> i_c % 8) & 1 == 1, b_g, 0.0)
        tl.store(dx_ptr + i_row * C + i_c, b_dx, mask=m)


# --- launchers ---


def head_tile(images: Tensor, weight: Tensor) -> dict:
    """Sizes as compile-time constants (a model has one head), and a tile of all the channels."""
    channels = images.shape[1]
    block_c = triton.next_power_of_2(channels)
    sizes = {"PIXELS": pixels_of(images), "CLASSES": len(weight), "C": channels}
    return sizes | {"BLOCK_N": max(1, TILE // block_c), "BLOCK_C": block_c, "ACC": tl_acc(images.dtype)} | EXACT


def pool_linear_triton(x: Tensor, weight: Tensor, bias: Maybe, logits: Tensor) -> None:
    check_forward(x, weight, bias, logits)
    if logits.numel():
        with torch.cuda.device_of(x):
            pool_linear_kernel[(len(x),)](x, weight, bias, logits, **head_tile(x, weight))


def pool_linear_grad_triton(dlogits: Tensor, weight: Tensor, mask: Maybe, scale: Maybe, factor: Maybe, dx: Tensor) -> None:
    check_backward(dlogits, weight, mask, scale, factor, dx)
    if dx.numel():
        tiny = torch.finfo(dlogits.dtype).tiny
        with torch.cuda.device_of(dx):
            pool_linear_grad_kernel[(len(dx),)](dlogits, weight, mask, scale, factor, dx, tiny, **head_tile(dx, weight))


# --- registration ---

_forward = define("pool_linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) logits)", pool_linear_ref, pool_linear_triton)
_backward = define(
    "pool_linear_grad(Tensor dlogits, Tensor weight, Tensor? mask, Tensor? scale, Tensor(a!)? factor, Tensor(b!) dx)",
    pool_linear_grad_ref,
    pool_linear_grad_triton,
)

# --- public ---


def pool_linear(x: Tensor, weight: Tensor, logits: Tensor, *, bias: Maybe = None) -> Tensor:
    """Write the logits of the images' mean over all pixels into `logits`; returns `logits`.

    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _forward(x, weight, bias, logits)
    return logits


def pool_linear_grad(
    dlogits: Tensor, weight: Tensor, dx: Tensor, *, mask: Maybe = None, scale: Maybe = None, factor: Maybe = None
) -> Tensor:
    """Write the gradient at the images into `dx`, each sample scaled if there is a `factor` to write; returns `dx`.

    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _backward(dlogits, weight, mask, scale, factor, dx)
    return dx

"""An image for a half-precision network without the rounding: every channel as a sum of two.

    v = scale_c x + shift_c;   out[c] = hi = round(v);   out[C + c] = lo = round(v - hi);   the channels from 2 C on are 0

A first convolution in half precision rounds its image to 8 (bf16) or 11 (fp16) bits, as coarsely as an attack steps (2^-9 of a
pixel near 1 is 0.5/255). Its input is padded to 8 channels for the tensor cores anyway, so with its weights repeated for the
channels from C to 2 C it reads hi + lo, which is v up to 2^-17 |v| in bf16 (8e-6) and 2^-22 |v| in fp16, above its denormals.

x: fp32 [B, C, H, W]; out: bf16 or fp16 [B, P >= 2 C, H, W]; both with channels innermost in memory. scale, shift: fp32 [C];
what is absent drops out. Where hi is not finite (v is not, or overflows fp16) it says so, and lo is 0: hi + lo stays what hi is.
Moves 4 C + 2 P bytes a pixel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import EXACT, Maybe, as_rows, check, check_layout, check_per_channel

BLOCK = 1024  # channels of `out` a program, about

# --- reference ---


def check_split(x: Tensor, scale: Maybe, shift: Maybe, out: Tensor) -> None:
    check(x.dtype == torch.float32, f"x must be float32, got {x.dtype}")
    check(out.dtype in (torch.float16, torch.bfloat16), f"out must be float16 or bfloat16, got {out.dtype}")
    check(x.ndim == 4, "x must be [B, C, H, W]")
    check_layout(x=x, out=out)
    batch, channels, *size = x.shape
    check(
        out.ndim == 4 and out.shape[1] >= 2 * channels and [out.shape[0], *out.shape[2:]] == [batch, *size],
        f"out must be [{batch}, at least {2 * channels}, {', '.join(map(str, size))}]",
    )
    check_per_channel(x, scale=scale, shift=shift)


def split_image_ref(x: Tensor, scale: Maybe, shift: Maybe, out: Tensor) -> None:
    check_split(x, scale, shift, out)
    v = as_rows(x)
    v = v if scale is None else v * scale
    v = v if shift is None else v + shift
    hi = v.to(out.dtype)
    lo = torch.where(hi.isfinite(), v - hi.float(), 0)
    channels = x.shape[1]
    pixels = as_rows(out)
    pixels[:, :channels] = hi
    pixels[:, channels : 2 * channels] = lo
    pixels[:, 2 * channels :] = 0


# --- Triton ---


@triton.jit
def split_image_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, pixels, C: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    i = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    i_p = tl.arange(0, BLOCK_P)[None, :]
    i_c = tl.where(i_p < C, i_p, i_p - C)
    m = (i < pixels) & (i_p < 2 * C)
    b_v = tl.load(x_ptr + i * C + i_c, mask=m, other=0.0)
    if scale_ptr is not None:
        b_v *= tl.load(scale_ptr + i_c, mask=m, other=0.0)
    if shift_ptr is not None:
        b_v += tl.load(shift_ptr + i_c, mask=m, other=0.0)
    b_hi = b_v.to(out_ptr.dtype.element_ty).to(tl.float32)
    b_lo = tl.where(b_hi - b_hi == 0, b_v - b_hi, 0.0)
    tl.store(out_ptr + i * P + i_p, tl.where(i_p < C, b_hi, b_lo), mask=(i < pixels) & (i_p < P))


# --- launcher ---


def split_image_triton(x: Tensor, scale: Maybe, shift: Maybe, out: Tensor) -> None:
    check_split(x, scale, shift, out)
    if out.numel():
        pixels, width = as_rows(out).shape
        block_p = triton.next_power_of_2(width)
        block_n = max(1, BLOCK // block_p)
        with torch.cuda.device_of(x):
            split_image_kernel[(triton.cdiv(pixels, block_n),)](
                x, scale, shift, out, pixels, C=x.shape[1], P=width, BLOCK_N=block_n, BLOCK_P=block_p, **EXACT
            )


# --- registration ---

_split_image = define("split_image(Tensor x, Tensor? scale, Tensor? shift, Tensor(a!) out)", split_image_ref, split_image_triton)

# --- public ---


def split_image(x: Tensor, out: Tensor, *, scale: Maybe = None, shift: Maybe = None) -> Tensor:
    """Write `x * scale + shift` into `out` as a rounded part, what the rounding left, and zeros; returns `out`.

    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _split_image(x, scale, shift, out)
    return out

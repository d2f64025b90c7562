"""The pointwise work between the convolutions of an input-gradient network, in one pass each way.

    forward:   t = a + b,   v = scale_c t + shift_c,   out = relu(v);   total = t;   mask = the bits !(v <= 0)
    backward:  dx = mask * (grad + grad2) * scale_c + residual

A residual addition, BatchNorm in evaluation mode as one scale and shift a channel, ReLU, and what the way back needs of them:
one bit an activation instead of the activation. What is absent drops out of its formula (-0 stays -0); without `relu`, out = v.
NaN passes the ReLU, as through torch.relu, and its bit is 1. A masked-out element of dx is exactly `residual`, or 0, whatever
grad is there: 0 * inf does not arise.

Images: one shape [N, C, ...] and one dtype of {fp32, bf16, fp16, fp64}, channels innermost in memory (channels_last, or
contiguous [N, C]). They are rows = N * spatial rows of C channels. scale, shift: contiguous [C] in fp32 (fp64 for fp64 images).
mask: uint8 [rows, ceil(C / 8)], bit c % 8 of byte c // 8 for channel c, unused bits 0. Arithmetic is fp32 (fp64) and rounds once,
on the store: v continues from the unrounded t. Results may be the same memory as inputs (`out` as `a` or `b`, `dx` as any input).

Each image given moves itemsize bytes an element, once, and the mask 1/8 byte: 8.125 bytes in fp32 for scale, shift and ReLU.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import EXACT, Maybe, acc_dtype, as_rows, check, check_channels, check_per_channel, tl_acc

BYTES = 128  # mask bytes that a program does, eight channels each

# --- reference ---


def pack_bits(bits: Tensor) -> Tensor:
    """bool [rows, C] as uint8 [rows, ceil(C / 8)]."""
    rows, channels = bits.shape
    octets = F.pad(bits.byte(), (0, -channels % 8)).view(rows, -(-channels // 8), 8)
    return (octets << torch.arange(8, device=bits.device)).sum(2).byte()


def unpack_bits(mask: Tensor, channels: int) -> Tensor:
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device)) & 1
    return bits.flatten(1)[:, :channels].bool()


def check_mask(mask: Maybe, image: Tensor) -> None:
    if mask is not None:
        rows, channels = as_rows(image).shape
        check(mask.dtype == torch.uint8, f"mask must be uint8, got {mask.dtype}")
        shape = (rows, -(-channels // 8))
        check(mask.shape == shape and mask.is_contiguous(), f"mask must be contiguous {list(shape)}")


def check_forward(a: Tensor, b: Maybe, scale: Maybe, shift: Maybe, total: Maybe, out: Tensor, mask: Maybe, relu: bool) -> None:
    check_channels(a=a, b=b, total=total, out=out)
    check_per_channel(a, scale=scale, shift=shift)
    check(relu or mask is None, "mask goes with relu")
    check_mask(mask, a)


def check_backward(grad: Tensor, grad2: Maybe, mask: Maybe, scale: Maybe, residual: Maybe, dx: Tensor) -> None:
    check_channels(grad=grad, grad2=grad2, residual=residual, dx=dx)
    check_per_channel(grad, scale=scale)
    check_mask(mask, grad)


def scale_shift_relu_ref(
    a: Tensor, b: Maybe, scale: Maybe, shift: Maybe, total: Maybe, out: Tensor, mask: Maybe, relu: bool
) -> None:
    check_forward(a, b, scale, shift, total, out, mask, relu)
    acc = acc_dtype(a.dtype)
    t = as_rows(a).to(acc)
    t = t if b is None else t + as_rows(b).to(acc)
    v = t if scale is None else t * scale
    v = v if shift is None else v + shift
    if total is not None:
        as_rows(total).copy_(t)
    if mask is not None:
        mask.copy_(pack_bits(~(v <= 0)))
    as_rows(out).copy_(v.masked_fill(v <= 0, 0) if relu else v)


def scale_shift_relu_grad_ref(grad: Tensor, grad2: Maybe, mask: Maybe, scale: Maybe, residual: Maybe, dx: Tensor) -> None:
    check_backward(grad, grad2, mask, scale, residual, dx)
    acc = acc_dtype(grad.dtype)
    g = as_rows(grad).to(acc)
    g = g if grad2 is None else g + as_rows(grad2).to(acc)
    g = g if scale is None else g * scale
    rest = torch.zeros((), dtype=acc, device=g.device) if residual is None else as_rows(residual).to(acc)
    g = g if residual is None else g + rest
    as_rows(dx).copy_(g if mask is None else torch.where(unpack_bits(mask, g.shape[1]), g, rest))


# --- Triton ---


@triton.jit
def octets(rows, C, WHOLE: tl.constexpr, BYTES: tl.constexpr):
    """Mask bytes of this program, and for their [BYTES, 8] channels: offsets in the images, channels, and what exists."""
    i = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    row_bytes = (C + 7) // 8
    i_bit = tl.arange(0, 8)[None, :]
    i_c = (i % row_bytes)[:, None] * 8 + i_bit
    m_byte = i < rows * row_bytes
    if WHOLE:  # C % 8 == 0: the offsets run on from row to row, which lets Triton load packets
        return i, i[:, None] * 8 + i_bit, i_c, m_byte, m_byte[:, None] & (i_bit < 8)
    return i, (i // row_bytes)[:, None] * C + i_c, i_c, m_byte, m_byte[:, None] & (i_c < C)


@triton.jit
def scale_shift_relu_kernel(
    a_ptr, b_ptr, scale_ptr, shift_ptr, total_ptr, out_ptr, mask_ptr, rows, C,
    RELU: tl.constexpr, WHOLE: tl.constexpr, BYTES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_byte, o, i_c, m_byte, m = octets(rows, C, WHOLE, BYTES)
    b_v = tl.load(a_ptr + o, mask=m, other=0.0).to(ACC)
    if b_ptr is not None:
        b_v += tl.load(b_ptr + o, mask=m, other=0.0).to(ACC)
    if total_ptr is not None:
        tl.store(total_ptr + o, b_v, mask=m)
    if scale_ptr is not None:
        b_v *= tl.load(scale_ptr + i_c, mask=m, other=0.0)
    if shift_ptr is not None:
        b_v += tl.load(shift_ptr + i_c, mask=m, other=0.0)
    if RELU:
        off = b_v <= 0
        if mask_ptr is not None:  # off where there is no channel: everything loads as 0 there
            b_bits = tl.where(off, 0, 1) << tl.arange(0, 8)[None, :]
            tl.store(mask_ptr + i_byte, tl.sum(b_bits, 1).to(tl.uint8), mask=m_byte)
        b_v = tl.where(off, 0.0, b_v)
    tl.store(out_ptr + o, b_v, mask=m)


@triton.jit
def scale_shift_relu_grad_kernel(
    grad_ptr, grad2_ptr, mask_ptr, scale_ptr, residual_ptr, dx_ptr, rows, C,
    WHOLE: tl.constexpr, BYTES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_byte, o, i_c, m_byte, m = octets(rows, C, WHOLE, BYTES)
    b_g = tl.load(grad_ptr + o, mask=m, other=0.0).to(ACC)
    if grad2_ptr is not None:
        b_g += tl.load(grad2_ptr + o, mask=m, other=0.0).to(ACC)
    if scale_ptr is not None:
        b_g *= tl.load(scale_ptr + i_c, mask=m, other=0.0)
    b_rest = tl.zeros([BYTES, 8], ACC)
    if residual_ptr is not None:
        b_rest = tl.load(residual_ptr + o, mask=m, other=0.0).to(ACC)
        b_g += b_rest
    if mask_ptr is not None:
        b_byte = tl.load(mask_ptr + i_byte, mask=m_byte, other=0).to(tl.int32)
        b_g = tl.where((b_byte[:, None] >> tl.arange(0, 8)[None, :]) & 1 == 1, b_g, b_rest)
    tl.store(dx_ptr + o, b_g, mask=m)


# --- launchers ---


def octet_grid(image: Tensor) -> tuple[tuple[int], dict]:
    rows, channels = as_rows(image).shape
    arguments = {"rows": rows, "C": channels, "WHOLE": channels % 8 == 0, "BYTES": BYTES, "ACC": tl_acc(image.dtype)}
    return (triton.cdiv(rows * -(-channels // 8), BYTES),), arguments | EXACT


def scale_shift_relu_triton(
    a: Tensor, b: Maybe, scale: Maybe, shift: Maybe, total: Maybe, out: Tensor, mask: Maybe, relu: bool
) -> None:
    check_forward(a, b, scale, shift, total, out, mask, relu)
    if a.numel():
        grid, arguments = octet_grid(a)
        with torch.cuda.device_of(a):
            scale_shift_relu_kernel[grid](a, b, scale, shift, total, out, mask, RELU=relu, **arguments)


def scale_shift_relu_grad_triton(grad: Tensor, grad2: Maybe, mask: Maybe, scale: Maybe, residual: Maybe, dx: Tensor) -> None:
    check_backward(grad, grad2, mask, scale, residual, dx)
    if grad.numel():
        grid, arguments = octet_grid(grad)
        with torch.cuda.device_of(grad):
            scale_shift_relu_grad_kernel[grid](grad, grad2, mask, scale, residual, dx, **arguments)


# --- registration ---

_forward = define(
    "scale_shift_relu(Tensor a, Tensor? b, Tensor? scale, Tensor? shift, Tensor(a!)? total, Tensor(b!) out, Tensor(c!)? mask, "
    "bool relu)",
    scale_shift_relu_ref,
    scale_shift_relu_triton,
    shared="a b total out",
)
_backward = define(
    "scale_shift_relu_grad(Tensor grad, Tensor? grad2, Tensor? mask, Tensor? scale, Tensor? residual, Tensor(a!) dx)",
    scale_shift_relu_grad_ref,
    scale_shift_relu_grad_triton,
    shared="grad grad2 residual dx",
)

# --- public ---


def scale_shift_relu(
    a: Tensor,
    out: Tensor,
    *,
    b: Maybe = None,
    scale: Maybe = None,
    shift: Maybe = None,
    total: Maybe = None,
    mask: Maybe = None,
    relu: bool = True,
) -> Tensor:
    """Write relu((a + b) * scale + shift) into `out`, a + b into `total` and the ReLU's bits into `mask`; returns `out`.

    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _forward(a, b, scale, shift, total, out, mask, relu)
    return out


def scale_shift_relu_grad(
    grad: Tensor, dx: Tensor, *, grad2: Maybe = None, mask: Maybe = None, scale: Maybe = None, residual: Maybe = None
) -> Tensor:
    """Write (grad + grad2) * scale, 0 where `mask` is, plus `residual` into `dx`; returns `dx`.

    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _backward(grad, grad2, mask, scale, residual, dx)
    return dx

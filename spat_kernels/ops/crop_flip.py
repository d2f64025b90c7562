"""Training images: gather, random crop after zero padding, random horizontal flip, cast and layout, in one pass.

    out[b, c, h, w] = padded(images[rows[b]])[h + dy, w', c] / 255,   w' = (W - 1 - w if flipped else w) + dx

which is torchvision's RandomCrop((H, W), padding=pad), RandomHorizontalFlip and ToTensor. dy and dx are uniform on 0 .. 2 pad, a
flip has probability 1/2: one Philox4x32-10 call a sample, with key seed[0] and counter (ids[b], seed[1]), gives the words w0, w1,
w2, and dy = w0 (2 pad + 1) >> 32, dx = w1 (2 pad + 1) >> 32, flipped = w2 >> 31. So a crop is a function of the seed and the id,
in whatever batch, on whatever shard. pad = 0 without a flip draws nothing.

images: uint8 [N, H, W, C], contiguous; a row outside [0, N) makes its sample NaN. rows, ids: int64 [B]; seed: int64 [2].
out: [B, C, H, W], contiguous or channels_last, in {fp32, bf16, fp16, fp64}: the quotient in fp32 (fp64 for fp64), rounded once.
Moves 1 + 4 bytes a value in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import EXACT, FLOATS, acc_dtype, check, check_int64, is_dense, tl_acc
from .linf import philox_at

BLOCK = 1024
LIMIT = 2**30  # of pad and of the values of a sample: coordinates and offsets within one fit 32 bits

# --- reference ---


def check_crop(images: Tensor, rows: Tensor, ids: Tensor, seed: Tensor, out: Tensor, pad: int) -> None:
    check(images.dtype == torch.uint8, f"images must be uint8, got {images.dtype}")
    check(images.ndim == 4 and images.is_contiguous(), "images must be contiguous [N, H, W, C]")
    count, height, width, channels = images.shape
    check(count > 0, "images must hold at least one")
    check(height * width * channels < LIMIT, "images must hold fewer than 2^30 values each")
    check(out.dtype in FLOATS, f"out must be float32, float16, bfloat16 or float64, got {out.dtype}")
    check(out.ndim == 4 and out.shape[1:] == (channels, height, width), f"out must be [B, {channels}, {height}, {width}]")
    check(is_dense(out), "out must be contiguous or channels_last")
    check(0 <= pad < LIMIT, f"pad must be at least 0 and less than 2^30, got {pad}")
    check_int64(len(out), rows=rows, ids=ids)
    check_int64(2, seed=seed)


def crops_ref(ids: Tensor, seed: Tensor, pad: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dx and whether to flip, each [B]."""
    words = philox_at(seed, ids)
    dy, dx = words[:, 0] * (2 * pad + 1) >> 32, words[:, 1] * (2 * pad + 1) >> 32
    return dy, dx, (words[:, 2] >> 31 == 1) & flip


def crop_flip_ref(images: Tensor, rows: Tensor, ids: Tensor, seed: Tensor, out: Tensor, pad: int, flip: bool) -> None:
    check_crop(images, rows, ids, seed, out, pad)
    count, height, width, _ = images.shape
    dy, dx, flipped = (t[:, None] for t in crops_ref(ids, seed, pad, flip))
    h, w = torch.arange(height, device=out.device), torch.arange(width, device=out.device)
    y, x = (h + dy - pad)[:, :, None], (torch.where(flipped, width - 1 - w, w) + dx - pad)[:, None, :]
    known = ((rows >= 0) & (rows < count))[:, None, None]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = rows[:, None, None].where(known, 0), y.clamp(0, height - 1), x.clamp(0, width - 1)
    pixels = (images[at] * inside[..., None]).to(acc_dtype(out.dtype))
    # a Python number would be a multiplication by its reciprocal on GPUs
    values = pixels / pixels.new_full((1,), 255)
    out.copy_(values.where(known[..., None], torch.nan).movedim(-1, 1))


# --- Triton ---


@triton.jit
def crop_flip_kernel(
    images_ptr, rows_ptr, ids_ptr, seed_ptr, out_ptr, count, pad, chunks, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    INNER: tl.constexpr, MOVES: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_sample = tl.program_id(0).to(tl.int64) // chunks
    o = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    # out is [samples, C // INNER, H, W, INNER] in memory
    i_x, i_line = o // INNER % W, o // (INNER * W)
    i_y, i_c = i_line % H, i_line // H * INNER + o % INNER
    if MOVES:
        index, counter = tl.load(ids_ptr + i_sample), tl.load(seed_ptr + 1)
        r0, r1, r2, _ = tl.philox(
            tl.load(seed_ptr),
            index.to(tl.uint32), (index >> 32).to(tl.uint32), counter.to(tl.uint32), (counter >> 32).to(tl.uint32),
        )  # fmt: skip
        if FLIP:
            i_x = tl.where((r2 >> 31) != 0, W - 1 - i_x, i_x)
        places = tl.cast(2 * pad + 1, tl.int64)  # pad = 1 is a constant
        i_y += ((r0.to(tl.int64) * places) >> 32).to(tl.int32) - pad
        i_x += ((r1.to(tl.int64) * places) >> 32).to(tl.int32) - pad
    i_image = tl.load(rows_ptr + i_sample)
    known = (i_image >= 0) & (i_image < count)
    m = o < H * W * C
    # not `m & known`: Triton 3.9's interpreter makes an integer of a scalar condition that it broadcasts
    m_inside = (o < tl.where(known, H * W * C, 0)) & (i_y >= 0) & (i_y < H) & (i_x >= 0) & (i_x < W)
    b_u = tl.load(images_ptr + i_image * (H * W * C) + ((i_y * W + i_x) * C + i_c), mask=m_inside, other=0).to(ACC)
    # u / 255 without a division (csrc/math.h)
    if b_u.dtype == tl.float64:
        b_value = b_u * 0.0039215686274509665 + b_u * 1.3932210505100003e-17
    else:
        b_value = b_u * 0.003921568393707275 + b_u * 2.3374371882489697e-10
    tl.store(out_ptr + i_sample * (H * W * C) + o, tl.where(known, b_value, float("nan")), mask=m)


# --- launcher ---


def crop_flip_triton(images: Tensor, rows: Tensor, ids: Tensor, seed: Tensor, out: Tensor, pad: int, flip: bool) -> None:
    check_crop(images, rows, ids, seed, out, pad)
    if out.numel():
        count, height, width, channels = images.shape
        chunks = triton.cdiv(height * width * channels, BLOCK)
        with torch.cuda.device_of(out):
            crop_flip_kernel[(len(out) * chunks,)](
                images, rows, ids, seed, out, count, pad, chunks, H=height, W=width, C=channels,
                INNER=1 if out.is_contiguous() else channels, MOVES=pad > 0 or flip, FLIP=flip,
                BLOCK=BLOCK, ACC=tl_acc(out.dtype), **EXACT,
            )  # fmt: skip


# --- registration ---

_crop_flip = define(
    "crop_flip(Tensor images, Tensor rows, Tensor ids, Tensor seed, Tensor(a!) out, int pad, bool flip)",
    crop_flip_ref,
    crop_flip_triton,
)

# --- public ---


def crop_flip(
    images: Tensor, rows: Tensor, ids: Tensor, seed: Tensor, out: Tensor, *, pad: int = 0, flip: bool = False
) -> Tensor:
    """Write the uint8 images at `rows` into `out` as floats in [0, 1], cropped at random from `pad` zeros around them and, with
    `flip`, mirrored at random; returns `out`.

    ids: which random numbers each sample takes; seed: the Philox key and counter. Shapes and dtypes: see the module. Raises
    RuntimeError where they do not fit.
    """
    _crop_flip(images, rows, ids, seed, out, pad, flip)
    return out

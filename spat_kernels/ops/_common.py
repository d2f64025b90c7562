"""What the op files share: dtypes, layouts and argument checks of the references and Triton launchers.

bindings.cpp checks the same for compiled code. Nothing here is reached when a compiled kernel serves the op.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

Maybe = Tensor | None  # an argument that may be absent
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Without fused multiply-add every expression rounds as it is written, the same on every backend.
EXACT = {"enable_fp_fusion": False}


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in, and of its losses and per-sample arguments: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tl_acc(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def is_dense(t: Tensor) -> bool:
    """Contiguous or channels_last: each sample is one stretch of memory."""
    return t.is_contiguous() or (t.ndim >= 3 and t.movedim(1, -1).is_contiguous())


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, and equal strides wherever a dimension has more than one element."""
    if a.shape != b.shape:
        return False
    return a.stride() == b.stride() or all(n <= 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def check_alike(**images: Tensor) -> None:
    """Two images, alike and dense."""
    (first, a), (second, b) = images.items()
    check(a.dtype in FLOATS, f"{first} must be float32, float16, bfloat16 or float64, got {a.dtype}")
    check(a.ndim >= 1 and is_dense(a), f"{first} must be contiguous or channels_last")
    check(b.dtype == a.dtype, f"{second} must be {a.dtype} like {first}, got {b.dtype}")
    check(same_layout(a, b), f"{second} must have the shape and the strides of {first}")


def check_images(x_adv: Tensor, x: Tensor, lo: float, hi: float, **per_sample: Tensor) -> None:
    """x_adv and x alike and dense; each of `per_sample` one value, or one for each sample."""
    check_alike(x_adv=x_adv, x=x)
    check(lo <= hi, f"lo must be at most hi, got {lo} and {hi}")
    for name, t in per_sample.items():
        check(t.dtype == acc_dtype(x_adv.dtype), f"{name} must be {acc_dtype(x_adv.dtype)}")
        check(t.numel() in (1, x_adv.shape[0]) and t.is_contiguous(), f"{name} must hold 1 or {x_adv.shape[0]} elements")


def check_step(
    x_adv: Tensor, x: Tensor, grad: Tensor, eps: Tensor, step_size: Tensor, lo: float, hi: float, nan_seen: Maybe
) -> None:
    check_images(x_adv, x, lo, hi, eps=eps, step_size=step_size)
    check_grad(x_adv, grad, nan_seen)


def check_grad(x_adv: Tensor, grad: Tensor, nan_seen: Maybe) -> None:
    check(same_layout(x_adv, grad), "grad must have the shape and the strides of x_adv")
    check(grad.dtype in FLOATS, f"grad must be float32, float16, bfloat16 or float64, got {grad.dtype}")
    check((grad.dtype == torch.float64) == (x_adv.dtype == torch.float64), "grad must be float64 exactly when x_adv is")
    if nan_seen is not None:
        fits = nan_seen.dtype == torch.uint8 and nan_seen.shape == x_adv.shape[:1] and nan_seen.is_contiguous()
        check(fits, "nan_seen must be contiguous uint8 [B]")


def check_rows(logits: Tensor, dlogits: Tensor, loss: Maybe, min_classes: int = 2, **labels: Tensor) -> None:
    check(logits.dtype in FLOATS, f"logits must be float32, float16, bfloat16 or float64, got {logits.dtype}")
    check(logits.ndim == 2 and logits.is_contiguous(), "logits must be contiguous [B, K]")
    check(logits.shape[1] >= min_classes, f"logits must have at least {min_classes} classes, got {logits.shape[1]}")
    check(dlogits.shape == logits.shape and dlogits.is_contiguous(), "dlogits must be contiguous with logits' shape")
    check(dlogits.dtype == logits.dtype, "dlogits must have logits' dtype")
    if loss is not None:
        check(loss.dtype == acc_dtype(logits.dtype), f"loss must be {acc_dtype(logits.dtype)}")
        check(loss.shape == logits.shape[:1] and loss.is_contiguous(), "loss must be contiguous [B]")
    check_int64(len(logits), **labels)


def check_int64(numel: int, **vectors: Tensor) -> None:
    for name, t in vectors.items():
        check(t.dtype == torch.int64 and t.shape == (numel,) and t.is_contiguous(), f"{name} must be contiguous int64 [{numel}]")


def as_rows(t: Tensor) -> Tensor:
    """Images with channels innermost as [rows, channels], a view."""
    return t.movedim(1, -1).flatten(0, -2)


def check_layout(**images: Maybe) -> None:
    """Channels innermost in memory: channels_last, or contiguous [N, C]."""
    for name, t in images.items():
        innermost = t is None or (t.ndim >= 2 and t.movedim(1, -1).is_contiguous())
        check(innermost, f"{name} must be [N, C, ...] with channels innermost in memory (channels_last)")


def check_channels(**images: Maybe) -> None:
    """Alike and with channels innermost. The first is the model of the others, which may be absent."""
    check_layout(**images)
    (first, like), *others = images.items()
    assert like is not None
    check(like.dtype in FLOATS, f"{first} must be float32, float16, bfloat16 or float64, got {like.dtype}")
    for name, t in others:
        if t is not None:
            check(t.dtype == like.dtype, f"{name} must be {like.dtype} like {first}, got {t.dtype}")
            check(t.shape == like.shape, f"{name} must have the shape of {first}")


def check_per_channel(image: Tensor, **vectors: Maybe) -> None:
    dtype, channels = acc_dtype(image.dtype), image.shape[1]
    for name, t in vectors.items():
        if t is not None:
            check(t.dtype == dtype, f"{name} must be {dtype}, got {t.dtype}")
            check(t.shape == (channels,) and t.is_contiguous(), f"{name} must be contiguous [{channels}]")


def broadcast(value: Tensor, like: Tensor) -> Tensor:
    """`value`, one for the batch or [B], shaped to broadcast against the images `like`."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def is_class(labels: Tensor, classes: int) -> Tensor:
    return (labels >= 0) & (labels < classes)


def launch_rows(kernel, logits: Tensor, *tensors: Maybe, numbers: tuple[float, ...], **constants: bool) -> None:
    """Launch a row kernel, the last of whose `tensors` is the loss: about 1024 logits a program, long rows in chunks of 1024.

    K is a compile-time constant (a model has one), so rows of one chunk compile without a loop.
    """
    rows, classes = logits.shape
    block_k = min(triton.next_power_of_2(classes), 1024)
    block_b = max(1, min(1024 // block_k, 32))
    tile = {"K": classes, "BLOCK_B": block_b, "BLOCK_K": block_k, "ACC": tl_acc(logits.dtype)}
    if logits.numel():
        with torch.cuda.device_of(logits):
            grid, with_loss = (triton.cdiv(rows, block_b),), tensors[-1] is not None
            kernel[grid](logits, *tensors, rows, *numbers, WITH_LOSS=with_loss, **constants, **tile, **EXACT)


@triton.jit
def divide(a, b):
    """a / b, rounded to nearest as in C++. Triton's `/` does that in fp64, but in fp32 it is up to 2 ulp off (div.full.f32)."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def clamp(v, lo, hi):
    """`v` in [lo, hi]; NaN stays NaN as in C++, which tl.maximum alone would turn into `lo`."""
    v = tl.maximum(v, lo, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, hi, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_rows(ptr, i_b, i_k, B, K: tl.constexpr, other, ACC: tl.constexpr):
    """A [BLOCK_B, BLOCK_K] tile at rows i_b and columns i_k, `other` beyond the edges, and its mask."""
    m = (i_b < B)[:, None] & (i_k < K)[None, :]
    return tl.load(ptr + i_b[:, None] * K + i_k[None, :], mask=m, other=other).to(ACC), m


@triton.jit
def safe_labels(labels_ptr, i_b, B, K: tl.constexpr):
    """Labels at rows i_b, and whether they name a class; those that do not are replaced by 0, so that nothing reads outside."""
    b_y = tl.load(labels_ptr + i_b, mask=i_b < B, other=0)
    valid = (b_y >= 0) & (b_y < K)
    return tl.where(valid, b_y, 0), valid


@triton.jit
def per_sample(ptr, i_sample, m, VARIES: tl.constexpr):
    """The value of each element's sample, or the one value for all."""
    return tl.load(ptr + i_sample, mask=m, other=0.0) if VARIES else tl.load(ptr)

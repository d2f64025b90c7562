"""Convolutions with their pass in the epilogue, by our own kernel for Hopper (csrc/conv_sm90a.cu).

    forward:   t = conv(x, weight) + b,   v = scale_c t + shift_c,   out = relu(v);   total = t;   mask = the bits !(v <= 0)
    gradient:  dx = mask * (dgrad(grad, weight) + grad2) * scale_c + residual

The formulas are those of ops.scale_shift_relu, whose first image is here what the convolution gives, in fp32 and not rounded. The
gradient of a convolution of stride 1 is a convolution of `grad` with the weights turned round, which `turned` prepares.

fp16 and bf16, channels_last, channels in multiples of 8, one group, no dilation, the same stride both ways. A block does 128
pixels of 64, 128 or 160 output channels, its `tile`. With `rows` the pixels are whole rows of an image, and are copied once for
all weights of a column of the window. Which variant is fastest depends on the shape.
"""

import torch
from torch import Tensor

from .._library import cuda_built, guard, library
from ..ops._common import Maybe
from .recipe import Recipe

TILES = (160, 128, 64)
PIXELS, MAX_PIXELS = 128, 192  # in a tile, and with the rows above and below it
MAX_KERNEL = 64
WASTE = 1.2  # a tile is tried if it does at most this many times the output channels of the tile that does the fewest
HOPPER = (9, 0)

_CONV = "Tensor x, Tensor weight, int stride, int pad_height, int pad_width"
_FORWARD = "Tensor? b, Tensor? scale, Tensor? shift, Tensor(a!)? total, Tensor(b!) out, Tensor(c!)? mask, bool relu"
_GRADIENT = "Tensor? grad2, Tensor? mask, Tensor? scale, Tensor? residual, Tensor(a!) out"
library.define(f"conv_scale_shift_relu({_CONV}, {_FORWARD}, int tile, bool rows) -> ()")
library.define(f"conv_scale_shift_relu_grad({_CONV}, {_GRADIENT}, int tile, bool rows) -> ()")
guard("conv_scale_shift_relu")
guard("conv_scale_shift_relu_grad")


def turned(weight: Tensor) -> Tensor:
    """Weights [K, C, R, S] as those of the gradient, [C, K, R, S], turned by 180 degrees, channels_last."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def conv_scale_shift_relu(
    x: Tensor, weight: Tensor, out: Tensor, *, stride: int = 1, padding: tuple[int, int] = (0, 0), b: Maybe = None,
    scale: Maybe = None, shift: Maybe = None, total: Maybe = None, mask: Maybe = None, relu: bool = True, tile: int = 128,
    rows: bool = False,
) -> Tensor:  # fmt: skip
    """Write relu((conv(x, weight) + b) * scale + shift) into `out`, and return it.

    Args:
        x: [N, C, H, W], channels_last, as all images and weights. Their addresses are multiples of 16 bytes.
        weight: [K, C, R, S].
        out: [N, K, H', W'], like `b` and `total`.
        stride, padding: of the convolution, `padding` vertical and horizontal.
        b: added to what the convolution gives.
        scale, shift: fp32 [K].
        total: gets conv(x, weight) + b.
        mask: gets the ReLU's bits, as in ops.scale_shift_relu.
        relu: whether there is one.
        tile, rows: as in the module's docstring. They change nothing but the speed.

    Raises:
        RuntimeError: the tensors do not fit, the GPU is not a Hopper, or `rows` is not for these shapes (see `variants`).
    """
    torch.ops.spat.conv_scale_shift_relu.default(x, weight, stride, *padding, b, scale, shift, total, out, mask, relu, tile, rows)
    return out


def conv_scale_shift_relu_grad(
    grad: Tensor, turned_weight: Tensor, dx: Tensor, *, padding: tuple[int, int] = (0, 0), grad2: Maybe = None,
    mask: Maybe = None, scale: Maybe = None, residual: Maybe = None, tile: int = 128, rows: bool = False,
) -> Tensor:  # fmt: skip
    """Write (dgrad(grad, weight) + grad2) * scale, 0 where `mask` has no bit, plus `residual` into `dx`, and return it.

    Args:
        grad: [N, K, H', W'], of what the convolution made. Its stride was 1.
        turned_weight: [C, K, R, S], from `turned`.
        dx: [N, C, H, W], like `grad2` and `residual`.
        padding: of the convolution forward.
        grad2: added to what the convolution gives.
        mask: the ReLU's bits, as in ops.scale_shift_relu_grad.
        scale: fp32 [C].
        residual: added at the end.
        tile, rows: as in `conv_scale_shift_relu`.

    Raises:
        RuntimeError: as in `conv_scale_shift_relu`.
    """
    inner = [size - 1 - p for size, p in zip(turned_weight.shape[2:], padding, strict=True)]
    torch.ops.spat.conv_scale_shift_relu_grad.default(
        grad, turned_weight, 1, *inner, grad2, mask, scale, residual, dx, tile, rows
    )
    return dx


class Hopper:
    """The engine (see `choose.Engine`). A variant is a tile, with or without `rows`: "tile 160", "tile 160 rows"."""

    name = "hopper"

    def runs_on(self, device: torch.device) -> bool:
        if not cuda_built or device.type != "cuda" or not torch.cuda.is_available():
            return False
        return torch.cuda.get_device_capability(device) == HOPPER

    def variants(self, recipe: Recipe, device: torch.device) -> list[str]:
        stride, channels = recipe.stride, (recipe.input[0], recipe.output[0])
        fits = (
            recipe.dtype in (torch.float16, torch.bfloat16)
            and recipe.layout == torch.channels_last
            and recipe.groups == 1
            and recipe.dilation == (1, 1)
            and not recipe.bias
            and all(c % 8 == 0 for c in channels)
            and all(p < k <= MAX_KERNEL for p, k in zip(recipe.padding, recipe.kernel, strict=True))
            and (stride == (1, 1) or (recipe.way == "forward" and stride[0] == stride[1] <= 8))
        )
        done = {tile: -(-recipe.result[1] // tile) * tile for tile in TILES}
        tiles = [f"tile {tile}" for tile in TILES if done[tile] <= WASTE * min(done.values())]
        return [*tiles, *[f"{tile} rows" for tile in tiles if _in_rows(recipe)]] if fits else []

    def prepare_weight(self, recipe: Recipe, weight: Tensor) -> Tensor | None:
        return turned(weight) if recipe.way == "gradient" else None

    def run(self, variant: str, recipe: Recipe, x: Tensor, weight: Tensor, out: Tensor, **tensors: Tensor) -> None:
        tile, rows = int(variant.split()[1]), variant.endswith("rows")
        if recipe.way == "gradient":
            conv_scale_shift_relu_grad(x, weight, out, padding=recipe.padding, tile=tile, rows=rows, **tensors)
        else:
            relu, (stride, _) = bool(recipe.epilogue and recipe.epilogue.relu), recipe.stride
            conv_scale_shift_relu(
                x, weight, out, stride=stride, padding=recipe.padding, relu=relu, tile=tile, rows=rows, **tensors
            )


def _in_rows(recipe: Recipe) -> bool:
    """Whether a tile can be whole rows of one image, or two images, as `pixels_in_rows` in csrc/conv_sm90a.cu says."""
    (_, height, width), (rows, _) = recipe.output, recipe.kernel
    images = 2 if height * width == PIXELS // 2 else 1
    whole = width % 8 == 0 and PIXELS // 2 % width == 0 and images * height * width % PIXELS == 0
    same = recipe.stride == (1, 1) and recipe.input[1:] == recipe.output[1:]
    return whole and same and PIXELS + images * (rows - 1) * width <= MAX_PIXELS

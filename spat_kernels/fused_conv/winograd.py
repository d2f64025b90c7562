"""Convolutions of 3x3 and stride 1 in fp32 on CPUs with AVX-512, by Winograd's F(2x2, 3x3) (csrc/winograd.cpp).

    forward:   y = conv(x, weight)
    gradient:  dx = dgrad(grad, weight), a convolution with the weights turned round

Four outputs of a channel take 16 products instead of 36. Whether it is used depends on shapes, dtype and the machine alone, never
on a measured time, so that results repeat to the last bit. It is settled once an attack, by the batch that it begins with.

Its error is 0.3 to 0.6 times that of oneDNN in channels_last, and an output whose nine inputs are 0 is exactly 0. Weights are
transformed once an attack. That takes as long as 0.04 (128 channels at 16x16) to 0.8 convolutions (512 at 4x4) of 8 images, so
that an attack of a single step would lose by it where there are few pixels: hence `TILES`.
"""

from math import prod

import torch
from torch import Tensor

from .._library import compiled, guard, library

CHANNELS = 32  # come in multiples of this
TILES = 64  # a batch needs at least this many of 2x2 pixels: else transforming the weights costs more than one step saves

library.define("winograd(Tensor x, Tensor weight, Tensor(a!) out) -> ()")
library.define("winograd_weights(Tensor weight, bool turned, Tensor(a!) out) -> ()")
guard("winograd")
guard("winograd_weights")


def applies(weight: Tensor, conv: dict, batch: int, pixels: tuple[int, ...]) -> bool:
    """Whether it does the convolution of `weight` [K, C, 3, 3] with the settings `conv` of a plan's step.

    Args:
        batch, pixels: samples, and height and width of each.
    """
    out, channels, *kernel = weight.shape
    return (
        compiled is not None
        and batch * prod(-(-size // 2) for size in pixels) >= TILES
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and kernel == [3, 3]
        and all(tuple(conv[name]) == (1, 1) for name in ("stride", "padding", "dilation"))
        and conv["groups"] == 1
        and all(c % CHANNELS == 0 for c in (out, channels))
    )


class Winograd:
    """A convolution and its gradient. Each has its weights transformed at its first use.

    Args:
        weight: [K, C, 3, 3] in channels_last, for which it `applies`.
    """

    def __init__(self, weight: Tensor):
        self._weight = weight
        self._transformed: dict[bool, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x [N, C, H, W], both in channels_last."""
        return self._convolve(x, turned=False)

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient at x, of grad [N, K, H, W], both in channels_last."""
        return self._convolve(grad, turned=True)

    def _convolve(self, x: Tensor, turned: bool) -> Tensor:
        channels = self._weight.shape[1 if turned else 0]
        if turned not in self._transformed:
            transformed = self._weight.new_empty(16, channels, x.shape[1])
            torch.ops.spat.winograd_weights.default(self._weight, turned, transformed)
            self._transformed[turned] = transformed
        shape = len(x), channels, *x.shape[2:]
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        torch.ops.spat.winograd.default(x, self._transformed[turned], out)
        return out

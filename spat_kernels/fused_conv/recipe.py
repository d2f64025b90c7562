"""A convolution and the pass that may ride in it: what an engine is asked for, and how PyTorch and `ops` do it one by one.

    forward    y = conv(x, weight) [+ bias];  then the pass of ops.scale_shift_relu on y: + b, scale, shift, ReLU, total, mask
    gradient   g = d conv / d input, of grad;  then that of ops.scale_shift_relu_grad on g: + grad2, mask, scale, residual

A recipe holds shapes and names and no tensor, so that a choice can be looked up by it and written to disk. FP8 would be one more
dtype here (e4m3), with the scales of input and output channels among the names that the pass reads.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..ops._common import Maybe

Way = Literal["forward", "gradient"]
READS: dict[Way, tuple[str, ...]] = {"forward": ("b", "scale", "shift"), "gradient": ("grad2", "mask", "scale", "residual")}
WRITES: dict[Way, tuple[str, ...]] = {"forward": ("total", "mask"), "gradient": ()}
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Epilogue:
    """The pass: the tensors that it reads and writes by the names of `ops.scale_shift_relu` and `_grad`, in the order of `READS`
    and `WRITES`, without the convolution's result and `out`."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    relu: bool = False


@dataclass(frozen=True)
class Recipe:
    """What the choice of an engine depends on.

    Attributes:
        way: "forward", or "gradient" with respect to the convolution's input.
        dtype: of images and weights.
        batch: samples N.
        input: (C, H, W), a sample of what the convolution reads forward.
        output: (K, OH, OW), a sample of what it makes forward.
        kernel, stride, padding, dilation: (vertical, horizontal).
        groups: of channels.
        layout: memory format of what the convolution reads, and of its weights.
        bias: whether a bias [K] in `dtype` is added, forward, before the pass.
        epilogue: the pass, or None: a convolution alone.
        tf32: whether fp32 values may be rounded to TF32.
    """

    way: Way
    dtype: torch.dtype
    batch: int
    input: tuple[int, int, int]
    output: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    layout: torch.memory_format = torch.channels_last
    bias: bool = False
    epilogue: Epilogue | None = None
    tf32: bool = False

    @property
    def result(self) -> tuple[int, int, int, int]:
        """The shape of `out`, and of the images that the pass reads and writes."""
        return self.batch, *(self.output if self.way == "forward" else self.input)

    def __str__(self) -> str:
        """Short, and different for different recipes: "forward bf16 128x160x32x32 -> 160, 3x3 + b, shift, relu, mask"."""
        centred = tuple(d * (k - 1) // 2 for k, d in zip(self.kernel, self.dilation, strict=True))
        parts = [_by(self.kernel)]
        parts += [f"stride {_by(self.stride)}"] * (self.stride != (1, 1))
        parts += [f"padding {_by(self.padding)}"] * (self.padding != centred)
        parts += [f"dilation {_by(self.dilation)}"] * (self.dilation != (1, 1))
        parts += [f"{self.groups} groups"] * (self.groups != 1)
        parts += ["contiguous"] * (self.layout != torch.channels_last)
        parts += ["bias"] * self.bias
        dtype = "tf32" if self.tf32 else SHORT.get(self.dtype, self.dtype)
        images = f"{self.way} {dtype} {_by((self.batch, *self.input))} -> {self.output[0]}"
        return f"{images}, {', '.join(parts)}" + (f" + {', '.join(self._pass())}" if self.epilogue else "")

    def _pass(self) -> list[str]:
        assert self.epilogue is not None
        return [*self.epilogue.reads, *["relu"] * self.epilogue.relu, *self.epilogue.writes]


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def empty_results(recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
    """Memory for what a recipe writes: "out" and "total" in its dtype and channels_last, "mask" uint8 [pixels, ceil(C / 8)]."""

    def image() -> Tensor:
        return torch.empty(recipe.result, dtype=recipe.dtype, device=device, memory_format=torch.channels_last)

    results = {"out": image()}
    writes = recipe.epilogue.writes if recipe.epilogue else ()
    if "total" in writes:
        results["total"] = image()
    if "mask" in writes:
        batch, channels, height, width = recipe.result
        results["mask"] = torch.empty(batch * height * width, -(-channels // 8), dtype=torch.uint8, device=device)
    return results


def convolve(recipe: Recipe, x: Tensor, weight: Tensor, bias: Maybe = None) -> Tensor:
    """The convolution of a recipe alone, by PyTorch, with channels innermost in memory."""
    settings = recipe.stride, recipe.padding, recipe.dilation
    if recipe.way == "forward":
        y = torch.conv2d(x, weight, bias, *settings, recipe.groups)
    else:
        shape = recipe.batch, *recipe.input
        unread = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=recipe.layout)
        only_input = [True, False, False]
        y = torch.ops.aten.convolution_backward(
            x, unread, weight, None, *settings, False, [0, 0], recipe.groups, only_input
        )[0]  # fmt: skip
    return y.contiguous(memory_format=torch.channels_last)


def apart(recipe: Recipe, x: Tensor, weight: Tensor, out: Maybe = None, **tensors: Maybe) -> Tensor:
    """The convolution by PyTorch, then the pass by `ops`: the results to which an engine is held.

    Args:
        recipe: what to do.
        x: what the convolution reads, in `recipe.layout`: its input [N, C, H, W], or grad [N, K, OH, OW].
        weight: [K, C / groups, R, S].
        out: [N, K, OH, OW] or [N, C, H, W] in channels_last, which is written; None is the memory of the convolution's result.
        tensors: "bias", and what the pass reads and writes, by name.

    Returns:
        Tensor: `out`.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    bias = tensors.pop("bias", None)
    y = convolve(recipe, x, weight, bias)
    if recipe.epilogue is None:
        return y if out is None else out.copy_(y)
    target = y if out is None else out
    if recipe.way == "forward":
        return ops.scale_shift_relu(y, target, relu=recipe.epilogue.relu, **tensors)
    return ops.scale_shift_relu_grad(y, target, **tensors)

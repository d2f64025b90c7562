"""The weights that the steps of a plan read: a model's parameters as they are now, folded, cast and laid out.

BatchNorm and normalisation become one scale and one shift a channel, those behind a convolution a part of its weights. All of it
takes a few launches, so that a training loop may change the model between attacks.
"""

from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused_conv import winograd
from ..fused_conv.winograd import Winograd
from ..ops._common import acc_dtype
from ..precision import HALVES
from . import packed_linear
from .nodes import Computed, Constant, Norm, Ref, Term
from .packed_linear import PackedLinear
from .plan import Plan
from .steps import Cat, Conv, Linear, Local, Maps, Pointwise, ResponseNorm, Step
from .token_steps import Combine, LayerNorm

CHANNELS_LAST = torch.channels_last
ALIGNED = 4  # scales and shifts start at multiples of 4 values, 16 bytes of fp32, which CUDA kernels read at once


class LinearWeights(NamedTuple):
    weight: Tensor  # [O, C]
    bias: Tensor | None
    packed: PackedLinear | None = None  # multiplies by the weight, for many rows

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self.packed is None else self.packed.forward(x, self.bias)

    def gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.weight if self.packed is None else self.packed.gradient(grad)


class ConvWeights(NamedTuple):
    """What a convolution reads, besides its input."""

    weight: Tensor
    folded: Tensor | None  # the bias, in the dtype of the arithmetic
    bias: Tensor | None  # the bias as the convolution adds it; None where a Pointwise does
    scale: Tensor | None  # a factor for each channel of the image, before the convolution
    shift: Tensor | None
    layout: torch.memory_format = CHANNELS_LAST  # of input, output and weights
    splits: bool = False  # fp32 values are read in half precision, as two halves (ops.split_image)
    wide: Tensor | None = None  # fp32 weights for the gradient, where that is the faster way
    winograd: Winograd | None = None  # does the convolution, and its gradient, without the bias
    dense: LinearWeights | None = None  # does it, with the bias, where it is a matrix product
    whole: LinearWeights | None = None  # the same, of weights as large as what they read: [O, C h w], as they lie in the model
    patches: Tensor | None = None  # [O, h w C], the same weights, for the gradient where patches do not overlap


class ScaleShift(NamedTuple):
    """What a pass between convolutions applies; None for 1 and 0."""

    scale: Tensor | None = None
    shift: Tensor | None = None


class PointwiseWeights(NamedTuple):
    """The same, and what LeakyReLU and PReLU multiply values below 0 by."""

    scale: Tensor | None
    shift: Tensor | None
    negative: Tensor | None = None


class Weights:
    """Binds the steps of a plan to a model.

    Args:
        model: where the weights are read, at every `bind`.
        image_dtype: of the images.
        dtype: of the convolutions.
        batch: samples that an attack begins with, for the choice of `Winograd`.
    """

    def __init__(self, plan: Plan, model: nn.Module, image_dtype: torch.dtype, dtype: torch.dtype, batch: int):
        self.plan, self.image_dtype, self.dtype, self.acc, self.batch = plan, image_dtype, dtype, acc_dtype(dtype), batch
        self.device = next(model.parameters()).device
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._constants: dict = {}  # made at the first `bind`: a captured one cannot copy from the host

    def release(self) -> None:
        """Forget the model."""
        self._modules = {}

    def bind(self) -> list:
        """What each step reads: ConvWeights, PointwiseWeights or LinearWeights; None for the others."""
        steps = self.plan.steps
        maps = [m for s in steps for kind in ("before", "after", "affine") for m in getattr(s, kind, ())]
        self._norms = self._fold_norms([m for m in maps if isinstance(m, Norm)])
        bound: list = [None] * len(steps)
        for i, step in enumerate(steps):
            if isinstance(step, Conv):
                bound[i] = self._conv(step)
            elif isinstance(step, Linear):
                bound[i] = self._linear(step)
            elif isinstance(step, (LayerNorm, ResponseNorm)):
                bound[i] = tuple(None if c is None else self._of(c).to(self.acc).contiguous() for c in (step.weight, step.bias))
            elif isinstance(step, Local):
                bound[i] = tuple(self._as_value(step, c) for c in step.constants)
            elif isinstance(step, Cat):
                bound[i] = [None if isinstance(p, int) else self._as_value(step, p) for p in step.parts]
            elif isinstance(step, Combine):
                assert isinstance(step.term.constant, (Ref, Computed))
                bound[i] = self._as_value(step, step.term.constant)
        for i, step in enumerate(steps):
            if isinstance(step, Pointwise):
                scale, shift = self._scale_shift(step.affine, step.shape[step.channels])
                for j in step.shifts:
                    shift = _sum(shift, bound[j].folded)
                bound[i] = PointwiseWeights(scale, shift, self._negative(step))
        return bound

    def _of(self, constant: Constant) -> Tensor:
        return constant.of(self._modules).detach()

    def _as_value(self, step: Step, constant: Constant) -> Tensor:
        """A constant in the dtype of the values that it meets; masks and indices as they are."""
        c = self._of(constant)
        exact = step.out in self.plan.exact and self.plan.exact.issuperset(step.inputs)
        return c.to(self.device, self.acc if exact else self.dtype) if c.is_floating_point() else c

    def _linear(self, step: Linear) -> LinearWeights:
        dtype = self.acc if step.out in self.plan.exact else self.dtype
        weight, bias = self._of(step.weight), None if step.bias is None else self._of(step.bias)
        if step.after:
            scale, shift = self._scale_shift(step.after, len(weight))
            weight = weight if scale is None else weight.to(self.acc) * scale.view(-1, 1)
            bias = bias if bias is None or scale is None else bias * scale
            bias = _sum(bias, shift)
        weight, bias = weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype).contiguous()
        fast = len(step.shape) > 1 and packed_linear.applies(weight, self.batch * prod(step.shape[:-1]), dtype)
        return LinearWeights(weight, bias, PackedLinear(weight) if fast else None)

    def _conv(self, step: Conv) -> ConvWeights:
        weight = self._of(step.weight)
        scale, shift = self._scale_shift(step.after, len(weight))
        if step.bias is not None:
            bias = self._of(step.bias).to(self.acc)
            shift = _sum(bias if scale is None else bias * scale, shift)
        fast = self.dtype == torch.float32 and winograd.applies(weight, step.conv, self.batch, step.shape[1:])
        splits = self.dtype in HALVES and self.image_dtype == torch.float32 and step.inputs[0] in self.plan.exact
        product = not splits and self._is_product(step, weight)
        whole = not splits and self._reads_all(step, weight)
        patches = not whole and self._is_of_patches(step, weight)
        layout = CHANNELS_LAST if fast or product or patches else self._layout(step, weight)
        layout = torch.contiguous_format if whole else layout
        if scale is None:
            folded = weight.to(self.dtype, memory_format=layout)
        else:
            folded = torch.empty_like(weight, dtype=self.dtype, memory_format=layout)
            torch.mul(weight, scale.view(-1, 1, 1, 1), out=folded)
        matrix = folded.permute(0, 2, 3, 1).flatten(1).contiguous() if product or patches else None
        folded = _twice(folded) if splits else folded
        inside = None if shift is None or step.shift_moves else shift.to(self.dtype)
        before = self._scale_shift(step.before, weight.shape[1])
        dense = None
        if product:
            assert matrix is not None
            packs = packed_linear.applies(weight, self.batch * prod(step.shape[1:]), self.dtype)
            dense = LinearWeights(matrix, inside, PackedLinear(matrix) if packs else None)
        wide = folded.float() if self._gradient_in_fp32(step, weight) else None
        return ConvWeights(
            folded, shift, inside, *before, layout, splits, wide, Winograd(folded) if fast else None, dense,
            LinearWeights(folded.flatten(1), inside) if whole else None, matrix if patches else None,
        )  # fmt: skip

    def _is_product(self, step: Conv, weight: Tensor) -> bool:
        """Whether a convolution is that of each pixel by itself, and that is no slower.

        On CPUs it never is, and where there are few pixels it is far from it: 320 x 1280 channels at 3x3, batch 8: 0.6 ms instead
        of 1.1 to 5. Of one pixel, a convolution would take 40 us to begin.
        """
        c = step.conv
        of_pixels = [*weight.shape[2:], *c["stride"], c["groups"]] == [1] * 5 and not any(c["padding"])
        return of_pixels and (self._multiplies() or tuple(step.shape[1:]) == (1, 1))

    def _reads_all(self, step: Conv, weight: Tensor) -> bool:
        """Whether the weights are as large as the images, as in VGG's first dense layer, 7x7: oneDNN lays out all of them again
        in every call."""
        c, image = step.conv, self.plan.nodes[step.inputs[0]].shape[1:]
        alone = c["groups"] == 1 and not any(c["padding"]) and list(c["dilation"]) == [1, 1]
        return alone and tuple(weight.shape[2:]) == tuple(image) != (1, 1)

    def _is_of_patches(self, step: Conv, weight: Tensor) -> bool:
        """Whether a convolution cuts images into patches: oneDNN's gradient takes up to 14 times that of a matrix product."""
        c, sizes, pixels = step.conv, list(weight.shape[2:]), self.plan.nodes[step.inputs[0]].shape[1:]
        apart = sizes == list(c["stride"]) != [1, 1] and not any(c["padding"]) and list(c["dilation"]) == [1, 1]
        whole = all(k * n == size for k, n, size in zip(sizes, step.shape[1:], pixels, strict=True))
        return apart and whole and c["groups"] == 1 and self._multiplies()

    def _multiplies(self) -> bool:
        return self.device.type == "cpu" and packed_linear.is_fast(self.dtype)

    def _gradient_in_fp32(self, step: Conv, weight: Tensor) -> bool:
        """On CPUs oneDNN has no fast kernel in half precision for depthwise ones with strides: 39 ms instead of 0.3 to 11."""
        depthwise = step.conv["groups"] > 1 and weight.shape[1] == 1
        return self.device.type == "cpu" and self.dtype in HALVES and depthwise and step.conv["stride"] != [1, 1]

    def _layout(self, step: Conv, weight: Tensor) -> torch.memory_format:
        """channels_last, but for fp32 on CPUs with few pixels: there oneDNN reads all weights again for every image.

        512 channels at 4x4, batch 64: 18.4 ms in channels_last, 10.8 ms with both conversions; at 8x8, 256: 10.3 and 13.1.
        Groups of up to 16 channels have few weights (512 channels at 4x4, batch 16, both ways: 0.8 and 14.9 ms), but not those of
        48 (768 channels: 16.6 and 7.6 ms).
        """
        few = self.device.type == "cpu" and self.dtype not in HALVES and prod(step.shape[1:]) <= 16
        few = few and (step.conv["groups"] == 1 or weight.shape[1] > 16)
        return torch.contiguous_format if few else CHANNELS_LAST

    def _negative(self, step: Pointwise) -> Tensor | None:
        negative = step.act and step.act.negative
        if negative is None:
            return None
        if isinstance(negative, (Ref, Computed)):
            return self._of(negative).to(self.acc).contiguous()
        return self._constant(("negative", negative), lambda: torch.tensor([negative], dtype=self.acc))

    def _fold_norms(self, norms: list[Norm]) -> dict[Norm, ScaleShift]:
        """scale = weight / sqrt(var + eps) and shift = bias - mean * scale of every BatchNorm, all at once."""
        if not norms:
            return {}
        means = [self._of(n.mean) for n in norms]
        sizes = [len(m) for m in means]
        padded = [-(-size // ALIGNED) * ALIGNED for size in sizes]  # else what follows odd channels would be read one by one
        padding = self._constant("padding", lambda: torch.zeros(ALIGNED, dtype=means[0].dtype))

        def joined(refs, absent):
            parts = [torch.full_like(m, absent) if r is None else self._of(r) for r, m in zip(refs, means, strict=True)]
            rests = [padding[: n - size] for n, size in zip(padded, sizes, strict=True)]
            return torch.cat([t for pair in zip(parts, rests, strict=True) for t in pair if len(t)]).to(self.acc)

        each = [n.eps for n in norms]
        eps = self._constant("eps", lambda: torch.tensor(each, dtype=self.acc).repeat_interleave(torch.tensor(padded)))
        scale = (joined([n.var for n in norms], 1.0) + eps).rsqrt_() * joined([n.weight for n in norms], 1.0)
        shift = joined([n.bias for n in norms], 0.0) - joined([n.mean for n in norms], 0.0) * scale
        parts = ([t[:size] for t, size in zip(joint.split(padded), sizes, strict=True)] for joint in (scale, shift))
        return dict(zip(norms, map(ScaleShift, *parts), strict=True))

    def _constant(self, key, make) -> Tensor:
        """What `make()` gave the first time, on the model's device."""
        if key not in self._constants:
            self._constants[key] = make().to(self.device)
        return self._constants[key]

    def _scale_shift(self, maps: Maps, channels: int) -> ScaleShift:
        """The maps one after the other as one scale and one shift [C]."""
        scale = shift = None
        for m in maps:
            s, t = self._norms[m] if isinstance(m, Norm) else self._term(m, channels)
            if shift is not None and s is not None:
                shift = shift * s
            shift = _sum(shift, t)
            scale = s if scale is None else scale if s is None else scale * s
        return ScaleShift(scale, shift)

    def _term(self, term: Term, channels: int) -> ScaleShift:
        if isinstance(term.constant, (Ref, Computed)):
            c = self._of(term.constant).to(self.device, self.acc).reshape(-1).expand(channels).contiguous()
        else:
            value = partial(torch.tensor, term.constant, dtype=torch.float64)
            c = self._constant((term, channels), lambda: value().to(self.acc).reshape(-1).expand(channels).contiguous())
        if term.kind in ("mul", "div"):
            return ScaleShift(scale=c if term.kind == "mul" else 1 / c)
        if term.kind == "rsub":
            return ScaleShift(torch.full_like(c, -1.0), c)
        return ScaleShift(shift=c if term.kind == "add" else -c)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is 0."""
    return b if a is None else a if b is None else a + b


def _twice(weight: Tensor) -> Tensor:
    """Weights [O, C, h, w] for an image in two halves: the same for both, [O, P, h, w], zeros up to a multiple P of 8."""
    out, channels, *kernel = weight.shape
    shape = out, -(-2 * channels // 8) * 8, *kernel
    wide = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=CHANNELS_LAST).zero_()
    wide[:, :channels] = weight
    wide[:, channels : 2 * channels] = weight
    return wide

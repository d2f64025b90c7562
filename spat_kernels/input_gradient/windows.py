"""Logits of images that differ from known ones inside a square only: what the square does not reach is not computed again.

Behind a k x k convolution a square of side s reaches s + k - 1 pixels. The values of the known images (the base) are kept, and
for a variant each step of the plan computes the window that its inputs' windows reach, with what is around them read from the
base. From the first step on that is not known to be local (a dense layer, the mean over all pixels) values are computed whole.

Rows and columns go their ways independently: the way of an interval of pixels through the steps is found once. Windows of one
side have one shape wherever they are: one that would stick out of the image is moved inside, since oneDNN takes about 1 ms to
prepare for a new shape. Samples are filled up to multiples of 8 for the same reason.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grouping import made
from .planned_gradient import FORWARD, PlannedGradient
from .steps import Cat, Conv, FusedConv, Index, Linear, Local, Pointwise, Pool, Step
from .weights import ConvWeights

MULTIPLE = 8
ELEMENTWISE = (nn.Softplus, nn.ELU, nn.CELU, nn.SELU, nn.Hardtanh, nn.Softsign, nn.LogSigmoid)


class Reach(NamedTuple):
    """What a local step reads: along rows and columns, in intervals [first, last)."""

    extent: Sequence[int] = (1, 1)  # of the dilated kernel
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)

    def outputs(self, axis: int, first: int, last: int, length: int) -> tuple[int, int]:
        """Those of `length` outputs that read the interval, and maybe others: as many for every interval of this size."""
        extent, stride = self.extent[axis], self.stride[axis]
        count = min((last - first + extent - 2) // stride + 1, length)
        reached = -((extent - 1 - self.padding[axis] - first) // stride)
        start = min(max(reached, 0), length - count)
        return start, start + count

    def inputs(self, axis: int, first: int, last: int) -> tuple[int, int]:
        """What the outputs in the interval read, padding included."""
        start = first * self.stride[axis] - self.padding[axis]
        return start, start + (last - first - 1) * self.stride[axis] + self.extent[axis]


class Leg(NamedTuple):
    """How a step finds the interval that it reads of a local value."""

    read: slice  # in the whole value
    into: slice  # where in what is read the new part goes
    part: slice  # of the new part
    exact: bool  # the new part is what is read


class Way(NamedTuple):
    """One step, seen along one axis."""

    legs: list[Leg | None]  # for each input; None: it is computed whole
    padding: tuple[int, int]  # zeros that a convolution reads before and behind
    out: slice | None  # what it computes; None: all


def _reach(step: Step, bound) -> Reach | None:
    """None: `step` may read everything everywhere."""
    if isinstance(step, Conv):
        c = step.conv
        extent = [(k - 1) * d + 1 for k, d in zip(bound.weight.shape[2:], c["dilation"], strict=True)]
        return Reach(extent, c["stride"], c["padding"])
    if isinstance(step, Pointwise):
        return Reach() if len(step.shape) == 3 and step.of_images else None
    if isinstance(step, (Cat, Index)):
        return Reach() if step.of_channels else None
    if isinstance(step, Local):
        return Reach() if type(step.function) in ELEMENTWISE else None
    if not isinstance(step, Pool):
        return None
    pool = step.pool
    if isinstance(pool, (nn.MaxPool2d, nn.AvgPool2d)):
        kernel, stride, padding, dilation = (
            (v, v) if isinstance(v, int) else tuple(v)
            for v in (pool.kernel_size, pool.stride, pool.padding, getattr(pool, "dilation", 1))
        )
        if padding == (0, 0) and dilation == (1, 1) and not pool.ceil_mode:
            return Reach(kernel, stride)
    return None


class Windows:
    """The forward of a plan on variants of images.

    Args:
        gradient: prepared, and `supports` it.

    Attributes:
        base: value of the plan -> what it is for the known images, [n, H, W, C].
    """

    def __init__(self, gradient: PlannedGradient):
        self.gradient, self.shapes = gradient, [node.shape for node in gradient.plan.nodes]
        self.steps: list[tuple[Step, Any, Reach | None]] = []  # with what is bound to them
        self.kept: set[int] = set()  # values that some step needs the surroundings of
        local = {0}
        for step, bound in zip(gradient.plan.steps, gradient.bound, strict=True):
            reach = _reach(step, bound) if local.issuperset(step.inputs) else None
            if reach:
                local.update(made(step))
            if reach != Reach() or len(step.inputs) > 1:
                self.kept |= local.intersection(step.inputs)
            if isinstance(step, Pointwise):
                step = replace(step, in_place=False)  # what it reads may be kept
            if isinstance(step, FusedConv):
                step = step.plain()
            if type(step) is Linear:
                bound = bound._replace(weight=bound.weight.t().contiguous().t())  # [40, 1568] -> [40, 512]: 1.0 ms instead of 1.5
            self.steps.append((step, bound, reach))
        self._ways: dict[tuple[int, int, int], list[Way]] = {}

    @staticmethod
    def supports(gradient) -> bool:
        """On CPUs: a GPU would wait for launches, of which there are more this way."""
        if not isinstance(gradient, PlannedGradient) or gradient.device.type != "cpu":
            return False
        return not gradient.engines.active and gradient.dtype == gradient.image_dtype and len(gradient.plan.nodes[0].shape) == 3

    @property
    def bytes_per_image(self) -> int:
        """Memory that the kept values of the base take."""
        return sum(prod(self.shapes[j]) for j in self.kept) * self.gradient.dtype.itemsize

    def share(self, side: int) -> float:
        """How many of a forward's multiplications are done again for squares of this side."""
        done = full = 0
        for (step, bound, _), rows, columns in zip(self.steps, *(self._way(a, 0, side) for a in (0, 1)), strict=True):
            if isinstance(step, (Conv, Linear)):
                pixels = prod(step.shape[1:]) if isinstance(step, Conv) else prod(step.shape[:-1])
                full += pixels * bound.weight.numel()
                done += (_length(rows.out) * _length(columns.out) if rows.out else pixels) * bound.weight.numel()
        return done / max(full, 1)

    def begin(self, images: Tensor) -> None:
        """Make `images` [n, C, H, W] the base."""
        values: list = [None] * len(self.shapes)
        values[0], self.base, self.samples = images, dict[int, Tensor](), len(images)
        for step, bound, _ in self.steps:
            values[step.out], _ = FORWARD[type(step)](self.gradient, step, bound, values, False)
            for j in step.frees:
                if j in self.kept:
                    self.base[j] = values[j].permute(0, 2, 3, 1).contiguous()
                values[j] = None

    def keep(self, samples: Tensor) -> None:
        """Forget the others. `samples` is a mask [n]."""
        self.base, self.samples = {j: value[samples] for j, value in self.base.items()}, int(samples.sum())

    def variants(self, which: Tensor, top: int, left: int, pixels: Tensor) -> Tensor:
        """Logits [m, K] of images of the base with other pixels in one window.

        Args:
            which: int64 [m], the images, ascending.
            top, left: the first pixel of the window.
            pixels: [m, C, height, width], what is in it.
        """
        count = len(which)
        filled = min(-(-count // MULTIPLE) * MULTIPLE, self.samples)
        if filled > count:
            which, pixels = (torch.cat((t, t[-1:].expand(filled - count, *t.shape[1:]))) for t in (which, pixels))
        some = which if count < self.samples else None
        ways = zip(self._way(0, top, pixels.shape[2]), self._way(1, left, pixels.shape[3]), strict=True)
        values: list = [None] * len(self.shapes)
        values[0] = pixels
        self._new: dict[int, tuple[slice, slice, Tensor]] = {}  # what `adopt` writes into the base, and where
        if 0 in self.kept:
            self._new[0] = slice(top, top + pixels.shape[2]), slice(left, left + pixels.shape[3]), pixels
        for (step, bound, reach), (rows, columns) in zip(self.steps, ways, strict=True):
            inputs = values.copy()
            for j, down, across in zip(step.inputs, rows.legs, columns.legs, strict=True):
                if down and across:
                    inputs[j] = self._surrounded(j, values[j], down, across, some)
            if reach and isinstance(step, Conv):
                step, bound = _pad(step, bound, inputs, (*columns.padding, *rows.padding))
            inputs[step.out], _ = FORWARD[type(step)](self.gradient, step, bound, inputs, False)
            for j in made(step):
                values[j] = inputs[j]
                if j in self.kept:
                    assert rows.out
                    assert columns.out
                    self._new[j] = rows.out, columns.out, values[j]
            for j in step.frees:
                values[j] = None
        return values[self.gradient.plan.last][:count]

    def adopt(self, which: Tensor, better: Tensor) -> None:
        """Make those of the last variants, of the images `which` [m], the base that are `better`, bool [m]."""
        better = better.nonzero()[:, 0]
        if len(better):
            which = which[better]
            for j, (rows, columns, value) in self._new.items():
                self.base[j][:, rows, columns][which] = value.permute(0, 2, 3, 1)[better]

    def _surrounded(self, j: int, new: Tensor, rows: Leg, columns: Leg, which: Tensor | None) -> Tensor:
        """What a step reads of value j: `new` in its window, the base around it."""
        if rows.exact and columns.exact:
            return new
        base = self.base[j][:, rows.read, columns.read]
        out = base.clone() if which is None else base[which]
        out[:, rows.into, columns.into] = new.permute(0, 2, 3, 1)[:, rows.part, columns.part]
        return out.permute(0, 3, 1, 2)

    def _way(self, axis: int, first: int, size: int) -> list[Way]:
        key = axis, first, size
        if key not in self._ways:
            self._ways[key] = self._find_way(axis, first, first + size)
        return self._ways[key]

    def _find_way(self, axis: int, first: int, last: int) -> list[Way]:
        """The steps for an interval of the image that is new."""
        new, ways = {0: (first, last)}, []  # local value -> what is new of it
        for step, _, reach in self.steps:
            out, padding, wanted = None, (0, 0), {j: (0, self.shapes[j][1 + axis]) for j in step.inputs if j in new}
            if reach:
                ends = [new[j] for j in step.inputs]
                out = reach.outputs(axis, min(e[0] for e in ends), max(e[1] for e in ends), step.shape[1 + axis])
                first, last = reach.inputs(axis, *out)
                length = self.shapes[step.inputs[0]][1 + axis]
                padding = max(-first, 0), max(last - length, 0)
                wanted = dict.fromkeys(wanted, (max(first, 0), min(last, length)))
                new |= dict.fromkeys(made(step), out)
            legs = [_leg(new[j], wanted[j]) if j in wanted else None for j in step.inputs]
            ways.append(Way(legs, padding, out and slice(*out)))
        return ways


def _leg(new: tuple[int, int], wanted: tuple[int, int]) -> Leg:
    first = max(new[0], wanted[0])
    last = max(first, min(new[1], wanted[1]))  # nothing, where strides step over the new part
    into, part = slice(first - wanted[0], last - wanted[0]), slice(first - new[0], last - new[0])
    return Leg(slice(*wanted), into, part, new == wanted)


def _length(interval: slice) -> int:
    return interval.stop - interval.start


def _pad(step: Conv, bound: ConvWeights, inputs: list[Tensor], padding: tuple[int, ...]) -> tuple[Conv, ConvWeights]:
    """The step that convolves without padding, after normalising and padding what it reads in `inputs`."""
    (j,) = step.inputs
    scale, shift = (None if v is None else v.view(-1, 1, 1) for v in (bound.scale, bound.shift))
    inputs[j] = inputs[j] if scale is None else inputs[j] * scale
    inputs[j] = inputs[j] if shift is None else inputs[j] + shift
    inputs[j] = F.pad(inputs[j], padding) if any(padding) else inputs[j]
    return replace(step, conv={**step.conv, "padding": [0, 0]}), bound._replace(scale=None, shift=None, winograd=None)

"""Square Attack (Andriushchenko et al., arXiv 1912.00049), as in AutoAttack (arXiv 2003.01690): random search, no gradient.

A query sets a random square of the image to a new perturbation, and keeps it where the margin z_y - max_{k != y} z_k falls. The
squares get smaller in the course of the run. All samples of a batch see the same squares. On CPUs a plan computes what small ones
reach, and no more (windows.py).

    L-infinity: x +- eps, one random sign for each channel of the square; vertical stripes of such signs at the start
    L2, L1:     a square loses its perturbation, and another one gains it, in the shape of a centred bump (`_bump`)
"""

import math
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..balls import box, project_l1
from ..input_gradient.windows import Windows
from ..ops._common import acc_dtype, broadcast
from ..predictions import predictions
from ..rng import draw
from ..settings import Norm
from ._common import RestartedAttack, Result, Tally, all_or_nothing, eps_per_sample

# (from this query of 10,000 on, p_init / that): the schedule of the authors' code.
SCHEDULE = ((0, 1), (11, 2), (51, 4), (201, 8), (501, 16), (1001, 32), (2001, 64), (4001, 128), (6001, 256), (8001, 512))
# Number of queries after which samples drop out on devices that must be waited for, and whose random numbers bumps draw at once.
BLOCK = 50
CHUNK = 64  # images in a forward on CPUs: more do not make one faster
# Windows have overheads: they are for squares for which they multiply at most this share of what whole forwards do. The samples
# then go through their queries in parts of at most PART images and PART_BYTES of values kept. On one core, a query of one image
# takes 153 us in whole forwards (mnist-cnn/8), in windows 225, 151, 122, 105 us in parts of 32, 64, 128, 256.
WINDOWS_SHARE, PART, PART_BYTES = 0.7, 256, 2**29


@dataclass(eq=False, kw_only=True)
class Square(RestartedAttack):
    """Square Attack as a reusable object: `attack = Square(8/255)`, then `attack(model, x, y)`.

    Args:
        queries: proposals in each run, >= 0, after one query of where it starts.
        restarts: runs, each on the samples that the ones before have not broken.
        p_init: share of the image that the first squares cover, in (0, 1].
        rescale: whether the schedule by which squares get smaller, which was made for 10,000 queries, is stretched to `queries`.
        eps, norm, bounds, precision, input_gradient, fuse, bn_mode, budget: as for `PGD`. No gradient is computed:
            input_gradient="plan" is the plan's forward, "autograd" calls the model itself. In mode "train" a sample's result
            depends on the others left.
        generator: source of all random numbers, on any device; None is torch's default one of x's device.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.
    """

    queries: int = 5000
    p_init: float = 0.8
    rescale: bool = True

    def __post_init__(self):
        super().__post_init__()
        checks.check_flag("rescale", self.rescale)
        checks.check_count("queries", self.queries, 0)
        checks.check_number("p_init", self.p_init, lambda v: 0 < v <= 1, "in (0, 1], the share of the image that a square covers")

    def __call__(self, model, x: Tensor, y: Tensor) -> Tensor:
        """`run`, of which the images alone are returned."""
        return self.run(model, x, y).x_adv

    @all_or_nothing
    def run(self, model, x: Tensor, y: Tensor) -> Result:
        """Attack `model` at the images `x`.

        The model (modes, statistics), x and y are afterwards as they were, also when the model raises. Works in any grad mode and
        under autocast.

        Args:
            model: module or callable, x -> logits [B, K].
            x: images [B, C, H, W] inside `bounds` in fp32, fp16, bf16 or fp64; for L2 and L1 of at least 5x5 pixels.
            y: int64 [B], the true labels.

        Returns:
            Result: images with x's shape, dtype, device and memory format, inside the ball (to one rounding of x's dtype) and
            exactly inside `bounds`: misclassified ones; x itself where none was found, or where x is misclassified as it is;
            and what each cost.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.
        """
        highest_label, tally = self._check_batch(model, x, y), Tally(x, self.budget)
        check_pixels(x, self.norm)
        if x.numel() == 0:
            return tally.result(x.detach().clone())
        with self._prepared_gradient(model, x, y, highest_label) as (gradient, x, y):
            x_adv, eps = x.clone(), eps_per_sample(self.eps, x)
            robust = predictions(gradient.logits(x)) == y
            tally.add(slice(None), 1)
            for _ in range(self.restarts):
                index = robust.nonzero()[:, 0]
                index = index[~tally.spent(index)]
                if len(index):
                    RUNS[self.norm](self, gradient, x, y, eps, index, tally)(x_adv, robust)
        return tally.result(x_adv)


def check_pixels(x: Tensor, norm: str, remedy: str = "") -> None:
    """That x is what Square takes."""
    least = 1 if norm == "linf" else 5
    if x.ndim != 4 or (x.numel() > 0 and min(x.shape[2:]) < least):
        raise ValueError(
            f"x must be images [B, C, H, W] of at least {least}x{least} pixels for norm={norm!r}, "
            f"got shape {list(x.shape)}{remedy and ': ' + remedy}"
        )


class _Run:
    """One run on samples of a batch.

    Attributes:
        index: [n], where in the batch the samples are that are left.
        best: [n, C, H, W], their images with the smallest margins so far, [n], `margin`.
    """

    per_sample: tuple[str, ...] = ("index", "x", "y", "eps", "best", "margin")
    windows: Windows | None = None

    def __init__(self, settings: Square, gradient, x: Tensor, y: Tensor, eps: Tensor, index: Tensor, tally: Tally):
        self.settings, self.gradient, self.batch = settings, gradient, x.shape
        self.bounds = box(settings.bounds, x.dtype)
        self.index, self.tally = index, tally
        self.x, self.y, self.eps = x[self.index], y[self.index], broadcast(eps[self.index], x)
        self.waits = x.device.type != "cpu"
        self.best = self._start()
        self.margin = self._margins(self._whole_forward(self.best), self.y)
        tally.add(index, 1)

    def __call__(self, x_adv: Tensor, robust: Tensor) -> None:
        """Write what the run breaks into `x_adv`, and out of `robust`."""
        self._search(0, self.settings.queries, x_adv, robust)

    def _search(self, first: int, last: int, x_adv: Tensor, robust: Tensor) -> None:
        for i in range(first, last):
            if i % BLOCK == 0 or not self.waits or self.tally.limit is not None:
                self._drop_broken(x_adv, robust)
            if len(self.index) == 0:
                return
            self._query(i)
        self._drop_broken(x_adv, robust)

    def _start(self) -> Tensor:
        """The first images."""
        raise NotImplementedError

    def _query(self, i: int) -> None:
        """Query number i."""
        raise NotImplementedError

    def _uniform(self, *size: int) -> Tensor:
        return draw("uniform_", *size, dtype=acc_dtype(self.x.dtype), device=self.x.device, generator=self.settings.generator)

    def _signs(self, *size: int) -> Tensor:
        return torch.where(self._uniform(*size) < 0.5, -1.0, 1.0)

    def _side(self, i: int, least: int = 1) -> int:
        """The side of the square of query i, unless the image is smaller."""
        rescaled = int(i / self.settings.queries * 10_000) if self.settings.rescale else i
        divisor = [d for first, d in SCHEDULE if rescaled >= first][-1]
        return max(round(math.sqrt(self.settings.p_init / divisor * self.batch[2] * self.batch[3])), least)

    def _square(self, side: int, place: list[float]) -> tuple[int, int, tuple]:
        """Where a square begins, and its index in images, from two numbers in [0, 1).

        As published, it never reaches the last row and column, unless it fills them.
        """
        top, left = (int(p * (length - side)) for p, length in zip(place, self.batch[2:], strict=True))
        return top, left, (..., slice(top, top + side), slice(left, left + side))

    def _whole_forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return torch.cat([self.gradient.logits(c) for c in images.split(len(images) if self.waits else CHUNK)])

    def _margins(self, logits: Tensor, y: Tensor) -> Tensor:
        """z_y - max_{k != y} z_k [n], below 0 where misclassified; NaN where a logit is, which is no prediction."""
        y = y[:, None]
        own, other = logits.gather(1, y), logits.scatter(1, y, -torch.inf).amax(1, keepdim=True)
        return (own - other).masked_fill_(own == other, 0)[:, 0]  # also where both are infinite

    def _better(self, margin: Tensor, which=slice(None)) -> Tensor:
        """Where proposals are taken. What is broken stays as it is until it is dropped, so that devices agree."""
        old = self.margin[which]
        return ~(margin >= old) & (old >= 0)  # a NaN is better

    def _drop_broken(self, x_adv: Tensor, robust: Tensor) -> None:
        broken = ~(self.margin >= 0)
        leaves = broken | self.tally.spent(self.index)
        if leaves.any():
            x_adv[self.index[broken]] = self.best[broken]
            robust[self.index[broken]] = False
            self._take(~leaves)
            if self.windows:
                self.windows.keep(~leaves)

    def _take(self, samples: Tensor) -> None:
        for name in self.per_sample:
            setattr(self, name, getattr(self, name)[samples])


class _LinfRun(_Run):
    """x +- eps, one random sign for each channel of a square.

    Many late proposals leave an image as it is, half of those of one pixel on grey images: on CPUs they are not asked.
    """

    per_sample = (*_Run.per_sample, "lower", "upper")

    def __call__(self, x_adv, robust):
        queries = self.settings.queries
        self.places, self.signs = self._uniform(queries, 2).tolist(), self._signs(queries, self.batch[1], 1, 1)
        windows, first = None, queries
        if Windows.supports(self.gradient):
            windows = Windows(self.gradient)
            pays = {side: windows.share(side) <= WINDOWS_SHARE for side in set(map(self._side, range(queries)))}
            first = next((i for i in range(queries) if pays[self._side(i)]), queries)
        self._search(0, first, x_adv, robust)
        if first == queries or len(self.index) == 0:
            return
        assert windows is not None
        size = max(min(PART, PART_BYTES // windows.bytes_per_image), 1)
        for samples in torch.arange(len(self.index)).split(size):
            part = copy(self)
            part._take(samples)
            part.windows = windows
            windows.begin(part.best)
            part._search(first, queries, x_adv, robust)

    def _start(self):
        x, (b, c, _, w) = self.x.to(self.eps.dtype), self.batch
        self.lower, self.upper = ((x + side * self.eps).clamp(*self.bounds).to(self.x.dtype) for side in (-1, 1))
        return torch.where(self._signs(b, c, 1, w)[self.index] < 0, self.lower, self.upper)  # vertical stripes

    def _side(self, i, least=1):
        return min(super()._side(i, least), *self.batch[2:])

    def _query(self, i):
        top, left, at = self._square(self._side(i), self.places[i])
        old = self.best[at]
        new = torch.where(self.signs[i] < 0, self.lower[at], self.upper[at])
        which: Any = slice(None)
        if not self.waits:
            which = (new != old).flatten(1).any(1).nonzero()[:, 0]
            if len(which) == 0:
                return
            new = new[which]
        if self.windows:
            logits = self.windows.variants(which, top, left, new)
        else:
            images = self.best[which].clone()
            images[at] = new
            logits = self._whole_forward(images)
        self.tally.add(self.index if self.waits else self.index[which], 1)
        margin = self._margins(logits, self.y[which])
        better = self._better(margin, which)
        self.margin[which] = torch.where(better, margin, self.margin[which])
        old[which] = torch.where(broadcast(better, new), new, old[which])
        if self.windows:
            self.windows.adopt(which, better)


class _BumpRun(_Run):
    """A square loses its perturbation, and another one gains it, in the shape of a bump; at the start a grid of bumps.

    Attributes:
        p: of the norm, 1 or 2.
        fall: how fast bumps fall, as `_hill` has it.
    """

    p: int
    fall: int

    def __init__(self, *args):
        self.bumps: dict[int, Tensor] = {}
        super().__init__(*args)

    def _start(self):
        b, c, height, width = self.batch
        side = min(height, width) // 5
        rows, columns = height // side, width // side
        top, left = (height - rows * side) // 2, (width - columns * side) // 2
        turns = self._uniform(rows, columns).tolist()
        signs = self._signs(rows, columns, b, c, 1, 1)[:, :, self.index]
        delta = torch.zeros_like(self.x, dtype=self.eps.dtype)
        for i in range(rows):
            for j in range(columns):
                at = ..., slice(top + i * side, top + (i + 1) * side), slice(left + j * side, left + (j + 1) * side)
                delta[at] = self._bump(side, turns[i][j]) * signs[i, j]
        return self._images(delta)

    def _side(self, i, least=3):
        side, largest = super()._side(i, least), min(self.batch[2:])
        return min(side + (side % 2 == 0), largest - (largest % 2 == 0))

    def _query(self, i):
        if i % BLOCK == 0:
            queries = min(BLOCK, self.settings.queries - i)
            self.places, self.signs = self._uniform(queries, 5).tolist(), self._signs(queries, *self.batch[:2], 1, 1)
        side, place, signs = self._side(i), self.places[i % BLOCK], self.signs[i % BLOCK]
        (*_, gains), (*_, loses) = (self._square(side, p) for p in (place[:2], place[2:4]))
        delta = self.best.to(self.eps.dtype) - self.x
        outside = delta.clone()
        outside[gains] = outside[loses] = 0
        new = self._bump(side, place[4]) * signs[self.index] + delta[gains] / (self._norm(delta[gains], (2, 3)) + 1e-12)
        outside[gains] = new / (self._norm(new, (2, 3)) + 1e-12) * self._budget(delta, delta - outside)
        images = self._images(outside)
        self.tally.add(self.index, 1)
        margin = self._margins(self._whole_forward(images), self.y)
        better = self._better(margin)
        self.margin = torch.where(better, margin, self.margin)
        self.best = torch.where(broadcast(better, images), images, self.best)

    def _images(self, delta: Tensor) -> Tensor:
        """x with this perturbation, brought to length eps."""
        raise NotImplementedError

    def _budget(self, delta: Tensor, within: Tensor) -> Tensor:
        """The length that each channel of the new square gets, from the perturbation and its part `within` both squares."""
        raise NotImplementedError

    def _norm(self, v: Tensor, dims=(1, 2, 3)) -> Tensor:
        return torch.linalg.vector_norm(v, self.p, dims, keepdim=True)

    def _bump(self, side: int, turn: float) -> Tensor:
        """[side, side] of length 1: a positive and a negative half, each highest in its middle; turned by `turn` >= 0.5."""
        if side not in self.bumps:
            bump = torch.cat((self._hill(side // 2, side), -self._hill(side - side // 2, side)))
            self.bumps[side] = (bump / torch.linalg.vector_norm(bump, self.p)).to(self.x.device, self.eps.dtype)
        return self.bumps[side] if turn < 0.5 else self.bumps[side].T

    def _hill(self, height: int, width: int) -> Tensor:
        """[height, width] of length 1: the sum of rectangles growing around the middle, of heights 1, 1/2^fall, 1/3^fall, ..."""
        hill = torch.zeros(height, width, dtype=torch.float64)
        top, left = height // 2, width // 2
        for i in range(max(top, left) + 1):
            hill[max(top - i, 0) : top + i + 1, max(left - i, 0) : left + i + 1] += 1 / (i + 1) ** self.fall
        return hill / torch.linalg.vector_norm(hill, self.p).clamp_min(torch.finfo(hill.dtype).tiny)


class _L2Run(_BumpRun):
    p, fall = 2, 2

    def _images(self, delta):
        return (self.x + delta / (self._norm(delta) + 1e-12) * self.eps).clamp(*self.bounds).to(self.x.dtype)

    def _budget(self, delta, within):
        return ((self.eps**2 - self._norm(delta) ** 2).clamp_min(0) / self.batch[1] + self._norm(within) ** 2).sqrt()


class _L1Run(_BumpRun):
    """As in the authors' code, a channel is given as much as if all were like it. The projection takes back what is over."""

    p, fall = 1, 4

    def _images(self, delta):
        x, delta = (t.double().flatten(1) for t in (self.x, delta))
        points = project_l1(x + delta, x, self.eps.double().flatten(1), *self.bounds)
        return points.view(self.x.shape).to(self.x.dtype)

    def _budget(self, delta, within):
        return (self.eps - self._norm(delta)).clamp_min(0) + self.batch[1] * self._norm(within, (2, 3))


RUNS: dict[Norm, type[_Run]] = {"linf": _LinfRun, "l2": _L2Run, "l1": _L1Run}

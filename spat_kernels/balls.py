"""The sets that an attack stays in: a ball around each clean image, cut by the box of valid values."""

import math
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .ops._common import acc_dtype, broadcast, same_layout
from .rng import draw
from .settings import Norm

SPARSITY = 0.01  # share of the coordinates that a step in L1 moves along, as published for SLIDE; APGD chooses its own
ROUNDING = 1e-12  # relative differences that are none in sums of fp64


class Ball:
    """Where the iterates of one batch may go, and how they step.

    Args:
        x: clean images [B, ...], contiguous or channels_last; kept, not copied.
        eps, step_size: numbers, or tensors of one value or [B].
        bounds: (lo, hi), as `box` gives them for x's dtype.

    Attributes:
        nan_seen: uint8 [B], 1 for samples that met a gradient that is NaN (L2: or infinite).
    """

    per_sample: tuple[str, ...] = ("x", "eps", "step_size", "nan_seen")

    def __init__(self, x: Tensor, eps: float | Tensor, step_size: float | Tensor, bounds: tuple[float, float]):
        self.x, self.bounds = x, bounds
        self.eps, self.step_size = as_values(eps, x), as_values(step_size, x)
        self.nan_seen = torch.zeros(len(x), dtype=torch.uint8, device=x.device)

    def draw(self, generator: torch.Generator | None, samples: int) -> tuple[Tensor, ...]:
        """The random numbers of `random_start_`: those of a batch of `samples`, first in every tensor."""
        raise NotImplementedError

    def random_start_(self, x_adv: Tensor, draws: tuple[Tensor, ...]) -> None:
        """Write uniform random points of the ball, clamped to the box: a function of `draws`."""
        raise NotImplementedError

    def surface_start_(self, x_adv: Tensor, draws: tuple[Tensor, ...]) -> None:
        """Write random points of the surface of the ball, clamped to the box: a function of `draws`."""
        raise NotImplementedError

    def step_(self, x_adv: Tensor, grad: Tensor, step_size: Tensor | None = None) -> None:
        """Step `x_adv` up the gradient, in place, and project. `step_size` [1] or [B] instead of the ball's own."""
        self._move_(x_adv, self.laid_out(grad), self.step_size if step_size is None else step_size)

    def hashed_step_(self, x_adv: Tensor, grad: Tensor, hash: Tensor) -> None:
        """`step_`, and add the hashes of the iterates to `hash`, int64 [B]."""
        raise NotImplementedError

    def laid_out(self, grad: Tensor) -> Tensor:
        """`grad` with the strides of the images, as the kernels need it."""
        return grad if same_layout(grad, self.x) else torch.empty_like(self.x, dtype=grad.dtype).copy_(grad)

    def around(self, x: Tensor) -> "Ball":
        """The same ball with its images in another memory format: `x`. Radii, step sizes and flags are shared."""
        ball = copy(self)
        ball.x = x
        return ball

    def part(self, rows: Tensor) -> "Ball":
        """The ball of the samples `rows`, int64 [n], with tensors of its own."""
        part, samples = copy(self), len(self.x)
        for name in self.per_sample:
            values = getattr(self, name)
            setattr(part, name, values[rows] if len(values) == samples else values)
        return part

    def _move_(self, x_adv: Tensor, grad: Tensor, step_size: Tensor) -> None:
        raise NotImplementedError

    def project_(self, x_adv: Tensor) -> None:
        """Project `x_adv`, in place: a step of length 0."""
        self._move_(x_adv, torch.zeros_like(x_adv), torch.zeros_like(self.eps))


class LinfBall(Ball):
    def draw(self, generator, samples):
        return (draw("random_", 2, dtype=torch.int64, device=self.x.device, generator=generator),)

    def random_start_(self, x_adv, draws):
        (seed,) = draws
        ops.linf_random_start_(x_adv, self.x, self.eps, seed, *self.bounds)

    def surface_start_(self, x_adv, draws):
        """Uniform noise, scaled for each sample to a largest element of eps."""
        (seed,), noise = draws, torch.empty_like(self.x, dtype=self.eps.dtype)
        ops.linf_random_start_(noise, torch.zeros_like(noise), torch.ones_like(self.eps), seed, -1.0, 1.0)
        noise *= broadcast(self.eps / noise.abs().flatten(1).amax(1), noise)
        x_adv.copy_((self.x + noise).clamp_(*self.bounds))

    def _move_(self, x_adv, grad, step_size):
        ops.linf_step_(x_adv, self.x, grad, self.eps, step_size, *self.bounds, self.nan_seen)

    def hashed_step_(self, x_adv, grad, hash):
        ops.linf_step_(x_adv, self.x, self.laid_out(grad), self.eps, self.step_size, *self.bounds, self.nan_seen, hash)


class L2Ball(Ball):
    def draw(self, generator, samples):
        like: Any = {"dtype": self.eps.dtype, "device": self.x.device, "generator": generator}
        return draw("normal_", samples, *self.x.shape[1:], **like), draw("uniform_", samples, **like)

    def random_start_(self, x_adv, draws):
        """Uniform in the ball: one step of length eps * U^(1/n) in a uniformly random direction."""
        self._throw_(x_adv, draws, self.eps * draws[1] ** (1 / self.x[0].numel()))

    def surface_start_(self, x_adv, draws):
        self._throw_(x_adv, draws, self.eps)

    def _throw_(self, x_adv, draws, length):
        x_adv.copy_(self.x)
        self._move_(x_adv, torch.empty_like(self.x, dtype=self.eps.dtype).copy_(draws[0]), length)

    def _move_(self, x_adv, grad, step_size):
        ops.l2_step_(x_adv, self.x, grad, self.eps, step_size, *self.bounds, self.nan_seen)


class L1Ball(Ball):
    """Steps go along the coordinates with the largest gradients, equally far along each, and end at the nearest point of ball
    and box (SLIDE: Tramèr and Boneh, arXiv 1904.13000; projection: Croce and Hein, arXiv 2103.01208).

    Attributes:
        kept: int64 [1] or [B], along how many coordinates a step goes: more where gradients are equal, fewer where they are 0.
        skips_sides: whether coordinates at the side of the box to which their gradient points are left out, so that no part of a
            step is lost on them.
    """

    per_sample = (*Ball.per_sample, "kept")

    def __init__(self, x, eps, step_size, bounds):
        super().__init__(x, eps, step_size, bounds)
        kept = max(round(SPARSITY * math.prod(x.shape[1:])), 1)
        self.kept = torch.full((1,), kept, dtype=torch.int64, device=x.device)
        self.skips_sides = True

    def draw(self, generator, samples):
        like: Any = {"dtype": self.eps.dtype, "device": self.x.device, "generator": generator}
        shape = samples, *self.x.shape[1:]
        return draw("normal_", *shape, **like), draw("exponential_", *shape, **like), draw("exponential_", samples, **like)

    def random_start_(self, x_adv, draws):
        """Uniform in the ball: n of n + 1 exponentials that are scaled to the sum eps, with random signs."""
        normal, exponential, other = draws
        total = exponential.flatten(1).sum(1) + other
        x_adv.copy_((self.x + exponential * normal.sign() * broadcast(self.eps / total, normal)).clamp_(*self.bounds))

    def surface_start_(self, x_adv, draws):
        """Normal noise, projected: as in the authors' code, a few large elements."""
        self._put_(x_adv, self.x.double() + draws[0])

    def _move_(self, x_adv, grad, step_size):
        self._put_(x_adv, x_adv.double() + self._direction(x_adv, grad) * broadcast(step_size, x_adv))

    def _direction(self, x_adv: Tensor, grad: Tensor) -> Tensor:
        """Signs of the largest elements of each sample's gradient, scaled to the L1 norm 1, fp64."""
        g, (lo, hi) = grad.flatten(1), self.bounds
        unusable = g.isnan()
        self.nan_seen |= unusable.any(1)
        if self.skips_sides:
            points = x_adv.flatten(1)
            unusable |= torch.where(g > 0, points >= hi, points <= lo)
        g = g.masked_fill(unusable, 0)
        least = g.abs().sort(1, descending=True).values.gather(1, (self.kept - 1).expand(len(g))[:, None])
        signs = torch.where(g.abs() >= least, g.sign(), 0).double()
        return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).view(grad.shape)

    def _put_(self, x_adv: Tensor, points: Tensor) -> None:
        """Write the nearest points of ball and box to `points`, fp64 [B, ...]."""
        x, eps = self.x.double().flatten(1), self.eps.double()[:, None]
        x_adv.copy_(project_l1(points.flatten(1), x, eps, *self.bounds).view(self.x.shape))


def project_l1(points: Tensor, x: Tensor, eps: Tensor, lo: float, hi: float) -> Tensor:
    """The nearest points of L1 ball and box at once, not of one after the other (Croce and Hein, arXiv 2103.01208, Prop. 2.1).

    With d = points - x, and room r_i to the side of the box that d_i points to, coordinate i goes to
    x_i + sign(d_i) min(max(|d_i| - t, 0), r_i). The distance from x falls with t, and bends where a coordinate leaves its side,
    |d_i| - r_i, or comes to rest, |d_i|. Those are sorted, and t is found between two of them, summing up from the largest on.

    Args:
        points: [B, n], finite. x: [B, n] inside the box. Both best in fp64, since the bends are summed up.
        eps: [1, 1] or [B, 1], radii.
        lo, hi: the box.

    Returns:
        Tensor: [B, n]; points inside ball and box are returned as they are.
    """
    moved = points - x
    size, room = moved.abs(), torch.where(moved > 0, hi - x, x - lo)
    bends, order = torch.cat((size, (size - room).clamp_min(0)), 1).sort(1, descending=True)
    free = torch.where(order < size.shape[1], 1, -1).cumsum(1)  # coordinates between rest and a side, below each bend
    gained = free[:, :-1] * -bends.diff(dim=1)
    distance = F.pad(gained.cumsum(1), (1, 0))  # at each bend
    last = (distance <= eps).sum(1, keepdim=True) - 1
    t = bends.gather(1, last) - (eps - distance.gather(1, last)) / free.gather(1, last).clamp_min(1)
    fits = torch.minimum(size, room).sum(1, keepdim=True) <= eps
    left = torch.where(size - t > ROUNDING * size, size - t, 0)  # ties come to rest: what has moved is counted
    nearest = x + moved.sign() * torch.minimum(left, room)
    return torch.where(fits, points, nearest).clamp(lo, hi)


def as_values(value: float | Tensor, x: Tensor) -> Tensor:
    """A number or a tensor as [1] or [B], on x's device and in the dtype that arithmetic on the images `x` is done in."""
    size = value.numel() if isinstance(value, Tensor) else 1
    return fill_(torch.empty(size, dtype=acc_dtype(x.dtype), device=x.device), value)


def fill_(values: Tensor, value: float | Tensor) -> Tensor:
    """Write a number, or a tensor of up to N values, into `values` [N]. A number does not wait for the device."""
    if isinstance(value, Tensor):
        values[: value.numel()].copy_(value.detach().reshape(-1))
        return values
    return values.fill_(float(value))


BALLS: dict[Norm, type[Ball]] = {"linf": LinfBall, "l2": L2Ball, "l1": L1Ball}


def box(bounds: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """`bounds` rounded to `dtype`, so that a result clamped to them is inside exactly."""
    lo, hi = torch.tensor(bounds, dtype=torch.float64).to(dtype).tolist()
    return lo, hi

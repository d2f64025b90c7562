"""The sets that an attack stays in: a ball around each clean image, cut by the box of valid values."""

from copy import copy
from typing import Any

import torch
from torch import Tensor

from . import ops
from .ops._common import acc_dtype, broadcast, same_layout
from .rng import draw
from .settings import Norm


class Ball:
    """Where the iterates of one batch may go, and how they step.

    Args:
        x: clean images [B, ...], contiguous or channels_last; kept, not copied.
        eps, step_size: numbers, or tensors of one value or [B].
        bounds: (lo, hi), as `box` gives them for x's dtype.

    Attributes:
        nan_seen: uint8 [B], 1 for samples that met a gradient that is NaN (L2: or infinite).
    """

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
        for name in ("x", "eps", "step_size", "nan_seen"):
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


def as_values(value: float | Tensor, x: Tensor) -> Tensor:
    """A number or a tensor as [1] or [B], on x's device and in the dtype that arithmetic on the images `x` is done in."""
    size = value.numel() if isinstance(value, Tensor) else 1
    return fill_(torch.empty(size, dtype=acc_dtype(x.dtype), device=x.device), value)


def fill_(values: Tensor, value: float | Tensor) -> Tensor:
    """Write a number, or a tensor of up to N values, into `values` [N]. A number does not wait for the device."""
    if isinstance(value, Tensor):
        values[: value.numel()].copy_(value.detach().reshape(-1))
        return values
    return values.fill_(value)


BALLS: dict[Norm, type[Ball]] = {"linf": LinfBall, "l2": L2Ball}


def box(bounds: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """`bounds` rounded to `dtype`, so that a result clamped to them is inside exactly."""
    lo, hi = torch.tensor(bounds, dtype=torch.float64).to(dtype).tolist()
    return lo, hi

"""APGD in L1: sparse steps, whose sparsity follows the perturbation (Croce and Hein, arXiv 2103.01208).

    x_{t+1} = project(x_t + step_size * s / |s|_1)      s: the signs of the k largest elements of the gradient

There is no momentum. A step size starts at eps, and k at a fifth of the elements. At checkpoints, every 4 % of the steps, k
becomes two thirds of the number of elements in which the best point differs from x. If that number has fallen by more than 5 %,
the step size is eps again and the run continues from its best point; else the step size falls by a third, down to eps / 10.

AutoAttack searches in larger balls first: radii of 3, 2 and 1 eps, with 30, 30 and 40 % of the steps. Each search
starts at the best point of the one before, projected, and k and the number of elements are those of its start.
"""

from copy import copy
from math import ceil

import torch
from torch import Tensor

from ..balls import Ball, L1Ball
from ..ops._common import broadcast

PERIOD = 0.04  # between checkpoints, as a share of the steps
FIRST_KEPT = 0.2
SHORTER, SHORTEST = 1.5, 10.0  # a step size is divided by the one, until it is eps over the other
FEWER = 19, 20  # less than this share of the elements are new ones


def checkpoints(steps: int) -> dict[int, int]:
    """The steps after which step sizes and sparsity are adapted, each with the length of the period that ends there."""
    length = max(int(PERIOD * steps), 1)
    return dict.fromkeys(range(length, steps, length), length)


def larger_first(steps: int) -> list[tuple[int, int]]:
    """(Radius in units of eps, steps) of the searches, in their order. The last one, in the ball itself, has a step at least."""
    each = min(ceil(0.3 * steps), (steps - 1) // 2)
    return [(3, each), (2, each), (1, steps - 2 * each)] if each else [(1, steps)]


def enlarged(ball: Ball, times: int) -> Ball:
    """The ball of that many times the radius. Images and flags are shared."""
    larger = copy(ball)
    larger.eps = ball.eps * times
    return larger


class SparseSteps:
    """The steps and checkpoints of a search in L1. What else a search is, and its attributes, is in apgd_run.py."""

    ball: Ball
    x_adv: Tensor
    grad: Tensor
    best: Tensor
    best_grad: Tensor
    broken: Tensor
    done: Tensor
    changed: Tensor  # int64 [n], in how many elements the best point differed from x, at the last checkpoint

    checkpoints = staticmethod(checkpoints)

    def begin(self, adapt: bool) -> None:
        """Step size and sparsity of the first steps. `adapt` takes the sparsity from the start."""
        n, size = len(self.ball.x), self.ball.x[0].numel()
        self.ball.step_size = self.ball.eps.expand(n).clone()
        self.changed = torch.full_like(self.broken, size, dtype=torch.int64)
        self._keep(torch.full_like(self.changed, size - int((1 - FIRST_KEPT) * size)))
        if adapt:
            self.changed = self._changed(self.x_adv)
            self._keep(self._fewer(self.changed))

    def step(self) -> None:
        self.x_adv = self.x_adv.clone()
        self.ball.step_(self.x_adv, self.grad)

    def check(self, few: float) -> None:
        """At a checkpoint. `few`, as in apgd_run.py, does not count in L1."""
        changed, ball = self._changed(self.best), self.ball
        sparser = FEWER[1] * changed < FEWER[0] * self.changed
        ball.step_size = torch.where(sparser, ball.eps, torch.maximum(ball.step_size / SHORTER, ball.eps / SHORTEST))
        self.x_adv, self.grad = (
            torch.where(broadcast(sparser, now), best, now)
            for best, now in ((self.best, self.x_adv), (self.best_grad, self.grad))
        )
        self._keep(self._fewer(changed))
        self.changed, self.done = changed, self.done | self.broken

    def _changed(self, points: Tensor) -> Tensor:
        return (points != self.ball.x).flatten(1).sum(1)

    @staticmethod
    def _fewer(changed: Tensor) -> Tensor:
        """Two thirds, rounded up."""
        return (2 * changed + 2) // 3

    def _keep(self, kept: Tensor) -> None:
        assert isinstance(self.ball, L1Ball)
        self.ball.kept, self.ball.skips_sides = kept.clamp_min(1), False

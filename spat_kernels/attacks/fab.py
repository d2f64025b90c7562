"""FAB: the fast adaptive boundary attack (Croce and Hein, arXiv 1907.02044), as in AutoAttack (arXiv 2003.01690).

It looks for the nearest misclassified image. With f_k = z_k - z_y, zero on the boundary to class k, each step linearises f at x_t
and goes to the nearest of its zeros, a hyperplane, with a bias towards the clean image x:

    pi(u)   = the point of the hyperplane f_k(x_t) + w (u - x_t) = 0 in the box that is nearest to u,   w = d f_k / d x_t
    x_{t+1} = clamp((1 - a) (x_t + eta (pi(x_t) - x_t)) + a (x + eta (pi(x) - x)))
    a       = min(|pi(x_t) - x_t| / (|pi(x_t) - x_t| + |pi(x) - x|), alpha_max)

A misclassified x_{t+1} is kept if it is the nearest so far, and the search continues from x + beta (x_{t+1} - x).
"""

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..balls import box
from ..ops._common import acc_dtype, broadcast
from ..predictions import other_classes, predictions
from ..rng import draw
from ._common import RestartedAttack, Result, Tally, all_or_nothing, eps_per_sample, warn_of_nan
from .targeting import DUAL, boundaries


@dataclass(eq=False, kw_only=True)
class FAB(RestartedAttack):
    """The fast adaptive boundary attack as a reusable object: `attack = FAB(8/255)`, then `attack(model, x, y)`.

    Each step costs a forward and a backward at one point and a forward at the next; with targets=None K - 1 backwards, all from
    the one forward. Targets and restarts each cost a run, but for samples that are misclassified within eps by then.

    Args:
        steps: of each run, >= 0.
        targets: n >= 1 runs the targeted form FAB-T against the n likeliest wrong classes of the clean image (at most K - 1),
            one after the other. None is the untargeted form: every step goes to the nearest of the K - 1 boundaries.
        restarts: runs for each target: the first from x, the others from random points halfway to the rim of the ball.
        alpha_max: largest weight of the clean image's projection, in [0, 1].
        eta: overshoot beyond the hyperplane, >= 1.
        beta: where to continue from a misclassified point, as a fraction of the way from x to it, in (0, 1].
        eps, norm, bounds, precision, input_gradient, fuse, bn_mode, budget: as for `PGD`. What is found farther away than eps
            does not count. In mode "train" a sample's result depends on the others, of which those already misclassified are left
            out.
        generator: source of the random starts, on any device; None is torch's default one of x's device. The first run of each
            target draws nothing.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.
    """

    steps: int = 100
    targets: int | None = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        checks.check_count("steps", self.steps, 0)
        if self.targets is not None:
            checks.check_count("targets", self.targets, 1)
        checks.check_number("alpha_max", self.alpha_max, lambda v: 0 <= v <= 1, "in [0, 1]")
        checks.check_number("eta", self.eta, lambda v: 1 <= v < inf, "finite and >= 1")
        checks.check_number("beta", self.beta, lambda v: 0 < v <= 1, "in (0, 1]")

    def __call__(self, model, x: Tensor, y: Tensor) -> Tensor:
        """`run`, of which the images alone are returned."""
        return self.run(model, x, y).x_adv

    @all_or_nothing
    def run(self, model, x: Tensor, y: Tensor) -> Result:
        """Attack `model` at the images `x`.

        The model (modes, gradients, statistics), x and y are afterwards as they were, also when the model raises. Works in any
        grad mode and under autocast.

        Args:
            model: module or callable, x -> logits [B, K].
            x: images [B, ...] inside `bounds` in fp32, fp16, bf16 or fp64.
            y: int64 [B], the true labels.

        Returns:
            Result: images with x's shape, dtype, device and memory format, without a graph, inside the ball and exactly inside
            `bounds`: the nearest misclassified ones of the first run that found any within eps; x itself where no run did, or
            where x is misclassified as it is. They lie next to a boundary: what is misclassified in half precision need not be
            so in full. And what each cost.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.

        Warns:
            RuntimeWarning: elements of the gradient were NaN or infinite for some samples. They count as 0, which may look like
                robustness and be none.
        """
        highest_label, tally = self._check_batch(model, x, y), Tally(x, self.budget)
        if x.numel() == 0:
            return tally.result(x.detach().clone())
        with self._prepared_gradient(model, x, y, highest_label) as (gradient, x, y):
            x_adv, nan_seen = self._attack(gradient, x, y, tally)
        warn_of_nan(int(nan_seen.sum()), len(x))
        return tally.result(x_adv)

    def _attack(self, gradient, x: Tensor, y: Tensor, tally: Tally) -> tuple[Tensor, Tensor]:
        x_adv, eps = x.clone(), eps_per_sample(self.eps, x)
        logits = gradient.logits(x)
        tally.add(slice(None), 1)
        robust = predictions(logits) == y
        nan_seen = torch.zeros_like(robust)
        wrong = other_classes(logits, y)
        runs = [wrong] if self.targets is None else zip(*(w[:, : self.targets].split(1, dim=1) for w in wrong), strict=True)
        for others, possible in runs:
            for restart in range(self.restarts):
                noise = self._noise(x) if restart else None
                rows = (robust & possible.any(1)).nonzero()[:, 0]  # waits for the device
                for left, budget in tally.affordable(rows, 1, self.steps * (2 + others.shape[1])):
                    search = _Search(self, gradient, x[left], y[left], others[left])
                    before = gradient.forwards, gradient.backwards
                    search.run(None if noise is None else noise[left] * (eps[left, None] / 2), budget)
                    tally.add(left, gradient.forwards - before[0], gradient.backwards - before[1])
                    found = search.distance <= eps[left]
                    x_adv[left] = torch.where(broadcast(found, x), search.images(search.nearest), x_adv[left])
                    robust[left] = ~found
                    nan_seen[left] |= search.nan_seen
        return x_adv, nan_seen

    def _noise(self, x: Tensor) -> Tensor:
        """Directions [B, n] of length 1. For all samples, so that none gets other ones when others drop out."""
        size = len(x), x[0].numel()
        like: Any = {"dtype": acc_dtype(x.dtype), "device": x.device, "generator": self.generator}
        noise = draw("uniform_", *size, **like) * 2 - 1 if self.norm == "linf" else draw("normal_", *size, **like)
        return noise / length(noise, self.norm)[:, None]


class _Search:
    """One run on samples [B]: every tensor stays where it is and nothing waits for the device.

    Args:
        others: int64 [B, T], the classes whose boundaries are looked for.

    Attributes:
        nearest: [B, n], the nearest misclassified images found.
        distance: [B], of them; infinite where there are none.
        nan_seen: bool [B], samples that met a gradient that is NaN or infinite.
    """

    def __init__(self, settings: FAB, gradient, x: Tensor, y: Tensor, others: Tensor):
        self.settings, self.gradient, self.norm = settings, gradient, settings.norm
        self.shape, self.dtype = x.shape, x.dtype
        self.bounds = box(settings.bounds, x.dtype)
        self.x, self.y, self.others = x.flatten(1).to(acc_dtype(x.dtype)), y, others
        self.nearest = self.x.clone()
        self.distance = torch.full_like(self.x[:, 0], inf)
        self.nan_seen = torch.zeros_like(y, dtype=torch.bool)

    def run(self, start: Tensor | None, budget: int | None = None) -> None:
        """From x + `start`, or x; of as many steps as `budget` passes suffice for."""
        steps = self.settings.steps if budget is None else min(self.settings.steps, budget // (2 + self.others.shape[1]))
        point = self.x if start is None else self._rounded(self.x + start)
        for _ in range(steps):
            point = self._step(point)
            wrong = predictions(self.gradient.logits(self.images(point))) != self.y
            distance = length(point - self.x, self.norm)
            nearer = wrong & (distance < self.distance)
            self.distance = torch.where(nearer, distance, self.distance)
            self.nearest = torch.where(nearer[:, None], point, self.nearest)
            back = self._rounded(torch.lerp(self.x, point, self.settings.beta))
            point = torch.where(wrong[:, None], back, point)

    def _step(self, point: Tensor) -> Tensor:
        gap, w = self._boundary(point)
        x, (lo, hi) = self.x, self.bounds
        gap_at_x = gap + (w * (x - point)).sum(1)
        points, gaps = torch.cat((point, x)), torch.cat((gap, gap_at_x))
        moves = project(points, torch.cat((w, w)), gaps, lo, hi, self.norm)
        ours, from_x = length(moves, self.norm).clamp_min(1e-8).split(len(x))
        share = (ours / (ours + from_x)).clamp_max(self.settings.alpha_max)[:, None]
        ours, from_x = (points + self.settings.eta * moves).split(len(x))
        return self._rounded(ours * (1 - share) + from_x * share)

    def _boundary(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """z_k - z_y [B] and its gradient [B, n] at `point`, for the class k of `others` with the nearest linearised boundary."""
        logits = self.gradient.forward(self.images(point))
        nearest = torch.full_like(self.distance, inf)
        gap, w = torch.zeros_like(nearest), torch.zeros_like(point)
        for gap_k, w_k in boundaries(self.gradient, logits, self.y, self.others, point.dtype):
            usable = w_k.isfinite()
            w_k = torch.where(usable, w_k, 0)
            steepness = torch.linalg.vector_norm(w_k, DUAL[self.norm], dim=1)
            distance = gap_k.abs() / (steepness + 1e-12)
            self.nan_seen |= ~usable.all(1) | gap_k.isnan()  # a gap is infinite where a class is ruled out
            nearer = (distance < nearest) & steepness.isfinite()
            nearest, gap = torch.where(nearer, distance, nearest), torch.where(nearer, gap_k, gap)
            w = torch.where(nearer[:, None], w_k, w)
        return gap, w

    def images(self, point: Tensor) -> Tensor:
        return point.to(self.dtype).view(self.shape)

    def _rounded(self, point: Tensor) -> Tensor:
        """Inside the box, and what x's dtype holds."""
        return point.to(self.dtype).clamp_(*self.bounds).to(point.dtype)


def project(points: Tensor, w: Tensor, gap: Tensor, lo: float, hi: float, norm: str) -> Tensor:
    """The shortest moves d that close the gap, gap + w d = 0, inside the box: exact projections onto hyperplane and box.

    They go along -sign(gap w), at most to the side of the box.

    Args:
        points: [B, n] inside the box.
        w: [B, n], finite.
        gap: [B], finite.
        norm: "linf", "l2" or "l1".

    Returns:
        Tensor: moves [B, n]; where the box does not reach the hyperplane, those to its corner nearest to it.
    """
    downhill = -(w.sign() * gap.sign()[:, None])
    room = torch.where(downhill > 0, hi - points, points - lo)
    if norm == "l1":
        return downhill * _steepest_first(w.abs(), room, gap.abs()[:, None])
    return downhill * _together(w.abs(), room, gap.abs()[:, None], torch.ones_like(w) if norm == "linf" else w.abs())


def _steepest_first(steep: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """L1: of all moves of the same length, that of the steepest coordinate closes most. So the steepest moves to its side, then
    the next one, and the last one as far as it has to."""
    steep, order = steep.sort(1, descending=True)
    room = room.gather(1, order)
    left = gap - F.pad((steep * room).cumsum(1)[:, :-1], (1, 0))  # [B, n], before each coordinate moves
    lengths = torch.minimum(left.clamp_min(0) / steep.clamp_min(torch.finfo(steep.dtype).tiny), room)
    return torch.empty_like(lengths).scatter_(1, order, torch.where(steep > 0, lengths, 0))


def _together(steep: Tensor, room: Tensor, gap: Tensor, speed: Tensor) -> Tensor:
    """L-infinity and L2: coordinate i moves by min(t v_i, m_i), with the room m_i and the speed v_i, 1 for L-infinity and |w_i|
    for L2. The gap that this closes, sum_i |w_i| min(t v_i, m_i), grows with t and bends where t = m_i / v_i: those are sorted,
    and t is found between two of them."""
    bend, order = torch.where(steep == 0, 0.0, room / speed).sort(1)
    closed, rate = ((steep * v).gather(1, order) for v in (room, speed))
    closed = F.pad(closed.cumsum(1), (1, 0))  # [B, n + 1]: by the coordinates that have reached the side, before each bend
    rate = F.pad(rate.flip(1).cumsum(1).flip(1), (0, 1))  # of those that have not
    at_bend = closed[:, 1:] + rate[:, 1:] * bend
    passed = (at_bend < gap).sum(1, keepdim=True)
    t = (gap - closed.gather(1, passed)) / rate.gather(1, passed).clamp_min(torch.finfo(steep.dtype).tiny)
    out_of_reach = passed == steep.shape[1]
    return torch.where(out_of_reach, room, torch.minimum(t.clamp(0, torch.finfo(t.dtype).max) * speed, room))


def length(v: Tensor, norm: str) -> Tensor:
    """Norms [B] of v [B, n]: "linf", "l2" or "l1"."""
    return torch.linalg.vector_norm(v, {"linf": inf, "l2": 2, "l1": 1}[norm], dim=1)

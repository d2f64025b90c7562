"""PGD that ends early for samples from which nothing new can come: `PGD(stop=...)` (Doldo et al., arXiv 2503.19347).

With a fixed step, the sign and the projection, the next iterate is a function of the present one, if the gradient of a sample
depends on nothing else. So a repeated iterate means a cycle: if x_t = x_s, s < t, then x_{t+k} = x_{s+k} for all k, and x_T is
x_t where T - t is divisible by the period t - s. Iterates are known by a hash of 64 bits, which the fused step computes while it
writes them; ops/linf.py bounds the probability of a collision.

The steps run in segments. Between two of them samples leave, and the batch gets smaller. Kernels are chosen by the size of a
batch, and may sum up in another order, so the gradients in a smaller batch are first compared with those in the larger one. On
CPUs they must be equal to the last bit, else the batch stays as it is: the images are bit-identical to those of a run without an
early stop. On GPUs, where no size may have the bits of another, the run goes on in the smaller batch and forgets the iterates
before it: each sample has its T steps, but with other roundings than without an early stop.

A budget of passes ends a run in the same way, at the step that it still suffices for.
"""

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks, ops
from ..balls import BALLS, Ball, box
from ..cuda_graphs.cache import graphs
from ..cuda_graphs.run import Batch, followed
from ..losses import as_loss, value_dtype
from ..ops._common import acc_dtype
from ..precision import logit_gradient_scale
from ..predictions import predictions
from ..rng import rng_lock
from ._common import Tally, take_rows
from .pgd_run import SEGMENT, SegmentRun

if TYPE_CHECKING:
    from .pgd import PGD

# Smaller batches on CPUs hold a multiple of this number of samples. On two cores, for convolutional networks in fp32 and fp64, by
# plan and by autograd, gradients in batches of 8, 16, 24, ..., 120 were those in a batch of 128 to the bit; in batches of 1, 3,
# 13, 31, 65 some were not. Other machines may differ: hence the comparison.
MULTIPLE = 8
# A smaller batch must save at least twice what the comparison costs: a step is two passes, so (size - smaller) * steps is at
# least 4 * size. Of the steps to come only these count where cycles are looked for, since most samples leave soon, and where the
# samples pay for the comparison out of a budget.
AHEAD = 16
# On GPUs a batch has this share of the one before: each size has a graph, and half a batch would be replayed by the graph of all.
QUARTER = 4
COMPARISON = 4  # passes: a forward and a backward in both batches
SHRINK = 0.75  # after a size whose gradients had other bits, the next one that is tried is at most this share of it
# The share of the largest element by which gradients on a GPU may differ between two calls, since atomic additions have no order.
NOISE = 1e-2


class EarlyStop:
    """An attack with an early stop or a budget, on one batch.

    Args:
        settings: the attack.
        batch: as its runs are given it.
        highest_label: the largest class that the labels name.

    Attributes:
        x_adv: like x. nan_seen: uint8 [B], as of a run. tally: the passes of each sample.
        classes: the number of classes K, None before the first forward.
        reserve: passes that are kept for a look at what a run has found.
    """

    def __init__(self, settings: "PGD", model, batch: Batch, highest_label: int):
        self.settings, self.model, self.batch, self.highest_label = settings, model, batch, highest_label
        self.loss = as_loss(settings.loss)
        self.x_adv, self.tally = batch.x.clone(), Tally(batch.x, settings.budget)
        self.nan_seen = torch.zeros(len(batch.x), dtype=torch.uint8, device=batch.x.device)
        self.classes: int | None = None
        self.reserve = int(settings.restarts > 1)

    def run(self) -> None:
        """All restarts. With select="success" a sample that one has broken is left out of the next, if `stop` looks for that."""
        settings, x = self.settings, self.batch.x
        checks.check_model(self.model, x)
        best = _Best(self) if settings.restarts > 1 else None
        left = torch.arange(len(x), device=x.device)
        if self.loss.needs_clean_logits and settings.steps:
            self._see_clean_images()
        for restart in range(settings.restarts):
            start = self._start()
            if restart == 0 and settings.stop is not None and settings.steps:
                self._check_independence(start)
            groups = self.tally.affordable(left, self.reserve, 2 * settings.steps + self.reserve)
            for rows, passes in groups:
                steps = settings.steps if passes is None else (passes - self.reserve) // 2
                _Climb(self, rows, start, steps).run()
            if best is not None and groups:
                best.keep(torch.cat([rows for rows, _ in groups]))
                if settings.looks_for_success and settings.select == "success":
                    left = left[~best.success[left]]
        self.x_adv = self.x_adv if best is None else best.images

    def gradient(self, batch: Batch, iterate: Tensor, charged: Tensor) -> Tensor:
        """The gradient at `iterate`, as a step has it. `charged`: the samples to whom its passes are counted."""
        settings = self.settings
        with settings._prepared_gradient(self.model, batch.x, batch.y, self.highest_label) as (gradient, _, y):
            logits = gradient.forward(gradient.laid_out(iterate))
            self.loss.check_classes(logits.shape[1], settings.targeted)
            dlogits, reference = torch.empty_like(logits), self.loss.reference(y, batch.clean_logits, settings.targeted)
            scale = logit_gradient_scale(logits.dtype)
            loss = followed(self.loss, gradient, self.model)
            loss.gradient(logits, reference, dlogits, None, targeted=settings.targeted, scale=scale)
            grad = gradient.backward(dlogits)
            self.tally.add(charged, gradient.forwards, gradient.backwards)
        return grad

    def _see_clean_images(self) -> None:
        """Put the logits of the clean images into the batch, for the loss."""
        x, y = self.batch.x, self.batch.y
        with self.settings._prepared_gradient(self.model, x, y, self.highest_label) as (gradient, _, _):
            self.batch = self.batch._replace(clean_logits=gradient.logits(gradient.laid_out(x)))
        self.tally.add(slice(None), 1)

    def _check_independence(self, start: Tensor) -> None:
        """Check that a sample's gradient changes neither with the other samples nor from call to call. In a plan it cannot.

        Half of the samples are replaced by others, which must not show in the gradients of the rest.
        """
        settings, batch = self.settings, self.batch
        with settings._prepared_gradient(self.model, batch.x, batch.y, self.highest_label) as (gradient, _, _):
            planned = gradient.independent_samples
        rows = torch.arange(len(start), device=start.device)
        rows = rows[~self.tally.spent(rows, COMPARISON + 2)]  # the others have a step or two at most
        if planned or not len(rows):
            return
        batch, changed = part(batch, rows), start[rows].clone()
        changed[1::2] = changed[::2][: len(rows) // 2]
        before, after = (self.gradient(batch, iterate, rows)[::2] for iterate in (start[rows], changed))
        if not _equal(before, after) and (keeps_bits(start) or (before - after).abs().max() > NOISE * before.abs().max()):
            raise ValueError(
                f"stop={settings.stop!r}, but the model's gradient at an image changes with the others of its batch, or from "
                f"call to call, as with batch statistics or dropout (bn_mode={settings.bn_mode!r}): use bn_mode='eval', or leave "
                "out stop"
            )

    def _start(self) -> Tensor:
        """The first iterates of a run, which are those without an early stop."""
        batch, settings = self.batch, self.settings
        start = torch.empty_like(batch.x).copy_(batch.x if batch.start is None else batch.start)
        if batch.start is None and settings.random_start:
            ball = self.ball(batch)
            with rng_lock:
                draws = ball.draw(settings.generator, len(batch.x))
            ball.random_start_(start, draws)
        return start

    def ball(self, batch: Batch) -> Ball:
        return BALLS[self.settings.norm](batch.x, batch.eps, batch.step_size, box(self.settings.bounds, batch.x.dtype))


class _Climb:
    """One run of T `steps` from one start, for the samples `rows`.

    Attributes:
        index: int64 [n], which samples of the batch are in the working batch; some of them, not `live`, fill it up.
        iterate: [n, ...], x_t after t = `done` steps.
        history: int64 [T, n], the hashes of x_1, ..., x_T. `first`: the earliest that may be compared with.
        period: int64 [n], of the cycle that a sample is in, 0 where none is known.
    """

    def __init__(self, attack: EarlyStop, rows: Tensor, start: Tensor, steps: int):
        self.attack, self.steps, self.done, self.first = attack, steps, 0, 0
        everyone = torch.arange(len(start), device=start.device)
        index = everyone if attack.settings.stop else rows  # without a stop no bits are promised
        self.iterate, self.live = start[index], torch.isin(index, rows)
        self.history = index.new_zeros(steps if attack.settings.looks_for_cycles else 0, len(index))
        self.period = torch.zeros_like(index)
        self.largest = float(len(index))  # the largest size that may still be tried
        self._take(index)

    def run(self) -> None:
        while self.done < self.steps:
            self._shrink()
            steps = self._affordable((self.steps - self.done - 1) % SEGMENT + 1)
            if not steps:
                return
            self._segment(steps)
        self._leave(self.live)

    def _affordable(self, steps: int) -> int:
        """As many of `steps` as all samples can pay, after those that cannot pay one have left. 0 when none is left."""
        tally, reserve = self.attack.tally, self.attack.reserve
        self._leave(self.live & tally.spent(self.index, 2 + reserve))
        if not self.live.any():
            return 0
        if tally.limit is None:
            return steps
        return min(steps, (int(tally.left(self.index[self.live]).min()) - reserve) // 2)

    def _segment(self, steps: int) -> None:
        """Go on by `steps`, and drop the samples whose last iterate is known then."""
        attack, ours = self.attack, self.index[self.live]
        settings: Any = copy(attack.settings)
        settings.steps, settings.restarts, settings.run_class = steps, 1, SegmentRun
        settings.looks_first = self.done > 0 or attack.batch.start is None
        found = graphs.attack(settings, attack.model, self.batch._replace(start=self.iterate), attack.highest_label)
        self.iterate, nan_seen, broken, *hashes = found.tensors
        attack.classes, self.done = found.classes, self.done + steps
        attack.nan_seen[ours] |= nan_seen[self.live]
        attack.tally.add(ours, *found.passes)
        leaves = self.live & broken if attack.settings.looks_for_success else torch.zeros_like(self.live)
        if attack.settings.looks_for_cycles:
            self.history[self.done - steps : self.done] = torch.stack(hashes[:steps])
            leaves |= self.live & self._ends_here()
        self._leave(leaves)

    def _ends_here(self) -> Tensor:
        """bool [n], whose iterate is x_T."""
        t = self.done
        same = self.history[self.first : t - 1] == self.history[t - 1]
        number = torch.arange(self.first + 1, t, device=same.device)  # the t of each iterate x_t in `same`
        if len(number):
            latest = (same * number[:, None]).amax(0)
            self.period = torch.where((self.period == 0) & (latest > 0), t - latest, self.period)
        return (self.period > 0) & ((self.steps - t) % self.period.clamp_min(1) == 0)

    def _leave(self, leaves: Tensor) -> None:
        points = self.iterate
        if self.done == 0:  # a start of the caller's may be anywhere
            points = points.clone()
            self.attack.ball(self.batch).project_(points)
        self.attack.x_adv[self.index[leaves]] = points[leaves]
        self.live = self.live & ~leaves

    def _shrink(self) -> None:
        """Take a smaller batch, if it pays and does no harm."""
        if self.attack.settings.stop is None:
            return
        attack, left, size = self.attack, int(self.live.sum()), len(self.live)
        if keeps_bits(self.iterate):
            smaller = -(-left // MULTIPLE) * MULTIPLE
        else:
            smaller = size
            while -(-smaller // QUARTER) >= max(left, 1) and smaller > 1:
                smaller = -(-smaller // QUARTER)
        few = attack.settings.looks_for_cycles or attack.tally.limit is not None
        ahead = min(self.steps - self.done, AHEAD if few else self.steps)
        pays = smaller <= self.largest and (size - smaller) * ahead >= COMPARISON * size
        poor = attack.tally.spent(self.index[self.live], COMPARISON + 2 + attack.reserve)
        if not left or not pays or poor.any():
            return
        rows = self.live.byte().argsort(descending=True, stable=True)[:smaller]  # filled up by some that have left
        equal = self._has_equal_gradients(rows)
        if keeps_bits(self.iterate) and not equal:
            self.largest = SHRINK * smaller
            return
        self.iterate, self.live, self.history = self.iterate[rows], self.live[rows], self.history[:, rows]
        self.period = self.period[rows]
        self._take(self.index[rows])
        if not equal:
            self.first = max(self.done - 1, 0)  # x_t is the first one of this arithmetic
            self.period.zero_()

    def _take(self, index: Tensor) -> None:
        self.index, self.batch = index, part(self.attack.batch, index)

    def _has_equal_gradients(self, rows: Tensor) -> bool:
        """Whether the gradients of the samples `rows` do not change, to the bit, when these are a batch."""
        charged = self.index[self.live]
        whole = self.attack.gradient(self.batch, self.iterate, charged)
        return _equal(whole[rows], self.attack.gradient(part(self.batch, rows), self.iterate[rows], charged))


class _Best:
    """The best of each sample's restarts, chosen as in a run without an early stop."""

    def __init__(self, attack: EarlyStop):
        x = attack.batch.x
        self.attack, self.images = attack, x.clone()
        self.value = x.new_full((len(x),), -torch.inf, dtype=acc_dtype(x.dtype))
        self.success = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def keep(self, rows: Tensor) -> None:
        """Take over what is better of the samples `rows`, int64 [n]."""
        attack, settings, batch = self.attack, self.attack.settings, self.attack.batch
        with settings._prepared_gradient(attack.model, batch.x, batch.y, attack.highest_label) as (gradient, _, y):
            logits = gradient.logits(gradient.laid_out(attack.x_adv))
            value = torch.empty(len(logits), dtype=value_dtype(logits), device=logits.device)
            reference = attack.loss.reference(y, batch.clean_logits, settings.targeted)
            attack.loss.gradient(logits, reference, torch.empty_like(logits), value, targeted=settings.targeted, scale=1.0)
            attack.tally.add(rows, gradient.forwards)
        asked = torch.zeros_like(self.success)
        asked[rows] = True
        value = value.to(self.value.dtype).masked_fill(~asked, -torch.inf)
        if settings.select == "success":
            found = asked & ((predictions(logits) == y) == settings.targeted)
            ops.keep_best_(self.images, self.value, self.success, attack.x_adv, value, found)
        else:
            ops.keep_best_(self.images, self.value, None, attack.x_adv, value, None)


def part(batch: Batch, rows: Tensor) -> Batch:
    """The samples `rows` of a batch, without a start."""
    y, clean_logits = (None if t is None else t[rows] for t in (batch.y, batch.clean_logits))
    eps, step_size = (take_rows(value, rows) for value in (batch.eps, batch.step_size))
    return Batch(batch.x[rows], y, eps, step_size, clean_logits=clean_logits)


def keeps_bits(x: Tensor) -> bool:
    """Whether a smaller batch is taken only with the same bits."""
    return not x.is_cuda


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal, where NaN is equal to itself."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())

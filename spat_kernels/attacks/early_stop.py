"""PGD that ends early for samples from which nothing new can come: `PGD(stop=...)` (Doldo et al., arXiv 2503.19347).

With a fixed step, the sign and the projection, the next iterate is a function of the present one, if the gradient of a sample
depends on nothing else. So an iterate that was there before means a cycle: if x_t = x_s, s < t, then x_{t+k} = x_{s+k} for all
k, and x_T is x_t where T - t is divisible by the period t - s. Iterates are known by a hash of 64 bits, which the fused step
computes while it writes them; ops/linf.py bounds the probability of a collision.

The steps run in segments. Between two of them samples leave, and the batch gets smaller. Kernels are chosen by the size of a
batch, and may sum up in another order, so the gradients in a smaller batch are first compared with those in the larger one. On
CPUs they must be equal to the last bit, else the batch stays as it is: what comes out is what comes out without an early stop. On
GPUs, where no size may have the bits of another, the run goes on in the smaller batch and forgets the iterates before it: each
sample has its T steps, and a cycle is a proof, but roundings are not those of a run without an early stop.
"""

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..balls import BALLS, Ball, box
from ..cuda_graphs.cache import graphs
from ..cuda_graphs.run import Batch
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
# plan and by autograd, gradients in batches of 16, 32, 48 and 64 were those in a batch of 128 to the bit; in batches of 1, 3, 13,
# 31, 65 some were not. Other machines may differ: hence the comparison.
MULTIPLE = 16
SHRINK = 0.75  # the share of the samples that a smaller batch may have at most: each costs a comparison


class EarlyStop:
    """An attack with an early stop or a budget, on one batch.

    Args:
        settings: the attack.
        batch: as its runs are given it.
        highest_label: the largest class that the labels name.

    Attributes:
        x_adv: like x. nan_seen: uint8 [B], as of a run. tally: the passes of each sample.
        classes: the number of classes K, None before the first forward.
    """

    def __init__(self, settings: "PGD", model, batch: Batch, highest_label: int):
        self.settings, self.model, self.batch, self.highest_label = settings, model, batch, highest_label
        self.x_adv, self.tally = batch.x.clone(), Tally(batch.x, settings.budget)
        self.nan_seen = torch.zeros(len(batch.x), dtype=torch.uint8, device=batch.x.device)
        self.classes: int | None = None
        self.looks, self.hashes = settings.stop in ("success", "exact"), settings.stop in ("cycle", "exact")
        self.extra = int(as_loss(settings.loss).needs_clean_logits)  # forwards of a segment besides those of its steps
        self.reserve = (1 + self.extra) * (settings.restarts > 1)  # passes after a run, to see how good it is

    def run(self) -> None:
        """All restarts. With select="success" a sample that one has broken is left out of the next, if `stop` looks for that."""
        settings, x = self.settings, self.batch.x
        left, best = torch.arange(len(x), device=x.device), _Best(self) if settings.restarts > 1 else None
        for restart in range(settings.restarts):
            start = self._start()
            if restart == 0 and settings.stop is not None:
                self._check_independence(start)
            for rows, passes in self.tally.affordable(left, least=self.reserve):
                steps = settings.steps if passes is None else min(settings.steps, (passes - self.reserve) // 2)
                _Climb(self, rows, start[rows], steps).run()
                if best is not None:
                    best.keep(rows)
            if best is not None and self.looks and settings.select == "success":
                left = left[~best.success[left]]
        self.x_adv = self.x_adv if best is None else best.images

    def gradient(self, batch: Batch, iterate: Tensor, payers: Tensor) -> Tensor:
        """The gradient at `iterate`, as a step has it. `payers`: the samples on whose account its passes go."""
        settings, loss = self.settings, as_loss(self.settings.loss)
        with settings._prepared_gradient(self.model, batch.x, batch.y, self.highest_label) as (gradient, x, y):
            clean = gradient.logits(gradient.laid_out(x)) if loss.needs_clean_logits else None
            logits = gradient.forward(gradient.laid_out(iterate))
            dlogits, reference = torch.empty_like(logits), loss.reference(y, clean, settings.targeted)
            scale = logit_gradient_scale(logits.dtype)
            loss.gradient(logits, reference, dlogits, None, targeted=settings.targeted, scale=scale)
            grad = gradient.backward(dlogits)
            self.tally.add(payers, gradient.forwards, gradient.backwards)
        return grad

    def _check_independence(self, start: Tensor) -> None:
        """That a sample's gradient does not change with the other samples, nor from call to call. In a plan it cannot.

        Half of the samples are replaced by others, which must not show in the gradients of the rest.
        """
        batch, everyone = self.batch, torch.arange(len(start), device=start.device)
        with self.settings._prepared_gradient(self.model, *batch[:2], self.highest_label) as (gradient, _, _):
            planned = gradient.independent_samples
        if planned or self.tally.spent(everyone, 6).any():  # with a budget of fewer passes there is nothing to stop
            return
        changed = start.clone()
        changed[1::2] = start[::2][: len(start) // 2]
        before, after = (self.gradient(batch, iterate, everyone)[::2] for iterate in (start, changed))
        if not _equal(before, after):
            raise ValueError(
                f"stop={self.settings.stop!r}, but the model's gradient at an image changes with the others of its batch, or "
                "from call to call, as of batch statistics and random layers: put them into eval mode (bn_mode='eval'), or "
                "leave out stop"
            )

    def _start(self) -> Tensor:
        """The first iterates of a run, which are those without an early stop."""
        batch, settings = self.batch, self.settings
        start = torch.empty_like(batch.x).copy_(batch.x if batch.start is None else batch.start)
        if batch.start is None and settings.random_start:
            with rng_lock:
                draws = self.ball(batch).draw(settings.generator, len(batch.x))
            self.ball(batch).random_start_(start, draws)
        return start

    def ball(self, batch: Batch) -> Ball:
        return BALLS[self.settings.norm](batch.x, batch.eps, batch.step_size, box(self.settings.bounds, batch.x.dtype))


class _Climb:
    """One run from one start.

    Attributes:
        index: int64 [n], which samples of the batch are in the working batch; some of them, not `live`, fill it up.
        iterate: [n, ...], x_t after t = `done` steps.
        history: int64 [T, n], the hashes of x_1, ..., x_T. `first`: the earliest that may be compared with.
        period: int64 [n], of the cycle that a sample is in, 0 where none is known.
    """

    def __init__(self, attack: EarlyStop, rows: Tensor, start: Tensor, steps: int):
        self.attack, self.steps, self.done, self.first = attack, steps, 0, 0
        self.iterate, self.live = start, torch.ones_like(rows, dtype=torch.bool)
        self.history = rows.new_zeros(steps if attack.hashes else 0, len(rows))
        self.refused = len(rows) + 1  # the smallest size that was too small
        self.period = torch.zeros_like(rows)
        self._take(rows)

    def run(self) -> None:
        if self.steps == 0:
            self.attack.ball(self.batch).project_(self.iterate)
        while self.done < self.steps:
            steps = (self.steps - self.done - 1) % SEGMENT + 1
            self._leave(self.live & self.attack.tally.spent(self.index, 2 * steps + self.attack.extra + self.attack.reserve))
            if not self.live.any():
                return
            self._segment(steps)
            self._shrink()
        self._leave(self.live)

    def _segment(self, steps: int) -> None:
        """Go on by `steps`, and let those go whose last iterate is known then."""
        attack, tally = self.attack, self.attack.tally
        settings: Any = copy(attack.settings)
        settings.steps, settings.restarts, settings.run_class = steps, 1, SegmentRun
        settings.looks_first = self.done > 0 or attack.batch.start is None
        found = graphs.attack(settings, attack.model, self.batch._replace(start=self.iterate), attack.highest_label)
        self.iterate, nan_seen, broken, *hashes = found.tensors
        attack.classes, self.done = found.classes, self.done + steps
        ours = self.index[self.live]
        attack.nan_seen[ours] |= nan_seen[self.live]
        tally.add(ours, *(n[self.live] if isinstance(n, Tensor) else n for n in found.passes))
        leaves = self.live & broken if attack.looks else torch.zeros_like(self.live)
        if attack.hashes:
            self.history[self.done - steps : self.done] = torch.stack(hashes[:steps])
            leaves |= self.live & self._ends_here()
        self._leave(leaves)

    def _ends_here(self) -> Tensor:
        """bool [n], whose iterate is x_T."""
        t = self.done
        same = self.history[self.first : t - 1] == self.history[t - 1]
        number = torch.arange(self.first + 1, t, device=same.device)  # of the iterates: the first is x_1
        if len(number):
            latest = (same * number[:, None]).amax(0)
            self.period = torch.where((self.period == 0) & (latest > 0), t - latest, self.period)
        return (self.period > 0) & ((self.steps - t) % self.period.clamp_min(1) == 0)

    def _leave(self, leaves: Tensor) -> None:
        self.attack.x_adv[self.index[leaves]] = self.iterate[leaves]
        self.live = self.live & ~leaves

    def _shrink(self) -> None:
        """Take a smaller batch, if it pays and does no harm."""
        left, size, bits = int(self.live.sum()), len(self.live), keeps_bits(self.iterate)
        if bits:
            smaller = -(-left // MULTIPLE) * MULTIPLE
        else:  # few sizes, since each has a graph
            smaller = size
            while smaller % 2 == 0 and smaller // 2 >= max(left, 1):
                smaller //= 2
        comparison = self.attack.tally.spent(self.index[self.live], 2 * (2 + self.attack.extra) + self.attack.reserve)
        if not left or smaller > SHRINK * min(size, self.refused) or comparison.any():
            return
        rows = self.live.byte().argsort(descending=True, stable=True)[:smaller]  # filled up by some that have left
        equal = self._has_equal_gradients(rows)
        if bits and not equal:
            self.refused = smaller
            return
        self.iterate, self.live, self.history = self.iterate[rows], self.live[rows], self.history[:, rows]
        self.period = self.period[rows]
        self._take(self.index[rows])
        if not equal:
            self.first = self.done - 1  # x_t is the first one of this arithmetic
            self.period.zero_()

    def _take(self, index: Tensor) -> None:
        batch = self.attack.batch
        eps, step_size = (take_rows(value, index) for value in (batch.eps, batch.step_size))
        self.index = index
        self.batch = Batch(batch.x[index], None if batch.y is None else batch.y[index], eps, step_size)

    def _has_equal_gradients(self, rows: Tensor) -> bool:
        """Whether the gradients of the samples `rows` do not change, to the bit, when these are a batch."""
        attack, (x, y), payers = self.attack, self.batch[:2], self.index[self.live]
        part = self.batch._replace(x=x[rows], y=None if y is None else y[rows])
        whole = attack.gradient(self.batch, self.iterate, payers)
        return _equal(whole[rows], attack.gradient(part, self.iterate[rows], payers))


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
        loss = as_loss(settings.loss)
        with settings._prepared_gradient(attack.model, batch.x, batch.y, attack.highest_label) as (gradient, x, y):
            clean = gradient.logits(gradient.laid_out(x)) if loss.needs_clean_logits else None
            logits = gradient.logits(gradient.laid_out(attack.x_adv))
            value = torch.empty(len(logits), dtype=value_dtype(logits), device=logits.device)
            reference = loss.reference(y, clean, settings.targeted)
            loss.gradient(logits, reference, torch.empty_like(logits), value, targeted=settings.targeted, scale=1.0)
            attack.tally.add(rows, gradient.forwards)
        asked = torch.zeros_like(self.success)
        asked[rows] = True
        value = value.to(self.value.dtype).masked_fill(~asked, -torch.inf)
        if settings.select == "success":
            found = asked & ((predictions(logits) == y) == settings.targeted)
            ops.keep_best_(self.images, self.value, self.success, attack.x_adv, value, found)
        else:
            ops.keep_best_(self.images, self.value, None, attack.x_adv, value, None)


def keeps_bits(x: Tensor) -> bool:
    """Whether a smaller batch is taken only with the same bits."""
    return not x.is_cuda


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal, where NaN is equal to itself."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())

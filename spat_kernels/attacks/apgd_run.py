"""A run of APGD: what its iterates, step sizes and checkpoints are (`apgd.py` has the formulas)."""

from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import ops
from ..balls import Ball, L1Ball
from ..cuda_graphs.run import Batch, Passes, Run
from ..losses import DLR, OURS, value_dtype
from ..ops._common import acc_dtype, broadcast
from ..predictions import predictions
from .apgd_l1 import SparseSteps, enlarged, larger_first

if TYPE_CHECKING:
    from .apgd import APGD

FIRST, SHORTER, LEAST = 0.22, 0.03, 0.06  # lengths of the periods between checkpoints, as shares of the steps (section 3.2)
MOMENTUM = 0.75


def checkpoints(steps: int) -> dict[int, int]:
    """The steps after which step sizes are adapted, each with the length of the period that ends there."""
    length, shorter, least = (max(int(share * steps), 1) for share in (FIRST, SHORTER, LEAST))
    found, at = {}, length
    while at < steps:  # nothing follows one at the end
        found[at] = length
        length = max(length - shorter, least)
        at += length
    return found


class APGDRun(Run):
    """One run of APGD from a random start.

    Its outcome: images, by the rule of `APGD`; nan_seen, uint8 [B]; their losses [B]; whether they were misclassified (or where
    they were to go), bool [B].
    """

    y: Tensor  # never None

    def __init__(self, settings: "APGD", batch: Batch):
        super().__init__(settings, batch)
        self.rho, self.eot, self.multi_eps, self.last = settings.rho, settings.eot, settings.in_larger_balls, settings.last
        self.searches = larger_first(settings.steps) if self.multi_eps else [(1, settings.steps)]
        self.counts = torch.zeros(2, len(batch.x), dtype=torch.int64)
        self.towards_y = settings.targeted
        self.targeted = self.towards_y or batch.targets is not None
        if self.eot > 1:
            self.loss = self.loss.unnormalized()
        self.best, _, self.value, self.broken = self.empty_outcome(batch.x)
        self._begin_batch(batch)

    @staticmethod
    def empty_outcome(x: Tensor) -> tuple[Tensor, ...]:
        n, value = len(x), acc_dtype(x.dtype)
        vectors = (torch.empty(n, dtype=dtype, device=x.device) for dtype in (torch.uint8, value, torch.bool))
        return torch.empty_like(x), *vectors

    def _outcome(self) -> tuple[Tensor, ...]:
        return self.best, self.ball.nan_seen, self.value, self.broken

    def _reference(self):
        if isinstance(self.loss, DLR) and not self.towards_y:
            return self.y, self.targets  # the class to leave is y, not what the clean logits say
        return super()._reference()

    def attempt(self, captured: bool) -> None:
        drops = not captured and self._can_drop()
        start = self.inner.laid_out(self._start())
        with self.model.arithmetic(self.best.device.type):
            for times, steps in self.searches:
                search = self._begin(times, start)
                rest = self._ascend(search, steps, drops)
                start = search.best
        if rest is not None:
            self._store(rest)

    def _start(self) -> Tensor:
        start = torch.empty_like(self.ball.x)
        enlarged(self.ball, self.searches[0][0]).surface_start_(start, self.draws)
        return start

    def _begin(self, times: int, start: Tensor) -> "_Search":
        """A search from `start` in the ball of `times` the radius. If that is larger, nothing counts as broken."""
        if not isinstance(self.inner, L1Ball):
            return _Search(self.inner, self.y, self.reference, start)
        search = _SparseSearch(enlarged(self.inner, times), self.y, self.reference, start)
        if self.multi_eps:
            search.ball.project_(start)
        search.begin(adapt=self.multi_eps)
        search.done.fill_(times > 1)
        return search

    def _ascend(self, search: "_Search", steps: int, drops: bool) -> "_Search | None":
        """Go through the steps; return the search on the samples that are not dropped, None without any."""
        periods, last = search.checkpoints(steps), steps if self.last is None else self.last
        self._evaluate(search, differentiate=last > 0)
        for step in range(1, last + 1):
            search.step()
            self._evaluate(search, differentiate=step < last)
            if step in periods:
                search.check(self.rho * periods[step])
                if drops and search.broken.any():
                    self._store(search)
                    search = search.part((~search.broken).nonzero()[:, 0])
                    if not len(search.y):
                        return None
        return search

    def _can_drop(self) -> bool:
        """Whether to drop broken samples: a CPU takes less time for fewer, and the results of the others do not change."""
        return self.best.device.type == "cpu" and self.model.independent_samples and type(self.loss) in OURS

    @property
    def passes(self):
        return Passes(*self.counts.clone())  # a capture on the way counts on

    def _store(self, search: "_Search") -> None:
        rows = slice(None) if search.rows is None else search.rows
        self.counts[:, rows] = torch.tensor([[self.model.forwards], [self.model.backwards]])
        found = search.best, search.ball.nan_seen, search.best_value, search.broken
        for ours, theirs in zip(self._outcome(), found, strict=True):
            if search.rows is None:
                ours.copy_(theirs)
            else:
                ours[search.rows] = theirs

    def _evaluate(self, search: "_Search", differentiate: bool = True) -> None:
        """Give `search` the loss at its iterate, whether that is misclassified, and the gradient, averaged over `eot` passes."""
        passes = 1 if self.model.deterministic else self.eot
        logits, value, grad = self._pass(search, differentiate)
        for _ in range(passes - 1):
            more_logits, more_value, more_grad = self._pass(search, differentiate)
            logits, value = logits + more_logits, value + more_value
            grad = None if grad is None or more_grad is None else grad + more_grad
        search.keep(value / passes if passes > 1 else value, self._broken(logits, search.y), grad)

    def _broken(self, logits: Tensor, y: Tensor) -> Tensor:
        return (predictions(logits) == y) == self.towards_y

    def _pass(self, search: "_Search", differentiate: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        logits = self.model.forward(search.x_adv) if differentiate else self.model.logits(search.x_adv)
        value = torch.empty(len(logits), dtype=value_dtype(logits), device=logits.device)
        dlogits = self._logit_gradient(logits, search.reference, value)
        return logits, value, self.model.backward(dlogits) if differentiate else None


class AscentRun(APGDRun):
    """A run whose images are the iterates of the highest loss, misclassified or not. It looks at no value.

    With a start in the batch the first iterate is that, instead of a random point of the surface.
    """

    def __init__(self, settings: "APGD", batch: Batch):
        self.random_start = batch.start is None
        self.given = torch.empty_like(batch.x) if batch.start is not None else None
        super().__init__(settings, batch)

    def _begin_batch(self, batch: Batch) -> None:
        super()._begin_batch(batch)
        if self.given is not None and batch.start is not None:
            self.given[: self.n].copy_(batch.start)

    def _start(self) -> Tensor:
        return super()._start() if self.given is None else self.given.clone()  # a search writes on it

    def _broken(self, logits: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(y, dtype=torch.bool)

    def _can_drop(self) -> bool:
        return False


class _Search:
    """The iterates of one run on n samples, and what is known of each sample so far."""

    checkpoints = staticmethod(checkpoints)

    def __init__(self, ball: Ball, y: Tensor, reference, start: Tensor):
        n, like = len(ball.x), ball.eps
        self.rows: Tensor | None = None  # int64 [n], which samples of the run these are, or None: all
        self.ball, self.y, self.reference = copy(ball), y, reference
        self.ball.step_size = ball.step_size.expand(n).clone()
        self.unmoved = like.new_zeros(1)
        self.x_adv = start
        self.previous: Tensor | None = None
        self.grad: Tensor  # at x_adv; `keep` sets it
        self.best_grad: Tensor
        self.best, self.best_value = ball.x.clone(), like.new_full((n,), -torch.inf)
        self.broken = torch.zeros(n, dtype=torch.bool, device=like.device)
        self.done = torch.zeros_like(self.broken)  # broken at the last checkpoint: `best` stays
        self.halved = torch.ones_like(self.broken)  # at the last checkpoint
        self.rises, self.last_value = torch.zeros_like(self.broken, dtype=torch.int32), like.new_zeros(n)
        self.value_at_check: Tensor
        self.begun = False

    def step(self) -> None:
        x_adv, ball = self.x_adv, self.ball
        moved = x_adv.clone()
        ball.step_(moved, self.grad)
        if self.previous is not None:
            moved.lerp_(x_adv, 1 - MOMENTUM).sub_(self.previous.sub_(x_adv), alpha=1 - MOMENTUM)
            ball.step_(moved, self.grad, self.unmoved)
        self.previous, self.x_adv = x_adv, moved

    def keep(self, value: Tensor, wrong: Tensor, grad: Tensor | None) -> None:
        """Take note of the iterate: its loss [n], whether it is misclassified [n], and its gradient."""
        value, wrong = value.to(self.best_value.dtype), wrong & ~self.done
        if grad is not None:
            self.grad = self.ball.laid_out(grad)
            if not self.begun:
                self.best_grad = self.grad.clone()
            ops.keep_best_(self.best_grad, self.best_value.clone(), self.broken.clone(), self.grad, value, wrong)
        ops.keep_best_(self.best, self.best_value, self.broken, self.x_adv, value, wrong)
        if not self.begun:
            self.begun, self.value_at_check = True, self.best_value.clone()
        else:
            self.rises += value > self.last_value
            self.last_value = value

    def check(self, few: float) -> None:
        """At a checkpoint: halve the step sizes of samples whose loss has risen at most `few` times, and so on."""
        stalled = (self.rises <= few) | (~self.halved & (self.value_at_check >= self.best_value))
        self.ball.step_size /= 1 + stalled
        self.x_adv, self.grad = (
            torch.where(broadcast(stalled, now), best, now)
            for best, now in ((self.best, self.x_adv), (self.best_grad, self.grad))
        )
        self.halved, self.done = stalled, self.broken.clone()
        self.value_at_check = self.best_value.clone()
        self.rises.zero_()

    def part(self, rows: Tensor) -> "_Search":
        """The search on the samples `rows`, int64 [m], alone."""
        part = copy(self)
        for name, value in vars(self).items():
            if name not in ("ball", "unmoved"):
                setattr(part, name, tree_map_only(Tensor, lambda t: t[rows], value))
        part.ball = self.ball.part(rows)
        part.rows = rows if self.rows is None else part.rows
        return part


class _SparseSearch(SparseSteps, _Search):
    """In L1."""

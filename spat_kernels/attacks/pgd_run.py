"""Runs of PGD: all of its steps, or a few of them that note what may end the attack (`early_stop.py`)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..cuda_graphs.run import Batch, Run
from ..losses import value_dtype
from ..ops._common import acc_dtype, broadcast
from ..predictions import predictions

if TYPE_CHECKING:
    from .pgd import PGD

SEGMENT = 4  # steps between two looks; a cycle of 1, 2 or 4 steps, as most are, is left at once


class PGDRun(Run):
    """Projected gradient descent. With restarts the best so far is kept over the runs since the last `load`.

    Its outcome: adversarial images; nan_seen, uint8 [B], 1 for samples that met an unusable gradient.
    """

    def __init__(self, settings: "PGD", batch: Batch):
        super().__init__(settings, batch)
        self.steps, self.targeted = settings.steps, settings.targeted
        self.starts_at = "given" if batch.start is not None else "random" if settings.random_start else "clean"
        self.random_start = self.starts_at == "random"
        self.x_adv = torch.empty_like(batch.x)
        self.best: Tensor | None = None  # with restarts
        self.best_value: Tensor
        self.best_success: Tensor | None = None
        if settings.restarts > 1:
            self.best = torch.empty_like(batch.x)
            self.best_value = batch.x.new_empty(len(batch.x), dtype=acc_dtype(batch.x.dtype))
            if settings.select == "success":
                self.best_success = batch.x.new_empty(len(batch.x), dtype=torch.bool)
        self._begin_batch(batch)

    def _begin_batch(self, batch: Batch) -> None:
        super()._begin_batch(batch)
        if batch.start is not None:
            self.x_adv[: self.n].copy_(batch.start)
        if self.best is not None:
            self.best.copy_(self.ball.x)
            self.best_value.fill_(-torch.inf)
            if self.best_success is not None:
                self.best_success.zero_()

    def attempt(self, captured: bool) -> None:
        x_adv, ball = self.x_adv, self.ball
        if self.starts_at == "random":
            ball.random_start_(x_adv, self.draws)
        elif self.starts_at == "clean":
            x_adv.copy_(ball.x)
        if self.steps == 0 and self.starts_at == "given":
            ball.project_(x_adv)
        with self.model.arithmetic(x_adv.device.type):
            iterate = self.inner.laid_out(x_adv)
            self._climb(iterate)
            if iterate is not x_adv:
                x_adv.copy_(iterate)
            if self.best is not None:
                self._keep_best(self.best, self.model.logits(iterate))

    def _climb(self, iterate: Tensor) -> None:
        """All steps, in place."""
        for _ in range(self.steps):
            logits = self.model.forward(iterate)
            self.inner.step_(iterate, self.model.backward(self._logit_gradient(logits, self.reference)))

    @staticmethod
    def empty_outcome(x: Tensor) -> tuple[Tensor, ...]:
        return torch.empty_like(x), x.new_empty(len(x), dtype=torch.uint8)

    def _outcome(self) -> tuple[Tensor, ...]:
        return self.x_adv if self.best is None else self.best, self.ball.nan_seen

    def _keep_best(self, best: Tensor, logits: Tensor) -> None:
        value = torch.empty(len(logits), dtype=value_dtype(logits), device=logits.device)
        self._logit_gradient(logits, self.reference, value)
        found = None if self.best_success is None or self.y is None else predictions(logits).eq(self.y)
        success = found if found is None or self.targeted else ~found
        value = value.to(self.best_value.dtype)
        ops.keep_best_(best, self.best_value, self.best_success, self.x_adv, value, success)


class SegmentRun(PGDRun):
    """Up to `SEGMENT` steps from a given iterate.

    Its outcome: iterates; nan_seen, uint8 [B]; found, bool [B]: an iterate before the last was misclassified (or at its target)
    and stayed; SEGMENT times int64 [B], the hashes of the iterates after each step, where `stop` looks for cycles.
    """

    def __init__(self, settings: "PGD", batch: Batch):
        self.looks, self.hashes_iterates = settings.looks_for_success, settings.looks_for_cycles
        self.looks_first = settings.looks_first
        _, _, self.found, *self.hashes = self.empty_outcome(batch.x)
        super().__init__(settings, batch)

    def _climb(self, iterate: Tensor) -> None:
        self.found.zero_()
        for step in range(self.steps):
            logits = self.model.forward(iterate)
            if self.looks and (step or self.looks_first):
                assert self.y is not None
                self.found |= predictions(logits).eq(self.y) if self.targeted else predictions(logits).ne(self.y)
            grad = self.model.backward(self._logit_gradient(logits, self.reference))
            before = iterate.clone() if self.looks else iterate
            if self.hashes_iterates:
                self.inner.hashed_step_(iterate, grad, self.hashes[step].zero_())
            else:
                self.inner.step_(iterate, grad)
            if self.looks:
                iterate.copy_(torch.where(broadcast(self.found, iterate), before, iterate))

    @staticmethod
    def empty_outcome(x: Tensor) -> tuple[Tensor, ...]:
        found = x.new_empty(len(x), dtype=torch.bool)
        return *PGDRun.empty_outcome(x), found, *(x.new_empty(len(x), dtype=torch.int64) for _ in range(SEGMENT))

    def _outcome(self) -> tuple[Tensor, ...]:
        return self.x_adv, self.ball.nan_seen, self.found, *self.hashes

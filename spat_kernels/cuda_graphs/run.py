"""One batch's attack on tensors that stay where they are: run once as it is, or captured and replayed for other batches."""

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..balls import BALLS, Ball, box, fill_
from ..input_gradient.autograd import InputGradient
from ..input_gradient.choose import input_gradient
from ..input_gradient.planned_gradient import PlannedGradient
from ..losses import Loss, value_dtype
from ..ops._common import acc_dtype
from ..predictions import predictions

if TYPE_CHECKING:
    from ..attacks.pgd import PGD

# Keeps the logit gradients of confident samples out of fp16's denormals; only their direction counts.
FP16_SCALE = 128.0
# Held while random numbers are drawn, and during a capture: torch forbids other threads to draw from a generator meanwhile.
drawing = threading.RLock()


class Batch(NamedTuple):
    """What an attack is given for one batch, checked. x is dense [B, ...], y int64 [B] or None, start like x or None; eps and
    step_size are numbers, or tensors of one value or [B]; targets, int64 [B], are classes to go to from y. `runs` is the number
    of starts, of which the best is kept."""

    x: Tensor
    y: Tensor | None
    eps: float | Tensor
    step_size: float | Tensor
    start: Tensor | None = None
    targets: Tensor | None = None
    runs: int = 1

    def copy(self) -> "Batch":
        """With images and labels of its own; a run copies the rest by itself."""
        y, targets = (None if t is None else t.clone() for t in (self.y, self.targets))
        return self._replace(x=self.x.clone(), y=y, targets=targets)


class Run:
    """The attack of `settings` on one batch; a subclass says how.

    `attack` is all of it. Taken apart for a capture: `load` brings in a batch and `draw` the random numbers; what is left,
    `run()`, neither waits for the device nor looks at a value, and works on the same tensors each time. It is one run from one
    start.

    Args:
        settings: the attack. Its eps, step_size, generator and number of restarts are not looked at again.
        batch: adopted without a copy, and never written before the first `load`.

    Attributes:
        inner: the ball in which the iterates move: around the same images in the memory format that the model reads, so that no
            step converts them. Random starts and outcomes are in the caller's, so that equal seeds give equal starts.
        classes: the number of classes K, or None as long as no forward has told.
    """

    random_start = True
    targeted = False
    loss: Loss
    model: InputGradient | PlannedGradient
    inner: Ball

    def __init__(self, settings, batch: Batch):
        self.loss, self.how, self.precision = settings.loss, settings.input_gradient, settings.precision
        self.ball = BALLS[settings.norm](batch.x, batch.eps, batch.step_size, box(settings.bounds, batch.x.dtype))
        self.y, self.targets = batch.y, batch.targets
        self.draws: tuple[Tensor, ...] = ()
        self.reference: Any = None
        self.classes: int | None = None

    def load(self, batch: Batch) -> None:
        """Copy in a batch like the first one, or a shorter one: then what came before fills up the rest."""
        n = len(batch.x)
        for ours, given in ((self.ball.x, batch.x), (self.y, batch.y), (self.targets, batch.targets)):
            if ours is not None:
                assert given is not None
                ours[:n].copy_(given)
        fill_(self.ball.eps, batch.eps)
        fill_(self.ball.step_size, batch.step_size)
        self._begin_batch(batch)

    def _begin_batch(self, batch: Batch) -> None:
        self.n = len(batch.x)
        self.ball.nan_seen.zero_()

    def draw(self, generator: torch.Generator | None) -> None:
        """Draw what the next run starts from: as many numbers as the batch has samples, also where it fills only a part."""
        if not self.random_start:
            return
        with drawing:
            draws = self.ball.draw(generator, self.n)
        if not self.draws:
            self.draws = draws
        else:
            for ours, drawn in zip(self.draws, draws, strict=True):
                ours[: len(drawn)].copy_(drawn)

    def attack(self, model, generator: torch.Generator | None, runs: int, highest_label: int) -> None:
        """Attack `model`, borrowed, from `runs` starts."""
        self.model = input_gradient(model, self.ball.x, self.how, self.precision, highest_label)
        for i in range(runs):
            self.draw(generator)
            if i == 0:
                self.begin()
            self.attempt(captured=False)

    def __call__(self) -> None:
        """One run, from the clean logits on."""
        self.begin()
        self.attempt(captured=True)

    def begin(self) -> None:
        """What all runs on a batch share: the model's weights made ready, the images in the memory format that it reads, and what
        the logits are held against."""
        with self.model.arithmetic(self.ball.x.device.type):
            self.model.prepare()
            self.inner = self.ball.around(self.model.laid_out(self.ball.x))
            self.reference = self._reference()

    def _reference(self):
        clean_logits = self.model.logits(self.inner.x) if self.loss.needs_clean_logits else None
        labels: Any = self.y if self.targets is None else self.targets  # None only for a loss that uses none
        return self.loss.reference(labels, clean_logits, self.targeted)

    def attempt(self, captured: bool) -> None:
        """One run from one start. Only if it is not `captured` may it look at values."""
        raise NotImplementedError

    def release(self) -> None:
        """Forget the model and the loss, which a capture must not keep alive, but nothing that its kernels read or write.

        What was allocated during the capture may go: that memory is the graph's.
        """
        self.model.release()
        del self.loss, self.inner, self.reference

    @staticmethod
    def empty_outcome(x: Tensor) -> tuple[Tensor, ...]:
        """Tensors for the `outcome` of a batch `x`."""
        raise NotImplementedError

    @property
    def outcome(self) -> tuple[Tensor, ...]:
        """What the attack on the batch loaded last gave, adversarial images [B, ...] first. The next run overwrites it."""
        return tuple(t if len(t) == self.n else t[: self.n] for t in self._outcome())

    def _outcome(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _logit_gradient(self, logits: Tensor, reference, value: Tensor | None = None) -> Tensor:
        if self.classes is None:
            self.classes = logits.shape[1]
            self.loss.check_classes(self.classes, self.targeted)
        dlogits = torch.empty_like(logits)
        scale = FP16_SCALE if logits.dtype == torch.float16 else 1.0
        self.loss.gradient(logits, reference, dlogits, value, targeted=self.targeted, scale=scale)
        return dlogits


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
            for _ in range(self.steps):
                logits = self.model.forward(iterate)
                self.inner.step_(iterate, self.model.backward(self._logit_gradient(logits, self.reference)))
            if iterate is not x_adv:
                x_adv.copy_(iterate)
            if self.best is not None:
                self._keep_best(self.best, self.model.logits(iterate))

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

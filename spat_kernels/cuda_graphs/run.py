"""One batch's attack on tensors that stay where they are: run once as it is, or captured and replayed for other batches."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..balls import BALLS, Ball, box, fill_
from ..input_gradient.autograd import InputGradient
from ..input_gradient.choose import input_gradient
from ..input_gradient.planned_gradient import PlannedGradient
from ..losses import Loss
from ..model_state.borrow import parts
from ..precision import logit_gradient_scale
from ..rng import rng_lock


class Batch(NamedTuple):
    """What an attack is given for one batch, checked.

    x is dense [B, ...], y int64 [B] or None, start like x or None; eps and step_size are numbers, or tensors of one value or [B].
    targets, int64 [B], are classes to go to from y. clean_logits [B, K], those at x, are for losses that need them (None: a run
    asks the model). `runs` is the number of starts, of which the best is kept.
    """

    x: Tensor
    y: Tensor | None
    eps: float | Tensor
    step_size: float | Tensor
    start: Tensor | None = None
    targets: Tensor | None = None
    clean_logits: Tensor | None = None
    runs: int = 1

    def copy(self) -> "Batch":
        """With images and labels of its own; a run copies the rest by itself."""
        y, targets, logits = (None if t is None else t.clone() for t in (self.y, self.targets, self.clean_logits))
        return self._replace(x=self.x.clone(), y=y, targets=targets, clean_logits=logits)


class Passes(NamedTuple):
    """Forwards and backwards of the model that samples took part in: of all alike, or of each, int64 [B]."""

    forwards: int | Tensor
    backwards: int | Tensor


def followed(loss: Loss, gradient: InputGradient | PlannedGradient, model) -> Loss:
    """`loss` as attacks on `model` through `gradient` follow it: where samples may mix, with gradients of their true lengths."""
    if gradient.independent_samples or not isinstance(model, nn.Module):
        return loss
    return loss.unnormalized() if any(_mixes_samples(module) for tree in parts(model) for module in tree) else loss


def _mixes_samples(module: nn.Module) -> bool:
    """Whether it may: by statistics of the batch, or in train mode by code of a user's."""
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return module.training and not type(module).__module__.startswith("torch.nn.")


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
        classes: the number of classes K, None before the first forward.
    """

    random_start = True
    targeted = False
    loss: Loss
    model: InputGradient | PlannedGradient
    inner: Ball

    def __init__(self, settings, batch: Batch):
        self.loss, self.path, self.precision = settings.loss, settings.input_gradient, settings.precision
        self.fuse = settings.fuse
        self.ball = BALLS[settings.norm](batch.x, batch.eps, batch.step_size, box(settings.bounds, batch.x.dtype))
        self.y, self.targets, self.clean_logits = batch.y, batch.targets, batch.clean_logits
        self.draws: tuple[Tensor, ...] = ()
        self.reference: Any = None
        self.classes: int | None = None

    def load(self, batch: Batch) -> None:
        """Copy in a batch like the first one, or a shorter one: then what came before fills up the rest."""
        n = len(batch.x)
        kept = (self.ball.x, batch.x), (self.y, batch.y), (self.targets, batch.targets), (self.clean_logits, batch.clean_logits)
        for ours, given in kept:
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
        with rng_lock:  # over all that a ball draws, or threads on one generator would share it out between them
            draws = self.ball.draw(generator, self.n)
        if not self.draws:
            self.draws = draws
        else:
            for ours, drawn in zip(self.draws, draws, strict=True):
                ours[: len(drawn)].copy_(drawn)

    def attack(self, model, generator: torch.Generator | None, runs: int, highest_label: int) -> None:
        """Attack `model`, borrowed, from `runs` starts."""
        self.model = input_gradient(model, self.ball.x, self.path, self.precision, highest_label, self.fuse)
        self.loss = followed(self.loss, self.model, model)
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
        clean_logits = self.clean_logits
        if clean_logits is None and self.loss.needs_clean_logits:
            clean_logits = self.model.logits(self.inner.x)
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

    @property
    def passes(self) -> Passes:
        """Forwards and backwards since the attack began."""
        return Passes(self.model.forwards, self.model.backwards)

    def _logit_gradient(self, logits: Tensor, reference, value: Tensor | None = None) -> Tensor:
        if self.classes is None:
            self.classes = logits.shape[1]
            self.loss.check_classes(self.classes, self.targeted)
        dlogits = torch.empty_like(logits)
        scale = logit_gradient_scale(logits.dtype)  # only the direction counts
        self.loss.gradient(logits, reference, dlogits, value, targeted=self.targeted, scale=scale)
        return dlogits

"""PGD as adv_lib does it: the last iterate that is misclassified comes out, and the image itself where there is none."""

import torch
from torch import Tensor

from ...attacks.pgd import PGD
from ...attacks.pgd_run import PGDRun
from ...balls import as_values
from ...interrupts import deferred
from ...losses import AutogradLoss
from ...model_state.borrow import borrowed
from ...ops._common import broadcast
from ...predictions import predictions
from ...rng import draw


class LastSuccessRun(PGDRun):
    """`steps` iterates are looked at, the start first: so the last forward is followed by no step."""

    def _climb(self, iterate: Tensor) -> None:
        assert self.y is not None
        last = self.inner.x.clone()
        for step in range(self.steps):
            ends = step == self.steps - 1
            logits = self.model.logits(iterate) if ends else self.model.forward(iterate)
            classes = predictions(logits)
            success = classes.eq(self.y) if self.targeted else classes.ne(self.y)
            last = torch.where(broadcast(success, iterate), iterate, last)
            gradient = self._logit_gradient(logits, self.reference)  # which checks the number of classes too
            if not ends:
                self.inner.step_(iterate, self.model.backward(gradient))
        iterate.copy_(last)


class LastSuccess(PGD):
    """`PGD` in the L-infinity ball and [0, 1], whose last successful iterate comes out."""

    run_class = LastSuccessRun

    def draw_start(self, x: Tensor) -> Tensor:
        """Random points of the ball, from the numbers that adv_lib draws."""
        noise = draw("uniform_", *x.shape, dtype=x.dtype, device=x.device, generator=self.generator) * 2 - 1
        return (x + noise * broadcast(as_values(self.eps, x), x)).clamp(0, 1).to(x.dtype)


def model_logits(model, x: Tensor, bn_mode: str) -> Tensor:
    """[B, K], on a copy of x, since the model may write on its input."""
    with deferred, torch.no_grad(), borrowed(model, bn_mode):
        return model(x.detach().clone())


def wrong_or_clean(x_adv: Tensor, model, x: Tensor, y: Tensor, bn_mode: str, targeted: bool = False) -> tuple[Tensor, Tensor]:
    """`x_adv` where the model classifies it as something else than y (as y, if `targeted`), else x; and where, bool [B]."""
    success = (predictions(model_logits(model, x_adv, bn_mode)) == y) == targeted
    return torch.where(broadcast(success, x), x_adv, x.detach()), success


class TargetedDLR(AutogradLoss):
    """(max_{k != t} z_k - z_t) / (z_1 - (z_3 + z_4) / 2 + 1e-8), z_1 >= z_2 >= ..., which attacks towards t minimise.

    `losses.DLR` compares the target with the class that is likeliest for the clean image instead.
    """

    @classmethod
    def fewest_classes(cls, targeted):
        return 4

    def value(self, logits, reference):
        target = reference[:, None]
        lead = logits.scatter(1, target, -torch.inf).amax(1) - logits.gather(1, target)[:, 0]
        highest, _, third, fourth = logits.topk(4, 1).values.T
        return lead / (highest - (third + fourth) / 2 + 1e-8)

"""ADT-EXP: samples of an adversarial distribution of perturbations (Dong et al., NeurIPS 2020, arXiv 2002.05999).

    x_adv = clamp(x + eps tanh(mu + softplus(rho) r)),  r ~ N(0, 1) for each pixel

mu and rho, which start at 0, maximise the mean of loss(f(x_adv), y) + entropy * H, where H is the mean over the pixels of
log softplus(rho) + log(1 - tanh^2): the entropy of the distribution, up to constants. Each step averages the gradients at a few
samples, and is that of Adam with betas = (0, 0). One kernel does it, and draws the next sample (`ops/adt.py`).

Lengths of gradients count here, since those of the loss and of the entropy are added. So the loss is its `unnormalized` form.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks, ops
from ..cuda_graphs.run import Batch
from ..ops._common import acc_dtype
from ..precision import logit_gradient_scale
from ..settings import Norm, Select
from .pgd import PGD
from .pgd_run import PGDRun

LARGEST = 1e6  # step and weight: far from where fp32 overflows


class ADTRun(PGDRun):
    """Learns the distribution of each image, and draws from it."""

    def __init__(self, settings: "ADT", batch: Batch):
        super().__init__(settings, batch)
        self.loss = self.loss.unnormalized()
        self.samples, self.lr, self.entropy = settings.samples, settings.lr, settings.entropy

    def attempt(self, captured: bool) -> None:
        with self.model.arithmetic(self.x_adv.device.type):
            iterate = torch.empty_like(self.inner.x)
            self._climb(iterate)
            self.x_adv.copy_(iterate)

    def _climb(self, iterate: Tensor) -> None:
        ball, (seed,) = self.inner, self.draws
        dtype = acc_dtype(iterate.dtype)
        mu, rho = (torch.zeros_like(iterate, dtype=dtype) for _ in range(2))
        sum_mu, sum_rho = (torch.zeros_like(mu) if self.samples > 1 else None for _ in range(2))
        entropy = self.entropy / (iterate[0].numel() * self.samples)
        ops.adt_sample_(iterate, mu, rho, ball.x, ball.eps, seed, 0, *ball.bounds)
        for i in range(self.steps * self.samples):
            logits = self.model.forward(iterate)
            grad = ball.laid_out(self.model.backward(self._logit_gradient(logits, self.reference)))
            ops.adt_step_(
                iterate, mu, rho, ball.x, grad, ball.eps, self._factor(logits, dtype), seed, i, self.lr, entropy, *ball.bounds,
                ball.nan_seen, sum_mu, sum_rho, last=(i + 1) % self.samples == 0,
            )  # fmt: skip

    def _factor(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """What the last gradient is to be multiplied by, [1] or [B], for the mean over the samples of a step."""
        scale = 1 / (logit_gradient_scale(logits.dtype) * self.samples)
        factor = self.model.factor
        return torch.full((1,), scale, dtype=dtype, device=logits.device) if factor is None else factor.to(dtype) * scale


@dataclass(eq=False, kw_only=True)
class ADT(PGD):
    """Samples of adversarial distributions as a reusable object: `attack = ADT(8/255)`, then `attack(model, x, y)`.

    A call, `run` and `launch` are those of `PGD`, except that there is no `start`, and what comes out is one sample of the
    distribution that was learned for each image. It is for training: as attacks, PGD and APGD are stronger.

    In x + eps tanh(mu + softplus(rho) r), r ~ N(0, 1), mu is the mean of each pixel before tanh, and softplus(rho) its scale
    (Dong et al., NeurIPS 2020, arXiv 2002.05999, ADT-EXP). Both start at 0.

    targeted, bounds, precision, input_gradient, fuse, bn_mode and graph are as in `PGD`, whose other arguments it does not take.

    Args:
        eps: radius of the L-infinity ball in the units of x, a number or one per sample as a tensor [B].
        loss: what is maximised, in its `unnormalized` form.
        steps: of mu and rho, >= 0.
        lr: longest step of each, in [0, 1e6].
        entropy: weight of the entropy, in [0, 1e6].
        samples: gradients that each step averages, >= 1, each of a forward and a backward. The authors' code has 5, and adds up
            those of all steps so far.
        generator: source of the noise. Equal seeds give equal noise in equal memory formats of what the model reads.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.
    """

    steps: int = 7
    lr: float = 0.3
    entropy: float = 0.01
    samples: int = 1
    # What PGD has beside: fixed.
    norm: Norm = field(default="linf", init=False, repr=False)
    restarts: int = field(default=1, init=False, repr=False)
    step_size: None = field(default=None, init=False, repr=False)
    random_start: bool = field(default=True, init=False, repr=False)
    select: Select = field(default="success", init=False, repr=False)
    stop: None = field(default=None, init=False, repr=False)
    budget: None = field(default=None, init=False, repr=False)

    run_class: ClassVar[type[PGDRun]] = ADTRun

    def __post_init__(self):
        super().__post_init__()
        checks.check_count("samples", self.samples, 1)
        for name in ("lr", "entropy"):
            checks.check_number(name, getattr(self, name), lambda v: 0 <= v <= LARGEST, f"in [0, {LARGEST:g}]")

    def kind(self) -> tuple:
        return *super().kind(), self.lr, self.entropy, self.samples

    @property
    def passes(self) -> int:
        return self.steps * self.samples + 1

    def _check(self, model, x, y, start) -> None:
        if start is not None:
            raise ValueError("start is given, but ADT draws its first sample around x: leave it out")
        super()._check(model, x, y, start)

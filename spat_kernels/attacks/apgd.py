"""Auto-PGD: projected gradient ascent that chooses its step sizes itself (Croce & Hein, arXiv 2003.01690, section 3).

    x_0     = a random point of the surface of the ball
    z       = project(x_t + step_size * direction(d loss / d x_t))
    x_{t+1} = project(x_t + 0.75 (z - x_t) + 0.25 (x_t - x_{t-1}))                                           (x_1 = z)

The step size starts at 2 eps. At checkpoints, fixed beforehand (`checkpoints`), it is halved for a sample, and the run continues
from its best point, if since the last checkpoint the loss rose in at most a share rho of the steps, or if the step size was not
halved then and the best loss has not changed since. As in the authors' code the first step rises if its loss is positive.

L1 has steps and checkpoints of its own (apgd_l1.py).

Everything is a tensor with a value per sample, so a run never waits for the device: the schedule knows no data.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..cuda_graphs.cache import graphs
from ..cuda_graphs.run import Batch
from ..input_gradient.choose import check_precision
from ..losses import LossLike, as_loss, value_dtype
from ..ops._common import acc_dtype
from ..predictions import other_classes, predictions
from ..settings import TARGETINGS, Graph, Targeting
from ._common import RestartedAttack, Result, Tally, all_or_nothing, as_dense, take_rows, warn_of_nan
from .apgd_run import APGDRun, AscentRun
from .targeting import malt_passes, nearest_classes


@dataclass(eq=False, kw_only=True)
class APGD(RestartedAttack):
    """Auto-PGD as a reusable object: `attack = APGD(8/255)`, then `attack(model, x, y)`.

    AutoAttack's APGD-CE is `APGD(eps)`, its APGD-T is `APGD(eps, loss="dlr", targets=9)`.

    Args:
        loss: what is maximised, as for `PGD`. If eot > 1, its `unnormalized` form.
        steps: gradient steps, >= 1; a run takes steps + 1 forwards (steps + 3 with multi_eps) and steps backwards.
        restarts: runs from different random starts (for each target), of what is not misclassified yet.
        rho: the share of steps that must raise the loss, in [0, 1]: see above. Not in L1.
        eot: number of passes over which gradients and losses are averaged, for models that draw random numbers (expectation over
            transformations); the class is that of the mean logits. Models that take the plan draw none: there it is one pass.
        targeted: move towards the classes y instead of away from them. Then images are broken where they are classified as y.
        targets: None moves away from y. n >= 1 goes in turn towards each of the n first wrong classes for x, where "dlr" is the
            targeted form, Eq. 7, between y and the target.
        targeting: which wrong classes are first: "confidence", the likeliest; or "malt", those whose boundaries are nearest, for
            a backward for each of the K - 1 (at most 100) candidates (targeting.py).
        multi_eps: whether a run spends 60 % of its steps in balls of 3 and 2 eps first (apgd_l1.py), as AutoAttack does in L1.
            None is True for L1, and False for the others, which know no such form.
        eps, norm, bounds, precision, input_gradient, fuse, bn_mode, budget, generator, graph: as for `PGD`; a capture is that of
            a run. What is misclassified is left out of the next run, and on CPUs, in models that take the plan, out of the rest
            of its own. A run for which the budget does not suffice ends early, in L1 with multi_eps with all three balls.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.
    """

    loss: LossLike = "ce"
    steps: int = 100
    rho: float = 0.75
    eot: int = 1
    targeted: bool = False
    targets: int | None = None
    targeting: Targeting = "confidence"
    multi_eps: bool | None = None
    graph: Graph = "auto"

    run_class = APGDRun  # what `graphs` runs and captures
    last: ClassVar[int | None] = None  # the step after which a run ends that the budget does not suffice for

    def __post_init__(self):
        checks.check_flag("targeted", self.targeted)
        self.loss = loss = as_loss(self.loss)
        loss.check_targeted(self.targeted or self.targets is not None)
        super().__post_init__()
        checks.check_auto_or_flag("graph", self.graph)
        for name in ("steps", "eot"):
            checks.check_count(name, getattr(self, name), 1)
        if self.targets is not None:
            checks.check_count("targets", self.targets, 1)
            if self.targeted:
                raise ValueError(f"targets={self.targets} with targeted=True: both say where to go: leave one out")
        checks.check_choice("targeting", self.targeting, TARGETINGS)
        if self.targeting == "malt" and self.targets is None:
            raise ValueError("targeting='malt' is an order of targets: give targets=9, or leave it out")
        checks.check_number("rho", self.rho, lambda v: 0 <= v <= 1, "in [0, 1], the share of steps that must raise the loss")
        if self.multi_eps is not None:
            checks.check_flag("multi_eps", self.multi_eps)
        if self.multi_eps and self.norm != "l1":
            raise ValueError(f"multi_eps=True with norm={self.norm!r}: it is for L1: leave it out")

    def __call__(self, model, x: Tensor, y: Tensor) -> Tensor:
        """`run`, of which the images alone are returned."""
        return self.run(model, x, y).x_adv

    @all_or_nothing
    def run(self, model, x: Tensor, y: Tensor) -> Result:
        """Attack `model` at the images `x`.

        Nothing of the caller's changes, as for `PGD`. Images that are misclassified as they are come back as they are. Of the
        others, those that some iterate broke come back as the iterate of the highest loss among the misclassified ones of that
        run (up to the first checkpoint at which one has been found); the rest as that of the highest loss among all runs.

        Args:
            model: module or callable, x -> logits [B, K].
            x: images [B, ...] inside `bounds` in fp32, fp16, bf16 or fp64.
            y: int64 [B], the true labels, or the targets.

        Returns:
            Result: adversarial images with x's shape, dtype, device and memory format, without a graph: inside the ball (to one
            rounding of x's dtype) and exactly inside `bounds`; and what each cost.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.

        Warns:
            RuntimeWarning: as for `PGD`, the gradient was NaN for some samples.
        """
        highest_label, tally = self._check_batch(model, x, y), Tally(x, self.budget)
        if x.numel() == 0:
            return tally.result(x.detach().clone())
        x, y = as_dense(x, y)
        with self._prepared_gradient(model, x, y, highest_label) as (gradient, _, _):
            logits, runs = self._runs(gradient, x, y, tally)
            eot = 1 if gradient.deterministic else self.eot
            tally.add(slice(None), 1, gradient.backwards if self.budget is None else 0)
        robust, x_adv = (predictions(logits) == y) != self.targeted, x.clone()
        clean_logits = logits if self.targeted and as_loss(self.loss).needs_clean_logits else None
        value = torch.full_like(y, -torch.inf, dtype=acc_dtype(x.dtype))
        nan_seen = torch.zeros_like(y, dtype=torch.uint8)
        for targets, possible in runs:
            for _ in range(self.restarts):
                for rows, left in tally.affordable((robust & possible).nonzero()[:, 0], eot, eot * self._evaluations):
                    batch = self._batch(x, y, targets, clean_logits, rows)
                    outcome = graphs.attack(self._within(left, eot), model, batch, highest_label)
                    found, nans, values, broken = outcome.tensors
                    better = broken | (values > value[rows])
                    taken = rows[better]
                    x_adv[taken], value[taken] = found[better], values[better]
                    nan_seen[rows] |= nans
                    robust[rows] = ~broken
                    tally.add(rows, *outcome.passes)
        warn_of_nan(int(nan_seen.sum()), len(x))
        return tally.result(x_adv)

    @all_or_nothing
    def launch(self, model, x: Tensor, y: Tensor, *, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One run for adversarial training, that does not wait for the device, as `PGD.launch` does not.

        Of each image it gives the iterate of the highest loss, misclassified or not, the first one included: so does the training
        of Singh et al. (arXiv 2303.01870), with steps=2 and start=x. Nobody looks at the values in x, y and start.

        Args:
            model, x, y: as for `run`.
            start: the first iterate, like x and inside the ball. Default: a random point of its surface.

        Returns:
            tuple: adversarial images, as of `run`; uint8 [B], 1 for samples that met an unusable gradient.

        Raises:
            TypeError, ValueError: an argument does not fit, or `restarts`, `targets` or `budget` ask for more than one run.
        """
        if self.restarts > 1 or self.targets is not None or self.budget is not None:
            asked = f"restarts={self.restarts}, targets={self.targets} and budget={self.budget}"
            raise ValueError(f"{asked}: launch is one run, untargeted or towards y: call the attack, or leave them out")
        checks.check_images(x)
        checks.check_callable(model)
        check_precision(self.precision, x)
        self._check_radius(x)
        checks.check_labels(y, x)
        if start is not None:
            checks.check_start(start, x)
        if x.numel() == 0:
            return x.detach().clone(), x.new_zeros(len(x), dtype=torch.uint8)
        ascent: Any = copy(self)
        ascent.run_class = AscentRun
        x, y = as_dense(x, y)
        outcome = graphs.attack(ascent, model, Batch(x, y, self.eps, 2 * self.eps, start), highest_label=-1)
        x_adv, nan_seen, *_ = outcome.tensors
        return x_adv, nan_seen

    @property
    def _evaluations(self) -> int:
        """Forwards and backwards of a run, each of which is `eot` passes."""
        return 2 * self.steps + (3 if self.in_larger_balls else 1)

    def _within(self, left: int | None, eot: int) -> "APGD":
        """The attack, of which a run takes no more than `left` passes (None: all that it needs)."""
        if left is None:
            return self
        shorter: Any = copy(self)
        fitting = (left // eot - 3) // 2
        if self.in_larger_balls and fitting > 0:
            shorter.steps = fitting
        else:
            shorter.multi_eps, shorter.last = False, (left // eot - 1) // 2
        return shorter

    def kind(self) -> tuple:
        """What tells captures of this class apart, beside what all attacks have."""
        return self.steps, self.rho, self.eot, self.targeted, self.last, self.in_larger_balls

    @property
    def passes(self) -> int:
        """Forwards of a run, at most."""
        return (self.steps + (3 if self.in_larger_balls else 1)) * self.eot

    @property
    def in_larger_balls(self) -> bool:
        """`multi_eps`, or what None stands for."""
        return self.norm == "l1" if self.multi_eps is None else self.multi_eps

    def _runs(self, gradient, x: Tensor, y: Tensor, tally: Tally) -> tuple[Tensor, list[tuple[Tensor | None, Tensor]]]:
        """The logits of the clean images; and for each run the classes to go to, int64 [B], in the order of `targeting`, None
        where the attack is not targeted, and which of the samples, bool [B], can go there."""
        keeps = self.targeting == "malt" and self.budget is None
        logits = gradient.forward(x) if keeps else gradient.logits(x)
        classes = logits.shape[1]
        as_loss(self.loss).check_classes(classes, self.targeted or self.targets is not None)
        if self.targets is None:
            return logits, [(None, torch.ones_like(y, dtype=torch.bool))]
        if self.targets >= classes:
            raise ValueError(f"targets={self.targets}, but the model has {classes} classes: at most {classes - 1} are wrong")
        if self.targeting == "malt":
            wrong, possible = self._nearest(gradient, logits, x, y, tally)
        else:
            wrong, possible = other_classes(logits, y)
        return logits, list(zip(*(t[:, : self.targets].T.contiguous() for t in (wrong, possible)), strict=True))

    def _nearest(self, gradient, logits: Tensor, x: Tensor, y: Tensor, tally: Tally) -> tuple[Tensor, Tensor]:
        """MALT's order of the wrong classes. A sample whose budget does not suffice for it can go to none."""
        if self.budget is None:
            return nearest_classes(gradient, logits, y, self.norm, value_dtype(logits))
        wrong, possible = other_classes(logits, y)
        rows = (~tally.spent(torch.arange(len(y), device=y.device), 1 + malt_passes(logits.shape[1]))).nonzero()[:, 0]
        able = torch.zeros_like(possible)
        if len(rows):
            wrong[rows], able[rows] = nearest_classes(
                gradient, gradient.forward(x[rows]), y[rows], self.norm, value_dtype(logits)
            )
            tally.add(rows, 1, gradient.backwards)
        return wrong, able

    def _batch(self, x: Tensor, y: Tensor, targets: Tensor | None, clean_logits: Tensor | None, rows: Tensor) -> Batch:
        eps = self.eps
        if len(rows) < len(x):
            x, y, eps = x[rows], y[rows], take_rows(eps, rows)
            targets, clean_logits = (None if t is None else t[rows] for t in (targets, clean_logits))
        return Batch(x, y, eps, 2 * eps, targets=targets, clean_logits=clean_logits)

"""AutoAttack: attacks without parameters to tune, one after the other, each on what is still correct (arXiv 2003.01690).

standard    APGD-CE, APGD-T, FAB-T, Square
fast        APGD-PMA, APGD-T towards the two nearest classes (MALT, targeting.py), then standard on close calls alone: images
            whose label has lost most of its lead p_y - max p_k. Where gradients are masked, or logits are so large that every
            p is 0 or 1, images that could be broken are no close calls: `exhaustive` has standard follow on all that is left
plus        APGD-CE and APGD-DLR (5 restarts each), FAB (5 restarts), Square, APGD-T, FAB-T
rand        APGD-CE and APGD-DLR, each gradient averaged over 20 passes, for models that draw random numbers

In L1 (arXiv 2103.01208) APGD searches in larger balls first, and "standard" has 5 restarts of APGD-CE and 5 targets of APGD-T.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, losses
from ..input_gradient.autograd import InputGradient
from ..interrupts import deferred
from ..model_state.borrow import borrowed
from ..ops._common import acc_dtype
from ..predictions import predictions, probability_lead
from ..settings import AttackSettings, Graph, Precision, Targeting, Version
from . import gradient_masking
from ._common import BallAttack, Tally, as_dense, take_rows
from .apgd import APGD
from .fab import FAB
from .square import Square, check_pixels
from .targeting import malt_passes

VERSIONS: dict[Version, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "fast": ("apgd-pma", "apgd-t-malt", "apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
ATTACKS = tuple(dict.fromkeys(VERSIONS["plus"] + VERSIONS["fast"]))
LOSS_OF = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-pma": "pma", "apgd-t": "dlr", "apgd-t-malt": "dlr"}
TARGETS, TARGETS_L1, TARGETS_FAST = {"apgd-t": 9, "apgd-t-malt": 9, "fab-t": 9}, 5, 2
FIRST = VERSIONS["fast"][:2]  # what comes before the close calls
CLOSE = 0.15  # the share of its lead that a close call has left, at most; benchmarks/NOTES.md says what that finds and costs


def fewest_classes(name: str) -> int:
    """How many classes a model must have for the attack `name`."""
    return losses.LOSSES[LOSS_OF[name]].fewest_classes(targeted=name in TARGETS) if name in LOSS_OF else 2


class Result(NamedTuple):
    """What AutoAttack found.

    Attributes:
        x_adv: like x: misclassified images where there are any, else x.
        forwards, backwards: int64 [B], the passes of the model that a sample was in until it was done, as in
            other attacks.
        broken_by: int64 [B], index in `names` of what broke a sample, or -1: robust.
        names: "clean" (misclassified without an attack), then the attacks in their order.
    """

    x_adv: Tensor
    forwards: Tensor
    backwards: Tensor
    broken_by: Tensor
    names: tuple[str, ...]

    @property
    def robust(self) -> Tensor:
        """bool [B], correct under every attack."""
        return self.broken_by < 0


@dataclass(eq=False, kw_only=True)
class AutoAttack(BallAttack):
    """AutoAttack as a reusable object: `AutoAttack(8/255)(model, x, y)`, or `.run(model, x, y)` to learn what broke what.

    Each call draws the same random numbers, from a generator of its own.

    Args:
        version: "standard" (APGD-CE, APGD-T, FAB-T, Square), "fast" (APGD-PMA, APGD-T to 2 classes by MALT, then "standard" on
            close calls), "plus" or "rand"; or names of attacks in their order, of those in "plus" and "fast": each with one
            restart, and towards 9 classes if targeted.
        exhaustive: whether in "fast" the attacks of "standard" are made on all that is left. Without it what only Square can
            break is not looked for. The smaller the logits, the more images are close calls, and the more "fast" costs.
        steps: of APGD and FAB.
        queries: of Square, which "rand" leaves out.
        seed: of all random numbers that are not the model's.
        batch_size: number of images attacked at once; None is all.
        eps, norm, bounds, precision, input_gradient, fuse, bn_mode, budget, graph: as for `PGD`. Whether an image is
            misclassified is always judged by the model itself, in the caller's arithmetic.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.
    """

    version: Version | tuple[str, ...] = "standard"
    exhaustive: bool = False
    steps: int = 100
    queries: int = 5000
    seed: int = 0
    batch_size: int | None = None
    graph: Graph = "auto"

    def __post_init__(self):
        super().__post_init__()
        checks.check_flag("exhaustive", self.exhaustive)
        checks.check_count("seed", self.seed, 0)
        if self.batch_size is not None:
            checks.check_count("batch_size", self.batch_size, 1)
        if not isinstance(self.version, (tuple, list)):
            checks.check_choice("version", self.version, VERSIONS)
        elif not self.version:
            raise ValueError(f"version={self.version!r} names no attack: give some of {', '.join(map(repr, ATTACKS))}")
        if self.exhaustive and self.version != "fast":
            raise ValueError(f"exhaustive=True goes with version='fast', got version={self.version!r}: leave it out")
        for name in self.attacks:
            checks.check_choice("version", name, ATTACKS)
        for name in ATTACKS:
            self._attack(name, max(TARGETS.values()) + 1, self.eps, None, self.precision)  # they check the rest

    @property
    def attacks(self) -> tuple[str, ...]:
        """The names of the attacks, in their order."""
        return VERSIONS[self.version] if isinstance(self.version, str) else tuple(self.version)

    def __call__(self, model, x: Tensor, y: Tensor) -> Tensor:
        """`run`, of which the images alone are returned."""
        return self.run(model, x, y).x_adv

    @deferred
    def run(self, model, x: Tensor, y: Tensor) -> Result:
        """Attack `model` at the images `x`.

        The model, x, y and the global random states are afterwards as they were, but for what the model draws.

        Args:
            model: module or callable, x -> logits [B, K], with K >= 4, for "rand" 3.
            x: images [B, C, H, W] inside `bounds` in fp32, fp16, bf16 or fp64.
            y: int64 [B], the true labels.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.

        Warns:
            RuntimeWarning: a sign that the result may be too good (`gradient_masking.py`): outputs that are random (or, for
                "rand", not), probabilities instead of logits, NaN; gradients that are 0; images that Square breaks and gradients
                do not ("fast" asks it about close calls alone). The gradient was NaN for some samples, as for `PGD`.
        """
        *_, result = self.stages(model, x, y)
        return result

    @torch.inference_mode(False)
    @torch.no_grad()
    def stages(self, model, x: Tensor, y: Tensor) -> Iterator[Result]:
        """`run` one attack at a time: yields what is found by then, first without an attack and then after each of them.

        It is the same `Result` every time, whose tensors are written to.
        """
        highest_label = self._check_batch(model, x, y)
        if "square" in self.attacks:
            check_pixels(x, self.norm, self._instead(lambda name: name != "square"))
        x, y = as_dense(x, y)
        generator = torch.Generator(x.device).manual_seed(self.seed)
        tally = Tally(x, self.budget)
        result = Result(x.clone(), tally.forwards, tally.backwards, torch.full_like(y, -1), ("clean", *self.attacks))
        lead = torch.ones(len(x), dtype=acc_dtype(x.dtype), device=x.device)
        classes, only_here = self._without_attack(model, x, y, highest_label, result, tally, lead)
        close = CLOSE * lead
        for rows in self._batches(result.robust & ~only_here)[:1]:
            self._warn_of_signs(model, x[rows], y[rows], highest_label)
        yield result
        for number, name in enumerate(self.attacks, 1):
            attacked = result.robust
            if self._asks_close_calls and name not in FIRST:
                attacked = attacked & ~(lead > close)  # NaN is close
            # Attacks leave alone what is misclassified as it is: what is so in `precision` only, they attack without.
            for precision, chosen in ((self.precision, ~only_here), (None, only_here)):
                for batch in self._batches(attacked & chosen):
                    poor = tally.spent(batch, self._least(name, classes))
                    lead[batch[poor]] = 0  # it may be close: this attack does not say
                    rows = batch[~poor]
                    if not len(rows):
                        continue
                    attack = self._attack(name, classes, take_rows(self.eps, rows), generator, precision)
                    attack.budget = None if self.budget is None else tally.left(rows) - 1
                    found, forwards, backwards = attack.run(model, x[rows], y[rows])
                    tally.add(rows, forwards, backwards)
                    tally.add(rows, 1)
                    logits = self._logits(model, found, highest_label)
                    self._lower(lead, rows, logits, y)
                    broken = predictions(logits) != y[rows]
                    result.x_adv[rows[broken]] = found[broken]
                    result.broken_by[rows[broken]] = number
            if name == "square" and number > 1:
                self._warn_of_square(int((result.broken_by == number).sum()), len(x))
            yield result

    def _without_attack(
        self, model, x: Tensor, y: Tensor, highest_label: int, result: Result, tally: Tally, lead: Tensor
    ) -> tuple[int, Tensor]:
        """Put what is misclassified as it is into `result`, the leads of labels into `lead`, and warn of strange logits.

        Returns:
            tuple: the number of classes, 0 without images; bool [B], what is misclassified in `precision` only.
        """
        classes, unanswered, probabilities = 0, 0, True
        only_here = torch.zeros_like(y, dtype=torch.bool)
        for rows in self._batches(result.robust):
            logits = self._logits(model, x[rows], highest_label)
            tally.add(rows, 1)
            if not classes:
                classes = logits.shape[1]
                self._check_classes(classes)
            unanswered += int(logits.isnan().any(1).sum())
            probabilities = probabilities and gradient_masking.are_probabilities(logits)
            result.broken_by[rows[predictions(logits) != y[rows]]] = 0
            self._lower(lead, rows, logits, y)
            rows = rows[~tally.spent(rows)]
            if self.precision is not None and len(rows):
                tally.add(rows, 1)
                with self._prepared_gradient(model, x[rows], y[rows], highest_label) as (gradient, images, labels):
                    only_here[rows] = predictions(gradient.logits(images)) != labels
        if unanswered:
            checks.warn(f"the logits of {unanswered} of {len(x)} images are NaN, which counts as misclassified")
        if classes and probabilities:
            checks.warn("the model seems to return probabilities: give its logits, whose gradients do not vanish")
        return classes, only_here

    def _warn_of_square(self, alone: int, images: int) -> None:
        if alone > gradient_masking.SQUARE_SHARE * images:
            checks.warn(
                f"Square, which needs no gradients, broke {alone} of {images} images, and the attacks by gradients did not: "
                "the gradients may be masked, and the model less robust than it looks"
            )

    def _warn_of_signs(self, model, x: Tensor, y: Tensor, highest_label: int) -> None:
        """What the authors' code warns of, looked for on images that are correct."""
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            differ, allowed = gradient_masking.logit_difference(*(self._logits(model, x, highest_label) for _ in range(2)))
        if differ > allowed and self.version != "rand":
            checks.warn(f"the model seems to draw random numbers (its logits differ by {differ:.2g}): use version='rand'")
        if differ <= allowed and self.version == "rand":
            checks.warn("the model draws no random numbers: version='standard' is the stronger one for it")
        if self.attacks != ("square",):
            with self._prepared_gradient(model, x, y, highest_label) as (gradient, images, labels):
                zero = int(gradient_masking.has_no_gradient(gradient, images, labels).sum())
            if zero:
                checks.warn(
                    f"the gradient of the margin is 0 or NaN at {zero} of the first {len(x)} images: attacks by gradients cannot "
                    f"move them, so they may look robust without being so{': use exhaustive=True' * self._asks_close_calls}"
                )

    def _attack(
        self, name: str, classes: int, eps: float | Tensor, generator: torch.Generator | None, precision: Precision | None
    ) -> APGD | FAB | Square:
        in_l1 = self.norm == "l1" and self.version in ("standard", "fast")
        repeated = ("apgd-ce", "apgd-dlr", "fab") if self.version == "plus" else ("apgd-ce",) if in_l1 else ()
        restarts = 5 if name in repeated else 1
        common: AttackSettings = {
            "norm": self.norm, "restarts": restarts, "bounds": self.bounds, "precision": precision,
            "input_gradient": self.input_gradient, "fuse": self.fuse, "bn_mode": self.bn_mode, "generator": generator,
        }  # fmt: skip
        targets = TARGETS.get(name)
        if name == "apgd-t" and in_l1:
            targets = TARGETS_L1
        elif name == "apgd-t-malt" and self.version == "fast":
            targets = TARGETS_FAST
        targets = targets and min(targets, classes - 1)
        if name == "square":
            return Square(eps, queries=self.queries, rescale=False, **common)  # as in the authors' code
        if name.startswith("fab"):
            return FAB(eps, steps=self.steps, targets=targets, **common)
        eot = 20 if self.version == "rand" else 1
        targeting: Targeting = "malt" if name.endswith("-malt") else "confidence"
        return APGD(
            eps, loss=LOSS_OF[name], steps=self.steps, targets=targets, targeting=targeting, eot=eot, graph=self.graph, **common
        )

    @property
    def _asks_close_calls(self) -> bool:
        return self.version == "fast" and not self.exhaustive

    def _lower(self, lead: Tensor, rows: Tensor, logits: Tensor, y: Tensor) -> None:
        """Note the leads of the samples `rows`, where they decide what is attacked."""
        if self._asks_close_calls:
            lead[rows] = lead[rows].minimum(probability_lead(logits, y[rows]).to(lead.dtype))

    @staticmethod
    def _least(name: str, classes: int) -> int:
        """The passes that an attack needs to look at the clean images, and the one that judges it."""
        return 2 + (malt_passes(classes) if name.endswith("malt") else 0)

    def _batches(self, robust: Tensor) -> list[Tensor]:
        """The samples still to be attacked, in batches of indices."""
        rows = robust.nonzero()[:, 0]
        return list(rows.split(min(self.batch_size or len(rows), len(rows)))) if len(rows) else []

    def _logits(self, model, x: Tensor, highest_label: int) -> Tensor:
        with borrowed(model, self.bn_mode):
            return InputGradient(model, None, highest_label).logits(x)

    def _check_classes(self, classes: int) -> None:
        for name in self.attacks:
            if fewest_classes(name) > classes:
                raise ValueError(
                    f"version={self.version!r}: the loss of {name} needs at least {fewest_classes(name)} classes, the model has "
                    f"{classes}: {self._instead(lambda name: fewest_classes(name) <= classes)}"
                )

    def _instead(self, fits: Callable[[str], bool]) -> str:
        """What to do where not all attacks fit: name those that do, which then attack all that is left, also those of "fast"."""
        names = tuple(filter(fits, self.attacks))
        return f"use version={names!r}{' without exhaustive' * self.exhaustive}" if names else "choose other attacks"

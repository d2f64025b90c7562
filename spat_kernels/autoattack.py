"""AutoAttack: attacks without parameters to tune, one after the other, each on what is still correct (arXiv 2003.01690).

standard    APGD-CE, APGD-T, FAB-T, Square
plus        APGD-CE and APGD-DLR (5 restarts each), FAB (5 restarts), Square, APGD-T, FAB-T
rand        APGD-CE and APGD-DLR, each gradient averaged over 20 passes, for models that draw random numbers
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .apgd import APGD
from .attacked import attacked, check_ball, check_batch, of_rows, usable
from .borrow import borrowed
from .fab import FAB
from .input_gradient import InputGradient
from .square import Square, check_pixels

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
ATTACKS = VERSIONS["plus"]
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
TARGETS = 9


class Result(NamedTuple):
    """What AutoAttack found.

    Attributes:
        x_adv: like x: misclassified images where there are any, else x.
        broken_by: int64 [B], index in `names` of what broke a sample, or -1: robust.
        names: "clean" (misclassified without an attack), then the attacks in their order.
    """

    x_adv: Tensor
    broken_by: Tensor
    names: tuple[str, ...]

    @property
    def robust(self) -> Tensor:
        """bool [B], correct under every attack."""
        return self.broken_by < 0


@dataclass(eq=False)
class AutoAttack:
    """AutoAttack as a reusable object: `AutoAttack(8/255)(model, x, y)`, or `.run(model, x, y)` to learn what broke what.

    Each call draws the same random numbers, from a generator of its own.

    Args:
        eps: radius of the ball in the units of x, a number or one per sample as a tensor [B].
        norm: "linf" or "l2".
        version: "standard", "plus" or "rand", or names of attacks in their order, of those in "plus", each with one restart.
        steps: of APGD and FAB.
        queries: of Square.
        seed: of all random numbers that are not the model's.
        batch_size: attack so many images at once; None is all.
        bounds, precision, input_gradient, bn_mode, graph: as for `PGD`. Whether an image is misclassified is asked of the model
            itself in any case, in the caller's arithmetic.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.
    """

    eps: float | Tensor
    _: KW_ONLY
    norm: str = "linf"
    version: str | tuple[str, ...] = "standard"
    steps: int = 100
    queries: int = 5000
    seed: int = 0
    batch_size: int | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    precision: str | None = None
    input_gradient: str = "auto"
    bn_mode: str = "eval"
    graph: bool | str = "auto"

    def __post_init__(self):
        check_ball(self)
        checks.check_count("seed", self.seed, 0)
        if self.batch_size is not None:
            checks.check_count("batch_size", self.batch_size, 1)
        if not isinstance(self.version, (tuple, list)):
            checks.check_choice("version", self.version, VERSIONS)
        elif not self.version:
            raise ValueError(f"version={self.version!r} names no attack: give some of {', '.join(map(repr, ATTACKS))}")
        for name in self.attacks:
            checks.check_choice("version", name, ATTACKS)
        for name in ATTACKS:
            self._attack(name, TARGETS + 1, self.eps, None, self.precision)  # they check the rest

    @property
    def attacks(self) -> tuple[str, ...]:
        """The names of the attacks, in their order."""
        return VERSIONS[self.version] if isinstance(self.version, str) else tuple(self.version)

    def __call__(self, model, x: Tensor, y: Tensor) -> Tensor:
        """`run`, of which the images alone are returned."""
        return self.run(model, x, y).x_adv

    def run(self, model, x: Tensor, y: Tensor) -> Result:
        """Attack `model` at the images `x`.

        The model, x, y and the global random states are afterwards as they were.

        Args:
            model: module or callable, x -> logits [B, K], with K >= 4 for "standard" and "plus", 3 for "rand".
            x: images [B, C, H, W] inside `bounds` in fp32, fp16, bf16 or fp64.
            y: int64 [B], the true labels.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.

        Warns:
            RuntimeWarning: the gradient was NaN for some samples, as for `PGD`.
        """
        *_, result = self.stages(model, x, y)
        return result

    @torch.inference_mode(False)
    @torch.no_grad()
    def stages(self, model, x: Tensor, y: Tensor) -> Iterator[Result]:
        """`run` one attack at a time: yields what is found by then, first without an attack and then after each of them.

        It is the same `Result` every time, whose tensors are written to.
        """
        highest_label = check_batch(self, model, x, y)
        if "square" in self.attacks:
            check_pixels(x, self.norm, self.attacks)
        x, y = usable(x, y)
        generator = torch.Generator(x.device).manual_seed(self.seed)
        result = Result(x.clone(), torch.full_like(y, -1), ("clean", *self.attacks))
        classes, close = 0, torch.zeros_like(y, dtype=torch.bool)
        for rows in self._batches(result.robust):
            logits = self._logits(model, x[rows], highest_label)
            classes = logits.shape[1]
            result.broken_by[rows[logits.argmax(1) != y[rows]]] = 0
            if self.precision is not None:
                with attacked(self, model, x[rows], y[rows], highest_label) as (way, images, labels):
                    close[rows] = way.logits(images).argmax(1) != labels
        if classes:
            self._check_classes(classes)
        yield result
        for number, name in enumerate(self.attacks, 1):
            # Attacks leave alone what is misclassified as it is: what is so in `precision` only, they attack without.
            for precision, chosen in ((self.precision, ~close), (None, close)):
                for rows in self._batches(result.robust & chosen):
                    attack = self._attack(name, classes, of_rows(self.eps, rows), generator, precision)
                    found = attack(model, x[rows], y[rows])
                    broken = self._logits(model, found, highest_label).argmax(1) != y[rows]
                    result.x_adv[rows[broken]] = found[broken]
                    result.broken_by[rows[broken]] = number
            yield result

    def _attack(
        self, name: str, classes: int, eps: float | Tensor, generator: torch.Generator | None, precision: str | None
    ) -> APGD | FAB | Square:
        restarts = 5 if self.version == "plus" and name in ("apgd-ce", "apgd-dlr", "fab") else 1
        common = {
            "norm": self.norm, "restarts": restarts, "bounds": self.bounds, "precision": precision,
            "input_gradient": self.input_gradient, "bn_mode": self.bn_mode, "generator": generator,
        }  # fmt: skip
        targets = min(TARGETS, classes - 1) if name.endswith("-t") else None
        if name == "square":
            return Square(eps, queries=self.queries, **common)
        if name.startswith("fab"):
            return FAB(eps, steps=self.steps, targets=targets, **common)
        loss, eot = "ce" if name == "apgd-ce" else "dlr", 20 if self.version == "rand" else 1
        return APGD(eps, loss=loss, steps=self.steps, targets=targets, eot=eot, graph=self.graph, **common)

    def _batches(self, robust: Tensor) -> list[Tensor]:
        """The samples still to be attacked, in batches of indices."""
        rows = robust.nonzero()[:, 0]
        return list(rows.split(self.batch_size or len(rows))) if len(rows) else []

    def _logits(self, model, x: Tensor, highest_label: int) -> Tensor:
        with borrowed(model, self.bn_mode):
            return InputGradient(model, None, highest_label).logits(x)

    def _check_classes(self, classes: int) -> None:
        fitting = [name for name in self.attacks if LEAST_CLASSES.get(name, 2) <= classes]
        for name in self.attacks:
            if name not in fitting:
                raise ValueError(
                    f"version={self.version!r}: the loss of {name} needs at least {LEAST_CLASSES[name]} classes, the model has "
                    f"{classes}: use version={tuple(fitting)!r}"
                )

"""What all attacks have in common: settings and how they are read, one run on a batch, and a description."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from spat_kernels import losses
from spat_kernels.attacks._common import Result, Tally
from spat_kernels.checks import as_norm
from spat_kernels.settings import NORMS, Norm

from ...errors import as_input_error

NORM_NAMES: dict[Norm, str] = {"linf": "L-infinity", "l2": "L2", "l1": "L1"}

# ---- how settings are read: functions text -> value, which raise a ValueError that says what to give


def number(text: str) -> float:
    """0.1 or 1/10, finite and at least 0."""
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError("give a number of at least 0, such as 0.1 or 1/10")
    return value


def share_of_eps(text: str) -> float:
    if text.endswith("/255"):
        raise ValueError("it is in units of eps, not in 1/255: give 1/4 for a quarter of eps")
    return number(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("give a whole number")
    return int(text)


def positive(text: str) -> int:
    if count(text) < 1:
        raise ValueError("give at least 1")
    return int(text)


def yes_or_no(text: str) -> bool:
    known = {"yes": True, "true": True, "no": False, "false": False}
    if text.lower() not in known:
        raise ValueError("give yes or no")
    return known[text.lower()]


def choice(*choices: str) -> Callable[[str], str]:
    """Reads one of `choices`, in capitals or not, unless choices differ by that alone."""

    def read(text: str) -> str:
        found = [text] if text in choices else [each for each in choices if each.lower() == text.lower()]
        if len(found) != 1:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return found[0]

    return read


def loss_name(text: str) -> str:
    return choice(*losses.names())(text)


def read_setting(key: str, read: Callable[[str], Any], text: str) -> Any:
    """`read(text)`, whose errors name the setting."""
    with as_input_error(f"{key}={text}"):
        return read(text)


def setting(default: object, read: Callable[[str], object]) -> Any:
    """A dataclass field that the grammar reads by `read`."""
    return field(default=default, metadata={"read": read})


# ---- an attack


def unchanged(x: Tensor) -> Result:
    """A copy of the images, for no passes."""
    return Tally(x).result(x.clone())


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack with all its settings: `parse` makes them, and `attack(model, x, y, eps, generator)` is one run of it.

    Settings are read as in the grammar, so that norm="L2" is "l2".

    Args:
        name: what it is called in reports; its random numbers depend on it. Default: its spec.
        norm: "linf", "l2" or "l1".
        eps: radius for images in [0, 1]; None is the evaluation's for this norm.
        restarts: how often an evaluation runs it on what is not broken yet.
    """

    family: ClassVar[str]
    named: ClassVar[dict[str, tuple[str, str]]] = {}  # published attacks by name: what they are in the grammar, and their source

    name: str = ""
    norm: Norm = setting("linf", lambda text: choice(*NORMS)(as_norm(text)))
    eps: float | None = setting(None, number)
    restarts: int = setting(1, positive)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if "read" in f.metadata and value is not f.default:
                object.__setattr__(self, f.name, read_setting(f.name, f.metadata["read"], str(value)))
        if not self.name:
            object.__setattr__(self, "name", self.spec)
        if self.restarts > 1 and not self.random:
            raise ValueError("restarts would repeat one run: nothing in it is random")
        if self.eps is not None and self.norm == "linf" and self.eps > 1:
            raise ValueError(f"eps={self.eps:g} is in the units of images in [0, 1]: write eps={self.eps:g}/255")

    # ---- what an evaluation has to know of it

    def runs(self, classes: int) -> int:
        """The number of runs, on a model with that number of classes."""
        return self.restarts

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts of a run, such as AutoAttack's attacks. Others are one part without a name."""
        return ("",)

    @property
    def random(self) -> bool:
        """Whether restarts differ."""
        return True

    @property
    def follows_gradients(self) -> bool:
        """Whether it differentiates the model."""
        return True

    @property
    def least_classes(self) -> int:
        """The number of classes that a model must have for it."""
        return 2

    def least_passes(self, classes: int) -> int:
        """Forwards and backwards without which a run does nothing."""
        return 0

    def radius(self, eps: float, eps_l2: float, eps_l1: float) -> float:
        """Its own eps, else the one of its norm."""
        return self.eps if self.eps is not None else {"linf": eps, "l2": eps_l2, "l1": eps_l1}[self.norm]

    # ---- a run

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Adversarial images of one run: of the last of its `stages`, which takes the same arguments."""
        *_, found = self.stages(*args, **kwargs)
        return found.x_adv

    def stages(
        self,
        model: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        eps: float,
        generator: torch.Generator,
        *,
        run: int = 0,
        only: Tensor | None = None,
        **attack_options: Any,
    ) -> Iterator[Result]:
        """Adversarial images of one run, after each of its parts, and what they have cost by then.

        Args:
            model: images [B, C, H, W] in [0, 1] -> logits [B, K].
            x: images [B, C, H, W] in [0, 1]. y: int64 [B], the true labels.
            eps: the radius.
            generator: for everything random. What PGD draws for an image does not depend on `only`; APGD, Square and AutoAttack
                draw for the images that they attack.
            run: the index of the run in `runs`, which chooses the targets.
            only: bool [B], which images to attack; None is all.
            attack_options: `precision`, `input_gradient`, `graph`, `budget` as in `spat_kernels.PGD`.

        Yields:
            Result: images like x; those that are not attacked are as they were, and cost nothing.
        """
        draws = self._draw(x, y, eps, generator)
        if only is None or bool(only.all()):
            yield from self._stages(model, x, y, eps, draws, run, attack_options)
        elif bool(only.any()):
            chosen = [t[only] if isinstance(t, Tensor) else t for t in draws]
            options = {name: value[only] if isinstance(value, Tensor) else value for name, value in attack_options.items()}
            for found in self._stages(model, x[only], y[only], eps, chosen, run, options):
                whole = unchanged(x)
                for ours, theirs in zip(whole, found, strict=True):
                    ours[only] = theirs
                yield whole
        else:
            yield unchanged(x)

    def _draw(self, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> list:
        """What is random about a run on a whole batch: tensors with one entry per image, or others for all of them."""
        return []

    def _stages(self, model, x: Tensor, y: Tensor, eps: float, draws: list, run: int, attack_options: dict) -> Iterator[Result]:
        yield self._attack(model, x, y, eps, draws, run, attack_options)

    def _attack(self, model, x: Tensor, y: Tensor, eps: float, draws: list, run: int, attack_options: dict) -> Result:
        """The adversarial images and their costs. Attacks of several parts define `_stages` instead."""
        raise NotImplementedError

    # ---- in words

    @property
    def spec(self) -> str:
        """All its settings in the grammar, except those that are at their defaults."""
        parts: list[tuple[str, object]] = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "name" and value != f.default:
                parts += value if f.name == "settings" else [(f.name, value)]
        return ":".join([self.family, *(f"{key}={value}" for key, value in parts)])

    @classmethod
    def readers(cls) -> dict[str, Callable[[str], Any]]:
        """By setting, the function that reads it."""
        return {f.name: f.metadata["read"] for f in fields(cls) if "read" in f.metadata}

    def describe(self) -> str:
        """Its settings in one line."""
        what = ", ".join(self._describe())
        repeated = f", {self.restarts} restarts" if self.restarts > 1 else ""
        radius = "" if self.eps is None else f", eps {self.eps:.4g}"
        return f"{what}{repeated}{radius}, {NORM_NAMES[self.norm]}"

    def _describe(self) -> list[str]:
        raise NotImplementedError

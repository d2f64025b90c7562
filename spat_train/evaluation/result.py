"""The result of an evaluation: the outcome of every attack on every image, and the numbers that follow from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from spat_kernels.settings import GradientPath, Graph, Precision

from ..runtime.distributed import World
from .attack_specs import Attack

WORST = "worst case"


@dataclass(frozen=True, eq=False)
class Example:
    """An image that an attack broke: its place among the evaluated ones, and uint8 [H, W, C] after rounding."""

    index: int
    image: Tensor


class Options(TypedDict, total=False):
    """Keyword arguments that `evaluate` and `alarms` share."""

    eps: float
    rows: Tensor | None
    seed: int
    batch_size: int
    on_progress: Callable[[], object]
    memory_format: torch.memory_format
    precision: Precision | None
    input_gradient: GradientPath
    graph: Graph
    world: World | None


@dataclass(frozen=True)
class Recheck:
    """Adversarial images checked again.

    Attributes:
        adversarial: how many there are of images that the model gets right.
        outside: how many of all that the attack made lie outside of the ball or the box.
        rounded: how many of the adversarial ones are still misclassified once rounded to 8 bits.
    """

    adversarial: int
    outside: int
    rounded: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outcome of every attack on every image.

    Attributes:
        settings: all that the results depend on, except the attacks.
        attacks: by name, "clean" first.
        classes: K.
        rows: int64 [N], which images of the data set. labels: int64 [N].
        predicted: by attack, int64 [N]: the wrong class that an image was brought to, else its label; -1 where logits were NaN.
        part: by attack that has several (`Attack.parts`: AutoAttack's), int64 [N]: the index of the part that broke an
            image, else -1.
        forwards, backwards: by attack, int64 [N], the passes of the model that it spent on an image, those that judge what comes
            out left out; not of attacks that were recorded before there were such counts.
        rechecks: by attack, without "clean".
        examples: by attack, the first images that were right and that it broke.
    """

    settings: dict
    attacks: dict[str, Attack]
    classes: int
    rows: Tensor
    labels: Tensor
    predicted: dict[str, Tensor]
    part: dict[str, Tensor]
    forwards: dict[str, Tensor] = field(default_factory=dict)
    backwards: dict[str, Tensor] = field(default_factory=dict)
    rechecks: dict[str, Recheck] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def correct(self, name: str) -> Tensor:
        """bool [N]: not broken by the attack `name`, or by any for "worst case"."""
        if name == WORST:
            return torch.stack([self.correct(each) for each in self.attacks]).all(0)
        return self.predicted[name] == self.labels

    def after(self, name: str) -> dict[str, Tensor]:
        """By part of the attack, bool [N]: right before it, and not broken up to that part, in any of its restarts.

        {} for an attack of one part.
        """
        right, by = self.correct("clean"), self.part.get(name)
        return {} if by is None else {p: right & ((by < 0) | (by > k)) for k, p in enumerate(self.attacks[name].parts)}

    def passes(self, name: str) -> tuple[float, float] | None:
        """Forwards and backwards that the attack took, the mean of the attacked images; None where they are not known."""
        attacked = torch.ones_like(self.labels, dtype=torch.bool) if self.settings["attack_wrong"] else self.correct("clean")
        if name not in self.forwards or not attacked.any():
            return None
        forwards, backwards = (float(counts[name][attacked].double().mean()) for counts in (self.forwards, self.backwards))
        return forwards, backwards

    def _ended(self, name: str) -> str:
        """Whether the budget ended the attack on images that it had not broken, in words."""
        budget = self.settings.get("budget")
        if budget is None or name not in self.forwards:
            return ""
        left = budget - self.forwards[name] - self.backwards[name]
        ended = self.correct(name) & self.correct("clean") & (left < max(self.attacks[name].least_passes(self.classes), 4))
        return f", ended by the budget of {budget} for {int(ended.sum())} images" if ended.any() else ""

    def accuracy(self, name: str) -> float:
        """In percent."""
        return percent(self.correct(name))

    def interval(self, name: str) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, in percent."""
        return interval(self.correct(name))

    def worst_case(self) -> float:
        """Percent of the images that no attack broke."""
        return self.accuracy(WORST)

    def lines(self) -> list[tuple[str, str, str, str, str, str]]:
        """What a table has: name, accuracy and its interval in percent, passes per image, broken images, and a description.

        A row for each attack, below it one for each of its parts where it has several, and the worst case.
        """
        found = []
        for name, attack in self.attacks.items():
            passes = self.passes(name)
            cost = "" if passes is None else f"{passes[0]:.0f} + {passes[1]:.0f}"
            found.append(_row(name, self.correct(name), attack.describe() + self._ended(name), cost))
            for number, (part, left) in enumerate(self.after(name).items()):
                found.append(_row(f"  after {part}", left, f"{part} broke {int((self.part[name] == number).sum())}"))
        return [*found, _row(WORST, self.correct(WORST), "broken by any of the above")]

    def table(self) -> str:
        """Attacks down: accuracy and its interval in percent, forwards and backwards per attacked image."""
        return text_table([("accuracy, %", "", "95 % interval", "passes"), *(row[:4] for row in self.lines())])


def _row(name: str, correct: Tensor, description: str, cost: str = "") -> tuple[str, str, str, str, str, str]:
    low, high = interval(correct)
    return name, f"{percent(correct):.2f}", f"{low:.2f} to {high:.2f}", cost, str(int((~correct).sum())), description


def percent(correct: Tensor) -> float:
    """The share of True in bool [N], in percent."""
    return 100 * int(correct.sum()) / len(correct)


def interval(correct: Tensor) -> tuple[float, float]:
    """Wilson's 95 % interval of `percent` (Wilson, 1927; Brown, Cai and DasGupta, 2001)."""
    from scipy.stats import binomtest  # its import takes a second

    found = binomtest(int(correct.sum()), len(correct)).proportion_ci(0.95, method="wilson")
    return 100 * float(found.low), 100 * float(found.high)


def beats_guessing(accuracy: float, images: int, classes: int) -> bool:
    """Whether an accuracy, in percent of `images`, is above 1 / classes by its whole Wilson interval."""
    return interval(torch.arange(images) < round(accuracy / 100 * images))[0] > 100 / classes


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells in columns, the first aligned to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = (f"{row[0]:<{first}}" + "".join(f"  {cell:>{n}}" for cell, n in zip(row[1:], others, strict=True)) for row in rows)
    return "\n".join(map(str.rstrip, lines))

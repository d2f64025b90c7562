"""What an evaluation found: what became of every image under every attack, and the numbers that follow from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from spat_kernels.settings import GradientPath, Graph, Precision

from .attack_specs import Attack

WORST = "worst case"
Z95 = 1.959963984540054  # of a standard normal, two-sided 95 %


@dataclass(frozen=True, eq=False)
class Example:
    """An image that an attack broke: its place among the evaluated ones, and uint8 [H, W, C] after rounding."""

    index: int
    image: Tensor


class Options(TypedDict, total=False):
    """What `evaluate` and `alarms` take alike."""

    eps: float
    rows: Tensor | None
    seed: int
    batch_size: int
    on_progress: Callable[[], object]
    memory_format: torch.memory_format
    precision: Precision | None
    input_gradient: GradientPath
    graph: Graph


@dataclass(frozen=True)
class Recheck:
    """Adversarial images looked at again: how many there are of images that were right before, how many of all that the attack
    made lie outside of the ball or the box, and how many are still misclassified once rounded to 8 bits."""

    adversarial: int
    outside: int
    rounded: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What became of every image under every attack.

    Attributes:
        settings: all that the results depend on but the attacks.
        attacks: by name, "clean" first.
        classes: K.
        rows: int64 [N], which images of the data set. labels: int64 [N].
        predicted: by attack, int64 [N]: the wrong class that an image was brought to, else its label; -1 where logits were NaN.
        part: by attack that has several (`Attack.parts`: AutoAttack's), int64 [N]: the index of what broke an image, else -1.
        rechecks: by attack but "clean".
        examples: by attack, the first images that were right and that it broke.
    """

    settings: dict
    attacks: dict[str, Attack]
    classes: int
    rows: Tensor
    labels: Tensor
    predicted: dict[str, Tensor]
    part: dict[str, Tensor]
    rechecks: dict[str, Recheck] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def correct(self, name: str) -> Tensor:
        """bool [N]: not broken by the attack; of "worst case": by none."""
        if name == WORST:
            return torch.stack([self.correct(each) for each in self.attacks]).all(0)
        return self.predicted[name] == self.labels

    def after(self, name: str) -> dict[str, Tensor]:
        """By part of the attack, bool [N]: right before it, and not broken up to that part, in any of its restarts. {} where it
        has but one."""
        right, by = self.correct("clean"), self.part.get(name)
        return {} if by is None else {p: right & ((by < 0) | (by > k)) for k, p in enumerate(self.attacks[name].parts)}

    def accuracy(self, name: str) -> float:
        """In percent."""
        return percent(self.correct(name))

    def interval(self, name: str) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, in percent."""
        return interval(self.correct(name))

    def worst_case(self) -> float:
        """Percent of the images that no attack broke."""
        return self.accuracy(WORST)

    def table(self) -> str:
        """Attacks down: accuracy and its interval in percent."""
        width = max(len(name) for name, _, _ in [("accuracy, %", "", None), *self.lines()])
        lines = [f"{'accuracy, %':<{width}}           95 % interval"]
        for name, correct, _ in self.lines():
            low, high = interval(correct)
            lines.append(f"{name:<{width}}  {percent(correct):6.2f}   {low:6.2f} to {high:6.2f}")
        return "\n".join(lines)

    def lines(self) -> list[tuple[str, Tensor, str]]:
        """What a table has: attacks, the parts of those that have several below them, the worst case; each with its `correct`,
        and what it is."""
        found = []
        for name, attack in self.attacks.items():
            found.append((name, self.correct(name), attack.describe()))
            for number, (part, left) in enumerate(self.after(name).items()):
                found.append((f"  after {part}", left, f"{part} broke {int((self.part[name] == number).sum())}"))
        return [*found, (WORST, self.correct(WORST), "broken by any of the above")]


def percent(correct: Tensor) -> float:
    """The share of True in bool [N]."""
    return 100 * int(correct.sum()) / len(correct)


def interval(correct: Tensor) -> tuple[float, float]:
    """Wilson's 95 % interval of `percent`."""
    low, high = wilson(int(correct.sum()), len(correct))
    return 100 * low, 100 * high


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson, 1927; Brown, Cai and DasGupta, 2001): inside [0, 1], and right at 0 and 1."""
    p, shrink = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / shrink
    # At the ends rounding would leave some 1e-17.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half

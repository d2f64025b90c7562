"""What a figure of the papers is, and what it is made from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from matplotlib.figure import Figure
from torch import Tensor, nn

from ..errors import check_count
from ..models.try_on import device_of
from .loaded_run import LoadedRun, TestImages, open_models
from .options import Options
from .pictures import CANDIDATES, examples
from .runs import Run
from .selection import RunSelector


@dataclass(frozen=True)
class Extent:
    """How much the pictures and the landscape show."""

    examples: int = 5
    """Images shown, in pictures and in the landscape."""
    restarts: int = 20
    """Random starts from each of them, in the landscape."""
    ascent_steps: int = 100
    """Steps of PGD from each start, each of 2.5 eps / steps, in the landscape."""

    def check(self) -> None:
        """Raise InputError for a number that is too small."""
        check_count("--examples", self.examples)
        check_count("--restarts", self.restarts, least=2)
        check_count("--ascent-steps", self.ascent_steps)


@dataclass(frozen=True)
class FigureContext:
    """What a figure is made from. `eps`: the radius, for images in [0, 1]."""

    runs: list[Run]
    images: TestImages
    options: Options
    extent: Extent
    eps: float

    @cached_property
    def loaded(self) -> list[LoadedRun]:
        return open_models(self.runs, self.images, self.options)

    @property
    def models(self) -> dict[str, nn.Module]:
        return {each.name: each.model for each in self.loaded}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.dataset.classes

    def measure(self, loaded: LoadedRun, attacks: list[str], **settings) -> dict[str, dict[str, float]]:
        """`LoadedRun.measure` with this context's images, options and radius."""
        return loaded.measure(self.images, attacks, self.options, **{"eps": self.eps} | settings)

    def examples(self) -> tuple[Tensor, Tensor, list[int]]:
        """Images [N, C, H, W], their labels [N] and their rows in the test set: one of each class, right for all models."""
        x, y = self.images.floats(CANDIDATES, device_of(self.loaded[0].model))
        chosen = examples(list(self.models.values()), x, y, self.extent.examples)
        return x[chosen], y[chosen], self.images.rows[chosen].tolist()


Drawing = tuple[dict[str, Figure], dict]
"""Drawings by the name of the part, "" where there is one, and the numbers in them."""


@dataclass(frozen=True)
class PaperFigure:
    """A figure: its name on the command line, what it shows, the runs that it takes, and how it is made."""

    name: str
    about: str
    selector: RunSelector
    make: Callable[[FigureContext], Drawing]

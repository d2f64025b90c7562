"""What a figure of the papers is, and what it is made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.figure import Figure
from torch import Tensor, nn

from ..models.try_on import device_of
from .loaded_run import LoadedRun, TestImages, open_model, open_models
from .options import Extent, Options
from .pictures import CANDIDATES, examples
from .runs import Run
from .selection import RunSelector


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

    def measure(self, run: Run | LoadedRun, attacks: Sequence[str], **settings) -> list[dict[str, float]]:
        """`LoadedRun.measure` with this context's images, options and radius: a point for each of `attacks`."""
        loaded = open_model(run, self.images, self.options) if isinstance(run, Run) else run
        found = loaded.measure(self.images, attacks, self.options, **{"eps": self.eps} | settings)
        return [found[attack] for attack in attacks]

    def examples(self) -> tuple[Tensor, Tensor, list[int]]:
        """Images [N, C, H, W], their labels [N] and their rows in the test set: one of each class, right for all models."""
        x, y = self.images.floats(CANDIDATES, device_of(self.loaded[0].model))
        chosen = examples(list(self.models.values()), x, y, self.extent.examples)
        return x[chosen], y[chosen], self.images.rows[chosen].tolist()


Drawing = tuple[dict[str, Figure], dict]
"""Drawings by the name of the part, "" where there is one, and the numbers in them."""


@dataclass(frozen=True)
class PaperFigure:
    """A figure: what it shows, the runs that it takes, and how it is made."""

    about: str
    selector: RunSelector
    make: Callable[[FigureContext], Drawing]


FIGURES: dict[str, PaperFigure] = {}


def paper_figure(name: str, about: str, selector: RunSelector) -> Callable:
    """Decorator: make the function the figure `name` of the command line."""

    def register(make: Callable[[FigureContext], Drawing]) -> Callable[[FigureContext], Drawing]:
        FIGURES[name] = PaperFigure(about, selector, make)
        return make

    return register

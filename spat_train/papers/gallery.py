"""`spat-train figure`: every figure of the sources by name, the runs that it takes, its numbers and its drawing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from ..errors import InputError
from ..models.registry import device_of
from ..runtime import atomic_write as files
from . import figures, landscape, pictures, sweeps
from .measure import Subject, TestImages, open_images, open_models, radius
from .reported import FIGURE_61
from .reported import ROBUST as SOURCE
from .runs import Options, Run, check, named, told
from .selection import ANY, PAIR, ROBUST, TRAININGS, WIDTHS, Role, grid

Drawing = tuple[dict[str, Figure], dict]  # by the name of a part, "" where there is one; and the numbers in them


@dataclass(frozen=True)
class Extent:
    """How much the pictures and the landscape show."""

    examples: int = 5
    """Images that are shown, in pictures and in the landscape."""
    restarts: int = 20
    """Random starts from each of them, in the landscape."""
    ascent_steps: int = 100
    """Steps of PGD from each start, of 2.5 eps / steps, in the landscape."""


@dataclass(frozen=True)
class Bench:
    """What a figure is made from; `eps` for images in [0, 1]."""

    runs: list[Run]
    images: TestImages
    options: Options
    extent: Extent
    eps: float

    @cached_property
    def subjects(self) -> list[Subject]:
        return open_models(self.runs, self.images, self.options)

    @property
    def models(self) -> dict:
        return {subject.name: subject.model for subject in self.subjects}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.dataset.classes

    def examples(self) -> tuple[Tensor, Tensor, list[int]]:
        """Images [N, C, H, W], their labels [N] and their rows in the test set: one of each class, right for all models."""
        x, y = self.images.floats(pictures.CANDIDATES, device_of(self.subjects[0].model))
        chosen = pictures.examples(list(self.models.values()), x, y, self.extent.examples)
        return x[chosen], y[chosen], self.images.rows[chosen].tolist()


# ---- pictures


def input_gradients(b: Bench) -> Drawing:
    x, y, rows = b.examples()
    many, labels = b.images.floats(pictures.CANDIDATES, x.device)
    numbers = {}
    for name, model in b.models.items():
        gradients = landscape.input_gradients(model, many, labels)
        numbers[name] = {
            "neighbours' correlation": pictures.smoothness(gradients),
            "L1 norm": float(gradients.abs().sum((1, 2, 3)).mean()),
        }
    titles = dict(zip(["standard", "robust"], b.models.values(), strict=True))
    return {"": pictures.gradients_grid(titles, x, y, b.classes)}, {"rows": rows, "gradients": numbers, "gradients of": len(many)}


def margin_examples(b: Bench) -> Drawing:
    x, y, rows = b.examples()
    if b.options.eps is None and x.shape[1] == 3:
        radii = [32 / 255, 16 / 255, 8 / 255]
    elif b.options.eps is None:
        radii = [pictures.large_eps(b.eps, 1), b.eps, b.eps / 2]
    else:
        radii = [b.eps, b.eps / 2, b.eps / 4]
    (model,) = b.models.values()
    named = {f"ε = {told(255 * eps)}": eps for eps in radii}
    columns = pictures.margin_attacks(model, x, y, named, b.options.seed)
    figure, numbers = pictures.attacked_grid(model, columns, y, b.classes)
    return {"": figure}, {"rows": rows, "radii": radii, "columns": numbers}


def smoothed_examples(b: Bench) -> Drawing:
    x, y, rows = b.examples()
    eps = b.eps if b.options.eps else 32 / 255 if x.shape[1] == 3 else pictures.large_eps(b.eps, 1)
    (model,) = b.models.values()
    figure, numbers = pictures.attacked_grid(model, pictures.smoothed_attacks(model, x, y, eps, b.options.seed), y, b.classes)
    return {"": figure}, {"rows": rows, "eps": eps, "columns": numbers}


# ---- curves


def attacked_with_alpha(b: Bench) -> Drawing:
    numbers = {s.name: sweeps.against_alpha(s, b.images, b.options, b.eps) for s in b.subjects}
    return {"": figures.against_alpha(numbers)}, {"models": numbers}


def trained_with_alpha(b: Bench) -> Drawing:
    radii = sorted(run.config.eps for run in b.runs)
    own = b.images.dataset.name in SOURCE and b.images.dataset.name.startswith("cifar")
    eps = (b.options.eps or (8.0 if own else radii[len(radii) // 2])) / 255  # the middle one of the trainings', as 8 of 4, 8, 16
    numbers = sweeps.trained_with_alpha(b.runs, b.images, b.options, eps)
    reported = FIGURE_61 if b.images.dataset.name == "cifar10" and eps == 8 / 255 else None
    return {"": figures.trained_with_alpha(numbers, reported)}, {"eps": eps, "lines": numbers, "source": reported}


def budget(b: Bench) -> Drawing:
    numbers = sweeps.against_budget(b.subjects, b.images, b.options, b.eps)
    return {"": figures.against_budget(numbers)}, {"panels": numbers}


def steps(b: Bench) -> Drawing:
    numbers = sweeps.against_steps(b.subjects, b.images, b.options, b.eps)
    label = f"steps of PGD, each ε/10, at ε = {told(255 * b.eps)}"
    return {"": figures.against_steps(numbers["steps"], numbers["models"], label)}, numbers


def capacity(b: Bench) -> Drawing:
    numbers = sweeps.against_width(b.runs, b.images, b.options, b.eps)
    return {"": figures.against_width(numbers)}, {"panels": numbers}


def training_loss(b: Bench) -> Drawing:
    numbers = {name: sweeps.training_loss(run) for name, run in zip(b.models, b.runs, strict=True)}
    return {"": figures.training_losses(numbers)}, {"models": numbers}


# ---- the landscape


def landscapes(b: Bench) -> Drawing:
    x, y, rows = b.examples()
    names = [b.classes[label] for label in y]
    restarts, steps, step_size = b.extent.restarts, b.extent.ascent_steps, 2.5 * b.eps / b.extent.ascent_steps
    ascend = partial(landscape.ascend, restarts=restarts, steps=steps, step_size=step_size)
    found = {name: ascend(model, x, y, b.eps, seed=b.options.seed) for name, model in b.models.items()}
    hardest = int(next(reversed(found.values())).losses[..., -1].mean(0).argmax())  # of the last model, for the slice
    maxima, slices = {}, {}
    for name, model in b.models.items():
        maxima[name] = landscape.compare(model, x, y, b.eps, found[name], b.options.seed)
        slices[name] = landscape.surface(model, x[hardest], y[hardest], b.eps, points=41, seed=b.options.seed)
    drawn = {
        "curves": figures.ascents({name: each.losses.numpy() for name, each in found.items()}, list(x), names),
        "maxima": figures.maxima(maxima, names),
        "surface": figures.surfaces(slices, told(255 * b.eps)),
    }
    meaning = {name: landscape.meaning(numbers) for name, numbers in maxima.items()}
    losses = {name: each.losses.tolist() for name, each in found.items()}
    many = {"losses": losses, "maxima": maxima, "surfaces": {"row": rows[hardest], **slices}}
    how = {"restarts": restarts, "steps": steps, "step_size": step_size}
    return drawn, {"rows": rows, "labels": names, **how, "meaning": meaning} | _rounded(many)


def _rounded(values: dict) -> dict:
    """To five digits, which is enough to draw and a third of the file."""
    return json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.5g}"))


# ---- all of them


@dataclass(frozen=True)
class Kind:
    """A figure: what it shows, the runs that it takes, and how it is made."""

    about: str
    role: Role
    make: Callable[[Bench], Drawing]


FIGURES = {
    "4.1": Kind("thesis: the gradient of the loss by the image, of a standard and of a robust model", PAIR, input_gradients),
    "5.1": Kind("thesis: C&W-inf examples of a robust model at eps 32, 16 and 8 /255", ROBUST, margin_examples),
    "5.2": Kind("thesis: PGD-CE and PGD-LS examples of a robust model at eps 32/255", ROBUST, smoothed_examples),
    "5.3": Kind("thesis: accuracy under PGD-LS against its alpha, beside PGD-KL", PAIR, attacked_with_alpha),
    "6.1": Kind(
        "thesis: clean and robust accuracy against alpha of the training, CIFAR-10", grid("6.1", "cifar10"), trained_with_alpha
    ),
    "6.2": Kind("thesis: the same on CIFAR-100", grid("6.2", "cifar100"), trained_with_alpha),
    "landscape": Kind("Madry et al., Fig. 1 and 5: PGD from many starts, its maxima, a slice of the loss", ANY, landscapes),
    "training-loss": Kind("Madry et al., Fig. 2: adversarial loss during training", TRAININGS, training_loss),
    "capacity": Kind("Madry et al., Fig. 4: accuracy against width, standard and adversarial training", WIDTHS, capacity),
    "budget": Kind("Madry et al., Fig. 6; ARES: accuracy against eps, L-infinity and L2", ANY, budget),
    "steps": Kind("ARES: accuracy against the steps of PGD", ANY, steps),
}


def find(name: str) -> Kind:
    return named("figure", name, FIGURES)


def listing() -> str:
    """Every figure with the runs that it needs."""
    return "\n".join(f"{name:14} {kind.about}; needs {kind.role.words}" for name, kind in FIGURES.items())


def draw(name: str, given: Sequence[Path], options: Options, extent: Extent, out: Path) -> list[Path]:
    """Find (or train) the runs of figure `name`, measure them, and write it: figure-NAME.png, .pdf and .json in `out`.

    Args:
        given: folders of the runs; without, those in --runs.

    Raises:
        InputError: no such figure, or not the runs that it needs; an option, a run or the data do not fit.
    """
    kind = find(name)
    check(options, out)
    for option in ("examples", "restarts", "ascent_steps"):
        least = 2 if option == "restarts" else 1
        if getattr(extent, option) < least:
            raise InputError(f"--{option.replace('_', '-')} {getattr(extent, option)}: give at least {least}")
    runs = kind.role.take(name, given, options)
    images = open_images(runs, options)
    print(f"figure {name}: from {', '.join(str(run.folder) for run in runs)}")
    b = Bench(runs, images, options, extent, radius(runs, options))
    with figures.look():
        drawn, numbers = kind.make(b)
    ran = {run.folder.name: {"folder": str(run.folder), "config": run.config.to_dict()} for run in runs}
    head = {"figure": name, "data": images.dataset.name, "test_images": len(images), "eps": b.eps}
    return write(name, drawn, head | numbers | {"runs": ran}, out)


def write(name: str, drawn: dict[str, Figure], numbers: dict, out: Path) -> list[Path]:
    """What was written."""
    files.make_folder(out)
    paths = []
    for part, figure in drawn.items():
        stem = f"figure-{name}-{part}" if part else f"figure-{name}"
        pair = [out / f"{stem}.png", out / f"{stem}.pdf"]
        figures.save(figure, *pair)
        paths += pair
    # A key a line: matrices would otherwise fill a line with each of their numbers.
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in numbers.items())
    files.write(out / f"figure-{name}.json", f"{{\n{lines}\n}}\n".encode())
    return [*paths, out / f"figure-{name}.json"]

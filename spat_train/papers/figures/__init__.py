"""`spat-train figure`: the figures of the papers. Each module here is one figure, and is found by itself."""

import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from ...errors import lookup
from ...plotting import save, style
from ...runtime import atomic_write
from .. import figure
from ..figure import FigureContext
from ..loaded_run import open_images
from ..options import Extent, Options, check
from ..runs import Run

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
FIGURES = dict(sorted(figure.FIGURES.items()))


def listing() -> str:
    """Every figure with the runs that it needs."""
    return "\n".join(f"{name:14} {figure.about}; needs {figure.selector.words}" for name, figure in FIGURES.items())


def draw(name: str, given: Sequence[Path], options: Options, extent: Extent, out: Path) -> list[Path]:
    """Find the runs of figure `name`, measure them, and write figure-NAME.png, .pdf and .json into `out`.

    Args:
        given: folders of the runs. Without any, --runs is searched.

    Returns:
        The files written.

    Raises:
        InputError: no such figure, or not the runs that it needs, or an option, a run or the data do not fit.
    """
    figure = lookup("figure", name, FIGURES)
    check(options, out, extent)
    runs = figure.selector.take(name, given, options)
    images = open_images(runs, options)
    print(f"figure {name}: from {', '.join(str(run.folder) for run in runs)}")
    context = FigureContext(runs, images, options, extent, radius(runs, options))
    subject = f"{', '.join(dict.fromkeys(run.config.model for run in runs))} on {images.dataset.name}"
    with style():
        drawn, numbers = figure.make(context)
        for drawing in drawn.values():
            drawing.suptitle(", ".join(filter(None, [subject, drawing.get_suptitle()])), parse_math=False, wrap=True)
    configs = {run.folder.name: {"folder": str(run.folder), "config": run.config.to_dict()} for run in runs}
    head = {"figure": name, "data": images.dataset.name, "test_images": len(images), "eps": context.eps}

    atomic_write.make_folder(out)
    paths = []
    for part, drawing in drawn.items():
        stem = f"figure-{name}-{part}" if part else f"figure-{name}"
        pair = [out / f"{stem}.png", out / f"{stem}.pdf"]
        save(drawing, *pair)
        paths += pair
    # One key a line: with indentation each number of a matrix would take a line.
    content = head | numbers | {"runs": configs}
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    atomic_write.write(out / f"figure-{name}.json", f"{{\n{lines}\n}}\n".encode())
    return [*paths, out / f"figure-{name}.json"]


def radius(runs: Iterable[Run], options: Options) -> float:
    """--eps, else what the first robust run (or the first of all) is evaluated at; for images in [0, 1]."""
    first = min(runs, key=lambda run: run.standard)
    return (options.eps or first.config.evaluation_eps) / 255

"""Thesis, Figure 5.1: examples by C&W-infinity at three radii."""

import torch
from torch import Tensor, nn

from spat_kernels import cw_linf

from ..figure import Drawing, FigureContext, PaperFigure
from ..pictures import attacked_grid, large_eps
from ..runs import format_eps
from ..selection import ONE_ROBUST


def radii_of(context: FigureContext, channels: int) -> list[float]:
    """Of images in [0, 1]: 32, 16 and 8 /255 for colour, or --eps and its half and quarter."""
    if context.options.eps is not None:
        return [context.eps, context.eps / 2, context.eps / 4]
    return [32 / 255, 16 / 255, 8 / 255] if channels == 3 else [large_eps(context.eps, 1), context.eps, context.eps / 2]


def margin_attacks(model: nn.Module, x: Tensor, y: Tensor, radii: list[float], seed: int) -> dict[str, Tensor]:
    """The columns of the figure: images [N, C, H, W] and their examples at each radius."""
    columns = {"original": x}
    for eps in radii:
        generator = torch.Generator().manual_seed(seed)
        examples = cw_linf(model, x, y, eps, steps=30, step_size=eps / 10, generator=generator)
        columns[f"ε = {format_eps(255 * eps)}"] = examples
    return columns


def make(context: FigureContext) -> Drawing:
    x, y, rows = context.examples()
    radii = radii_of(context, x.shape[1])
    (model,) = context.models.values()
    drawn, numbers = attacked_grid(model, margin_attacks(model, x, y, radii, context.options.seed), y, context.classes)
    return {"": drawn}, {"rows": rows, "radii": radii, "columns": numbers}


FIGURE = PaperFigure("5.1", "thesis: C&W-inf examples of a robust model at eps 32, 16 and 8 /255", ONE_ROBUST, make)

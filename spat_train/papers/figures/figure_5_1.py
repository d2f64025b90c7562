"""Thesis, Figure 5.1: examples by C&W-infinity at three radii."""

import torch

from spat_kernels import cw_linf

from ..figure import Drawing, FigureContext, paper_figure
from ..pictures import attacked_grid, large_eps
from ..runs import eps_label
from ..selection import ONE_ROBUST


@paper_figure("5.1", "thesis: C&W-inf examples of a robust model at eps 32, 16 and 8 /255", ONE_ROBUST)
def make(context: FigureContext) -> Drawing:
    x, y, rows = context.examples()
    (model,) = context.models.values()
    if context.options.eps is not None:
        radii = [context.eps, context.eps / 2, context.eps / 4]
    elif x.shape[1] == 3:
        radii = [32 / 255, 16 / 255, 8 / 255]
    else:
        radii = [large_eps(context.eps, 1), context.eps, context.eps / 2]
    columns = {"original": x}
    for eps in radii:
        generator = torch.Generator().manual_seed(context.options.seed)
        examples = cw_linf(model, x, y, eps, steps=30, step_size=eps / 10, generator=generator)
        columns[eps_label(eps)] = examples
    drawn, numbers = attacked_grid(model, columns, y, context.classes)
    return {"": drawn}, {"rows": rows, "radii": radii, "columns": numbers}

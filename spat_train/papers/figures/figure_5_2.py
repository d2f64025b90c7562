"""Thesis, Figure 5.2: examples by PGD on the cross-entropy and on label-smoothed cross-entropies."""

from ..figure import Drawing, FigureContext, paper_figure
from ..pictures import attacked_grid, large_eps, smoothed_attacks
from ..runs import eps_label
from ..selection import ONE_ROBUST


@paper_figure("5.2", "thesis: PGD-CE and PGD-LS examples of a robust model at eps 32/255", ONE_ROBUST)
def make(context: FigureContext) -> Drawing:
    x, y, rows = context.examples()
    eps = context.eps if context.options.eps else 32 / 255 if x.shape[1] == 3 else large_eps(context.eps, 1)
    (model,) = context.models.values()
    drawn, numbers = attacked_grid(model, smoothed_attacks(model, x, y, eps, context.options.seed), y, context.classes)
    drawn.suptitle(eps_label(eps))
    return {"": drawn}, {"rows": rows, "eps": eps, "columns": numbers}

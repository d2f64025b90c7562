"""Thesis, Figure 4.1: what a standard and a robust model's gradients by the input look like."""

import torch
from torch import Tensor

from ...plotting import image_grid
from ..figure import Drawing, FigureContext, paper_figure
from ..loaded_run import alignment, input_gradients
from ..pictures import CANDIDATES
from ..selection import STANDARD_AND_ROBUST


def smoothness(gradients: Tensor) -> Tensor:
    """Correlation of neighbouring pixels in gradients [B, C, H, W], [B]: 0 for noise, towards 1 where they form shapes."""
    g = gradients - gradients.mean((2, 3), keepdim=True)
    along = (g[..., 1:] * g[..., :-1]).mean((1, 2, 3)), (g[..., 1:, :] * g[..., :-1, :]).mean((1, 2, 3))
    return sum(along) / 2 / g.square().mean((1, 2, 3)).clamp(min=1e-30)


def gradient_picture(gradient: Tensor) -> Tensor:
    """A gradient [C, H, W] as an image in [0, 1]: 0 is grey, and three standard deviations reach black and white."""
    return (0.5 + gradient / (6 * gradient.std()).clamp(min=1e-30)).clamp(0, 1)


@paper_figure("4.1", "thesis: the gradient of the loss by the image, of a standard and of a robust model", STANDARD_AND_ROBUST)
def make(context: FigureContext) -> Drawing:
    x, y, rows = context.examples()
    many, labels = context.images.floats(CANDIDATES, x.device)
    numbers, columns = {}, {"image": x}
    for each in sorted(context.loaded, key=lambda each: not each.run.standard):
        gradients = input_gradients(each.model, many, labels)
        numbers[each.name] = {
            "neighbours' correlation": float(smoothness(gradients).mean()),
            "L1 norm": float(gradients.abs().sum((1, 2, 3)).mean()),
            "alignment": float(alignment(each.model, many, labels).mean()),
        }
        title = "standard" if each.run.standard else "robust"
        columns[title] = torch.stack([gradient_picture(g) for g in input_gradients(each.model, x, y)])
    drawn = image_grid(columns, [context.classes[label] for label in y], {})
    return {"": drawn}, {"rows": rows, "gradients": numbers, "gradients of": len(many)}

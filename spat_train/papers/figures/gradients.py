"""How far the gradients by the image mean something to people: three scores of runs, against the alpha of their training.

    alignment    |cosine| of the margin's gradient and the image (Etmann et al., 2019, arXiv 1905.04172)
    neighbours   correlation of neighbouring pixels in the gradient of the loss: shapes instead of noise
    towards      cosine of the direction in which the margin falls and the way to the nearest image, in L2, of the class that
                 the model takes the image for next: what Ganz et al. (ICML 2023, arXiv 2207.11378) train gradients to point to

The gradients of robust models look like what matters in the image (Tsipras et al., 2019, arXiv 1805.12152), and lead to images of
the other class (Kaur et al., 2019, arXiv 1910.08640). All three scores are of the same images as in figure 4.1.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ...data.images import floats
from ...errors import InputError
from ...objectives import METHODS
from ...plotting import interval_marks, legend_below, line_styles, panel_row, x_ticks
from ..figure import Drawing, FigureContext, paper_figure
from ..loaded_run import LoadedRun, alignment, input_gradients, logits_of, summed_margin
from ..pictures import CANDIDATES
from ..runs import format_eps
from ..selection import ALL_RUNS
from .figure_4_1 import smoothness

SCORES = {
    "alignment": "cosine with the image", "neighbours": "neighbours' correlation", "towards": "cosine towards the next class",
}  # fmt: skip
POOL = 5000  # test images among which the nearest one is looked for


def towards_next_class(model: nn.Module, x: Tensor, y: Tensor, pool: Tensor, labels: Tensor) -> Tensor:
    """The score `towards` of images x [B, C, H, W] with labels y: [N], without those of whose next class `pool` has no image.

    Args:
        pool, labels: the images [M, C, H, W] among which the nearest are looked for, and their labels [M].
    """
    logits = logits_of(model, x).to(x.device)
    following = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    apart = torch.cdist(x.flatten(1), pool.flatten(1)).masked_fill(following[:, None] != labels, torch.inf)
    distance, nearest = apart.min(1)
    way, down = pool[nearest] - x, -input_gradients(model, x, y, of=summed_margin)
    return F.cosine_similarity(down.flatten(1), way.flatten(1))[distance.isfinite()]


def mean_interval(scores: Tensor) -> dict[str, float]:
    """The mean of [N] and its 95 % interval, by the normal distribution; of one image that is the mean alone."""
    mean, half = float(scores.mean()), 1.96 * float(scores.std(correction=min(1, len(scores) - 1))) / len(scores) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def lines_of(runs: Iterable[LoadedRun]) -> dict[str, list[LoadedRun]]:
    """Runs that differ in alpha or seed alone are one line, by rising alpha. Where no alpha differs, each run is its own."""
    runs = list(runs)
    if len({each.run.config.alpha for each in runs}) == 1:
        return {each.name: [each] for each in runs}
    configs = [each.run.config for each in runs if not each.run.standard]
    several = {"model": len({c.model for c in configs}) > 1, "eps": len({c.eps for c in configs}) > 1}
    lines: dict[str, list[LoadedRun]] = {}
    for each in sorted(runs, key=lambda each: (not each.run.standard, each.run.config.alpha)):
        c = each.run.config
        eps = "" if each.run.standard else f"ε = {format_eps(c.eps)}"
        parts = METHODS[c.method].title, c.model * several["model"], eps * several["eps"]
        lines.setdefault(", ".join(filter(None, parts)), []).append(each)
    return lines


@paper_figure("gradients", "how far gradients by the image mean something, by run or against alpha of the training", ALL_RUNS)
def make(context: FigureContext) -> Drawing:
    device = next(context.loaded[0].model.parameters()).device
    x, y = context.images.floats(CANDIDATES, device)
    test = context.images.dataset.test
    drawn = torch.from_numpy(np.random.default_rng(context.options.seed).permutation(len(test))[:POOL])
    pool, labels = floats(test, drawn, device, torch.contiguous_format)
    models = {}
    for each in context.loaded:
        towards = towards_next_class(each.model, x, y, pool, labels)
        if not len(towards):
            raise InputError(f"figure gradients: --data has no image of the next classes of {each.run.folder}: give other data")
        found = alignment(each.model, x, y), smoothness(input_gradients(each.model, x, y)), towards
        scores = {name: mean_interval(values) for name, values in zip(SCORES, found, strict=True)}
        models[each.name] = {"alpha": each.run.config.alpha, **scores, "images towards": len(towards)}
    return {"": draw(lines_of(context.loaded), models)}, {"models": models, "images": len(x)}


def draw(lines: dict[str, list[LoadedRun]], models: dict[str, dict]) -> Figure:
    """A panel for each of `SCORES`, a mark with its 95 % interval for each run: against alpha, or side by side."""
    alphas = sorted({found["alpha"] for found in models.values()})
    figure, axes = panel_row(len(SCORES))
    for ax, (score, title) in zip(axes, SCORES.items(), strict=True):
        for number, (style, (label, runs)) in enumerate(zip(line_styles(), lines.items(), strict=False)):
            points = [models[each.name] for each in runs]
            at = [p["alpha"] for p in points] if len(alphas) > 1 else [number]
            single = {"linestyle": "none"} if len(set(at)) < max(2, len(at)) else {}  # several seeds are not joined
            interval_marks(ax, at, [p[score] for p in points], "mean", label=label, **style | single)
        ax.margins(x=0.1)
        ax.set(title=title, xlabel="label smoothing α of the training" if len(alphas) > 1 else "")
        x_ticks(ax, alphas if len(alphas) > 1 else [])
    legend_below(figure, axes[0], min(4, len(lines)))
    return figure

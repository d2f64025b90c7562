"""Madry et al. (arXiv 1706.06083), Figures 1 and 5: the inner problem from inside.

What PGD finds from many random starts, whether that is one maximum or many, and a slice of the loss. As in section 3 and
appendices A and B of the paper: PGD ends at losses that are nearly equal, at points that are far apart.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from spat_kernels import pgd
from spat_kernels.precision import tf32_switches
from spat_kernels.predictions import predictions

from ...models.try_on import device_of
from ...plotting import NUMBERS, PAGE, line_styles, log_ticks, log_y, new_figure, show
from ...runtime.seeding import derived_seed
from ..figure import Drawing, FigureContext, paper_figure
from ..loaded_run import CHUNK, input_gradients, logits_of
from ..runs import eps_label, format_eps
from ..selection import ANY_RUNS

HATCHES = ("", "////", "....", "xxxx")
LEAST = 1e-4  # the smallest loss drawn on log scales


# ---- ascents


@dataclass(frozen=True, eq=False)
class Ascents:
    """PGD on each of N images from R random starts."""

    losses: Tensor  # [R, N, steps + 1], from the start on
    predicted: Tensor  # int64 [R, N], at the end
    starts: Tensor  # images [R, N, C, H, W]
    ends: Tensor  # the same


def ascend(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, *, restarts: int, steps: int, step_size: float, seed: int
) -> Ascents:
    """Follow PGD (L-infinity, cross-entropy) on images x [N, C, H, W] from uniform random points of the ball, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    per_round = max(1, CHUNK // len(x))
    for first in range(0, restarts, per_round):
        count = min(per_round, restarts - first)
        images, labels = x.repeat(count, 1, 1, 1), y.repeat(count)
        noise = (2 * torch.rand(images.shape, generator=generator) - 1) * eps
        start = point = (images + noise.to(images)).clamp(0, 1)
        losses = []
        for step in range(steps + 1):
            logits = logits_of(model, point)
            losses.append(F.cross_entropy(logits, labels.cpu(), reduction="none"))
            if step < steps:
                with tf32_switches("fp32", x.device.type):
                    point = pgd(model, images, labels, eps, steps=1, step_size=step_size, start=point, graph=False)
        parts = torch.stack(losses, -1), predictions(logits), start.cpu(), point.cpu()
        found.append([part.unflatten(0, (count, len(x))) for part in parts])
    return Ascents(*(torch.cat(parts) for parts in zip(*found, strict=True)))


# ---- are the maxima distinct?


def pairwise(points: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """L2 distance of each pair of `points` [R, ...], and cosine of the angle between them as seen from `centre` [...].

    Both are [R (R - 1) / 2], of the pairs (0, 1), (0, 2), ... (R - 2, R - 1).
    """
    away = (points - centre).flatten(1).double()
    i, j = torch.triu_indices(len(away), len(away), offset=1)
    cosines = F.normalize(away) @ F.normalize(away).T
    return torch.pdist(away), cosines[i, j]


def corners(x: Tensor, eps: float, count: int, seed: int) -> Tensor:
    """[count, *x.shape]: random corners of the ball around x, inside the box."""
    signs = torch.randint(2, (count, *x.shape), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (x + eps * signs).clamp(0, 1)


def losses_between(model: nn.Module, points: Tensor, y: Tensor, pairs: int, parts: int = 10) -> Tensor:
    """Mean loss [parts + 1] along at most `pairs` segments between neighbours of `points` [R, C, H, W], which are all of class y,
    divided by that at their ends."""
    pairs = min(pairs, len(points) - 1)
    shares = torch.linspace(0, 1, parts + 1).to(points).view(-1, 1, 1, 1, 1)
    images = torch.lerp(points[None, :pairs], points[None, 1 : pairs + 1], shares).flatten(0, 1)
    logits = logits_of(model, images.to(device_of(model)))
    losses = F.cross_entropy(logits, y.cpu().expand(len(images)), reduction="none").view(parts + 1, pairs).mean(1)
    return losses / ((losses[0] + losses[-1]) / 2)


# ---- a slice of the loss


def surface(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, points: int, seed: int) -> dict:
    """The loss around one image x [C, H, W] of class y [], at x + eps (a g + b r) inside the box, where g is the sign of the
    gradient at x, and r a random sign of each pixel.

    Returns:
        dict: shares [points] from -1 to 1, of a and b; losses and margins [points][points], rows b, columns a. A margin is the
        logit of y less the best other: negative where the class changes.
    """
    g = input_gradients(model, x[None], y[None])[0].sign()
    r = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)).to(x) * 2 - 1
    shares = torch.linspace(-1, 1, points).to(x)
    b, a = torch.meshgrid(shares, shares, indexing="ij")
    a, b = (t.reshape(-1, 1, 1, 1) for t in (a, b))
    logits = logits_of(model, (x + eps * (a * g + b * r)).clamp(0, 1))
    label = y.cpu().expand(len(logits))
    own, other = logits.gather(1, label[:, None])[:, 0], logits.scatter(1, label[:, None], -torch.inf).amax(1)
    square = {"losses": F.cross_entropy(logits, label, reduction="none"), "margins": own - other}
    return {"shares": shares.tolist()} | {name: values.view(points, points).tolist() for name, values in square.items()}


# ---- what it comes to


def compare(model: nn.Module, x: Tensor, y: Tensor, eps: float, found: Ascents, seed: int) -> dict:
    """Whether the maxima that `ascend` found are distinct, as numbers.

    Returns:
        dict: losses [R][N], at the end; fooled, the share of ends that are misclassified; spread, the mean over images of the
        standard deviation of the losses by their mean; distances and cosines, over all pairs and images, as `pairwise`; means
        of the same for random points and random corners of the ball; between, the mean over images of `losses_between`.
    """
    final = found.losses[..., -1]
    groups: dict[str, list[Tensor]] = {"found": [], "random": [], "corner": []}
    lines = []
    for n, (image, label) in enumerate(zip(x.cpu(), y.cpu(), strict=True)):
        points = found.ends[:, n], found.starts[:, n], corners(image, eps, len(final), derived_seed(seed, "corners", n))
        for group, each in zip(groups.values(), points, strict=True):
            group.append(torch.stack(pairwise(each, image)))
        lines.append(losses_between(model, found.ends[:, n], label, pairs=10))
    pairs = {kind: torch.cat(group, 1) for kind, group in groups.items()}
    distances, cosines = pairs.pop("found").tolist()
    kinds = [(f"{kind}_{name}", pairs[kind][i]) for kind in pairs for i, name in enumerate(("distance", "cosine"))]
    return {
        "losses": final.tolist(),
        "fooled": float((found.predicted != y.cpu()).float().mean()),
        "spread": float((final.std(0) / final.mean(0).clamp(min=1e-12)).mean()),
        "distances": distances,
        "cosines": cosines,
        **{kind: float(values.mean()) for kind, values in kinds},
        "between": torch.stack(lines).mean(0).tolist(),
    }


def summary(numbers: dict) -> str:
    """The result of `compare` in a sentence."""
    distance, cosine = (sum(numbers[name]) / len(numbers[name]) for name in ("distances", "cosines"))
    middle = numbers["between"][len(numbers["between"]) // 2]
    which = "different points of one plateau" if middle > 0.98 else "distinct maxima"
    if distance < 0.1 * numbers["random_distance"]:
        which = "all starts lead to one maximum"
    return (
        f"{which}: on average {distance:.3g} apart in L2 (random points of the ball {numbers['random_distance']:.3g}, its random "
        f"corners {numbers['corner_distance']:.3g}), at a cosine of {cosine:.2f} ({numbers['random_cosine']:.2f} and "
        f"{numbers['corner_cosine']:.2f}); halfway between two the loss is {middle:.2f} of theirs; from start to start their "
        f"losses vary by {100 * numbers['spread']:.1f} %"
    )


# ---- drawings


def plot_ascents(models: dict[str, np.ndarray], images: Sequence[Tensor], names: Sequence[str]) -> Figure:
    """Madry et al., Figure 1, of losses [R, N, steps + 1]: N images [C, H, W] across, models down, a line for each start."""
    figure = new_figure(PAGE, 1.25 * len(models) + 1.15)
    axes = figure.subplots(len(models) + 1, len(images), squeeze=False, sharey="row", height_ratios=[0.7] + [1] * len(models))
    for ax, image, name in zip(axes[0], images, names, strict=True):
        show(ax, image)
        ax.set_title(name, parse_math=False)
    for row, style, (name, losses) in zip(axes[1:], line_styles(), models.items(), strict=False):
        for j, ax in enumerate(row):
            ax.plot(losses[:, j].T.clip(LEAST), color=style["color"], linewidth=0.6, alpha=0.6)
            ax.xaxis.set_major_locator(MaxNLocator(max(1, 10 // len(names)), integer=True, steps=[1, 2, 5, 10]))
        log_y(row[0])
        row[0].set_ylabel(f"loss, {name}", parse_math=False)
    for ax in axes[-1]:
        ax.set_xlabel("PGD step")
    return figure


def plot_maxima(models: dict[str, dict], names: Sequence[str]) -> Figure:
    """Madry et al., Figure 5 and Appendix B: what `compare` gives for each model, for images of the classes `names`."""
    figure = new_figure(PAGE, 4.0)
    top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
    styles = list(islice(line_styles(marked=False), len(models)))
    finals = [np.asarray(each["losses"]).clip(LEAST) for each in models.values()]
    bins = np.geomspace(min(f.min() for f in finals) / 1.5, max(f.max() for f in finals) * 1.5, 60)
    axes = top.subplots(1, len(names), squeeze=False, sharex=True, sharey=True)[0]
    for j, (ax, name) in enumerate(zip(axes, names, strict=True)):
        for style, hatch, final in zip(styles, cycle(HATCHES), finals, strict=False):
            ax.hist(final[:, j], bins, color=style["color"], alpha=0.7, hatch=hatch, edgecolor="white", linewidth=0.2)
        ax.set(xscale="log", xlabel="final loss")
        ax.set_title(name, parse_math=False)
    log_ticks(axes[0].xaxis, max(2, 15 // len(names)))  # 15 over all panels
    axes[0].set_ylabel("restarts")

    left, middle, right = bottom.subplots(1, 3)
    first = next(iter(models.values()))
    for ax, key in ((left, "distance"), (middle, "cosine")):
        values = [each[f"{key}s"] for each in models.values()]
        bins = np.histogram_bin_edges(np.concatenate(values), 40)
        for style, each in zip(styles, values, strict=True):
            ax.hist(each, bins, histtype="step", density=True, **style)
        for kind, line in (("random", (0, (1, 1))), ("corner", (0, (6, 2)))):
            ax.axvline(first[f"{kind}_{key}"], color="black", linewidth=1, linestyle=line)
    for style, each in zip(styles, models.values(), strict=True):
        right.plot(np.linspace(0, 1, len(each["between"])), each["between"], **style)
    left.set(xlabel="L2 distance between two maxima", ylabel="density of pairs", yticks=[])
    middle.set(xlabel="cosine of the angle between two", yticks=[])
    right.set(xlabel="from one maximum to another", ylabel="loss, by that at both", ylim=(0, None))
    labels = [*models, "random points of the ball", "random corners of the ball"]
    handles = [Line2D([], [], **style) for style in styles] + list(left.lines)
    bottom.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def plot_surfaces(models: dict[str, dict], radius: str) -> Figure:
    """A panel of losses for each model, from what `surface` gives, with a line where the class changes."""
    figure = new_figure(min(PAGE, 3.2 * len(models) + 0.4), 2.9)
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    ticks = [-1, -0.5, 0, 0.5, 1]
    for ax, (name, each) in zip(axes, models.items(), strict=True):
        place, margins = (each["shares"], each["shares"]), np.asarray(each["margins"])
        filled = ax.contourf(*place, each["losses"], levels=20, cmap="cividis")
        filled.set_edgecolor("face")  # else seams show in PDF
        if margins.min() < 0 < margins.max():
            ax.contour(*place, margins, levels=[0], colors="white", linewidths=1.2)
        ax.plot(0, 0, marker="+", color="white", markersize=7)
        ax.set(xlabel=f"along the gradient's sign, in ε = {radius}", aspect="equal", xticks=ticks, yticks=ticks)
        ax.set_title(name, parse_math=False)
        ax.grid(False)
        figure.colorbar(filled, ax=ax, shrink=0.9, format=NUMBERS, ticks=MaxNLocator(5), label="loss")
    axes[0].set_ylabel("along a random sign, in ε")
    handles = [Line2D([], [], color="0.6"), Line2D([], [], color="0.6", marker="+", linestyle="")]
    figure.legend(handles, ["the class changes", "the image"], loc="outside lower center", ncols=2)
    return figure


# ---- the figure


@paper_figure("landscape", "Madry et al., Fig. 1 and 5: PGD from many starts, its maxima, a slice of the loss", ANY_RUNS)
def make(context: FigureContext) -> Drawing:
    x, y, rows = context.examples()
    names = [context.classes[label] for label in y]
    restarts, steps = context.extent.restarts, context.extent.ascent_steps
    seed, eps, step_size = context.options.seed, context.eps, 2.5 * context.eps / steps
    found = {
        name: ascend(model, x, y, eps, restarts=restarts, steps=steps, step_size=step_size, seed=seed)
        for name, model in context.models.items()
    }
    hardest = int(next(reversed(found.values())).losses[..., -1].mean(0).argmax())  # for the last model: its slice is shown
    maxima = {name: compare(model, x, y, eps, found[name], seed) for name, model in context.models.items()}
    slices = {name: surface(model, x[hardest], y[hardest], eps, points=41, seed=seed) for name, model in context.models.items()}
    drawn = {
        "curves": plot_ascents({name: each.losses.numpy() for name, each in found.items()}, list(x), names),
        "maxima": plot_maxima(maxima, names),
        "surface": plot_surfaces(slices, format_eps(255 * eps)),
    }
    for part in "curves", "maxima":
        drawn[part].suptitle(eps_label(eps))
    meaning = {name: summary(numbers) for name, numbers in maxima.items()}
    losses = {name: each.losses.tolist() for name, each in found.items()}
    many = {"losses": losses, "maxima": maxima, "surfaces": {"row": rows[hardest], **slices}}
    head = {"rows": rows, "labels": names, "restarts": restarts, "steps": steps, "step_size": step_size, "meaning": meaning}
    # Five digits are enough to draw, and make the file three times smaller.
    return drawn, head | json.loads(json.dumps(many), parse_float=lambda text: float(f"{float(text):.5g}"))

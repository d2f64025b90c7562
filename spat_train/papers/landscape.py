"""The inner problem from inside: what PGD finds from many starts, whether that is one maximum or many, a slice of the loss.

Madry et al., arXiv 1706.06083, section 3 and appendices A and B: from random starts in the ball, PGD ends at losses that are
nearly equal, at points that are far apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spat_kernels import pgd
from spat_kernels.model_state.borrow import borrowed
from spat_kernels.precision import tf32_switches
from spat_kernels.predictions import model_logits, predictions

from ..models.registry import device_of
from ..runtime.seeding import derived_seed

CHUNK = 512  # images in one forward


@contextmanager
def _exact(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Within: the model in eval mode without parameter gradients, and matrix products in full precision."""
    with borrowed(model, "eval"), tf32_switches("fp32", x.device.type):
        yield


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """[B, K] of images [B, C, H, W], on the CPU."""
    with _exact(model, x):
        return torch.cat([model_logits(model, images).cpu() for images in x.split(CHUNK)])


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """[B], of logits [B, K] and classes y, int64 [B]."""
    return F.cross_entropy(logits, y.to(logits.device), reduction="none")


def input_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of each image's cross-entropy by its pixels, like x [B, C, H, W]."""
    with torch.enable_grad(), _exact(model, x):
        found = []
        for images, labels in zip(x.detach().split(CHUNK), y.split(CHUNK), strict=True):
            images = images.clone().requires_grad_()
            found.append(torch.autograd.grad(F.cross_entropy(model(images), labels, reduction="sum"), images)[0])
    return torch.cat(found)


# ---- ascents


@dataclass(frozen=True, eq=False)
class Ascents:
    """PGD on each of N images from R random starts.

    Attributes:
        losses: [R, N, steps + 1], from the start on.
        predicted: int64 [R, N], at the end.
        starts, ends: images [R, N, C, H, W].
    """

    losses: Tensor
    predicted: Tensor
    starts: Tensor
    ends: Tensor


def ascend(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, *, restarts: int, steps: int, step_size: float, seed: int
) -> Ascents:
    """Follow PGD (L-infinity, cross-entropy) from uniform random points of the ball.

    Args:
        model: images [N, C, H, W] in [0, 1] -> logits [N, K].
        eps, step_size: in the units of x.
        seed: of the starts.
    """
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
            losses.append(cross_entropies(logits, labels))
            if step < steps:
                with tf32_switches("fp32", x.device.type):
                    point = pgd(model, images, labels, eps, steps=1, step_size=step_size, start=point, graph=False)
        shape = count, len(x)
        parts = torch.stack(losses, -1), predictions(logits), start.cpu(), point.cpu()
        found.append([part.unflatten(0, shape) for part in parts])
    return Ascents(*(torch.cat(parts) for parts in zip(*found, strict=True)))


# ---- are the maxima distinct?


def pairwise(points: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair of `points` [R, ...]: L2 distance, and cosine of the angle between them as seen from `centre` [...].

    Returns:
        Tensor, Tensor: [R (R - 1) / 2] each, pairs (0, 1), (0, 2), ... (R - 2, R - 1).
    """
    away = (points - centre).flatten(1).double()
    i, j = torch.triu_indices(len(away), len(away), offset=1)
    cosines = F.normalize(away) @ F.normalize(away).T
    return torch.pdist(away), cosines[i, j]


def corners(x: Tensor, eps: float, count: int, seed: int) -> Tensor:
    """[count, *x.shape]: random corners of the ball around x, inside the box."""
    signs = torch.randint(2, (count, *x.shape), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (x + eps * signs).clamp(0, 1)


def between(model: nn.Module, points: Tensor, y: Tensor, pairs: int, parts: int = 10) -> Tensor:
    """Mean loss along the segments between neighbours of `points` [R, C, H, W], by the mean of their ends: [parts + 1].

    Args:
        y: int64 [], the class of all points.
        pairs: at most so many segments.
        parts: steps from one end to the other.
    """
    pairs = min(pairs, len(points) - 1)
    shares = torch.linspace(0, 1, parts + 1).to(points).view(-1, 1, 1, 1, 1)
    images = torch.lerp(points[None, :pairs], points[None, 1 : pairs + 1], shares).flatten(0, 1)
    logits = logits_of(model, images.to(device_of(model)))
    losses = cross_entropies(logits, y.expand(len(images))).view(parts + 1, pairs).mean(1)
    return losses / ((losses[0] + losses[-1]) / 2)


# ---- a slice of the loss


def surface(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, points: int, seed: int) -> dict:
    """The loss around one image x [C, H, W] of class y [], at x + eps (a g + b r) inside the box.

    g is the sign of the gradient at x, r a random sign of each pixel.

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
    square = {"losses": cross_entropies(logits, label), "margins": own - other}
    return {"shares": shares.tolist()} | {name: values.view(points, points).tolist() for name, values in square.items()}


# ---- what it comes to


def compare(model: nn.Module, x: Tensor, y: Tensor, eps: float, found: Ascents, seed: int) -> dict:
    """The maxima of `ascend` as numbers.

    Returns:
        dict: losses [R][N], at the end; fooled, the share of ends that are misclassified; spread, the mean over images of the
        standard deviation of the losses by their mean; distances and cosines, over all pairs and images, as `pairwise`; means
        of the same for random points and random corners of the ball; between, the mean over images of `between`.
    """
    final = found.losses[..., -1]
    groups: dict[str, list[tuple[Tensor, ...]]] = {"": [], "random_": [], "corner_": []}
    lines = []
    for n, (image, label) in enumerate(zip(x.cpu(), y.cpu(), strict=True)):
        points = found.ends[:, n], found.starts[:, n], corners(image, eps, len(final), derived_seed(seed, "corners", n))
        for group, each in zip(groups.values(), points, strict=True):
            group.append(pairwise(each, image))
        lines.append(between(model, found.ends[:, n], label, pairs=10))
    pairs = {kind: [torch.cat(parts) for parts in zip(*group, strict=True)] for kind, group in groups.items()}
    means = {
        f"{kind}{name}": float(values.mean())
        for kind in ("random_", "corner_")
        for name, values in zip(("distance", "cosine"), pairs[kind], strict=True)
    }
    return {
        "losses": final.tolist(),
        "fooled": float((found.predicted != y.cpu()).float().mean()),
        "spread": float((final.std(0) / final.mean(0).clamp(min=1e-12)).mean()),
        "distances": pairs[""][0].tolist(),
        "cosines": pairs[""][1].tolist(),
        **means,
        "between": torch.stack(lines).mean(0).tolist(),
    }


def meaning(numbers: dict) -> str:
    """What `compare` found, in a sentence."""
    distance, cosine = (sum(numbers[name]) / len(numbers[name]) for name in ("distances", "cosines"))
    middle = numbers["between"][len(numbers["between"]) // 2]
    if distance < 0.1 * numbers["random_distance"]:
        which = "all starts lead to one maximum"
    elif middle > 0.98:
        which = "different points of one plateau"
    else:
        which = "distinct maxima"
    return (
        f"{which}: on average {distance:.3g} apart in L2 (random points of the ball {numbers['random_distance']:.3g}, its random "
        f"corners {numbers['corner_distance']:.3g}), at a cosine of {cosine:.2f} ({numbers['random_cosine']:.2f} and "
        f"{numbers['corner_cosine']:.2f}); halfway between two the loss is {middle:.2f} of theirs; from start to start their "
        f"losses vary by {100 * numbers['spread']:.1f} %"
    )

"""The inner problem seen from inside: what PGD finds from many starts, whether that is one maximum or many, and a slice of the loss.

Madry et al., arXiv 1706.06083, section 3 and appendices A and B: from random starts in the ball, PGD ends at losses that are nearly equal, at
points that are far apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spat_kernels import pgd
from spat_kernels.borrow import borrowed
from spat_kernels.precision import tf32_switches

CHUNK = 512  # images in one forward


@contextmanager
def _exact(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Within: the model in eval mode without parameter gradients, and matrix products in full precision."""
    with borrowed(model, "eval"), tf32_switches("fp32", x.device.type):
        yield


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [B] and predicted classes, int64 [B], of images [B, C, H, W], on the CPU."""
    found = []
    with torch.no_grad(), _exact(model, x):
        for images, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            logits = model(images).float()
            found.append((F.cross_entropy(logits, labels, reduction="none").cpu(), logits.argmax(1).cpu()))
    losses, predicted = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(predicted)


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
            loss, predicted = losses_of(model, point, labels)
            losses.append(loss)
            if step < steps:
                how = {"steps": 1, "step_size": step_size, "precision": "fp32", "graph": False}
                point = pgd(model, images, labels, eps, start=point, **how)
        shape = count, len(x)
        parts = torch.stack(losses, -1), predicted, start.cpu(), point.cpu()
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
    """Mean loss along the segments that join the first `pairs` neighbours of `points` [R, C, H, W], by that of their ends: [parts + 1]."""
    pairs = min(pairs, len(points) - 1)
    shares = torch.linspace(0, 1, parts + 1).view(-1, 1, 1, 1, 1)
    images = torch.lerp(points[None, :pairs], points[None, 1 : pairs + 1], shares).flatten(0, 1)
    device = next(model.parameters()).device
    losses, _ = losses_of(model, images.to(device), y.to(device).expand(len(images)))
    losses = losses.view(parts + 1, pairs).mean(1)
    return losses / ((losses[0] + losses[-1]) / 2)


# ---- a slice of the loss


@dataclass(frozen=True, eq=False)
class Surface:
    """Loss [n, n] and predicted class [n, n] at x + eps (a g + b r): rows b, columns a, both `shares` [n] from -1 to 1."""

    shares: Tensor
    losses: Tensor
    predicted: Tensor


def surface(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, points: int, seed: int) -> Surface:
    """The loss around one image x [C, H, W] of class y [], g the sign of its gradient, r a random sign of each pixel."""
    g = input_gradients(model, x[None], y[None])[0].sign()
    r = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)).to(x) * 2 - 1
    shares = torch.linspace(-1, 1, points).to(x)
    b, a = torch.meshgrid(shares, shares, indexing="ij")
    a, b = (t.reshape(-1, 1, 1, 1) for t in (a, b))
    images = (x + eps * (a * g + b * r)).clamp(0, 1)
    losses, predicted = losses_of(model, images, y.expand(len(images)))
    return Surface(shares.cpu(), losses.view(points, points), predicted.view(points, points))

"""Test images beside their adversarial examples, each with the class that the model sees."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from spat_kernels import pgd, pgd_ls
from spat_kernels.predictions import predictions
from spat_kernels.settings import PGDSettings

from ..data.images import Dataset, floats
from ..models.try_on import device_of
from ..plotting import image_grid, save, style
from .loaded_run import logits_of

ROWS = 5
CANDIDATES = 256  # images that the rows of a picture are chosen from


def large_eps(eps: float, channels: int) -> float:
    """A radius at which changes can be seen: 4 eps for colour (32/255 from 8/255), twice eps for grey.

    It stays below 0.5, where any image can be made flat grey.
    """
    return min(4 * eps if channels == 3 else 2 * eps, 0.45)


def examples(models: Sequence[nn.Module], x: Tensor, y: Tensor, count: int = ROWS) -> list[int]:
    """Indices of one image of each of `count` classes that all models get right, or of any image if there are none."""
    right = torch.stack([predictions(logits_of(model, x)) == y.cpu() for model in models]).all(0)
    among = right.nonzero()[:, 0] if right.any() else torch.arange(len(y))
    labels = y.cpu()[among]
    return [int(among[labels == label][0]) for label in labels.unique()[:count]]


def smoothed_attacks(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> dict[str, Tensor]:
    """The columns of Figure 5.2: images [N, C, H, W] and their examples by PGD-CE and PGD-LS."""
    settings: PGDSettings = {"steps": 50, "step_size": eps / 10, "generator": torch.Generator().manual_seed(seed)}
    return {
        "original": x,
        "PGD-CE": pgd(model, x, y, eps, **settings),
        "PGD-LS(.2)": pgd_ls(model, x, y, eps, 0.2, **settings),
        "PGD-LS(.8)": pgd_ls(model, x, y, eps, 0.8, **settings),
    }


def attacked_grid(model: nn.Module, columns: dict[str, Tensor], y: Tensor, classes: Sequence[str]) -> tuple[Figure, dict]:
    """Draw `columns` of attacked images [N, C, H, W], whose labels are y, each with the class that the model sees.

    Returns:
        The drawing, and by title the predicted classes and the losses.
    """
    captions: dict[str, Sequence[tuple[str, bool]]] = {}
    numbers = {}
    for title, images in columns.items():
        logits = logits_of(model, images)
        predicted, losses = predictions(logits), F.cross_entropy(logits, y.cpu(), reduction="none")
        names = [classes[p] if p >= 0 else "NaN" for p in predicted.tolist()]
        captions[title] = list(zip(names, (predicted == y.cpu()).tolist(), strict=True))
        numbers[title] = {"predicted": names, "loss": losses.tolist()}
    return image_grid(columns, [classes[label] for label in y], captions), numbers


def write_attacked(path: Path, model: nn.Module, data: Dataset, eps: float, seed: int) -> None:
    """Write a PNG of test images attacked on `model` as in Figure 5.2."""
    x, y = floats(data.test, torch.arange(min(CANDIDATES, len(data.test))), device_of(model), torch.contiguous_format)
    chosen = examples([model], x, y)
    with style():
        figure, _ = attacked_grid(model, smoothed_attacks(model, x[chosen], y[chosen], eps, seed), y[chosen], data.classes)
        figure.suptitle(f"Attacks at ε = {eps:.3g} and what the model sees")
    save(figure, path)

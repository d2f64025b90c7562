"""What models see and what attacks do, as pictures: input gradients (thesis, Fig. 4.1), adversarial images (Fig. 5.1, 5.2)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from spat_kernels import cw_linf, pgd, pgd_ls
from spat_kernels.predictions import predictions
from spat_kernels.settings import PGDSettings

from ..data.images import Dataset, floats
from ..models.registry import device_of
from .figures import gradient_picture, look, picture_grid, save
from .landscape import cross_entropies, input_gradients, logits_of

ROWS = 5
CANDIDATES = 256  # images that the rows of a picture are chosen from


def large_eps(eps: float, channels: int) -> float:
    """4 eps for colour (32/255 from 8/255), twice eps for grey, but below 0.5, where any image can be made flat grey."""
    return min(4 * eps if channels == 3 else 2 * eps, 0.45)


def one_per_class(y: Tensor, count: int) -> list[int]:
    """Index of the first image of each of the first `count` classes that occur in y [N]."""
    return [int((y == label).nonzero()[0]) for label in y.unique()[:count]]


def examples(models: Sequence[nn.Module], x: Tensor, y: Tensor, count: int = ROWS) -> list[int]:
    """One image of each class that all models get right; of all where there is no such."""
    right = torch.stack([predictions(logits_of(model, x)) == y.cpu() for model in models]).all(0)
    among = right.nonzero()[:, 0] if right.any() else torch.arange(len(y))
    return among[one_per_class(y.cpu()[among], count)].tolist()


def smoothed_attacks(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> dict[str, Tensor]:
    """The columns of Figure 5.2."""
    settings: PGDSettings = {"steps": 50, "step_size": eps / 10, "generator": torch.Generator().manual_seed(seed)}
    return {
        "original": x,
        "PGD-CE": pgd(model, x, y, eps, **settings),
        "PGD-LS(.2)": pgd_ls(model, x, y, eps, 0.2, **settings),
        "PGD-LS(.8)": pgd_ls(model, x, y, eps, 0.8, **settings),
    }


def margin_attacks(model: nn.Module, x: Tensor, y: Tensor, radii: dict[str, float], seed: int) -> dict[str, Tensor]:
    """The columns of Figure 5.1: C&W-infinity at each radius."""
    columns = {"original": x}
    for name, eps in radii.items():
        generator = torch.Generator().manual_seed(seed)
        columns[name] = cw_linf(model, x, y, eps, steps=30, step_size=eps / 10, generator=generator)
    return columns


def attacked_grid(model: nn.Module, columns: dict[str, Tensor], y: Tensor, classes: Sequence[str]) -> tuple[Figure, dict]:
    """Images as they were attacked, each with the class that the model sees; and, by column, classes and losses."""
    captions: dict[str, Sequence[tuple[str, bool]]] = {}
    numbers = {}
    for title, images in columns.items():
        logits = logits_of(model, images)
        predicted, losses = predictions(logits), cross_entropies(logits, y)
        names = [classes[p] if p >= 0 else "NaN" for p in predicted.tolist()]
        captions[title] = list(zip(names, (predicted == y.cpu()).tolist(), strict=True))
        numbers[title] = {"predicted": names, "loss": losses.tolist()}
    return picture_grid(columns, [classes[label] for label in y], captions), numbers


def gradients_grid(models: dict[str, nn.Module], x: Tensor, y: Tensor, classes: Sequence[str]) -> Figure:
    """Figure 4.1: each image, and the gradient of each model's loss there."""
    columns = {"image": x}
    for name, model in models.items():
        columns[name] = torch.stack([gradient_picture(g) for g in input_gradients(model, x, y)])
    return picture_grid(columns, [classes[label] for label in y], {})


def smoothness(gradients: Tensor) -> float:
    """Mean correlation of neighbouring pixels in gradients [B, C, H, W]: 0 for noise, towards 1 where they form shapes."""
    g = gradients - gradients.mean((2, 3), keepdim=True)
    along = (g[..., 1:] * g[..., :-1]).mean((1, 2, 3)), (g[..., 1:, :] * g[..., :-1, :]).mean((1, 2, 3))
    return float((sum(along) / 2 / g.square().mean((1, 2, 3)).clamp(min=1e-30)).mean())


def write_figure(path: Path, model: nn.Module, data: Dataset, eps: float, seed: int) -> None:
    """Write a PNG of test images attacked on `model` (Figure 5.2), each with the class that it sees."""
    x, y = floats(data.test, torch.arange(min(CANDIDATES, len(data.test))), device_of(model), torch.contiguous_format)
    chosen = examples([model], x, y)
    with look():
        figure, _ = attacked_grid(model, smoothed_attacks(model, x[chosen], y[chosen], eps, seed), y[chosen], data.classes)
        figure.suptitle(f"Attacks at ε = {eps:.3g} and what the model sees")
        save(figure, path)

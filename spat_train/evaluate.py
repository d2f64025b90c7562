"""Test accuracy, clean and under attack."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spat_kernels import cw_linf, fgsm, pgd

BATCH = 512


def attacks(eps: float, seed: int) -> dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    """The columns of the table: (model, x [B, C, H, W], y [B]) -> x_adv. Random starts come from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "clean": lambda model, x, y: x,
        "FGSM": lambda model, x, y: fgsm(model, x, y, eps),
        "PGD-20": lambda model, x, y: pgd(model, x, y, eps, steps=20, step_size=eps / 10, generator=generator),
        "C&W-inf-30": lambda model, x, y: cw_linf(model, x, y, eps, steps=30, step_size=eps / 10, generator=generator),
    }


def accuracies(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> dict[str, float]:
    """Accuracy in percent on x [N, C, H, W], y [N] per attack, the model in eval mode."""
    model.eval()
    result = {}
    for name, attack in tqdm(attacks(eps, seed).items(), desc="evaluate", leave=False):
        correct = 0
        for x_batch, y_batch in zip(x.split(BATCH), y.split(BATCH), strict=True):
            x_adv = attack(model, x_batch, y_batch)
            with torch.no_grad():
                correct += int((model(x_adv).argmax(1) == y_batch).sum())
        result[name] = 100 * correct / len(x)
    return result


def table(rows: dict[str, dict[str, float]]) -> str:
    """Models down, attacks across, in percent."""
    columns = list(next(iter(rows.values())))
    lines = [f"{'accuracy, %':<14}" + "".join(f"{name:>12}" for name in columns)]
    lines += [f"{model:<14}" + "".join(f"{row[name]:>12.1f}" for name in columns) for model, row in rows.items()]
    return "\n".join(lines)

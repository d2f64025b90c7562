"""Accuracy, clean and under attack."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spat_kernels import cw_linf, fgsm, pgd
from spat_kernels.precision import tf32_switches

from .distributed import World
from .images import Folder, Images, floats

BATCH = 512
Attack = Callable[..., Tensor]  # (model, x [B, C, H, W], y [B], eps, generator=, precision=, ...) -> x_adv


def _pgd(steps: int, part: float) -> Attack:
    """PGD of `steps` steps of eps / part."""
    return lambda model, x, y, eps, **how: pgd(model, x, y, eps, steps=steps, step_size=eps / part, **how)


# The columns of the thesis's tables 6.1 and 6.2; FGSM starts at the image.
TEST: dict[str, Attack] = {
    "clean": lambda model, x, y, eps, **how: x,
    "FGSM": fgsm,
    "PGD-20": _pgd(20, 10),
    "C&W-inf-30": lambda model, x, y, eps, **how: cw_linf(model, x, y, eps, steps=30, step_size=eps / 10, **how),
}


def validation(steps: int) -> dict[str, Attack]:
    return {"clean": TEST["clean"], "pgd": _pgd(steps, 4)}


def accuracies(
    model: nn.Module,
    images: Images | Folder,
    attacks: dict[str, Attack],
    eps: float,
    *,
    rows: Tensor | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    world: World | None = None,
    between: Callable[[], object] = lambda: None,
    bar: str | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    **how,
) -> dict[str, float]:
    """Accuracy in percent under each attack, the model in eval mode and given back in the mode it came in.

    Args:
        model: images [B, C, H, W] in [0, 1] -> logits [B, K].
        eps: radius for images in [0, 1].
        rows: int64 [N], which images; None is all.
        seed: of the random starts, which depend on it, on `batch_size` and on a batch's place alone.
        world: processes that share the batches; each gets the same result.
        between: called after every attack on a batch, equally often in every process (to stop by an exception).
        bar: the name of a progress bar; None shows none.
        memory_format: of the images.
        how: `precision`, `input_gradient`, `graph` of the attacks.
    """
    rows = torch.arange(len(images)) if rows is None else rows
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    rank, size = (world.rank, world.size) if world else (0, 1)
    correct = dict.fromkeys(attacks, 0)
    training = model.training
    progress = tqdm(total=len(rows) * len(attacks) // size, desc=bar, unit="img", leave=False, disable=bar is None)
    batches = rows.split(batch_size)
    model.eval()
    try:
        for number in range(rank, rank + len(batches), size):  # as many rounds for every process: the last may be without a batch
            x, y = floats(images, batches[number] if number < len(batches) else rows[:0], device, memory_format)
            for name, attack in attacks.items():
                if len(x):
                    generator = torch.Generator().manual_seed(seed + number)
                    x_adv = attack(model, x, y, eps, generator=generator, **how)
                    with torch.no_grad(), tf32_switches("fp32", device.type):
                        correct[name] += int((model(x_adv).argmax(1) == y).sum())
                    progress.update(len(x))
                between()
    finally:
        progress.close()
        model.train(training)
    counts = world.add(*correct.values()) if world else list(correct.values())
    return {name: 100 * count / len(rows) for name, count in zip(attacks, counts, strict=True)}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Models down, attacks across, in percent."""
    columns = list(next(iter(rows.values())))
    lines = [f"{'accuracy, %':<14}" + "".join(f"{name:>12}" for name in columns)]
    lines += [f"{model:<14}" + "".join(f"{row[name]:>12.1f}" for name in columns) for model, row in rows.items()]
    return "\n".join(lines)

"""The same small CNN trained three ways, measured and drawn: standard, Madry, and Madry on SPAT's examples."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from spat_kernels import pgd, pgd_ls

from .data import Dataset, InputError, digits, load_npz
from .evaluate import accuracies, table
from .figures import large_eps, write_figure
from .models import SmallCNN

DIGITS, GREY, COLOUR = (0.2, 20), (0.3, 15), (8 / 255, 15)  # eps, epochs


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    epochs: int,
    seed: int,
    name: str,
    batch_size: int = 64,
    max_lr: float = 5e-3,
) -> None:
    """Adversarial training: minimise the cross-entropy at attack(model, x, y) for x [N, C, H, W] in [0, 1], y [N]."""
    shuffle = torch.Generator().manual_seed(seed)
    batches = math.ceil(len(x) / batch_size)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=epochs * batches)
    model.train()
    with tqdm(total=epochs * batches, desc=name, unit="batch") as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(x), generator=shuffle).to(x.device).split(batch_size):
                x_adv = attack(model, x[index], y[index])
                loss = F.cross_entropy(model(x_adv), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def training_attacks(eps: float, alpha: float, seed: int) -> dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    """The three trainings: (model, x, y) -> what the model is trained on, 10 steps of eps / 4 where it is attacked."""

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    madry, spat = generator(), generator()
    return {
        "standard": lambda model, x, y: x,
        "Madry": lambda model, x, y: pgd(model, x, y, eps, generator=madry),
        "Madry+SPAT": lambda model, x, y: pgd_ls(model, x, y, eps, alpha, generator=spat),
    }


def demo(
    data: Path | None = None,
    limit: int | None = None,
    epochs: int | None = None,
    eps: float | None = None,
    alpha: float = 0.2,
    seed: int = 0,
    out: Path = Path("figure.png"),
) -> dict[str, dict[str, float]]:
    """Train a small CNN three ways (standard, Madry, Madry+SPAT), print their robustness, and draw the attacks.

    Without --data on scikit-learn's 8x8 digits, in well under a minute on a CPU core. Runs on a GPU where there is one.

    Args:
        data: an .npz file of x_train, y_train, x_test, y_test: images uint8 [N, H, W] or [N, H, W, 3], labels int64 [N]; and,
            optionally, the names of the classes.
        limit: number of training images, and the most test images, drawn at random. Default: all.
        epochs: passes over the training images of each training. Default: 20 for the digits, 15 for a file.
        eps: radius of the L-infinity ball, for images in [0, 1]. Default: 0.2 for the digits, 0.3 grey, 8/255 colour.
        alpha: label smoothing of the SPAT examples, in [0, 1].
        seed: source of all randomness.
        out: where the figure goes, a .png file.

    Returns:
        Accuracy in percent, per model and attack.
    """
    check(limit, epochs, eps, alpha, seed, out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = (digits(limit, seed) if data is None else load_npz(data, limit, seed)).to(device)
    channels = dataset.image_shape[0]
    default_eps, default_epochs = DIGITS if data is None else GREY if channels == 1 else COLOUR
    eps = default_eps if eps is None else eps
    epochs = default_epochs if epochs is None else epochs
    print(
        f"{dataset.name}: {len(dataset.x_train)} training and {len(dataset.x_test)} test images {list(dataset.image_shape)}, "
        f"eps {eps:.4g}, alpha {alpha:g}, {epochs} epochs, on {device}"
    )

    threads = torch.get_num_threads()
    if data is None:
        # 8x8 images are too small to gain from a second thread, and threads waiting for a busy core cost ten times the run.
        torch.set_num_threads(1)
    try:
        return run(dataset, eps, epochs, alpha, seed, out)
    finally:
        torch.set_num_threads(threads)


def run(dataset: Dataset, eps: float, epochs: int, alpha: float, seed: int, out: Path) -> dict[str, dict[str, float]]:
    """Train, print the table, write the figure; `demo` with its defaults filled in."""
    channels = dataset.image_shape[0]
    start = time.perf_counter()
    models, rows = {}, {}
    for name, attack in training_attacks(eps, alpha, seed).items():
        torch.manual_seed(seed)  # the same initial weights for all three
        models[name] = SmallCNN(dataset.image_shape, len(dataset.classes)).to(dataset.x_train.device)
        train(models[name], dataset.x_train, dataset.y_train, attack, epochs=epochs, seed=seed, name=name)
        rows[name] = accuracies(models[name], dataset.x_test, dataset.y_test, eps, seed)
    print(table(rows))

    write_figure(out, models["Madry"], dataset, large_eps(eps, channels), seed)
    print(f"{out} written; {time.perf_counter() - start:.0f} s")
    return rows


def check(limit: int | None, epochs: int | None, eps: float | None, alpha: float, seed: int, out: Path) -> None:
    """Raise InputError for what would fail, or mean nothing, after minutes of training."""
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: give at least 1 image, or leave it out for all")
    if epochs is not None and epochs < 1:
        raise InputError(f"--epochs {epochs}: give at least 1")
    if eps is not None and not 0 < eps <= 1:
        raise InputError(f"--eps {eps}: give a number in (0, 1], images are in [0, 1] (8/255 is 0.0314)")
    if not 0 <= alpha <= 1:
        raise InputError(f"--alpha {alpha}: give a number in [0, 1], it is a label smoothing")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: give an integer from 0 to 2**63 - 1")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: give a name that ends in .png")
    try:
        existed = out.exists()
        out.open("ab").close()
        if not existed:
            out.unlink()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}): give a file in a writable folder") from error

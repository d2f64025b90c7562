"""The same small CNN trained three ways, measured and drawn: standard, Madry, and Madry on SPAT's examples.

SPAT does not pay on data this easy, and the demo says so: where a model is sure, PGD-LS attacks less or not at all. `python -m
benchmarks.figure61` measured it for many alphas, and chooses alpha on held-out images (benchmarks/NOTES.md).
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from .command_line import DEFAULT_IN_HELP
from .config import Config
from .data.datasets import load
from .data.images import Dataset, floats
from .errors import InputError, check_count, check_eps, check_seed
from .evaluation.evaluate import TEST, accuracies, table
from .models.try_on import device_of
from .papers.loaded_run import alignment
from .papers.pictures import CANDIDATES, large_eps, write_attacked
from .training.trainer import train

DIGITS, GREY, COLOUR = (51.0, 14), (76.5, 15), (8.0, 15)  # eps in 1/255, epochs
ON_DIGITS = (
    "SPAT does not pay on these digits: no alpha beat 0 under PGD, at three radii and from five seeds (benchmarks/NOTES.md)"
)
# No validation: the demo selects nothing, and trains on every image.
SETTINGS = Config(
    model="small-cnn", optimizer="adam", lr=5e-3, schedule="one-cycle", weight_decay=0.0, batch_size=64,
    holdout=0, pad=0, flip=False, test=False,
)  # fmt: skip


def demo(
    data: str = "digits",
    limit: Annotated[int | None, DEFAULT_IN_HELP] = None,
    epochs: Annotated[int | None, DEFAULT_IN_HELP] = None,
    eps: Annotated[float | None, DEFAULT_IN_HELP] = None,
    alpha: float = 0.2,
    seed: int = 0,
    out: Path = Path("figure.png"),
) -> dict[str, dict[str, float]]:
    """Train a small CNN three ways (standard, Madry, Madry+SPAT), print their robustness, and draw the attacks.

    By default on scikit-learn's 8x8 digits, in well under a minute on a CPU core. Runs on a GPU where there is one.

    Args:
        data: as in `spat-train train`: digits, mnist, cifar10, ..., or an .npz file of x_train, y_train, x_test, y_test: images
            uint8 [N, H, W] or [N, H, W, 3], labels int64 [N]; and, optionally, the names of the classes.
        limit: number of training images and maximum number of test images, drawn at random. Default: all.
        epochs: passes over the training images of each training. Default: 14 for the digits, else 15.
        eps: radius of the L-infinity ball, in 1/255. Default: 51 (0.2) for the digits, 76.5 (0.3) grey, 8 colour.
        alpha: label smoothing of the SPAT examples, in [0, 1].
        seed: of everything random.
        out: the figure, a .png file.

    Returns:
        Accuracy in percent, per model and attack.
    """
    _check(limit, epochs, eps, alpha, seed, out)
    dataset = load(data, limit=limit, seed=seed)
    default_eps, default_epochs = DIGITS if data == "digits" else GREY if dataset.image_shape[0] == 1 else COLOUR
    measured = data == "digits" and 0 < alpha <= 0.6 and (limit, epochs, eps) == (None, None, None)  # what ON_DIGITS is about
    eps = default_eps if eps is None else eps
    config = replace(SETTINGS, data=data, limit=limit, seed=seed, eps=eps, epochs=epochs or default_epochs)
    print(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images {list(dataset.image_shape)}, "
        f"eps {config.eps:g}/255, alpha {alpha:g}, {config.epochs} epochs, on {'cuda' if torch.cuda.is_available() else 'cpu'}"
    )

    threads, start = torch.get_num_threads(), time.perf_counter()
    if data == "digits":
        # 8x8 images are too small to gain from a second thread, and threads waiting for a busy core cost ten times the run.
        torch.set_num_threads(1)
    try:  # from the same initial weights
        trainings = {"standard": replace(config, method="standard"), "Madry": config, "Madry+SPAT": replace(config, alpha=alpha)}
        models = {name: train(settings, dataset, save=False).model for name, settings in trainings.items()}
        radius = config.evaluation_eps_in_x
        rows = {name: accuracies(model, dataset.test, TEST, radius, seed=seed) for name, model in models.items()}
        print(table(rows))
        print(trade_off(models, rows, dataset))
        write_attacked(out, models["Madry"], dataset, large_eps(radius, dataset.image_shape[0]), seed)
    finally:
        torch.set_num_threads(threads)
    if measured:
        print(ON_DIGITS)
    print(f"{out} written; {time.perf_counter() - start:.0f} s")
    return rows


def trade_off(models: dict[str, nn.Module], rows: dict[str, dict[str, float]], dataset: Dataset) -> str:
    """What the SPAT examples change: accuracies, and how much the gradients look like the images."""
    some = torch.arange(min(CANDIDATES, len(dataset.test)))
    x, y = floats(dataset.test, some, device_of(models["Madry"]), torch.contiguous_format)
    plain, spat = (float(alignment(models[name], x, y).mean()) for name in ("Madry", "Madry+SPAT"))
    clean, robust = (rows["Madry+SPAT"][name] - rows["Madry"][name] for name in ("clean", "PGD-20"))
    return (
        f"Madry+SPAT against Madry: clean {clean:+.1f} points, PGD-20 {robust:+.1f}; "
        f"cosine of gradients and images {spat:.2f}, was {plain:.2f}"
    )


def _check(limit: int | None, epochs: int | None, eps: float | None, alpha: float, seed: int, out: Path) -> None:
    """Raise InputError for what would fail, or mean nothing, after minutes of training."""
    check_count("--limit", limit, least=2)
    check_count("--epochs", epochs)
    check_eps("--eps", eps)
    check_seed(seed)
    if not 0 <= alpha <= 1:
        raise InputError(f"--alpha {alpha}: give a number in [0, 1], it is a label smoothing")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: give a name that ends in .png")
    try:
        existed = out.exists()
        out.open("ab").close()
        if not existed:
            out.unlink()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}): give a file in a writable folder") from error

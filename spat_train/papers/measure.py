"""Models of runs on test images: opened, checked and measured; numbers are kept in the run's folder and cost nothing again."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..data.datasets import load
from ..data.images import Dataset, fingerprint, floats
from ..errors import InputError
from ..evaluation.evaluate import evaluate, tensor_hash, weights_hash
from ..evaluation.interruptible import interruptible
from ..models.checkpoints import load_model
from ..models.registry import device_of
from .runs import Options, Run, data_name, title


@dataclass(frozen=True, eq=False)
class Subject:
    """A run and its model, in eval mode."""

    run: Run
    model: nn.Module
    name: str


@dataclass(frozen=True, eq=False)
class TestImages:
    """`rows` of the test images of `dataset`: int64 [N], drawn at random."""

    dataset: Dataset
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        return len(self.dataset.test)

    def floats(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first `count`: fp32 [N, C, H, W] in [0, 1] and labels, int64 [N]."""
        return floats(self.dataset.test, self.rows[:count], device, torch.contiguous_format)


def open_images(runs: Iterable[Run], options: Options) -> TestImages:
    """The test images of --data, or of what all `runs` were trained on.

    Raises:
        InputError: they were trained on different data, or the data do not fit.
    """
    configs = {run.folder: run.config for run in runs}
    names = {data_name(c.data): folder for folder, c in configs.items()}
    if options.data is None and len(names) > 1:
        told = ", ".join(f"{folder} on {name}" for name, folder in names.items())
        raise InputError(f"--data: the runs were trained on different data ({told}): give runs of one, or name the data")
    c = next(iter(configs.values()))
    root = options.root or c.root
    dataset = load(
        options.data or c.data, root=root, download=options.download, image_size=c.image_size, skip_broken=c.skip_broken
    )
    drawn = np.random.default_rng(options.seed).permutation(len(dataset.test))[: options.test_images]
    return TestImages(dataset, torch.from_numpy(drawn))


def open_models(runs: Sequence[Run], images: TestImages, options: Options) -> list[Subject]:
    """In the order of `runs`; named by their method, or by their folders where two are alike.

    Raises:
        InputError: a checkpoint does not fit the images.
    """
    titles = [title(run.config) for run in runs]
    names = titles if len(set(titles)) == len(titles) else [run.folder.name for run in runs]
    return [open_model(run, images, options, name) for run, name in zip(runs, names, strict=True)]


def open_model(run: Run, images: TestImages, options: Options, name: str = "") -> Subject:
    """Called `name`, else as its folder."""
    repeated = options.scale.model if options.scale.model == run.config.model else None  # which code needs, to run
    model, _ = load_model(run.folder, images.dataset, repeated, option="--model")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Subject(run, model.to(device), name or run.folder.name)


def measured(
    subject: Subject,
    images: TestImages,
    attacks: Sequence[str],
    options: Options,
    *,
    eps: float,
    source: nn.Module | None = None,
    attack_wrong: bool = False,
) -> dict[str, dict[str, float]]:
    """By attack, in percent: accuracy, and low and high of its 95 % interval (Wilson).

    Args:
        attacks: names of `spat_train.evaluation.attack_specs`.
        eps: the radius, for images in [0, 1].
        source: the model that the attacks are made on.
        attack_wrong: as in `evaluate`.
    """
    settings = {"eps": eps, "seed": options.seed, "batch_size": options.eval_batch_size, "attack_wrong": attack_wrong}
    parts = (
        weights_hash(subject.model),
        source and weights_hash(source),
        fingerprint(images.dataset.test, contents=True),
        tensor_hash(images.rows),
    )
    key = hashlib.sha256(repr((parts, sorted(settings.items()))).encode()).hexdigest()[:12]
    folder = subject.run.folder / "evaluations" / f"{data_name(images.dataset.name)}-{len(images)}-{key}"
    device = device_of(subject.model)
    with interruptible(
        "the same command goes on from there",
        lambda: f"--eval-batch-size {options.eval_batch_size}: out of memory on {device}: lower it",
    ) as on_progress:
        found = evaluate(
            subject.model, images.dataset.test, attacks, eps=eps, source=source, attack_wrong=attack_wrong,
            rows=images.rows, seed=options.seed, batch_size=options.eval_batch_size, folder=folder, bar=subject.name,
            on_progress=on_progress, memory_format=subject.run.config.memory_format,
        )  # fmt: skip
    return {name: _told(found, name) for name in attacks}


def _told(found, name: str) -> dict[str, float]:
    low, high = found.interval(name)
    return {"accuracy": found.accuracy(name), "low": low, "high": high}


def radius(runs: Iterable[Run], options: Options) -> float:
    """--eps, else what the first run that was attacked in training is evaluated at, else the first; for images in [0, 1]."""
    runs = sorted(runs, key=lambda run: run.standard)
    return (options.eps or runs[0].config.evaluation_eps) / 255

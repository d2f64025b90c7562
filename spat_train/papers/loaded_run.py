"""Models of runs on test images: loaded, checked and measured. Accuracies are kept in the run's folder."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spat_kernels.interrupts import check
from spat_kernels.model_state.borrow import borrowed
from spat_kernels.precision import tf32_switches
from spat_kernels.predictions import model_logits

from ..data.datasets import load
from ..data.images import Dataset, fingerprint, floats
from ..errors import InputError
from ..evaluation.evaluate import evaluate
from ..evaluation.record_log import tensor_hash, weights_hash
from ..evaluation.result import Evaluation, interval, percent
from ..models.checkpoints import load_model
from ..models.try_on import device_of
from ..runtime.signals import interruptible
from .options import Options
from .runs import Run, data_name, title

CHUNK = 512  # images in one forward


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
        """The first `count`: fp32 [N, C, H, W] in [0, 1], and their labels, int64 [N]."""
        return floats(self.dataset.test, self.rows[:count], device, torch.contiguous_format)


def open_images(runs: Iterable[Run], options: Options) -> TestImages:
    """The test images of --data, or of the data that all `runs` were trained on.

    Raises:
        InputError: they were trained on different data, or the data do not fit.
    """
    configs = {run.folder: run.config for run in runs}
    names = {data_name(c.data): folder for folder, c in configs.items()}
    if options.data is None and len(names) > 1:
        listed = ", ".join(f"{folder} on {name}" for name, folder in names.items())
        raise InputError(f"--data: the runs were trained on different data ({listed}): give runs of one, or name the data")
    c = next(iter(configs.values()))
    root = options.root or c.root
    dataset = load(
        options.data or c.data, root=root, download=options.download, image_size=c.image_size, skip_broken=c.skip_broken
    )
    drawn = np.random.default_rng(options.seed).permutation(len(dataset.test))[: options.test_images]
    return TestImages(dataset, torch.from_numpy(drawn))


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A run and its model, in eval mode."""

    run: Run
    model: nn.Module
    name: str

    def measure(self, images: TestImages, attacks: Sequence[str], options: Options, **settings) -> dict[str, dict[str, float]]:
        """By attack, the accuracy of `evaluate` as a `point`. `settings`: as there."""
        found = self.evaluate(images, attacks, options, **settings)
        return {name: point(found.correct(name)) for name in attacks}

    def evaluate(
        self,
        images: TestImages,
        attacks: Sequence[str],
        options: Options,
        *,
        eps: float,
        source: nn.Module | None = None,
        attack_wrong: bool = False,
    ) -> Evaluation:
        """`spat_train.evaluate`, kept in the run's folder.

        Args:
            attacks: names in `spat_train.evaluation.attack_specs`.
            eps: the radius, for images in [0, 1].
            source: the model that the attacks are made on, if another one.
            attack_wrong: as in `evaluate`.
        """
        size = options.eval_batch_size
        settings: dict[str, Any] = {"eps": eps, "seed": options.seed, "batch_size": size, "attack_wrong": attack_wrong}
        weights = weights_hash(self.model), source and weights_hash(source)
        parts = *weights, fingerprint(images.dataset.test, contents=True), tensor_hash(images.rows)
        key = hashlib.sha256(repr((parts, sorted(settings.items()))).encode()).hexdigest()[:12]
        folder = self.run.folder / "evaluations" / f"{data_name(images.dataset.name)}-{len(images)}-{key}"
        device = device_of(self.model)
        with interruptible(
            "the same command continues it",
            lambda: f"--eval-batch-size {size}: out of memory on {device}: lower it",
        ) as on_progress:
            return evaluate(
                self.model, images.dataset.test, attacks, **settings, source=source, rows=images.rows, folder=folder,
                bar=self.name, on_progress=on_progress, memory_format=self.run.config.memory_format,
            )  # fmt: skip


def point(found: Tensor, name: str = "accuracy") -> dict[str, float]:
    """The share of True in bool [N], in percent, by this `name`, and low and high of its 95 % interval (Wilson)."""
    low, high = interval(found)
    return {name: percent(found), "low": low, "high": high}


def open_models(runs: Sequence[Run], images: TestImages, options: Options) -> list[LoadedRun]:
    """Load runs in their order, named by their method, or by their folders where two methods are the same.

    Raises:
        InputError: a checkpoint does not fit the images.
    """
    titles = [title(run.config) for run in runs]
    names = titles if len(set(titles)) == len(titles) else [run.folder.name for run in runs]
    return [open_model(run, images, options, name) for run, name in zip(runs, names, strict=True)]


def open_model(run: Run, images: TestImages, options: Options, name: str = "") -> LoadedRun:
    """Load one run, named `name`, else as its folder."""
    allowed = options.model if options.model == run.config.model else None  # code runs only where the user repeats its name
    model, _ = load_model(run.folder, images.dataset, allowed, option="--model")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LoadedRun(run, model.to(device), name or run.folder.name)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Logits [B, K] on the CPU, of images [B, C, H, W]. The model is left as it was."""
    with borrowed(model, "eval"), tf32_switches("fp32", x.device.type):
        return torch.cat([model_logits(model, images).cpu() for images in x.split(CHUNK)])


def _summed_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="sum")


def summed_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The label's logit minus the largest other one, summed. Where the model is sure, a loss has no gradient left; this has."""
    label = F.one_hot(y, logits.shape[1]).bool()
    return (logits[label] - logits.masked_fill(label, -torch.inf).amax(1)).sum()


def input_gradients(
    model: nn.Module, x: Tensor, y: Tensor, of: Callable[[Tensor, Tensor], Tensor] = _summed_cross_entropy
) -> Tensor:
    """The gradient of each image's cross-entropy with respect to its pixels, like x [B, C, H, W]. The model is left as it was.

    Args:
        of: instead of the cross-entropy: logits [B, K] and labels -> a sum over the images.
    """
    with torch.enable_grad(), borrowed(model, "eval"), tf32_switches("fp32", x.device.type):
        found = []
        for images, labels in zip(x.detach().split(CHUNK), y.split(CHUNK), strict=True):
            check()
            images = images.clone().requires_grad_()
            found.append(torch.autograd.grad(of(model(images), labels), images)[0])
    return torch.cat(found)


def alignment(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """How much gradients look like images, [B]: the cosine, without its sign, between x [B, C, H, W] and the margin's gradient.

    Etmann et al. (2019, arXiv 1905.04172) multiply it by the length of the image, and take the gradient of the logit alone.
    """
    gradients = input_gradients(model, x, y, of=summed_margin)
    return F.cosine_similarity(gradients.flatten(1), x.flatten(1)).abs()

"""Our attacks beside those of torchattacks, foolbox and ART: one model, one set of images, one start.

    python -m benchmarks.agreement runs/mnist-madry runs/cifar10-mart --data mnist.npz cifar10.npz --out agreement.json

Nothing is random but the starts, which are given to both. In fp64 images must be equal to 1e-6 but for a few pixels on ties. In
fp32 accuracies must be: PyTorch's cross-entropy cancels on confident samples there, spat's keeps its digits. ART is fp32 alone.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import tyro
from torch import Tensor, nn

import spat_kernels as sk
from benchmarks import measure, rivals
from benchmarks.tables import environment, markdown
from spat_train.data.datasets import load_npz
from spat_train.data.images import floats
from spat_train.models.checkpoints import load_model

STEPS = 20
BATCH = 250
SAME = 1e-6  # of a pixel in [0, 1]
POINTS = 0.3  # of accuracy

Attack = Callable[[nn.Module, Tensor, Tensor, float, Tensor], Tensor]  # model, x, y, eps, a start in the ball -> x_adv


@dataclass(frozen=True)
class Pair:
    """The same attack, ours and a judge's."""

    judge: str
    attack: str
    ours: Attack
    theirs: Attack
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)


def _pgd(model, x, y, eps, start):
    return sk.pgd(model, x, y, eps, steps=STEPS, step_size=eps / 10, start=start)


@contextmanager
def _drawn(name: str, noise: Tensor):
    """Within: the judge draws `noise` for its start."""
    of = torch.Tensor if name.endswith("_") else torch
    with mock.patch.object(of, name, lambda t, *_, **__: t.copy_(noise) if name.endswith("_") else noise.to(t.dtype)):
        yield


def _torchattacks_pgd(model, x, y, eps, start):
    with _drawn("uniform_", start - x):
        return rivals.torchattacks_pgd(model, STEPS, eps, eps / 10)(x, y)


def _l2(x: Tensor, eps: float) -> float:
    """A quarter of the way to the corners of the L-infinity ball: 0.43 for CIFAR-10 at 8/255, 2.1 for MNIST at 0.3."""
    return eps * x[0].numel() ** 0.5 / 4


def _torchattacks_l2(model, x, y, eps, start):
    tiny = 1e-300 if x.dtype == torch.float64 else 1e-10  # added to norms, and larger than those of confident samples' gradients
    settings = {"alpha": _l2(x, eps) / 5, "steps": STEPS, "random_start": False, "eps_for_division": tiny}
    return import_module("torchattacks").PGDL2(model, eps=_l2(x, eps), **settings)(x, y)


def _our_l2(model, x, y, eps, start):
    return sk.pgd(model, x, y, _l2(x, eps), steps=STEPS, step_size=_l2(x, eps) / 5, norm="l2", random_start=False)


def _torchattacks_tpgd(model, x, y, eps, start):
    with _drawn("randn_like", (start - x) / eps):
        return import_module("torchattacks").TPGD(model, eps=eps, alpha=eps / 10, steps=STEPS)(x, y)


def _our_tpgd(model, x, y, eps, start):
    """It starts 0.001 standard deviations away, not in the ball's corners."""
    near = (x + 0.001 * ((start - x) / eps)).clamp(0, 1)
    return sk.pgd_kl(model, x, None, eps, steps=STEPS, step_size=eps / 10, start=near)


def _foolbox_pgd(model, x, y, eps, start):
    return rivals.foolbox_pgd(model, STEPS, eps, eps / 10, start)(x, y)


def _art_pgd(model, x, y, eps, start):
    return rivals.art_pgd(model, STEPS, eps, eps / 10, random_starts=0)(x, y)


def _fgsm(model, x, y, eps, start):
    return import_module("torchattacks").FGSM(model, eps=eps)(x, y)


PAIRS = (
    Pair("torchattacks", "PGD", _pgd, _torchattacks_pgd),
    Pair("torchattacks", "FGSM", lambda m, x, y, eps, _: sk.fgsm(m, x, y, eps), _fgsm),
    Pair("torchattacks", "PGDL2", _our_l2, _torchattacks_l2),
    Pair("torchattacks", "TPGD", _our_tpgd, _torchattacks_tpgd),
    Pair("foolbox", "LinfPGD", _pgd, _foolbox_pgd),
    Pair("ART", "ProjectedGradientDescent", lambda m, x, y, eps, _: _pgd(m, x, y, eps, x), _art_pgd, (torch.float32,)),
)


def compare(pair: Pair, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict:
    """Both attacks on all images, batch by batch."""
    ours, theirs = [], []
    noise = torch.Generator().manual_seed(0)
    for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        start = (part + eps * (2 * torch.rand(part.shape, generator=noise, dtype=torch.float64) - 1).to(part.dtype)).clamp(0, 1)
        ours.append(pair.ours(model, part, labels, eps, start))
        theirs.append(pair.theirs(model, part, labels, eps, start).detach())
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    right = [_right(model, images, y) for images in (ours, theirs)]
    far = (ours - theirs).abs() > SAME
    return {
        "judge": pair.judge,
        "attack": pair.attack,
        "dtype": str(x.dtype).removeprefix("torch."),
        "accuracy": [_percent(r) for r in right],
        "samples_agree": _percent(right[0] == right[1]),
        "pixels_differ": _percent(far),
        "images_equal": _percent(~far.flatten(1).any(1)),
    }


def _percent(true: Tensor) -> float:
    return 100 * int(true.sum()) / true.numel()


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(BATCH)]) == y


@dataclass
class Arguments:
    """Our attacks beside those of torchattacks, foolbox and ART."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or checkpoints."""
    data: tuple[Path, ...]
    """The .npz file of each."""
    out: Path
    """JSON file to write."""
    images: int = 1000
    """Maximum number of test images, the first ones."""
    network: str | None = None
    """The architecture of checkpoints, which are attacked at eps 8/255."""


def table(results: dict) -> str:
    """Ours beside each judge's: accuracies, and in how many images a pixel differs by more than 1e-6."""
    return markdown(
        results, results["agreement"],
        "model | judge | attack | dtype || accuracy, %: ours | theirs | samples that agree, % | images equal to 1e-6, %",
        "{run} | {judge} | {attack} | {dtype} || "
        "{accuracy[0]:.1f} | {accuracy[1]:.1f} | {samples_agree:.1f} | {images_equal:.1f}",
        "{agreement[0][images]:,} test images each.", environment,
    )  # fmt: skip


class Given(NamedTuple):
    """What a benchmark attacks: a model in eval mode by its names, within eps; and images with their labels."""

    name: str
    network: str
    model: nn.Module
    eps: float
    x: Tensor
    y: Tensor


def given(path: Path, data: Path, images: int, network: str | None = None, device: str = "cpu") -> Given:
    """The model of a run or checkpoint, and the first test images. A checkpoint does not know its `network` and eps, 8/255."""
    dataset = load_npz(data)
    model, config = load_model(path, dataset, network, option="--network")
    x, y = floats(dataset.test, torch.arange(min(images, len(dataset.test))), device, torch.contiguous_format)
    name, eps = (config.model, config.eps / 255) if config else (str(network), 8 / 255)
    return Given(path.name if path.is_dir() else path.stem, name, model.requires_grad_(False).to(device), eps, x, y)


def main(args: Arguments) -> None:
    records = []
    for run, path in zip(args.runs, args.data, strict=True):
        name, network, model, eps, x, y = given(run, path, args.images, args.network)
        for pair in PAIRS:
            for dtype in pair.dtypes:
                found = compare(pair, copy.deepcopy(model).to(dtype), x.to(dtype), y, eps)
                records.append({"run": name, "model": network, "images": len(x), "eps": eps} | found)
                print(records[-1], flush=True)
    measure.write(args.out, measure.begun("agreement", "cpu", agreement=records))
    wrong = [r for r in records if abs(r["accuracy"][0] - r["accuracy"][1]) > POINTS]
    if wrong:
        raise SystemExit(f"accuracies differ by more than {POINTS} points: {wrong}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))

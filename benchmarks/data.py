"""The data path alone: `python -m benchmarks.data --npz cifar10.npz --out benchmarks/results/cpu/data.json`.

Whole epochs of 32x32 images in shuffled batches, padded by 4, cropped and flipped at random, as fp32 in [0, 1]: by the
trainer's `Loader` (resident uint8 images, one fused pass a batch), and by torchvision's RandomCrop, RandomHorizontalFlip and
ToTensor on PIL images in a `DataLoader`, as the authors' code does it. The rival keeps its workers from epoch to epoch. Before
the race, every image of a batch of either must be one of the crops of the image that it is made from.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import measure
from benchmarks.tables import environment, markdown
from spat_train.data.datasets import load_npz
from spat_train.data.images import Images
from spat_train.data.loader import Loader, Order

PAD = 4
Epoch = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def random_images(count: int, seed: int = 0) -> Images:
    """32x32, of ten classes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.randint(10, (count,), generator=generator))


def torchvision(images: Images, batch: int, workers: int, device: str) -> Epoch:
    """torchvision's CIFAR10 of these images, in a DataLoader."""
    from torchvision import datasets, transforms

    dataset = datasets.CIFAR10.__new__(datasets.CIFAR10)  # which would read files
    dataset.data, dataset.targets, dataset.target_transform = images.pixels.numpy(), images.labels.tolist(), None
    crop = transforms.RandomCrop(images.image_shape[1], padding=PAD)
    dataset.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device != "cpu"}
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, **options)
    return lambda: ((x.to(device, non_blocking=True), y.to(device, non_blocking=True)) for x, y in loader)


def ours(images: Images, batch: int, workers: int, device: str, resident: bool) -> Epoch:
    order = Order(torch.arange(len(images)), batch, seed=0)
    loader = Loader(images, order, device=device, pad=PAD, flip=True, workers=workers, resident=resident)
    numbers = count()
    return lambda: loader.epoch(next(numbers))


def providers(images: Images, batch: int, workers: int, device: str) -> dict[str, Epoch]:
    return {
        "spat_train": ours(images, batch, workers, device, resident=True),
        f"spat_train, streamed, {workers} workers": ours(images, batch, workers, device, resident=False),
        f"torchvision, {workers} workers": torchvision(images, batch, workers, device),
        "torchvision, in this process": torchvision(images, batch, 0, device),
    }


def verify(epoch: Epoch, images: Images) -> None:
    """Every image of a batch is one of the crops, and not all alike. `images` has its row numbers as labels."""
    x, rows = next(iter(epoch()))
    x, rows = x[:32].cpu(), rows[:32].cpu()
    side = x.shape[2]
    expected = F.pad(images.pixels[rows].movedim(3, 1).float() / 255, [PAD] * 4)
    crops = expected.unfold(2, side, 1).unfold(3, side, 1).flatten(2, 3)  # [B, C, crops, H, W]
    crops = torch.cat([crops, crops.flip(4)], 2).movedim(2, 1)
    same = (crops - x[:, None]).abs().amax((2, 3, 4)) < 1e-6
    assert same.any(1).all(), "some images are no crops of what they are made from"
    assert len(set(same.float().argmax(1).tolist())) > 16, "crops hardly differ"


@dataclass
class Options:
    """Race the data paths."""

    npz: Path | None = None
    """CIFAR-10 as an .npz; random images without."""
    images: int = 50_000
    batch: int = 128
    workers: int = 2
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: float = 10.0
    """Time to measure each for."""
    out: Path | None = None


def table(results: dict) -> str:
    base = next(p for p in results["paths"] if p["provider"] == "spat_train")
    others = [p | ({} if p is base else {"base": base}) for p in results["paths"]]
    kind = "CIFAR-10" if results["settings"]["real"] else "random"
    return markdown(
        results, others,
        "data path || images/s | spat_train is faster by", "{provider} || {images_per_second:,.0f} | {faster:.1f}x",
        f"{{settings[images]:,}} {kind} images, batch {{settings[batch]}}, pad {{settings[pad]}}, flips.", environment,
        faster=lambda r: r["base"]["images_per_second"] / r["images_per_second"],
    )  # fmt: skip


def main(options: Options) -> None:
    images = load_npz(options.npz).train if options.npz else random_images(options.images)
    count = min(options.images, len(images))
    images = Images(images.pixels[:count], torch.arange(count))
    chosen = providers(images, options.batch, options.workers, options.device)
    for epoch in chosen.values():
        verify(epoch, images)
    calls = {name: lambda epoch=epoch: deque(epoch(), maxlen=0) for name, epoch in chosen.items()}
    times, errors = measure.race(calls, options.device, options.seconds)
    if errors:
        raise SystemExit(f"failed: {errors}")
    rates = {name: len(images) / statistics.median(taken) for name, taken in times.items()}
    paths = [{"provider": name, "seconds": times[name], "images_per_second": rate} for name, rate in rates.items()]
    settings = {"images": len(images), "batch": options.batch, "pad": PAD, "real": options.npz is not None}
    results = measure.begun("data", options.device, settings=settings, paths=paths)
    measure.write(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

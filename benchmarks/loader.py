"""Pictures in files: `python -m benchmarks.loader --npz cifar10.npz --out benchmarks/results/cpu/loader.json`.

Whole epochs of JPEGs of 500x375 in shuffled batches, cropped at random to 224x224 and flipped, as fp32: by the trainer's `Loader`
from a folder and from WebDataset shards, beside torchvision's decoder alone, the most that a loader of whole pictures can reach:
as many processes read the same files, decode them, and hand nothing over. Rivals: torchvision's ImageFolder with its transforms
in a `DataLoader` (PIL), and webdataset's reader with the same decoder and torchvision's crops and flips. The pictures are
CIFAR-10's, side by side, as JPEGs of `QUALITY`, which brings them to the 110 KB of ImageNet's mean. Before the race, folder and
shards must give the same batches.

Each is the best of its rounds, which are mixed: by the clock, and by CPU seconds of the processes that read, and of the one that
takes the batches. Where more is going on than there are cores, only CPU seconds compare.
"""

import importlib.util
import io
import resource
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from benchmarks import measure
from benchmarks.tables import environment, markdown
from spat_train.data.datasets import load
from spat_train.data.images import Folder
from spat_train.data.loader import Loader, Order
from spat_train.data.pictures import RandomView, decode

HEIGHT, WIDTH, SIZE, EACH = 375, 500, 224, 128  # EACH: pictures in a shard
QUALITY = 93
DECODER = "torchvision's decoder alone, folder"
SHARDS_DECODER = "torchvision's decoder alone, shards"
Epoch = Callable[[], Iterable]


def mosaics(pixels: np.ndarray, number: int, enlarge: float) -> Iterable[bytes]:
    """JPEGs of `HEIGHT` x `WIDTH`: images [N, 32, 32, 3] side by side, enlarged."""
    from PIL import Image

    rows, columns = (int(np.ceil(side / (32 * enlarge))) for side in (HEIGHT, WIDTH))
    chosen = np.random.default_rng(0).integers(len(pixels), size=(number, rows, columns))
    for places in chosen:
        sheet = pixels[places].transpose(0, 2, 1, 3, 4).reshape(32 * rows, 32 * columns, 3)
        sheet = sheet[: round(HEIGHT / enlarge), : round(WIDTH / enlarge)]
        file = io.BytesIO()
        Image.fromarray(sheet).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


def write_files(root: Path, jpegs: list[bytes]) -> None:
    """Write two classes as root/folder and, in the same order, as root/shards; the two pictures in the middle are tested too."""
    half = len(jpegs) // 2
    (root / "shards").mkdir()
    for split, contents, middle in (("train", jpegs, half), ("val", jpegs[half - 1 : half + 1], 1)):
        for label in "01":
            (root / "folder" / split / label).mkdir(parents=True)
        for start in range(0, len(contents), EACH):
            with tarfile.open(root / "shards" / f"{split}-{start // EACH:06}.tar", "w") as tar:
                for i, content in enumerate(contents[start : start + EACH], start):
                    label = str(int(i >= middle))
                    (root / "folder" / split / label / f"{i:06}.jpg").write_bytes(content)
                    for suffix, value in (("jpg", content), ("cls", label.encode())):
                        member = tarfile.TarInfo(f"{i:06}.{suffix}")
                        member.size = len(value)
                        tar.addfile(member, io.BytesIO(value))


# ---- what is raced: each a function that gives an epoch


class Decoder(TorchDataset):
    """Batch i: its pictures decoded, and dropped."""

    def __init__(self, images: Folder, batch: int):
        self.images, self.rows = images, torch.randperm(len(images)).split(batch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> int:
        for row in self.rows[i].tolist():
            decode(self.images.read(row))
        return i


def ours(images: Folder, batch: int, workers: int, view: RandomView, shard: Tensor | None = None) -> Epoch:
    order = Order(torch.arange(len(images)), batch, seed=0, shard=images.shard if shard is None else shard)
    loader = Loader(images, order, view=view, flip=True, workers=workers)
    numbers = count()
    return lambda: loader.epoch(next(numbers))


def image_folder(root: Path, batch: int, workers: int) -> Epoch:
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    dataset = datasets.ImageFolder(str(root / "folder" / "train"), transforms.Compose(steps))
    return lambda: DataLoader(dataset, batch, shuffle=True, num_workers=workers)


def webdataset(root: Path, batch: int, workers: int) -> Epoch:
    import webdataset as wds
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    view = v2.Compose(steps)
    names = sorted(map(str, (root / "shards").glob("train-*.tar")))
    samples = wds.WebDataset(names, shardshuffle=len(names), empty_check=False).shuffle(1000).to_tuple("jpg", "cls")
    samples = samples.map_tuple(lambda jpeg: view(decode(jpeg)), int).batched(batch)
    return lambda: DataLoader(samples, batch_size=None, num_workers=workers)


def decoder(images: Folder, batch: int, workers: int) -> Epoch:
    dataset = Decoder(images, batch)
    return lambda: DataLoader(dataset, batch_size=None, num_workers=workers)


def providers(root: Path, batch: int, workers: int, rivals: bool = True) -> dict[str, Epoch]:
    folder, shards = (load(str(root / kind), image_size=SIZE).train for kind in ("folder", "shards"))
    crop = RandomView(True, None)
    verify(folder, shards, batch, crop)
    found: dict[str, Epoch] = {
        DECODER: decoder(folder, batch, workers),
        "spat_train, folder": ours(folder, batch, workers, crop),
        SHARDS_DECODER: decoder(shards, batch, workers),
        "spat_train, shards": ours(shards, batch, workers, crop),
    }
    if not rivals:
        return found
    found["spat_train, shards, RandAugment 2 9"] = ours(shards, batch, workers, RandomView(True, (2, 9)))
    found["torchvision, folder (PIL)"] = image_folder(root, batch, workers)
    if importlib.util.find_spec("webdataset"):
        found["webdataset, shards"] = webdataset(root, batch, workers)
    return found


def verify(folder: Folder, shards: Folder, batch: int, view: RandomView) -> None:
    """Both give the same batches where they have the same order, and no two images of one are alike."""
    (x, y), (other, labels) = (next(iter(ours(images, batch, 1, view, shards.shard)())) for images in (folder, shards))
    assert torch.equal(x, other), "images of folder and shards differ"
    assert torch.equal(y, labels), "labels of folder and shards differ"
    assert len(x.flatten(1).unique(dim=0)) == len(x), "images are alike"


# ---- the race


@dataclass
class Options:
    """Race the loaders of pictures."""

    npz: Path = measure.ROOT / "tests" / "assets" / "cifar10-test-100.npz"
    """Images as x_train, or x, uint8 [N, 32, 32, 3]."""
    images: int = 2048
    """Pictures in an epoch. With few, the start of processes and their first touch of memory count, which long epochs hide."""
    batch: int = 64
    workers: tuple[int, ...] = (1, 2)
    enlarge: float = 1.0
    """How often larger CIFAR-10's images are made. The size of files falls with it."""
    rivals: bool = True
    """Race RandAugment and the loaders of others too."""
    seconds: float = 10.0
    """Time to measure each for."""
    out: Path | None = None


def table(results: dict) -> str:
    paths = {(p["provider"], p["workers"]): p for p in results["paths"]}

    def alone(r: dict) -> dict:
        return paths[SHARDS_DECODER if "shards" in r["provider"] else DECODER, r["workers"]]

    return markdown(
        results,
        results["paths"],
        "pictures || processes | images/s | of the decoder's | CPU ms a picture: readers | main process "
        "| the decoder's of readers | of all",
        "{provider} || {workers} | {images_per_second:,.0f} | {share:.0%} | {cpu_ms:.2f} | {main_ms:.2f} | {cpu_share:.0%} "
        "| {all_share:.0%}",
        "{settings[images]:,} JPEGs of 500x375, {settings[kilobytes]:.0f} KB each, to 224x224, batch {settings[batch]}.",
        environment,
        share=lambda r: r["images_per_second"] / alone(r)["images_per_second"],
        cpu_share=lambda r: alone(r)["cpu_ms"] / r["cpu_ms"],
        all_share=lambda r: (alone(r)["cpu_ms"] + alone(r)["main_ms"]) / (r["cpu_ms"] + r["main_ms"]),
    )  # fmt: skip


def cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)  # of children: those that have ended
    return used.ru_utime + used.ru_stime


def counted(epoch: Epoch, spent: list[tuple[float, float]]) -> Callable[[], None]:
    """A call of an epoch, which adds the CPU seconds of its worker processes and of this one to `spent`."""
    processes = resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF

    def call() -> None:
        before = [cpu_seconds(who) for who in processes]
        deque(epoch(), maxlen=0)
        readers, main = (cpu_seconds(who) - start for who, start in zip(processes, before, strict=True))
        spent.append((readers, main))

    return call


def main(options: Options) -> None:
    with np.load(options.npz) as arrays, tempfile.TemporaryDirectory() as folder:
        jpegs = list(mosaics(arrays["x_train" if "x_train" in arrays else "x"], options.images, options.enlarge))
        write_files(Path(folder), jpegs)
        raced = {w: providers(Path(folder), options.batch, w, options.rivals) for w in options.workers}
        found = {(w, name): epoch for w, epochs in raced.items() for name, epoch in epochs.items()}
        spent: dict[tuple[int, str], list[tuple[float, float]]] = {key: [] for key in found}
        calls = {key: counted(epoch, spent[key]) for key, epoch in found.items()}
        for key, call in calls.items():  # files into memory: it is not the disk that is raced
            call()
            spent[key].clear()
        times, errors = measure.race(calls, "cpu", options.seconds)
    if errors:
        raise SystemExit(f"failed: {errors}")
    paths = [
        {
            "provider": name, "workers": workers, "seconds": taken,
            "images_per_second": options.images / min(taken),
            "cpu_ms": 1e3 * min(readers for readers, _ in spent[workers, name]) / options.images,
            "main_ms": 1e3 * min(main for _, main in spent[workers, name]) / options.images,
        }
        for (workers, name), taken in times.items()
    ]  # fmt: skip
    settings = {name: getattr(options, name) for name in ("images", "batch", "enlarge")}
    settings["kilobytes"] = sum(map(len, jpegs)) / len(jpegs) / 1e3
    results = measure.begun("loader", "cpu", settings=settings, paths=paths)
    measure.write(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Small images, files of them, and the memory that they take."""

import io
import re
import tarfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from spat_train.data.images import Images


def arrays(shape=(12, 12), train=40, test=20, classes=("a", "b", "c")) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": rng.integers(0, len(classes), train),
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": rng.integers(0, len(classes), test),
        "classes": np.array(classes),
    }


def saved(tmp_path, save=np.savez, **changes):
    """An .npz of small random images with some arrays changed, or left out where None."""
    path = tmp_path / "data.npz"
    save(path, **{name: array for name, array in (arrays() | changes).items() if array is not None})
    return path


@contextmanager
def takes_less_than(size: float):
    """Fails where the block leaves `size` bytes or more of memory in use."""

    def resident() -> int:
        with open("/proc/self/status") as status:
            return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])

    before = resident()
    yield
    assert resident() - before < size


def random_images(count=50, shape=(8, 9, 3), classes=5) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % classes)


def picture(mode, size=(16, 16)):
    from PIL import Image

    levels = np.linspace(0, 65535, size[0] * size[1]).astype(np.uint16).reshape(size[::-1])
    if mode.startswith("I;16"):
        return Image.frombytes(mode, size, levels.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(levels.astype({"I": np.int32, "F": np.float32}[mode]))
    return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB").convert(mode)


# ---- real pictures: CIFAR-10's cats, ships and trucks, as JPEG

CLASSES = {"cat": 3, "ship": 8, "truck": 9}
CIFAR = Path(__file__).parents[1] / "assets" / "cifar10-test-100.npz"


def write_folder(root: Path) -> Path:
    """train/ with 30 pictures and val/ with 10, of 3 classes and several sizes, from 32x32 enlarged."""
    from PIL import Image

    with np.load(CIFAR) as arrays:
        x, y = arrays["x"], arrays["y"]
    for name, label in CLASSES.items():
        for i, pixels in enumerate(x[y == label]):
            path = root / ("val" if i % 4 == 3 else "train") / name / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((40 + 8 * (i % 3), 40 + 4 * (i % 2)), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def label_by_name(path: Path) -> tuple[str, str]:
    return "cls", path.parent.name


def label_by_number(path: Path) -> tuple[str, str]:
    return "cls", str(list(CLASSES).index(path.parent.name))


def write_shards(folder: Path, root: Path, label: Callable[[Path], tuple[str, str]] = label_by_name, each: int = 7) -> Path:
    """The pictures of `folder` as shards train-000000.tar, ... and val-000000.tar, ..., shuffled, `each` in a shard."""
    root.mkdir(exist_ok=True)
    for split in ("train", "val"):
        paths = sorted((folder / split).rglob("*.jpg"))
        paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]
        for shard in range(0, len(paths), each):
            with tarfile.open(root / f"{split}-{shard // each:06}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for path in paths[shard : shard + each]:
                    suffix, text = label(path)
                    add(tar, f"{path.parent.name}-{path.stem}.jpg", path.read_bytes())
                    add(tar, f"{path.parent.name}-{path.stem}.{suffix}", text.encode())
    return root


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))

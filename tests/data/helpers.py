"""Small images, files of them, and the memory that they take."""

import re
from contextlib import contextmanager

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

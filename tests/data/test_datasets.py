"""Data sets by name, and how many images of them."""

import gzip
import pickle
import struct
import sys

import numpy as np
import pytest
import torch

from spat_train.data.datasets import load
from spat_train.errors import InputError
from tests.data.helpers import arrays, saved

RNG = np.random.default_rng(0)


def test_digits_split_is_fixed_and_scaled():
    pytest.importorskip("sklearn")
    data = load("digits")
    assert data.train.pixels.shape == (1347, 8, 8, 1)
    assert data.test.pixels.shape == (450, 8, 8, 1)
    assert data.image_shape == (1, 8, 8)
    assert (data.train.pixels.min(), data.train.pixels.max()) == (0, 255)
    assert torch.equal(data.test.pixels, load("digits", seed=1).test.pixels)
    assert data.test.labels.bincount().min() >= 43  # stratified


def test_limit_draws_matching_images_and_labels(tmp_path):
    source = arrays()
    path = str(saved(tmp_path))
    data = load(path, limit=15, seed=3)
    for image, label in zip(data.train.pixels, data.train.labels, strict=True):
        (index,) = np.flatnonzero((source["x_train"] == image[..., 0].numpy()).all((1, 2)))
        assert source["y_train"][index] == label
    assert torch.equal(data.train.pixels, load(path, limit=15, seed=3).train.pixels)
    assert not torch.equal(data.train.pixels, load(path, limit=15, seed=4).train.pixels)
    for limit, counts in {15: (15, 15), 30: (30, 20), 1000: (40, 20)}.items():
        data = load(path, limit=limit)
        assert (len(data.train), len(data.test)) == counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"data": "cifar11"},
            "--data cifar11: there is none: did you mean cifar1.* give cifar10, cifar100, stl10, mnist, digits, an .npz",
        ),
        ({"data": "nowhere.npz"}, "--data nowhere.npz: there is no such file"),
        ({"data": "nowhere"}, "--data nowhere: there is none: .*give"),
        ({"data": "digits", "limit": 0}, "--limit 0: give at least 1"),
        ({"data": "digits", "image_size": 32}, "--image-size 32: digits has 8x8 images: leave it out"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, arguments, message):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{message}"):
        load(**arguments)


def write_cifar(root, classes):
    """CIFAR's files with 6 images in all: 5 to train on and 1 to test on, or 1 and 1."""
    folder = root / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    folder.mkdir()
    splits = ["train", "test"] if classes == 100 else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = RNG.integers(0, 256, (len(splits), 3, 32, 32), dtype=np.uint8)
    for i, split in enumerate(splits):
        content = {"data": pixels[i].reshape(1, -1), "fine_labels" if classes == 100 else "labels": [i]}
        (folder / split).write_bytes(pickle.dumps(content))
    names = {"fine_label_names" if classes == 100 else "label_names": [f"class {i}" for i in range(classes)]}
    (folder / ("meta" if classes == 100 else "batches.meta")).write_bytes(pickle.dumps(names))
    return pixels.transpose(0, 2, 3, 1)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, monkeypatch, classes):
    datasets = pytest.importorskip("torchvision.datasets", exc_type=Exception)
    pixels = write_cifar(tmp_path, classes)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    data = load(f"cifar{classes}", root=tmp_path)
    assert (data.name, data.image_shape, data.num_classes) == (f"cifar{classes}", (3, 32, 32), classes)
    assert data.classes[-1] == f"class {classes - 1}"
    assert np.array_equal(torch.cat([data.train.pixels, data.test.pixels]), pixels)
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == list(range(len(pixels)))


def test_mnist(tmp_path):
    pytest.importorskip("torchvision", exc_type=Exception)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for split, rows in (("train", slice(4)), ("t10k", slice(4, 7))):
        x, y = pixels[rows], np.arange(7, dtype=np.uint8)[rows]
        for name, array, magic in ((f"{split}-images-idx3-ubyte", x, 0x803), (f"{split}-labels-idx1-ubyte", y, 0x801)):
            content = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()
            (folder / name).write_bytes(content)
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    data = load("mnist", root=tmp_path)
    assert data.train.pixels.shape == (4, 28, 28, 1)
    assert data.classes == tuple("0123456789")
    assert np.array_equal(data.test.pixels[..., 0], pixels[4:])
    assert data.test.labels.tolist() == [4, 5, 6]
    (folder / "train-images-idx3-ubyte").write_bytes(b"cut short")
    with pytest.raises(InputError, match=r"--data mnist: cannot be read from --root .* \(.*\): add --download"):
        load("mnist", root=tmp_path)


def test_stl10(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", exc_type=Exception)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = RNG.integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    for split, rows in (("train", slice(2)), ("test", slice(2, 4))):
        (folder / f"{split}_X.bin").write_bytes(pixels[rows].transpose(0, 3, 2, 1).tobytes())  # planes, column by column
        (folder / f"{split}_y.bin").write_bytes(np.arange(1, 5, dtype=np.uint8)[rows].tobytes())
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\ncat\n")
    monkeypatch.setattr(datasets.stl10, "check_integrity", lambda *_: True)
    (folder / "fold_indices.txt").write_text("")
    data = load("stl10", root=tmp_path, image_size=96)
    assert np.array_equal(data.train.pixels, pixels[:2])
    assert data.train.pixels.is_contiguous()
    assert data.test.labels.tolist() == [2, 3]
    assert data.classes == ("airplane", "bird", "car", "cat")


def test_torchvision_that_does_not_import(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match=r"^--data mnist: torchvision does not import \(.*\): install"):
        load("mnist", root=tmp_path)

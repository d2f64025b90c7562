"""Data sets by name, how many images of them, and what training and evaluation need of any images."""

import os
import pickle
import re
import shutil
import struct
import sys

import numpy as np
import pytest
import torch

from spat_train.data.datasets import load
from spat_train.data.images import Images, fingerprint, floats, hold_out
from spat_train.errors import InputError
from tests.data.helpers import arrays, random_images, saved

RNG = np.random.default_rng(0)


def test_digits_split_is_fixed_and_scaled():
    pytest.importorskip("sklearn")
    data = load("digits")
    assert (data.train.pixels.shape, data.test.pixels.shape) == ((1347, 8, 8, 1), (450, 8, 8, 1))
    assert (data.image_shape, data.train.pixels.min(), data.train.pixels.max()) == ((1, 8, 8), 0, 255)
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
        ({"data": "cifar11"}, "--data cifar11: there is none: did you mean cifar1.* give cifar10, .*mnist.*digits.* an .npz"),
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


def test_a_misspelled_path(tmp_path, monkeypatch):
    """Folders and .npz files are suggested, and other files are not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics" / "birds").mkdir(parents=True)
    (tmp_path / "pcis.txt").touch()
    for data, name in (("pcis", "pics"), ("pics/brids", "pics/birds")):
        with pytest.raises(InputError, match=f"^--data {data}: there is none: did you mean {name}[ ?]"):
            load(data)


def test_cifar(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", exc_type=Exception)
    (tmp_path / "cifar-10-batches-py").mkdir()
    pixels = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    contents = {
        f"data_batch_{i + 1}" if i < 5 else "test_batch": {"data": pixels[i].reshape(1, -1), "labels": [i]} for i in range(6)
    }
    contents["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    for name, content in contents.items():
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    data = load("cifar10", root=tmp_path)
    assert (data.name, data.image_shape, data.num_classes, data.classes[-1]) == ("cifar10", (3, 32, 32), 10, "class 9")
    assert np.array_equal(torch.cat([data.train.pixels, data.test.pixels]), pixels.transpose(0, 2, 3, 1))
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == list(range(6))
    monkeypatch.setattr(datasets, "CIFAR100", datasets.CIFAR10)  # of which it is a subclass
    monkeypatch.delattr(datasets, "CIFAR10")
    assert load("cifar100", root=tmp_path).name == "cifar100"


def test_mnist(tmp_path, monkeypatch):
    pytest.importorskip("torchvision", exc_type=Exception)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for split, rows in (("train", slice(4)), ("t10k", slice(4, 7))):
        x, y = pixels[rows], np.arange(7, dtype=np.uint8)[rows]
        for name, array, magic in ((f"{split}-images-idx3-ubyte", x, 0x803), (f"{split}-labels-idx1-ubyte", y, 0x801)):
            (folder / name).write_bytes(struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes())
    data = load("mnist", root=tmp_path)
    assert data.train.pixels.shape == (4, 28, 28, 1)
    assert data.classes == tuple("0123456789")
    assert np.array_equal(data.test.pixels[..., 0], pixels[4:])
    assert data.test.labels.tolist() == [4, 5, 6]
    (folder / "train-images-idx3-ubyte").write_bytes(b"cut short")
    with pytest.raises(InputError, match=r"--data mnist: cannot be read from --root .* \(.*\): add --download"):
        load("mnist", root=tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match=r"^--data mnist: torchvision does not import \(.*\): install"):
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


# ---- any images


def test_hold_out_is_stratified():
    labels = torch.arange(5).repeat_interleave(torch.tensor([700, 200, 0, 95, 5]))[torch.randperm(1000)]
    train, held = hold_out(labels, 100, seed=0)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(1000))
    for rows in (train, held):
        assert torch.equal(rows, rows.sort().values)
        assert rows.dtype == torch.int64
    assert labels[held].bincount(minlength=5).tolist() in ([70, 20, 0, 10, 0], [70, 20, 0, 9, 1])
    assert torch.equal(held, hold_out(labels, 100, seed=0)[1])
    assert not torch.equal(held, hold_out(labels, 100, seed=1)[1])


def test_hold_out_counts():
    for count in (0, 1, 7, 999):
        assert list(map(len, hold_out(torch.arange(1000) % 10, count, seed=0))) == [1000 - count, count]
    for count in (-1, 10):
        with pytest.raises(InputError, match=f"--holdout {count}: give 0 to 9"):
            hold_out(torch.arange(10), count, seed=0)


def test_fingerprint(monkeypatch):
    images = random_images()
    value = fingerprint(images)
    assert re.fullmatch("[0-9a-f]{16}", value)
    assert fingerprint(random_images()) == value
    for tensor, index in ((images.pixels, (49, 7, 8, 2)), (images.labels, (0,))):
        tensor[index] += 1
        assert fingerprint(images) != value
        tensor[index] -= 1
    assert fingerprint(Images(images.pixels.view(50, 9, 8, 3), images.labels)) != value
    assert fingerprint(Images(images.pixels[:0], images.labels[:0])) != value
    monkeypatch.setattr("spat_train.data.images.HASHED", 1000)
    monkeypatch.setattr("spat_train.data.images.SAMPLED", 8)
    sampled = fingerprint(images)
    images.pixels[49] += 1  # the last is in the sample
    assert fingerprint(images) != sampled


def test_fingerprint_of_a_folder(pictures):
    def value(image_size=16, **options) -> str:
        return fingerprint(load(str(pictures), image_size=image_size).train, **options)

    before, contents = value(), value(contents=True)
    assert value() == before
    assert value(20) != before
    shutil.copy(pictures / "train" / "dog" / "2.png", pictures / "train" / "dog" / "0.png")
    assert value() == before  # of another size: it may have been repaired
    assert value(contents=True) != contents
    path = (pictures / "train" / "dog" / "0.png").rename(pictures / "train" / "dog" / "7.png")
    assert value() != before
    os.rename(path, os.fsencode(path.parent) + b"/caf\xe9.png")  # not UTF-8
    assert value() != before
    os.truncate(pictures / "train" / "cat" / "1.png", 2**40)
    with pytest.raises(InputError, match="train/cat/1.png cannot be read .its file has 1099511627776 bytes, at most"):
        value(contents=True)


def test_floats(device):
    images = random_images()
    rows = torch.tensor([4, 4, 49])
    x, y = floats(images, rows, device)
    assert (x.shape, x.dtype, x.device.type) == ((3, 3, 8, 9), torch.float32, device)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x.cpu(), (images.pixels[rows].float() / 255).permute(0, 3, 1, 2))
    assert torch.equal(y.cpu(), images.labels[rows])

"""Where images come from, what is refused on the way, and what is asked of any set of them."""

import gzip
import pickle
import re
import struct
import sys

import numpy as np
import pytest
import torch

from spat_train.data import load, load_npz
from spat_train.images import Folder, Images, InputError, fingerprint, floats, hold_out

RNG = np.random.default_rng(0)


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


def resident_bytes() -> int:
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])


# --- .npz files ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "no array y_test"),
        ({"x_train": np.zeros((40, 12, 12), np.float32)}, r"x_train is float32 \[40, 12, 12\]: save images as uint8"),
        ({"x_train": np.zeros((40, 144), np.uint8)}, r"x_train is uint8 \[40, 144\]: save \[N, H, W\]"),
        ({"x_test": np.zeros((20, 3, 12, 12), np.uint8)}, r"x_test is uint8 \[20, 3, 12, 12\]: save \[N, H, W\]"),
        ({"x_train": np.zeros((40, 4, 4), np.uint8)}, "at least 8"),
        ({"x_test": np.zeros((20, 16, 16), np.uint8)}, r"x_test has images \(16, 16\), x_train \(12, 12\)"),
        ({"x_train": np.zeros((0, 12, 12), np.uint8), "y_train": np.zeros(0, np.int64)}, "x_train .* is empty"),
        ({"x_test": np.zeros((0, 12, 12), np.uint8), "y_test": np.zeros(0, np.int64)}, "x_test .* is empty"),
        ({"y_train": np.zeros(40, np.int32)}, r"y_train is int32 \[40\]: save labels as int64"),
        ({"y_train": np.zeros((40, 3), np.int64)}, r"y_train is int64 \[40, 3\]"),
        ({"y_train": np.zeros(39, np.int64)}, "39 labels for 40 images"),
        ({"y_test": np.full(20, 3)}, "y_test contains 3: save labels from 0 to 2"),
        ({"y_test": np.full(20, -1)}, "y_test contains -1"),
        ({"classes": np.array(["a"])}, "two or more class names"),
        ({"classes": np.array(["a", None, "c"])}, "cannot be read"),
        ({"x_train": np.array([None] * 40)}, "cannot be read as .npz .*Python objects"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_bad_arrays(tmp_path, save, changes, message):
    path = saved(tmp_path, save, **changes)
    if save is np.savez_compressed and "Python objects" in message:
        message = "cannot be read"  # in NumPy's words
    with pytest.raises(InputError, match=message) as error:
        load_npz(path)
    assert str(error.value).startswith(f"--data {path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_unreadable_file(tmp_path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        load(str(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_file(tmp_path, save):
    path = saved(tmp_path, save)
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        load_npz(path)


def test_single_array_file(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(InputError, match="single array"):
        load(str(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(12, 12), (10, 9, 3)])
def test_npz(tmp_path, save, order, shape):
    source = arrays(shape)
    path = saved(tmp_path, save, **source | {"x_train": np.asarray(source["x_train"], order=order)})
    data = load(str(path))
    assert (data.name, data.classes, data.num_classes) == ("data", ("a", "b", "c"), 3)
    assert data.image_shape == data.test.image_shape == (shape[2] if len(shape) == 3 else 1, *shape[:2])
    for split in ("train", "test"):
        images = getattr(data, split)
        assert images.pixels.is_contiguous() and images.pixels.ndim == 4
        assert np.array_equal(images.pixels.numpy().reshape(source[f"x_{split}"].shape), source[f"x_{split}"])
        assert np.array_equal(images.labels, source[f"y_{split}"])


def test_class_names_are_optional(tmp_path):
    contents = arrays()
    data = load_npz(saved(tmp_path, classes=None))
    assert data.classes == tuple(map(str, range(max(contents["y_train"].max(), contents["y_test"].max()) + 1)))
    assert len(data.classes) == len(contents["classes"])


def test_mapped_images_take_no_memory_and_leave_the_file_alone(big_npz):
    before = big_npz.read_bytes()[-1000:]
    memory = resident_bytes()
    images = load_npz(big_npz).train
    assert (images.batch(torch.tensor([777])) == 7).all()
    assert resident_bytes() - memory < 40e6
    images.pixels[-1] = 9
    assert big_npz.read_bytes()[-1000:] == before


# --- by name ---


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
    assert (len(data.train), len(data.test)) == (15, 15)
    for image, label in zip(data.train.pixels, data.train.labels, strict=True):
        (index,) = np.flatnonzero((source["x_train"] == image[..., 0].numpy()).all((1, 2)))
        assert source["y_train"][index] == label
    assert torch.equal(data.train.pixels, load(path, limit=15, seed=3).train.pixels)
    assert not torch.equal(data.train.pixels, load(path, limit=15, seed=4).train.pixels)
    assert len(load(path, limit=1000).train) == 40
    assert (len(load(path, limit=30).train), len(load(path, limit=30).test)) == (30, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "cifar11"}, "--data cifar11: unknown, perhaps cifar1.*: give cifar10, cifar100, stl10, mnist, digits, an .npz"),
        ({"data": "nowhere.npz"}, "--data nowhere.npz: there is no such file"),
        ({"data": "nowhere"}, "--data nowhere: unknown: give"),
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


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "mnist"])
def test_missing_files(tmp_path, name):
    pytest.importorskip("torchvision", exc_type=Exception)
    with pytest.raises(InputError, match=rf"^--data {name}: cannot be read from --root {tmp_path} \(.*\): add --download"):
        load(name, root=tmp_path)


def test_torchvision_that_does_not_import(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match=r"^--data mnist: torchvision does not import \(.*\): install"):
        load("mnist", root=tmp_path)


# --- folders of pictures ---


def test_folder(pictures):
    data = load(str(pictures), image_size=16)
    assert isinstance(data.train, Folder)
    assert (len(data.train), len(data.test)) == (6, 4)
    assert (data.name, data.classes, data.image_shape) == (pictures.name, ("cat", "dog"), (3, 16, 16))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    batch = data.train.batch(torch.tensor([5, 0]))
    assert (batch.shape, batch.dtype) == ((2, 16, 16, 3), torch.uint8)
    assert torch.equal(batch[1, ..., 0], batch[1, ..., 2])  # grey pictures become RGB
    assert data.train.batch(torch.empty(0, dtype=torch.int64)).shape == (0, 16, 16, 3)


def test_folder_pictures_of_the_size_are_kept(pictures):
    from PIL import Image

    data = load(str(pictures), image_size=20)
    pixels = np.array(Image.open(pictures / "train" / "dog" / "0.png"))  # 20 high, 30 wide
    assert np.array_equal(data.train.batch(torch.tensor([3]))[0, ..., 0], pixels[:, 5:25])


def test_folder_limit(pictures):
    images = load(str(pictures), image_size=16).train
    limited = load(str(pictures), image_size=16, limit=4).train
    assert len(limited) == len(limited.labels) == 4
    for i, file in enumerate(limited.files):
        assert limited.labels[i] == images.labels[images.files.index(file)]


def test_folder_errors(pictures):
    data = load(str(pictures), image_size=16)
    (pictures / "train" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"cat/0.png cannot be decoded"):
        data.train.batch(torch.tensor([0]))
    with pytest.raises(InputError, match="--image-size None: give the size"):
        load(str(pictures))
    (pictures / "val" / "emu").mkdir()
    (pictures / "val" / "emu" / "0.png").touch()
    with pytest.raises(InputError, match="train/ and val/ differ in class emu"):
        load(str(pictures), image_size=16)
    (pictures / "train" / "fox").mkdir()
    with pytest.raises(InputError, match="cannot be read .*fox"):
        load(str(pictures), image_size=16)
    with pytest.raises(InputError, match=r"has no train/ and test/ \(or val/\)"):
        load(str(pictures / "train"), image_size=16)


# --- any images ---


def random_images(count=50, shape=(8, 9, 3), classes=5) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count) % classes)


def test_hold_out_is_stratified():
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate((700, 200, 0, 95, 5))])
    labels = labels[torch.randperm(1000)]
    train, held = hold_out(labels, 100, seed=0)
    assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(1000))
    assert torch.equal(held, held.sort().values) and torch.equal(train, train.sort().values)
    assert train.dtype == held.dtype == torch.int64
    assert labels[held].bincount(minlength=5).tolist() in ([70, 20, 0, 10, 0], [70, 20, 0, 9, 1])
    assert torch.equal(held, hold_out(labels, 100, seed=0)[1])
    assert not torch.equal(held, hold_out(labels, 100, seed=1)[1])


@pytest.mark.parametrize("count", [0, 1, 7, 999])
def test_hold_out_counts(count):
    train, held = hold_out(torch.arange(1000) % 10, count, seed=0)
    assert (len(train), len(held)) == (1000 - count, count)


@pytest.mark.parametrize("count", [-1, 10])
def test_hold_out_refuses(count):
    with pytest.raises(InputError, match=f"--holdout {count}: give 0 to 9"):
        hold_out(torch.arange(10), count, seed=0)


def test_fingerprint():
    images = random_images()
    value = fingerprint(images)
    assert re.fullmatch("[0-9a-f]{16}", value)
    assert fingerprint(random_images()) == value
    for tensor, index in ((images.pixels, (49, 7, 8, 2)), (images.labels, (0,))):
        tensor[index] += 1
        assert fingerprint(images) != value
        tensor[index] -= 1
    assert fingerprint(images) == value
    assert fingerprint(Images(images.pixels.view(50, 9, 8, 3), images.labels)) != value
    assert fingerprint(Images(images.pixels[:0], images.labels[:0])) != value


def test_fingerprint_of_many_is_a_sample(monkeypatch):
    monkeypatch.setattr("spat_train.images.HASHED", 1000)
    monkeypatch.setattr("spat_train.images.SAMPLED", 8)
    images = random_images()
    value = fingerprint(images)
    images.pixels[49] += 1  # the last is in it
    assert fingerprint(images) != value


def test_fingerprint_of_a_folder(pictures):
    def value(**arguments) -> str:
        return fingerprint(load(str(pictures), **{"image_size": 16} | arguments).train)

    before = value()
    assert value() == before
    assert value(image_size=20) != before
    (pictures / "train" / "dog" / "0.png").rename(pictures / "train" / "dog" / "7.png")
    assert value() != before


def test_floats(device):
    images = random_images()
    rows = torch.tensor([4, 4, 49])
    x, y = floats(images, rows, device)
    assert (x.shape, x.dtype, x.device.type) == ((3, 3, 8, 9), torch.float32, device)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x.cpu(), (images.pixels[rows].float() / 255).permute(0, 3, 1, 2))
    assert torch.equal(y.cpu(), images.labels[rows])

"""Where images come from, what is refused on the way, and what is asked of any set of them."""

import gzip
import os
import pickle
import re
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch

from spat_train.data.datasets import load, load_npz
from spat_train.data.images import Folder, Images, fingerprint, floats, hold_out
from spat_train.data.pictures import read_picture
from spat_train.errors import InputError

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
        ({"x_test": np.zeros((20, 16, 16), np.uint8)}, r"x_test has images \[16, 16\], x_train \[12, 12\]"),
        ({"x_test": np.zeros((20, 12, 12, 3), np.uint8)}, r"x_test has images \[12, 12, 3\], x_train \[12, 12\]"),
        ({"x_train": np.zeros((40, 12, 12, 2), np.uint8)}, r"x_train is uint8 \[40, 12, 12, 2\]: save \[N, H, W\], "),
        ({"x_train": np.zeros((0, 12, 12), np.uint8), "y_train": np.zeros(0, np.int64)}, "x_train .* is empty"),
        ({"x_test": np.zeros((0, 12, 12), np.uint8), "y_test": np.zeros(0, np.int64)}, "x_test .* is empty"),
        ({"y_train": np.full(40, 0.5)}, r"y_train is float64 \[40\]: save class indices as integers"),
        ({"y_train": np.full(40, np.nan)}, r"y_train is float64 \[40\]: save class indices as integers"),
        ({"y_train": np.full(40, "a")}, r"y_train is <U1 \[40\]: save class indices as integers"),
        ({"y_train": np.zeros((40, 3), np.int64)}, r"y_train is int64 \[40, 3\]: save class indices as integers \[N\]"),
        ({"y_train": np.arange(40) % 3 + 1, "classes": None}, "y_train has no 0, of 0 to 3: number classes from 0 without gaps"),
        ({"y_train": np.arange(40) % 2 * 5, "classes": None}, "y_train has no 1, of 0 to 5: .* or save classes, a name for each"),
        ({"y_test": np.full(20, 7), "classes": None}, "y_train has no 3, of 0 to 7"),
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


@pytest.mark.parametrize(("field", "value"), [(8, 1), (10, 99)])  # flags: encrypted; method: none that there is
def test_zip_files_of_other_kinds(tmp_path, field, value):
    content = bytearray(saved(tmp_path).read_bytes())
    content[content.find(b"PK\1\2") + field] |= value
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as \.npz \(.+\): write it"):
        load_npz(tmp_path / "data.npz")


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
        assert images.pixels.is_contiguous()
        assert images.pixels.ndim == 4
        assert np.array_equal(images.pixels.numpy().reshape(source[f"x_{split}"].shape), source[f"x_{split}"])
        assert np.array_equal(images.labels, source[f"y_{split}"])


@pytest.mark.parametrize("labels", [np.uint8, np.int32, ">i2", np.uint64, np.float64])
@pytest.mark.parametrize("shape", [(12, 12), (12, 12, 1)])
def test_labels_of_any_integers_and_grey_images_of_either_shape(tmp_path, labels, shape):
    source = arrays()
    changes = {name: source[name].astype(labels) for name in ("y_train", "y_test")} | {"classes": None}
    data = load(str(saved(tmp_path, x_train=source["x_train"].reshape(-1, *shape), **changes)))
    assert data.image_shape == data.train.image_shape == (1, 12, 12)
    assert data.num_classes == 3
    assert data.train.labels.dtype == torch.int64
    assert data.train.labels.tolist() == source["y_train"].tolist()


def test_named_classes_may_lack_images(tmp_path):
    assert load_npz(saved(tmp_path, y_train=np.ones(40, int))).num_classes == 3


def test_test_images_alone(tmp_path):
    path = saved(tmp_path, x_train=None, y_train=None)
    with pytest.raises(InputError, match="no array x_train, y_train"):
        load(str(path))
    data = load(str(path), test_only=True)
    assert (len(data.train), len(data.test), data.image_shape, data.classes) == (0, 20, (1, 12, 12), ("a", "b", "c"))
    assert data.all_classes
    assert len(data.limited(5, 0).test) == 5
    data = load(str(saved(tmp_path, x_train=None, y_train=None, classes=None, y_test=np.ones(20, int))), test_only=True)
    assert data.num_classes == 2
    assert not data.all_classes


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


def test_folder_of_test_images_alone(pictures):
    (pictures / "train").rename(pictures / "other")
    with pytest.raises(InputError, match=r"the folder has no train/ and test/ \(or val/\)"):
        load(str(pictures), image_size=16)
    data = load(str(pictures), image_size=16, test_only=True)
    assert (len(data.train), len(data.test), data.classes, data.image_shape) == (0, 4, ("cat", "dog"), (3, 16, 16))
    with pytest.raises(InputError, match=r"the folder has no test/ \(or val/\)"):
        load(str(pictures / "val"), image_size=16, test_only=True)
    (pictures / "other").rename(pictures / "train")
    (pictures / "train" / "ape").mkdir()  # labels are numbered by the training classes
    data = load(str(pictures), image_size=16, test_only=True)
    assert data.classes == ("ape", "cat", "dog")
    assert set(data.test.labels.tolist()) == {1, 2}
    (pictures / "val" / "emu").mkdir()
    with pytest.raises(InputError, match="train/ and val/ differ in class ape"):
        load(str(pictures), image_size=16, test_only=True)
    for folder in (pictures / "train").iterdir():
        shutil.rmtree(folder)
    assert load(str(pictures), image_size=16, test_only=True).classes == ("cat", "dog", "emu")


def test_folder_errors(pictures):
    with pytest.raises(InputError, match="--image-size None: give the size"):
        load(str(pictures))
    (pictures / "val" / "emu").mkdir()
    with pytest.raises(InputError, match="train/ and val/ differ in class emu"):
        load(str(pictures), image_size=16)
    (pictures / "train" / "emu").mkdir()
    with pytest.raises(InputError, match="train/emu has no picture .*: put some there, or remove it"):
        load(str(pictures), image_size=16)
    (pictures / "train" / "cat" / "0.png").rename(pictures / "train" / "emu" / "0.png")
    assert load(str(pictures), image_size=16).test.labels.tolist() == [0, 0, 1, 1]  # test images may lack a class
    (pictures / "train" / "fox").symlink_to("nowhere")
    with pytest.raises(InputError, match="train/fox is a link to nothing"):
        load(str(pictures), image_size=16)


@pytest.mark.parametrize("target", ["..", "../..", "../dog"])
def test_links_that_go_in_circles(pictures, target):
    (pictures / "train" / "cat" / "link").symlink_to(target)
    if target == "../dog":
        assert len(load(str(pictures), image_size=16).train) == 9  # no circle
        (pictures / "train" / "dog" / "back").symlink_to("../cat")
    with pytest.raises(InputError, match="is a link to a folder around it: remove it"):
        load(str(pictures), image_size=16)


BROKEN = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("no picture"),
    "cut short": lambda path: path.write_bytes(path.with_name("1.png").read_bytes()[:300]),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "FIFO": os.mkfifo,
    "floats": lambda path: picture("F").save(path, "TIFF"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures(pictures, capsys, kind):
    path = pictures / "train" / "cat" / "0.png"
    path.unlink()
    BROKEN[kind](path)
    remedy = "repair or remove it, or start with --skip-broken" if path.is_file() else "remove it, or add --skip-broken"
    with pytest.raises(InputError, match=f"^--data: {path} .*: {remedy}") as error:
        load(str(pictures), image_size=16).train.batch(torch.tensor([0]))
    assert "\n" not in str(error.value)
    data = load(str(pictures), image_size=16, skip_broken=True)
    assert data.train.files == [f"{name}.png" for name in ("cat/1", "cat/2", "dog/0", "dog/1", "dog/2")]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(data.test) == 4
    assert f"1 of 6 pictures in {pictures / 'train'} are left out: cat/0.png\n" in capsys.readouterr().err


def picture(mode, size=(16, 16)):
    from PIL import Image

    levels = np.linspace(0, 65535, size[0] * size[1]).astype(np.uint16).reshape(size[::-1])
    if mode.startswith("I;16"):
        return Image.frombytes(mode, size, levels.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(levels.astype({"I": np.int32, "F": np.float32}[mode]))
    return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB").convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("I;16", "png"), ("I;16", "tiff"), ("I;16B", "tiff"), ("I", "pgm"),  # 16 bits
        ("L", "png"), ("RGB", "bmp"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "tiff"), ("1", "png"),
    ],
)  # fmt: skip
def test_kinds_of_pictures(tmp_path, mode, suffix):
    pytest.importorskip("PIL")
    path = tmp_path / f"0.{suffix}"
    source = picture(mode)
    if mode in ("LA", "RGBA"):
        source.putalpha(0)
    source.save(path)
    expected = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16, 1) >> 8
    if mode in ("1", "P"):
        expected = np.array(source.convert("RGB"))
    assert np.array_equal(read_picture(path, 16), np.broadcast_to(expected, (16, 16, 3)))


def test_16_bits_where_white_is_0(tmp_path):
    pytest.importorskip("PIL")
    picture("I;16").save(tmp_path / "0.tiff", tiffinfo={262: 0})
    assert read_picture(tmp_path / "0.tiff", 16)[[0, -1], [0, -1]].tolist() == [[255] * 3, [0] * 3]


def test_16_bits_of_colours(tmp_path):
    """Their high bytes, as those of grey pictures."""
    pytest.importorskip("PIL")
    levels = np.arange(16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3) * 80
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert np.array_equal(read_picture(tmp_path / "0.png", 16), levels >> 8)


@pytest.mark.parametrize("size", [(40, 40), (61, 40), (33, 90), (16, 200), (9, 10)])
def test_pictures_are_resized_and_cropped_as_torchvision_does(tmp_path, size):
    transforms = pytest.importorskip("torchvision.transforms.functional", exc_type=Exception)
    source = picture("RGB", size)
    source.save(tmp_path / "0.png")
    expected = np.array(transforms.center_crop(transforms.resize(source, 16), 16)).astype(int)
    assert abs(read_picture(tmp_path / "0.png", 16) - expected).max() <= (size[0] != size[1])


def test_a_thin_picture_takes_no_memory(tmp_path):
    """Resized as a whole it would have 1,000 x 200,000,000 pixels."""
    picture("L", (1, 200_000)).save(tmp_path / "0.png")
    assert read_picture(tmp_path / "0.png", 1000).shape == (1000, 1000, 3)


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
    assert torch.equal(held, held.sort().values)
    assert torch.equal(train, train.sort().values)
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
    monkeypatch.setattr("spat_train.data.images.HASHED", 1000)
    monkeypatch.setattr("spat_train.data.images.SAMPLED", 8)
    images = random_images()
    value = fingerprint(images)
    images.pixels[49] += 1  # the last is in it
    assert fingerprint(images) != value


def test_fingerprint_of_a_folder(pictures):
    def value(**arguments) -> str:
        return fingerprint(load(str(pictures), **{"image_size": 16} | arguments).train)

    before, contents = value(), fingerprint(load(str(pictures), image_size=16).train, contents=True)
    assert value() == before
    assert value(image_size=20) != before
    shutil.copy(pictures / "train" / "dog" / "2.png", pictures / "train" / "dog" / "0.png")
    assert value() == before  # of another size: it may have been repaired
    assert fingerprint(load(str(pictures), image_size=16).train, contents=True) != contents
    path = (pictures / "train" / "dog" / "0.png").rename(pictures / "train" / "dog" / "7.png")
    assert value() != before
    os.rename(path, os.fsencode(path.parent) + b"/caf\xe9.png")  # not UTF-8
    assert value() != before


def test_floats(device):
    images = random_images()
    rows = torch.tensor([4, 4, 49])
    x, y = floats(images, rows, device)
    assert (x.shape, x.dtype, x.device.type) == ((3, 3, 8, 9), torch.float32, device)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x.cpu(), (images.pixels[rows].float() / 255).permute(0, 3, 1, 2))
    assert torch.equal(y.cpu(), images.labels[rows])

"""Folders of pictures: their classes, what is refused or left out, and how pictures are decoded and resized."""

import inspect
import os
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch

from spat_train.data.datasets import load
from spat_train.data.images import Dataset, Folder
from spat_train.data.pictures import decode, square
from spat_train.errors import InputError
from tests.data.helpers import picture, takes_less_than

pytest.importorskip("PIL")
pytest.importorskip("torchvision", exc_type=Exception)


def read_picture(path, size: int) -> np.ndarray:
    return square(decode(path.read_bytes()), (size, size)).permute(1, 2, 0).numpy()


def opened(pictures, **options) -> Dataset:
    return load(str(pictures), **{"image_size": 16} | options)


def test_folder(pictures):
    data = opened(pictures)
    assert isinstance(data.train, Folder)
    assert (len(data.train), len(data.test)) == (6, 4)
    assert (data.name, data.classes, data.image_shape) == (pictures.name, ("cat", "dog"), (3, 16, 16))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = [read_picture(pictures / "train" / name, 16) for name in ("dog/2.png", "cat/0.png")]
    assert torch.equal(data.train.batch(torch.tensor([5, 0])), torch.from_numpy(np.stack(expected)))
    assert data.train.batch(torch.empty(0, dtype=torch.int64)).shape == (0, 16, 16, 3)
    limited = opened(pictures, limit=4).train
    assert [data.train.labels[data.train.files.index(file)] for file in limited.files] == limited.labels.tolist()


def test_folder_of_test_images_alone(pictures):
    (pictures / "train").rename(pictures / "other")
    with pytest.raises(InputError, match="the folder has no train/: give one that has, with"):
        opened(pictures)
    data = opened(pictures, test_only=True)
    assert (len(data.train), len(data.test), data.classes, data.image_shape) == (0, 4, ("cat", "dog"), (3, 16, 16))
    with pytest.raises(InputError, match=r"the folder has no test/ \(or val/\)"):
        load(str(pictures / "val"), image_size=16, test_only=True)
    (pictures / "other").rename(pictures / "train")
    (pictures / "train" / "ape").mkdir()  # labels are numbered by the training classes
    data = opened(pictures, test_only=True)
    assert data.classes == ("ape", "cat", "dog")
    assert set(data.test.labels.tolist()) == {1, 2}
    (pictures / "val" / "emu").mkdir()
    with pytest.raises(InputError, match="train/ and val/ differ in class ape"):
        opened(pictures, test_only=True)
    for folder in (pictures / "train").iterdir():
        shutil.rmtree(folder)
    assert opened(pictures, test_only=True).classes == ("cat", "dog", "emu")


def test_folder_errors(pictures):
    with pytest.raises(InputError, match="--image-size is missing: give the size, 8 or more"):
        load(str(pictures))
    (pictures / "val" / "emu").mkdir()
    with pytest.raises(InputError, match="train/ and val/ differ in class emu"):
        opened(pictures)
    (pictures / "train" / "emu").mkdir()
    with pytest.raises(InputError, match="train/emu has no picture .*: put some there, or remove it"):
        opened(pictures)
    (pictures / "train" / "cat" / "0.png").rename(pictures / "train" / "emu" / "0.png")
    assert opened(pictures).test.labels.tolist() == [0, 0, 1, 1]  # test images may lack a class
    (pictures / "train" / "fox").symlink_to("nowhere")
    with pytest.raises(InputError, match="train/fox is a link to nothing"):
        opened(pictures)


def test_names_that_terminals_obey(pictures):
    """Or that no report could hold. The files keep theirs."""
    for split in ("train", "val"):
        os.rename(pictures / split / "cat", os.fsencode(pictures / split) + b"/a\n\x1b[2Jcaf\xe9")
    data = opened(pictures)
    assert data.classes == ("a\\n\\x1b[2Jcaf\\udce9", "dog")
    assert data.train.batch(torch.arange(6)).shape == (6, 16, 16, 3)


def test_what_is_hidden_is_left_out(pictures):
    for name in (".ipynb_checkpoints", "cat/.thumbnails"):
        shutil.copytree(pictures / "train" / "dog", pictures / "train" / name)
    (pictures / "train" / "cat" / "._0.png").write_bytes(b"no picture")
    data = opened(pictures)
    assert (data.classes, len(data.train)) == (("cat", "dog"), 6)


def test_of_two_sets_of_test_images_one_is_taken_and_said(pictures, capsys):
    opened(pictures)
    assert not capsys.readouterr().err
    shutil.copytree(pictures / "train", pictures / "test")
    assert len(opened(pictures).test) == 6
    assert capsys.readouterr().err == f"spat-train: --data {pictures} has test/ and val/: val/ is ignored\n"


def test_without_test_images(pictures):
    shutil.rmtree(pictures / "val")
    with pytest.raises(InputError, match=r"the folder has no test/ \(or val/\): give one that has, for --no-test too, with"):
        opened(pictures)
    (pictures / "train").rename(pictures / "other")
    with pytest.raises(InputError, match=r"the folder has no train/ and test/ \(or val/\): give one that has, with"):
        opened(pictures)


def test_data_sets_are_short_in_print(pictures):
    shown = "train=Folder(6 x [3, 16, 16]), test=Folder(4 x [3, 16, 16]), classes=('cat', 'dog')"
    assert shown in repr(opened(pictures))


@pytest.mark.parametrize("target", ["..", "../..", "../dog"])
def test_links_that_go_in_circles(pictures, target):
    (pictures / "train" / "cat" / "link").symlink_to(target)
    if target == "../dog":
        assert len(opened(pictures).train) == 9  # no circle
        (pictures / "train" / "dog" / "back").symlink_to("../cat")
    with pytest.raises(InputError, match="is a link to a folder around it, or to one that is read already: remove it"):
        opened(pictures)


def test_links_that_double_at_each_level(pictures):
    """2**30 ways lead to the last folder, and none in a circle."""
    for level in range(30):
        folder = pictures / "train" / ("cat" if level == 0 else f".{level}")
        folder.mkdir(exist_ok=True)
        for name in "ab":
            (folder / name).symlink_to(f"../.{level + 1}")
    (pictures / "train" / ".30").mkdir()
    with pytest.raises(InputError, match="is a link to .* one that is read already: remove it"):
        opened(pictures)


def test_folders_nested_deeper_than_calls(pictures):
    deep, limit = pictures / "train" / "cat" / "/".join("d" * 300), sys.getrecursionlimit()
    deep.mkdir(parents=True)
    shutil.copy(pictures / "train" / "dog" / "0.png", deep)
    opened(pictures)  # imports are calls too
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 200)
        files = opened(pictures).train.files
    finally:
        sys.setrecursionlimit(limit)
    assert files[3] == f"cat/{'d/' * 300}0.png"


BROKEN = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("no picture"),
    "cut short": lambda path: path.write_bytes(path.with_name("1.png").read_bytes()[:300]),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "FIFO": os.mkfifo,
    "floats": lambda path: picture("F").save(path, "TIFF"),
    "huge": lambda path: path.touch() or os.truncate(path, 2**40),
    "PNG bomb": lambda path: path.write_bytes(png(2**31 - 1, 2**31 - 1)),
    "JPEG bomb": lambda path: jpeg(path, 65_500, 65_500),
    "JPEG of many parts": lambda path: jpeg(path, 16, 16, b"\xff\xe0\0\2" * 1000),
}

# What libjpeg passes over: a frame in a comment, a length below two, bytes between parts, and filling.
BEFORE = (b"\xff\xfe\0\x0c\xff\xc0\0\x11\x08\0\1\0\1\3", b"\xff\xe5\0\0", b"garbage", b"\xff\0", b"\xff\xd0", b"\xff" * 9)


@pytest.mark.parametrize("before", BEFORE)
def test_bombs_in_odd_files(tmp_path, before):
    """The size is read where libjpeg reads it."""
    path = tmp_path / "a.jpg"
    jpeg(path, 16, 16, before)
    assert decode(path.read_bytes()).shape == (3, 16, 16)
    jpeg(path, 65_500, 65_500, before)
    with pytest.raises(ValueError, match="its header says 4290250000 pixels, at most 178956970 are decoded"):
        decode(path.read_bytes())


def png(width: int, height: int) -> bytes:
    """A picture that says it is of this size, with little in it."""
    chunks = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1000)), b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)


def jpeg(path, width: int, height: int, before: bytes = b"") -> None:
    """Of this size, as it says; `before` its header comes something else."""
    picture("RGB").save(path, "JPEG")
    start, rest = path.read_bytes().split(b"\xff\xc0", 1)
    path.write_bytes(start + before + b"\xff\xc0" + rest[:3] + struct.pack(">2H", height, width) + rest[7:])


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures(pictures, capsys, kind):
    path = pictures / "train" / "cat" / "0.png"
    path.unlink()
    BROKEN[kind](path)
    remedy = "repair or remove it, or start with --skip-broken" if path.is_file() else "remove it, or add --skip-broken"
    with takes_less_than(50e6), pytest.raises(InputError, match=f"^--data: {path} .*: {remedy}") as error:
        opened(pictures).train.batch(torch.tensor([0]))
    assert "\n" not in str(error.value)
    data = opened(pictures, skip_broken=True)
    assert data.train.files == [f"{name}.png" for name in ("cat/1", "cat/2", "dog/0", "dog/1", "dog/2")]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(data.test) == 4
    assert f"1 of 6 pictures in {pictures / 'train'} are left out: cat/0.png (" in capsys.readouterr().err


# ---- decoding


def test_programs_are_no_pictures():
    """PIL would give this one to Ghostscript."""
    with pytest.raises(OSError, match="cannot identify image file"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("I;16", "png"), ("I;16", "tiff"), ("I;16B", "tiff"), ("I", "pgm"),  # 16 bits
        ("L", "png"), ("RGB", "bmp"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "tiff"), ("1", "png"),
    ],
)  # fmt: skip
def test_kinds_of_pictures(tmp_path, mode, suffix):
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
    picture("I;16").save(tmp_path / "0.tiff", tiffinfo={262: 0})
    assert read_picture(tmp_path / "0.tiff", 16)[[0, -1], [0, -1]].tolist() == [[255] * 3, [0] * 3]


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

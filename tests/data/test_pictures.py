"""Pictures of every kind are decoded to the levels that they show, and resized as torchvision does."""

import struct
import zlib

import numpy as np
import pytest

from spat_train.data.pictures import read_picture
from tests.data.helpers import picture

pytest.importorskip("PIL")


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


def test_16_bits_of_colours(tmp_path):
    """Their high bytes, as those of grey pictures."""
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

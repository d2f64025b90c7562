"""Extra images: every file they come in, without memory, and without running what a pickle says."""

import codecs
import io
import os
import pickle
import re
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from spat_train.data import pseudo_labels
from spat_train.data.pseudo_labels import EXPECTED, load_extra, read_pickle
from spat_train.errors import InputError
from tests.data.helpers import takes_less_than

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 8, 9, 3), dtype=np.uint8)
LABELS = np.arange(30) % 10


def read(path, image_shape=(3, 8, 9), num_classes=10):
    return load_extra(path, image_shape=image_shape, num_classes=num_classes)


def pickled(path, protocol=4, **content):
    content = {"data": PIXELS, "extrapolated_targets": LABELS} | content
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def copies(path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir() if file != path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("image", "label"), ("data", "extrapolated_targets"), ("x_train", "y_train")])
def test_npz(tmp_path, save, names):
    path = tmp_path / "extra.npz"
    save(path, **{names[0]: PIXELS, names[1]: LABELS.astype(np.int32), "other": np.zeros(3)})
    for _ in range(2):
        images = read(path)
        assert np.array_equal(images.pixels, PIXELS)
        assert images.labels.tolist() == LABELS.tolist()
        assert images.labels.dtype == torch.int64
        assert images.image_shape == (3, 8, 9)
    assert copies(path) == ([] if save is np.savez else ["extra.npz.pixels.npy"])
    for grey in (PIXELS[..., 0], PIXELS[..., :1]):
        save(path, **{names[0]: grey, names[1]: LABELS})
        assert np.array_equal(read(path, image_shape=(1, 8, 9)).pixels, PIXELS[..., :1])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("labels", [LABELS, LABELS.tolist(), list(LABELS), LABELS.astype(">u2"), LABELS.astype(float)])
def test_pickle(tmp_path, protocol, labels):
    """Whatever arrays lie beside the two, they are not looked at."""
    others = {"prob": np.full((30, 10), 0.1), "names": np.array(["a", None]), "accuracy": np.float32(0.5), "epoch": 3}
    path = pickled(tmp_path / "ti.pickle", protocol, extrapolated_targets=labels, **others)
    for _ in range(2):
        images = read(path)
        assert np.array_equal(images.pixels, PIXELS)
        assert images.labels.tolist() == LABELS.tolist()
    assert copies(path) == ["ti.pickle.pixels.npy"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 3, 1, 2), (1, 0, 2, 3)])
def test_pickled_layouts(tmp_path, protocol, axes):
    """C, Fortran, channels first and others in memory; protocol 5 has a way of its own for each."""
    pixels = PIXELS.transpose(axes).copy().transpose(np.argsort(axes))
    images = read(pickled(tmp_path / "ti.pickle", protocol, data=pixels))
    assert images.pixels.is_contiguous()
    assert np.array_equal(images.pixels, PIXELS)


def test_pickle_of_python_2(tmp_path):
    """As Python 2 writes it: byte strings, the names of old NumPy."""

    def string(pickler, value):
        content = value if isinstance(value, bytes) else value.encode()
        pickler.write(b"T" + len(content).to_bytes(4, "little") + content)

    class Python2(pickle._Pickler):
        dispatch = pickle._Pickler.dispatch | {bytes: string, str: string}

    path = tmp_path / "ti.pickle"
    with open(path, "wb") as file:
        Python2(file, 2).dump({"data": PIXELS, "extrapolated_targets": LABELS})
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    assert b"_codecs" not in path.read_bytes()
    assert np.array_equal(read(path).pixels, PIXELS)
    assert read(path).labels.tolist() == LABELS.tolist()


class Call:
    """Pickles as a call of `function` when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (lambda marker: Call(os.system, f"touch {marker}"), "posix.system"),
        (lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"), "builtins.eval|__builtin__.eval"),
        (lambda marker: Call(np.load, str(marker)), "numpy.load"),
        (lambda marker: Call(codecs.decode, "00", "hex"), "_codecs.decode"),
        (lambda marker: Call(getattr, "", "join"), "builtins.getattr|__builtin__.getattr"),
        (lambda marker: torch.zeros(3), r"torch._utils._rebuild_tensor_v2"),
    ],
)
def test_malicious_pickle(tmp_path, protocol, content, name):
    marker = tmp_path / "marker"
    path = pickled(tmp_path / "ti.pickle", protocol, other=content(marker))
    with pytest.raises(InputError, match=rf"--extra .*ti.pickle: cannot be read .*it asks for ({name}), which is no array"):
        read(path)
    assert copies(path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": PIXELS.astype(np.float32)}, r"images are float32 \[30, 8, 9, 3\]: save uint8 \[N, 8, 9, 3\]"),
        ({"data": PIXELS.reshape(30, -1)}, r"images are uint8 \[30, 216\]: save uint8 \[N, 8, 9, 3\]"),
        ({"data": PIXELS.transpose(0, 3, 1, 2)}, r"images are uint8 \[30, 3, 8, 9\]"),
        ({"data": PIXELS[:0], "extrapolated_targets": LABELS[:0]}, "is empty"),
        ({"data": np.uint8(3)}, r"images are \w+ \[\]"),
        ({"extrapolated_targets": LABELS[:29]}, "the array of labels has 29 labels for 30 images: save one label per image"),
        ({"extrapolated_targets": LABELS - 1}, "labels contains -1: save labels from 0 to 9"),
        ({"extrapolated_targets": LABELS.astype(np.uint64) + 2**63}, "labels contains 9223372036854775808"),
    ],
)
@pytest.mark.parametrize("form", ["pickle", "npz", "compressed"])
def test_refused(tmp_path, form, changes, message):
    path = tmp_path / "extra.data"
    if form == "pickle":
        pickled(path, **changes)
    else:
        with open(path, "wb") as file:
            save = np.savez if form == "npz" else np.savez_compressed
            save(file, **{"data": PIXELS, "extrapolated_targets": LABELS} | changes)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"--extra {path}: ")
    assert copies(path) == []  # refused before a copy is written


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", ".+"), (b"not a pickle", ".+"), (pickle.dumps({"data": PIXELS})[:500], ".+"), (b"\x93NUMPY\x01\x00", ".+"),
        (pickle.dumps({"data": PIXELS, "extrapolated_targets": LABELS}, 5, buffer_callback=[].append), ".*out-of-band.*"),
        (pickle.dumps({"data": PIXELS, "extrapolated_targets": np.array([None])}), ".*an array of dtype .O.*"),
    ],
)  # fmt: skip
def test_unreadable(tmp_path, content, reason):
    path = tmp_path / "extra.data"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"--extra .*extra.data: cannot be read as .npz or pickle \({reason}\): give"):
        read(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_mapped_file_that_is_cut_short_under_way(tmp_path, save):
    """The file itself, or the copy of its pixels."""
    path = tmp_path / "extra.npz"
    save(path, image=PIXELS, label=LABELS)
    images = read(path)
    (mapped,) = tmp_path.glob("*.npy") if save is np.savez_compressed else [path]
    os.truncate(mapped, 1000)
    with pytest.raises(InputError, match=f"^{mapped} was written to while it was in use"):
        images.batch(torch.arange(30))


def test_a_pickle_that_claims_a_memo_of_gigabytes(tmp_path):
    path = tmp_path / "extra.data"
    path.write_bytes(b"\x80\x04N" + b"r" + struct.pack("<I", 2**26) + b".")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="it holds a NoneType"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_bytearrays_are_read_as_bytes(tmp_path):
    """A pickle of 11 bytes may claim one of gigabytes, which Python would fill with zeros first."""
    path = tmp_path / "extra.data"
    path.write_bytes(pickle.dumps(bytearray(b"abc"), 5))
    assert type(read_pickle(path)) is bytes


def test_what_is_packed_beyond_its_header_is_not_written_to_the_disk(tmp_path):
    path, content = tmp_path / "extra.npz", io.BytesIO()
    np.save(content, PIXELS)
    np.savez(path, label=LABELS)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", content.getvalue() + bytes(1000))
    with pytest.raises(InputError, match="image is uint8 .* should have 6608 bytes, and has 7608"):
        read(path)
    assert copies(path) == []


def test_other_content(tmp_path):
    path = tmp_path / "extra.npz"
    np.savez(path, a=PIXELS, label=LABELS)
    with pytest.raises(InputError, match=re.escape(f"it has a, label: save {EXPECTED}")):
        read(path)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(InputError, match="it holds a list"):
        read(path)
    path.write_bytes(pickle.dumps({1: 2}))
    with pytest.raises(InputError, match="it has 1: save"):
        read(path)
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nowhere")
    np.savez(path, image=np.asfortranarray(PIXELS), label=LABELS)
    with pytest.raises(InputError, match="Fortran order"):
        read(path)


def test_copy_of_another_file_is_made_again(tmp_path, monkeypatch):
    path = pickled(tmp_path / "ti.pickle")
    read(path)
    monkeypatch.setattr(pseudo_labels, "_unpickled", lambda path: pytest.fail("the copy is up to date"))
    read(path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="labels contains 9"):
        read(path, num_classes=9)  # checked again against what it is to go with
    pickled(path, data=255 - PIXELS)
    os.utime(path, ns=(0, 0))
    assert np.array_equal(read(path).pixels, 255 - PIXELS)
    copy = tmp_path / "ti.pickle.pixels.npy"
    whole = copy.read_bytes()
    for damaged in (whole[:-1], whole[:300], b"", whole + b"more"):
        copy.write_bytes(damaged)
        assert np.array_equal(read(path).pixels, 255 - PIXELS)
    assert copies(path) == ["ti.pickle.pixels.npy"]


def test_copy_that_cannot_be_written(tmp_path, monkeypatch):
    path = pickled(tmp_path / "ti.pickle")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(InputError, match=r"cannot be written to .*ti.pickle.pixels.npy \(No space left on device\): make"):
            read(path)
    assert copies(path) == []
    if os.geteuid():
        tmp_path.chmod(0o555)
        with pytest.raises(InputError, match="Permission denied"):
            read(path)


def test_images_take_no_memory(tmp_path):
    """Nor do those that are compressed; tests of data sets map those that are not."""
    path = tmp_path / "compressed.npz"
    pixels = np.zeros((30_000, 32, 32, 3), np.uint8)
    pixels[777] = 7
    np.savez_compressed(path, image=pixels, label=np.arange(30_000) % 10)
    del pixels
    with takes_less_than(40e6):
        images = read(path, image_shape=(3, 32, 32))
        assert (images.batch(torch.tensor([777])) == 7).all()

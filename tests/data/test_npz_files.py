"""What .npz files may hold, and what is refused."""

import copy
import io
import os
import zipfile

import numpy as np
import pytest
import torch

from spat_train.data.datasets import load
from spat_train.data.loader import Loader, Order
from spat_train.data.npz_files import load_npz
from spat_train.errors import InputError
from spat_train.runtime.memory import free_memory
from tests.data.helpers import arrays, saved, takes_less_than


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "no array y_test"),
        ({"x_train": np.zeros((40, 12, 12), np.float32)}, r"x_train is float32 \[40, 12, 12\]: save images as uint8"),
        ({"x_train": np.zeros((40, 144), np.uint8)}, r"x_train is uint8 \[40, 144\]: save \[N, H, W\]"),
        ({"x_test": np.zeros((20, 3, 12, 12), np.uint8)}, r"x_test is uint8 \[20, 3, 12, 12\]: save \[N, H, W\]"),
        ({"x_train": np.zeros((40, 4, 4), np.uint8)}, "at least 8"),
        ({"x_test": np.zeros((20, 16, 16), np.uint8)}, r"x_test has images \[16, 16\], x_train \[12, 12\]"),
        ({"x_train": np.zeros((40, 12, 12, 2), np.uint8)}, r"x_train is uint8 \[40, 12, 12, 2\]: save \[N, H, W\], "),
        ({"x_train": np.zeros((0, 12, 12), np.uint8), "y_train": np.zeros(0, np.int64)}, "x_train .* is empty"),
        ({"y_train": np.full(40, np.nan)}, r"y_train is float64 \[40\]: save class indices as integers"),
        ({"y_train": np.full(40, "a")}, r"y_train is <U1 \[40\]: save class indices as integers"),
        ({"y_train": np.zeros((40, 3), np.int64)}, r"y_train is int64 \[40, 3\]: save class indices as integers \[N\]"),
        ({"y_train": np.arange(40) % 2 * 5, "classes": None}, "y_train has no 1, of 0 to 5: .* or save classes, a name for each"),
        ({"y_test": np.full(20, 7), "classes": None}, "y_train has no 3, of 0 to 7"),
        ({"y_train": np.zeros(39, np.int64)}, "39 labels for 40 images"),
        ({"y_test": np.full(20, 3)}, "y_test contains 3: save labels from 0 to 2"),
        ({"classes": np.array(["a"])}, "save the names of 2 to 1000000 classes"),
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


def test_other_files(tmp_path):
    path = tmp_path / "data.npy"
    for content in (b"", b"not an archive", b"PK\x03\x04 cut short"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as \.npz"):
            load(str(path))
    np.save(path, np.zeros(3))
    with pytest.raises(InputError, match="single array"):
        load(str(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("after", "offset", "new"), [(b"PK\1\2", 8, b"\1"), (b"PK\1\2", 10, b"\x63"), (b"", 2000, bytes(100))])
def test_damaged_file(tmp_path, save, after, offset, new):
    """It says that it is encrypted, or packed by an unknown method; or its content has changed."""
    path = saved(tmp_path, save)
    content = path.read_bytes()
    at = content.find(after) + offset
    path.write_bytes(content[:at] + new + content[at + len(new) :])
    with pytest.raises(InputError, match=r"cannot be read as \.npz \(.+\): write it"):
        load_npz(path)


U1 = {"descr": "|u1", "shape": (40, 12, 12)}


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("name", "header", "size", "message"),
    [
        ("x_train", U1 | {"shape": (2**40, 12, 12)}, 5760, r"x_train is uint8 \[1099511627776, 12, 12\] and should have"),
        ("x_train", U1 | {"shape": (2**70, 12, 12)}, 5760, "x_train is .* and should have"),
        ("x_train", U1, 50_000_000, "should have 5888 bytes, and has 50000128"),
        ("x_train", U1, 5759, "should have 5888 bytes, and has 5887"),
        ("x_train", U1 | {"fortran_order": True}, 5759, "should have 5888 bytes, and has 5887"),
        ("x_train", U1 | {"shape": (-40, -12, 12)}, 5760, "its header says uint8 .-40, -12, 12."),
        ("x_train", U1 | {"shape": (True, 480, 12)}, 5760, "its header says uint8 .True"),
        ("x_train", U1 | {"descr": ("|u1", (12, 12)), "shape": (40,)}, 5760, "its header says .'u1', .12, 12"),
        ("x_train", U1 | {"shape": "(" * 9000}, 5760, "cannot be read as .npz"),
        ("y_train", {"descr": "<i8", "shape": (2**40,)}, 320, "y_train is int64 .* should have"),
        ("classes", {"descr": "<U100000000", "shape": (3,)}, 12, "classes is .* should have"),
        ("classes", {"descr": "<U0", "shape": (2**40,)}, 0, "its header says <U0"),
        ("classes", {"descr": "<U1", "shape": (3,)}, -12, "classes is no text"),
    ],
)
def test_headers_that_lie(tmp_path, packed, name, header, size, message):
    """They are refused before what they promise is allocated, or what they hide is unpacked. A size below 0: bytes of 255."""
    path, file = tmp_path / "data.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"fortran_order": False} | header)
    file.write(bytes(size) if size >= 0 else b"\xff" * -size)
    with zipfile.ZipFile(path, "w", packed) as archive:
        for other, array in arrays().items():
            with archive.open(f"{other}.npy", "w") as member:
                member.write(file.getvalue()) if other == name else np.save(member, array)
    with takes_less_than(20e6), pytest.raises(InputError, match=f"^--data {path}: .*{message}"):
        load_npz(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_memory_does_not_hold(tmp_path, monkeypatch, save, order):
    path = saved(tmp_path, save, x_train=np.zeros((40, 12, 12), np.uint8, order))
    monkeypatch.setattr("spat_train.data.npz_files.free_memory", lambda: 5759)
    if save is np.savez and order == "C":
        load_npz(path)
    else:
        with pytest.raises(InputError, match="x_train takes 0.0 GB of memory, 0.0 GB are free.: write it with numpy.savez"):
            load_npz(path)


GROUPS = {
    "none": ("0::/\n", {}, 5120),
    "no limit": ("0::/a/b\n", {"a/b/memory.max": "max"}, 5120),
    "version 2, the one around": (
        "1:cpu:/\n0::/a/b\n",
        {"a/memory.max": "4000", "a/memory.current": "3000", "a/memory.stat": "anon 7\nactive_file 200\ninactive_file 30",
         "a/b/memory.max": "9000", "a/b/memory.current": "100", "a/b/memory.stat": ""},
        1230,
    ),
    "version 1, in a container": (
        "4:memory:/docker/1234\n0::/\n",
        {"memory/memory.limit_in_bytes": "4000", "memory/memory.usage_in_bytes": "3000",
         "memory/memory.stat": "active_file 9\ntotal_active_file 200\ntotal_inactive_file 30"},
        1230,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROUPS)
def test_memory_that_a_container_has(tmp_path, kind):
    groups, files, expected = GROUPS[kind]
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (files | {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5 kB\n", "proc/self/cgroup": groups}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == expected
    assert 1e6 < free_memory() < 1e15


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_of_members(tmp_path):
    path = saved(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y_test.npy", archive.read("y_test.npy"))
    with pytest.raises(InputError, match="it has y_test twice"):
        load_npz(path)
    path = saved(tmp_path, y_test=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y_test", b"no array")  # which NumPy would return as it is
    with pytest.raises(InputError, match="cannot be read"):
        load_npz(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("label", "dtype", "message"),
    [(10**7, int, "contains 10000000: save labels from 0 to 999999"), (999_999, int, "y_train has no 3, of 0 to 999999"),
     (2**62, int, "contains 4611686018427387904"), (-1, int, "contains -1"),
     (2**64 - 1, np.uint64, "contains 18446744073709551615"), (np.inf, float, "contains inf"), (1e300, float, "contains 1e.300"),
     (0.5, float, "save class indices as integers"), (2000, np.float16, "y_train has no 3, of 0 to 2000")],
)  # fmt: skip
def test_one_wild_label(tmp_path, label, dtype, message):
    labels = (np.arange(40) % 3).astype(dtype)
    labels[7] = label
    with takes_less_than(100e6), pytest.raises(InputError, match=message):
        load_npz(saved(tmp_path, y_train=labels, classes=None))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("classes", [("a", "b", "c"), None])
@pytest.mark.parametrize(
    ("shape", "labels"),
    [((12, 12), np.int64), ((12, 12, 1), np.uint8), ((10, 9, 3), np.int32), ((12, 12), ">i2"), ((12, 12), np.uint64),
     ((12, 12), np.float64)],
)  # fmt: skip
def test_npz(tmp_path, save, order, classes, shape, labels):
    source = arrays(shape)
    changes = {name: source[name].astype(labels) for name in ("y_train", "y_test")} | {"classes": classes}
    changes |= {"x_train": np.asarray(source["x_train"], order=order), "x_test": source["x_test"]}
    data = load(str(saved(tmp_path, save, **changes)))
    assert (data.name, data.classes, data.num_classes) == ("data", classes or ("0", "1", "2"), 3)
    assert data.image_shape == data.test.image_shape == (shape[2] if len(shape) == 3 else 1, *shape[:2])
    for split in ("train", "test"):
        images = getattr(data, split)
        assert images.pixels.is_contiguous()
        assert images.pixels.ndim == 4
        assert np.array_equal(images.pixels.numpy().reshape(source[f"x_{split}"].shape), source[f"x_{split}"])
        assert images.labels.dtype == torch.int64
        assert np.array_equal(images.labels, source[f"y_{split}"])


def test_names_that_terminals_obey(tmp_path):
    names = np.array(["caf\u00e9", "b\x1b[2J\n", "c\udce9"])
    assert load_npz(saved(tmp_path, classes=names)).classes == ("caf\u00e9", "b\\x1b[2J\\n", "c\\udce9")


def test_test_images_alone(tmp_path):
    path = saved(tmp_path, x_train=None, y_train=None)
    with pytest.raises(InputError, match="no array x_train, y_train"):
        load(str(path))
    assert load_npz(saved(tmp_path, y_train=np.ones(40, int))).num_classes == 3  # named classes may lack images
    path = saved(tmp_path, x_train=None, y_train=None)
    data = load(str(path), test_only=True)
    assert (len(data.train), len(data.test), data.image_shape, data.classes) == (0, 20, (1, 12, 12), ("a", "b", "c"))
    assert data.all_classes
    assert len(data.limited(5, 0).test) == 5
    data = load(str(saved(tmp_path, x_train=None, y_train=None, classes=None, y_test=np.ones(20, int))), test_only=True)
    assert data.num_classes == 2
    assert not data.all_classes


def test_mapped_images_take_no_memory_and_leave_the_file_alone(big_npz):
    before = big_npz.read_bytes()[-1000:]
    with takes_less_than(40e6):
        images = load_npz(big_npz).train
        assert (images.batch(torch.tensor([777])) == 7).all()
    for resident in (None, False):
        with takes_less_than(40e6):
            x, _ = next(Loader(images, Order(torch.arange(700, 800), 100, seed=0), resident=resident, workers=0).epoch(0))
            assert np.isclose(x.sum(), 3072 * 7 / 255)
    images.pixels[-1] = 9
    assert big_npz.read_bytes()[-1000:] == before


def truncated(path):
    os.truncate(path, 5000)


def overwritten(path):
    with open(path, "r+b") as file:
        file.write(b"PK")
    os.utime(path)


@pytest.mark.parametrize("change", [truncated, overwritten])
@pytest.mark.parametrize("read", [
    lambda data: data.train.batch(torch.arange(40)),
    lambda data: data.limited(5, seed=0),
    lambda data: list(Loader(data.train, Order(torch.arange(40), 8, seed=0), workers=0).epoch(0)),
    lambda data: list(Loader(data.train, Order(torch.arange(40), 8, seed=0), workers=2, resident=False).epoch(0)),
])  # fmt: skip
def test_a_mapped_file_that_changes_under_way(tmp_path, change, read):
    """Reading what was cut off would end the process without a word."""
    path = saved(tmp_path)
    data = load_npz(path)
    read(data)
    change(path)
    with pytest.raises(InputError, match=rf"^{path} was written to while it was in use .it had \d+ bytes, and has \d+.: put"):
        read(data)


def test_a_mapped_file_that_is_replaced_stays_as_it_was(tmp_path):
    path = saved(tmp_path)
    images = load_npz(path).train
    before = images.batch(torch.arange(40))
    saved(tmp_path / "..", x_train=np.zeros((40, 12, 12), np.uint8)).rename(path)
    assert torch.equal(images.batch(torch.arange(40)), before)
    path.unlink()
    assert torch.equal(images.batch(torch.arange(40)), before)
    assert torch.equal(copy.deepcopy(images).batch(torch.arange(40)), before)

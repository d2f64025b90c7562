"""The demo: what it refuses, that it runs end to end, and (slow) that its robust models are robust."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from spat_train import cli
from spat_train import demo as demo_module
from spat_train.data import InputError, digits, load_npz
from spat_train.figures import large_eps
from spat_train.models import SmallCNN

PNG = b"\x89PNG"


def arrays(shape=(12, 12), train=40, test=20, classes=("a", "b", "c")) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": rng.integers(0, len(classes), train),
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": rng.integers(0, len(classes), test),
        "classes": np.array(classes),
    }


def saved(tmp_path, **changes):
    """An .npz of small random images with some arrays changed, or left out where None."""
    path = tmp_path / "data.npz"
    np.savez(path, **{name: array for name, array in (arrays() | changes).items() if array is not None})
    return path


def refusal(monkeypatch, capsys, *arguments) -> str:
    """The error line of `spat-train demo ARGUMENTS`, which must end with code 2 before any training."""
    monkeypatch.setattr(demo_module, "train", lambda *args, **kwargs: pytest.fail("training began"))
    monkeypatch.setattr(sys, "argv", ["spat-train", "demo", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


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
    ],
)
def test_bad_arrays(tmp_path, monkeypatch, capsys, changes, message):
    path = saved(tmp_path, **changes)
    error = refusal(monkeypatch, capsys, "--data", path, "--out", tmp_path / "figure.png")
    assert error.startswith(f"spat-train: error: --data {path}: ")
    assert re.search(message, error)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_unreadable_file(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    error = refusal(monkeypatch, capsys, "--data", path, "--out", tmp_path / "figure.png")
    assert "cannot be read as .npz" in error


def test_damaged_file(tmp_path):
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        load_npz(path)


def test_single_array_file(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(InputError, match="single array"):
        load_npz(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.npz"], "--data nowhere.npz: there is no such file"),
        (["--limit", "0"], "--limit 0: give at least 1"),
        (["--epochs", "0"], "--epochs 0: give at least 1"),
        (["--eps", "0"], "--eps 0.0: give a number in (0, 1]"),
        (["--eps", "8"], "--eps 8.0: give a number in (0, 1]"),
        (["--eps", "nan"], "--eps nan: give a number in (0, 1]"),
        (["--alpha", "1.5"], "--alpha 1.5: give a number in [0, 1]"),
        (["--seed", "-1"], "--seed -1: give an integer"),
        (["--out", "figure.pdf"], "--out figure.pdf: give a name that ends in .png"),
        (["--out", "nowhere/figure.png"], "--out nowhere/figure.png: cannot be written (No such file"),
        (["--out", "folder.png"], "--out folder.png: cannot be written (Is a directory)"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert refusal(monkeypatch, capsys, *arguments).startswith(f"spat-train: error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]  # the check of --out leaves nothing behind


def test_digits_split_is_fixed_and_scaled():
    data = digits()
    assert data.x_train.shape == (1347, 1, 8, 8)
    assert data.x_test.shape == (450, 1, 8, 8)
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert data.x_train.dtype == torch.float32
    assert torch.equal(data.x_test, digits(seed=1).x_test)
    assert data.y_test.bincount().min() >= 43  # stratified


def test_limit_draws_matching_images_and_labels(tmp_path):
    source = arrays()
    data = load_npz(saved(tmp_path), limit=15, seed=3)
    assert (len(data.x_train), len(data.x_test)) == (15, 15)
    for image, label in zip(data.x_train, data.y_train, strict=True):
        (index,) = np.flatnonzero((source["x_train"] == (image[0] * 255).round().numpy()).all((1, 2)))
        assert source["y_train"][index] == label
    assert torch.equal(data.x_train, load_npz(saved(tmp_path), limit=15, seed=3).x_train)
    assert len(load_npz(saved(tmp_path), limit=1000).x_train) == 40


def test_colour_images_become_channels_first(tmp_path):
    source = arrays(shape=(10, 9, 3))
    data = load_npz(saved(tmp_path, **source))
    assert data.image_shape == (3, 10, 9)
    assert data.x_train[4, 2, 7, 5] == pytest.approx(source["x_train"][4, 7, 5, 2] / 255)
    assert data.classes == ("a", "b", "c")


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 13)])
def test_model_adapts_to_the_image_shape(shape):
    assert SmallCNN(shape, 7)(torch.rand(2, *shape)).shape == (2, 7)


def test_large_eps():
    assert large_eps(8 / 255, 3) == pytest.approx(32 / 255)
    assert large_eps(0.2, 1) == pytest.approx(0.4)
    assert large_eps(0.3, 1) < 0.5


def test_end_to_end_on_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["spat-train", "demo", "--epochs", "1", "--limit", "200"])
    cli.main()
    out = capsys.readouterr().out
    rows = accuracies(out)
    assert list(rows) == ["standard", "Madry", "Madry+SPAT"]
    assert all(len(row) == 4 for row in rows.values())
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    cli.main()
    assert accuracies(capsys.readouterr().out) == rows  # everything random comes from --seed


@pytest.mark.parametrize("shape", [(12, 12), (12, 12, 3)])
def test_end_to_end_on_a_file(tmp_path, shape):
    out = tmp_path / "attacks.png"
    source = arrays(shape, classes=("a $dear$ cat", "dog"))
    rows = demo_module.demo(data=saved(tmp_path, **source), limit=9, epochs=1, out=out)
    assert all(0 <= value <= 100 for row in rows.values() for value in row.values())
    assert out.read_bytes().startswith(PNG)


def test_one_image(tmp_path):
    demo_module.demo(data=saved(tmp_path, **arrays((8, 8))), limit=1, epochs=1, out=tmp_path / "figure.png")


@pytest.mark.slow
def test_default_demo_shows_robustness_within_90_seconds(tmp_path):
    start = time.perf_counter()
    command = [sys.executable, "-m", "spat_train.cli", "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert seconds < 90
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    rows = accuracies(done.stdout)
    clean, _, standard_pgd, _ = rows["standard"]
    assert clean > 90
    for name in ("Madry", "Madry+SPAT"):
        assert rows[name][0] > 90
        assert rows[name][2] > standard_pgd + 30


def accuracies(out: str) -> dict[str, list[float]]:
    """Rows of the printed table: clean, FGSM, PGD-20, C&W-inf-30."""
    lines = re.findall(r"^(standard|Madry|Madry\+SPAT) +((?:[\d.]+ *){4})$", out, re.MULTILINE)
    return {name: [float(value) for value in values.split()] for name, values in lines}


def test_class_names_are_optional(tmp_path):
    contents = arrays()
    names = contents.pop("classes")
    np.savez(tmp_path / "bare.npz", **contents)
    data = load_npz(tmp_path / "bare.npz")
    assert data.classes == tuple(map(str, range(max(contents["y_train"].max(), contents["y_test"].max()) + 1)))
    assert len(data.classes) == len(names)

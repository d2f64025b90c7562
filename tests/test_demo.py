"""The demo: what it refuses, that it runs end to end, and (slow) that its robust models are robust."""

import re
import sys

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from spat_train import cli
from spat_train import demo as demo_module
from spat_train.papers.pictures import large_eps
from spat_train.runtime import logs
from tests.data.helpers import arrays, saved

PNG = b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.npz"], "--data nowhere.npz: there is no such file"),
        (["--data", "text.npz"], "--data text.npz: cannot be read as .npz"),
        (["--limit", "0"], "--limit 0: give at least 2"),
        (["--epochs", "0"], "--epochs 0: give at least 1"),
        (["--eps", "0"], "--eps 0: it is in 1/255"),
        (["--eps", "0.3"], "--eps 0.3: it is in 1/255, from 0.5 to 255 (8 means 8/255, and 76.5 is 0.3)"),
        (["--eps", "nan"], "--eps nan: it is in 1/255"),
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
    (tmp_path / "text.npz").write_bytes(b"PK\x03\x04 cut short")
    monkeypatch.setattr(demo_module, "train", lambda *args, **kwargs: pytest.fail("training began"))
    monkeypatch.setattr(sys, "argv", ["spat-train", "demo", *arguments])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"spat-train: error: {message}")
    assert {path.name for path in tmp_path.iterdir()} == {"folder.png", "text.npz"}  # the check of --out leaves nothing behind


def test_large_eps():
    assert large_eps(8 / 255, 3) == pytest.approx(32 / 255)
    assert large_eps(0.2, 1) == pytest.approx(0.4)
    assert large_eps(0.3, 1) < 0.5


def test_end_to_end_on_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["spat-train", "demo", "--epochs", "1", "--limit", "200"])
    bars, bar = set(), logs.bar
    monkeypatch.setattr(logs, "bar", lambda total, name, **options: bars.add(name) or bar(total, name, **options))
    cli.main()
    _, *table, _ = first = capsys.readouterr().out.splitlines()
    assert bars - {None} == {"standard", "madry", "madry+spat0.2"}
    rows = [re.fullmatch(r"(\S+) +((?:[\d.]+ *){4})", line) for line in table]
    assert [row[1] for row in rows if row] == ["standard", "Madry", "Madry+SPAT"]
    madry, spat = ([float(cell) for cell in row[2].split()] for row in rows[-3:-1])
    changes = r"Madry\+SPAT against Madry: clean (\S+) points, PGD-20 (\S+); cosine of gradients and images 0\.\d\d, was 0\.\d\d"
    said = [float(change) for change in re.fullmatch(changes, table[-1]).groups()]
    assert said == pytest.approx([spat[0] - madry[0], spat[2] - madry[2]], abs=0.11)
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    cli.main()
    assert capsys.readouterr().out.splitlines()[:-1] == first[:-1]  # everything random comes from --seed


@pytest.mark.parametrize(("shape", "limit"), [((28, 28), 9), ((9, 13, 3), 9), ((8, 8), 2)])
def test_end_to_end_on_a_file(tmp_path, shape, limit):
    out = tmp_path / "attacks.png"
    source = arrays(shape, classes=("a $dear$ cat", "dog"))
    rows = demo_module.demo(data=saved(tmp_path, **source), limit=limit, epochs=1, out=out)
    assert all(0 <= value <= 100 for row in rows.values() for value in row.values())
    assert out.read_bytes().startswith(PNG)


@pytest.mark.slow
def test_default_demo_shows_robustness(tmp_path, capsys):
    rows = demo_module.demo(out=tmp_path / "figure.png")
    assert min(row["clean"] for row in rows.values()) > 90
    assert min(rows[name]["PGD-20"] for name in ("Madry", "Madry+SPAT")) > rows["standard"]["PGD-20"] + 30
    assert rows["Madry+SPAT"]["PGD-20"] < rows["Madry"]["PGD-20"]  # or what the demo says is wrong
    assert "SPAT does not pay on these digits" in capsys.readouterr().out

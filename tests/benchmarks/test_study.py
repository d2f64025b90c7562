"""Studies of trainings: what their rows say, and that a study is stopped, continued, shared and never repeated."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from scipy.stats import binomtest

from benchmarks import figure61, study, table61
from benchmarks.study import Comparison, compare
from spat_train import Config
from spat_train.papers.reported import TABLES
from spat_train.runtime.run_folder import RunFolder


def row(accuracies: dict, *, seed: int = 0, images: int = 200, **options) -> dict:
    """As a study keeps it; `accuracies` has bool [N] by column."""
    evaluation = {
        name: {
            "accuracy": 100 * float(found.mean()), "images": images, "precision": "fp32",
            "right": np.packbits(found).tobytes().hex(),
        } for name, found in accuracies.items()
    }  # fmt: skip
    config = Config(model="wrn-10-2", epochs=4, seed=seed, **options).to_dict()
    return {
        "config": config, "evaluation": evaluation, "trained": 4.0, "images_per_second": 70.0, "differs": [],
        "validations": [{"pgd": 100 * options.get("alpha", 0)}],
    }  # fmt: skip


def flags(right: int, images: int = 200) -> np.ndarray:
    return np.arange(images) < right


@pytest.mark.parametrize(("images", "right"), [(1, 1), (7, 3), (200, 101)])
def test_right_is_what_was_packed(images, right):
    found = study.right(row({"natural": flags(right, images)}, images=images), "natural")
    assert found.tolist() == flags(right, images).tolist()


def test_compare_counts_images_over_seeds():
    ours = [row({"PGD-20": flags(60)}, seed=0), row({"PGD-20": flags(70)}, seed=1), row({"PGD-20": flags(200)}, seed=9)]
    base = [row({"PGD-20": flags(50)}, seed=0), row({"PGD-20": ~flags(140)}, seed=1)]
    found = compare(ours, base, "PGD-20")
    assert found.differences == pytest.approx((5.0, 5.0))
    assert (found.won, found.lost) == (70, 60)  # 50 to 59 and 0 to 69; 140 to 199
    assert found.p == pytest.approx(binomtest(70, 130).pvalue)
    assert str(found) == "+5.00 ± 0.00"
    with pytest.raises(KeyError):
        compare(ours, base, "FGSM")
    with pytest.raises(KeyError):
        compare(ours[2:], base, "PGD-20")


@pytest.mark.parametrize(
    ("differences", "won", "lost", "verdict"),
    [((1.0, 2.0), 60, 20, 1), ((-1.0, -2.0), 20, 60, -1), ((1.0, 2.0), 22, 18, 0), ((1.0, -0.1), 60, 20, 0), ((0.0,), 0, 0, 0)],
)
def test_verdict_needs_images_and_every_seed(differences, won, lost, verdict):
    assert Comparison(differences, won, lost).verdict == verdict


def test_mean():
    assert study.mean([]) == ""
    assert study.mean([1.0]) == "1.00"
    assert study.mean([1.0, 2.0, 3.0]) == "2.00 ± 1.00"


def test_table61_says_which_orderings_hold():
    """TRADES is above Madry in natural accuracy in the thesis, and below TRADES+SPAT under PGD-20."""
    rows = [
        row({"natural": flags(100), "PGD-20": flags(60)}, method="trades", seed=seed) for seed in (0, 1)
    ] + [
        row({"natural": flags(102), "PGD-20": flags(90)}, method="trades", alpha=0.1, seed=seed) for seed in (0, 1)
    ] + [row({"natural": flags(130), "PGD-20": flags(60)}, seed=seed) for seed in (0, 1)]  # fmt: skip
    machine = {"device": "A CPU", "cuda": None, "cpu": {"flags": []}, "threads": 1, "torch": "2", "date": "2026-01-01T"}
    text = table61.table({"machine": machine, "rows": rows})
    assert "| TRADES | wrn-10-2, fp32 | 2 | 4 | 50.00 ± 0.00 |  | 30.00 ± 0.00 |  | 70 |" in text
    thesis = {(cell.target, cell.column): cell.accuracy for cell in TABLES["6.1"].cells}
    gap = 30 - thesis["trades", "PGD-20"]
    assert f"| difference |  |  | −{85.97 - 50:.2f} |  | −{-gap:.2f} |  |" in text
    assert "| TRADES+SPAT(.1) − TRADES | PGD-20 | higher | +15.00 ± 0.00 | 30 | 0 | 1.9e-09 | +0.90 |" in text
    assert "| TRADES+SPAT(.1) − TRADES | natural | undecided | +1.00 ± 0.00 | 2 | 0 | 0.5 | −1.37 |" in text
    assert "Of the thesis's 6 orderings" in text
    assert "2 hold (PGD-20 TRADES+SPAT(.1) > Madry; PGD-20 TRADES+SPAT(.1) > TRADES)" in text
    assert "2 are reversed (natural TRADES > Madry; natural TRADES+SPAT(.1) > Madry), 2 are undecided" in text


def test_figure61_chooses_by_held_out_images():
    """Held-out accuracy is best at alpha = 0.4 here, test accuracy at 0.2: the first decides, the second is what is said."""
    rows = [
        row({"natural": flags(100), "PGD-20": flags(right)}, alpha=a, eps=8.0) for a, right in ((0.0, 60), (0.2, 90), (0.4, 80))
    ]
    machine = {"device": "A CPU", "cuda": None, "cpu": {"flags": []}, "threads": 1, "torch": "2", "date": "2026-01-01T"}
    text = figure61.table({"machine": machine, "rows": rows, "judge": None})
    assert "Best α on held-out images (bold): 0.4 at 8/255, better than 0." in text
    assert "| 8/255 | **0.4** | 1 | 50.00 | 40.00 | +10.00 | 1.9e-06 | 40.00 |" in text
    assert "| 8/255 | 0.2 |" in text


def arguments(npz, tmp_path, **options):
    small = {"model": "small-cnn", "epochs": 1, "precision": "fp32"}
    return table61.Arguments(data=npz, out=tmp_path / "table61.json", runs=tmp_path / "runs", **small | options)


@pytest.mark.slow
def test_table61(tmp_path, tiny_npz, monkeypatch):
    """A row is trained and tested, another is stopped; a later command adds to the file, and repeats nothing."""

    def run(*rows: str, **options) -> list[dict]:
        args = arguments(tiny_npz, tmp_path, rows=list(rows), **options)
        table61.main(args)
        return json.loads(args.out.read_text())["rows"]

    (found,) = run("mart+spat", autoattack=4)
    assert "epochs 1 (90)" in found["differs"]
    assert len(found["validations"]) == 1
    columns = dict.fromkeys(table61.COLUMNS, 20) | {"AutoAttack": 4}
    assert {name: e["images"] for name, e in found["evaluation"].items()} == columns
    for e in found["evaluation"].values():
        assert 100 * study.right({"evaluation": {"it": e}}, "it").mean() == pytest.approx(e["accuracy"])
    assert found["evaluation"]["PGD-20"]["accuracy"] <= found["evaluation"]["natural"]["accuracy"]
    folder = tmp_path / "runs" / "small-cnn-mart+spat-eps8-alpha0.3-fp32-seed0"
    folder.rename(tmp_path / "runs" / "of others")
    assert run("mart+spat", autoattack=4) == [found]
    assert len(list((tmp_path / "runs").iterdir())) == 1
    shutil.rmtree(tmp_path / "runs")
    saved = tmp_path / "runs" / "small-cnn-trades-eps8-alpha0-fp32-seed0" / "last.pt"
    train = study.train
    stop = lambda run: saved.exists() and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(study, "train", lambda config: train(config, on_step=stop))
    with pytest.raises(SystemExit, match="143"):
        run("trades", epochs=1000)
    rows = json.loads((tmp_path / "table61.json").read_text())["rows"]
    assert [r["config"]["method"] for r in rows] == ["mart", "trades"]
    assert rows[0] == found
    assert not rows[1]["evaluation"]
    assert rows[1]["trained"] < 1000
    text = table61.table(json.loads((tmp_path / "table61.json").read_text()))
    assert "| MART+SPAT(.3) | small-cnn, fp32 | 1 | 1 |" in text
    assert " of 1000 |" in text
    monkeypatch.setattr(study, "train", lambda config: 1 / 0)
    with pytest.raises(SystemExit, match="not done yet: .*small-cnn-madry-eps8-alpha0-fp32-seed0, .*mart.*; what failed"):
        run("madry", "mart")
    for wrong, options in (("--rows spat: choose from madry", {}), ("--epochs 0", {"epochs": 0}), ("--seed -1", {"seeds": [-1]})):
        with pytest.raises(SystemExit, match=wrong):
            run("spat" if not options else "madry", **options)


@pytest.mark.slow
def test_a_run_that_another_process_has_is_left_to_it(tmp_path, tiny_npz, capsys):
    args = arguments(tiny_npz, tmp_path, rows=["madry", "mart"])
    held = RunFolder(tmp_path / "runs" / "small-cnn-madry-eps8-alpha0-fp32-seed0")
    held.claim()
    try:
        with pytest.raises(SystemExit, match=r"not done yet: .*madry-eps8-alpha0-fp32-seed0; what"):
            table61.main(args)
    finally:
        held.release()
    assert "another process is at work there" in capsys.readouterr().out
    assert [r["config"]["method"] for r in json.loads(args.out.read_text())["rows"]] == ["mart"]


@pytest.mark.slow
def test_figure61(tmp_path, tiny_npz, capsys):
    out, runs = tmp_path / "figure61.json", tmp_path / "runs"
    common = ["--data", str(tiny_npz), "--model", "small-cnn", "--epochs", "1"]
    study.train(Config(data=str(tiny_npz), model="small-cnn", epochs=1, out=tmp_path / "judge", seed=5, test=False))
    command = ["--out", str(out), "--runs", str(runs), "--eps", "8", "--alphas", "0", "0.2", "--judge", str(tmp_path / "judge")]
    figure61.main([*command, "--", *common])
    rows = json.loads(out.read_text())["rows"]
    assert [(r["config"]["eps"], r["config"]["alpha"]) for r in rows] == [(8.0, 0.0), (8.0, 0.2)]
    for found in rows:
        assert set(found["traits"]) == {"images", "alignment", "own", "kept"}
        assert 0 <= found["traits"]["alignment"] <= 1
        assert 0 <= found["traits"]["kept"] <= 100
        assert 0 <= found["traits"]["own"] <= 100
    assert "Best α on held-out images" in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = out.read_text()
    shutil.rmtree(runs)
    figure61.main([*command, "--", *common])
    assert json.loads(out.read_text())["rows"] == json.loads(before)["rows"]
    for wrong, options in (("--eps 0.1", ["--eps", "0.1"]), ("--alpha 2", ["--alphas", "2.0"])):
        with pytest.raises(SystemExit, match=wrong):
            figure61.main([*command, *options, "--", *common])

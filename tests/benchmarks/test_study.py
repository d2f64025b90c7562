"""Studies of trainings: what their rows say, and that a study is stopped, continued, shared and never repeated."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from benchmarks import figure61, study, table61
from benchmarks.study import Comparison, compare
from spat_train import Config
from spat_train.data.datasets import load
from spat_train.data.images import Dataset, Images
from spat_train.errors import InUseError
from spat_train.papers.reported import TABLES
from spat_train.runtime.run_folder import RunFolder


def row(accuracies: dict, *, seed: int = 0, **options) -> dict:
    """As a study keeps it; `accuracies` has bool [N] by column."""
    evaluation = {
        name: {
            "accuracy": 100 * float(found.mean()), "images": len(found), "precision": "bf16", "attack": table61.COLUMNS[name],
            "right": np.packbits(found).tobytes().hex(),
        } for name, found in accuracies.items()
    }  # fmt: skip
    config = Config(model="wrn-10-2", epochs=4, seed=seed, **options)
    return {
        "name": study.folder_name(config), "config": config.to_dict(), "evaluation": evaluation, "trained": 4.0,
        "images_per_second": 70.0, "differs": [], "validations": [{"pgd": 100 * config.alpha}],
    }  # fmt: skip


MACHINE = {"device": "A CPU", "cuda": None, "cpu": {"flags": []}, "threads": 1, "torch": "2", "date": "2026-01-01T"}


def flags(right: int, images: int = 200) -> np.ndarray:
    return np.arange(images) < right


@pytest.mark.parametrize(("images", "right"), [(1, 1), (7, 3), (200, 101)])
def test_images_are_what_was_packed(images, right):
    found = study.right_images(row({"natural": flags(right, images)}), "natural")
    assert found.tolist() == flags(right, images).tolist()


def test_compare_counts_images_over_seeds():
    ours = [row({"PGD-20": flags(60)}, seed=0), row({"PGD-20": flags(70)}, seed=1), row({"PGD-20": flags(200)}, seed=9)]
    base = [row({"PGD-20": flags(50)}, seed=0), row({"PGD-20": ~flags(140)}, seed=1)]
    found = compare(ours, base, "PGD-20")
    assert found.differences == pytest.approx((5.0, 5.0))
    assert (found.won, found.lost) == (70, 60)  # 50 to 59 and 0 to 69; 140 to 199
    assert found.p == pytest.approx(binomtest(70, 130).pvalue)
    assert str(found) == "+5.00 ± 0.00"
    assert compare(ours, base, "FGSM") is None
    assert compare(ours[2:], base, "PGD-20") is None


def test_compare_takes_the_images_that_both_have():
    found = compare([row({"PGD-20": flags(60, 100)})], [row({"PGD-20": flags(50, 200)})], "PGD-20")
    assert (found.differences, found.won, found.lost) == ((10.0,), 10, 0)


@pytest.mark.parametrize(
    ("differences", "won", "lost", "verdict"),
    [
        ((1.0, 2.0), 60, 20, 1), ((-1.0, -2.0), 20, 60, -1), ((1.0, 2.0), 22, 18, 0), ((1.0, -0.1), 60, 20, 0), ((0.0,), 0, 0, 0),
        ((2.5, 2.5, 2.5), 30, 75, 0),  # few images won from every seed, many lost from one
    ],
)  # fmt: skip
def test_verdict_needs_images_and_every_seed(differences, won, lost, verdict):
    assert Comparison(differences, won, lost).verdict == verdict


def test_mean():
    assert study.mean([]) == ""
    assert study.mean([1.0]) == "1.00"
    assert study.mean([1.0, 2.0, 3.0]) == "2.00 ± 1.00"


def test_a_folder_is_of_one_training():
    """Whatever changes the weights has another folder; what does not, the same."""
    config = Config(data="here/cifar10.npz", model="wrn-10-2")
    same = replace(config, data="there/cifar10.npz", out=Path("else"), resume=True, workers=7, test=False)
    assert study.folder_name(same) == study.folder_name(config)
    others = [
        {"epochs": 7}, {"limit": 9}, {"lr": 0.2}, {"seed": 1}, {"data": "cifar100.npz"}, {"extra": Path("more.npz")},
        {"precision": "bf16"},
    ]  # fmt: skip
    names = {study.folder_name(replace(config, **other)) for other in others}
    assert len(names - {study.folder_name(config)}) == len(others)


def test_done_is_what_was_tested_in_this_way(tmp_path, tiny_npz):
    config = Config(data=str(tiny_npz), model="small-cnn", epochs=1)

    def made(traits: dict | None = None, **options) -> study.Study:
        args = study.Arguments(out=tmp_path / "out.json", **options)
        attacks = [study.Attacks({"natural": "clean", "PGD-20": "pgd-20"}, args.test_count(data))]
        return study.Study("table61", args, [config], data, attacks, traits and (lambda *_: {}), traits or {})

    data = load(str(tiny_npz))
    columns = made().expected()
    full = {"name": study.folder_name(config), "evaluation": columns | {"AutoAttack": {}}, "traits": {"judge": "a", "own": 1.0}}
    assert made().is_done(config, {"rows": [full]})
    assert made({"judge": "a"}).is_done(config, {"rows": [full]})
    for other in (
        made(test_images=19),
        made(test_precision="bf16"),
        made(batch_size=2),
        made({"judge": "b"}),
        made({"judge": "a", "images": 1}),
    ):
        assert not other.is_done(config, {"rows": [full]})
    assert not made().is_done(replace(config, epochs=2), {"rows": [full]})
    assert not made().is_done(config, {"rows": [full | {"evaluation": {}}]})
    data = replace(data, test=replace(data.test, labels=1 - data.test.labels))
    assert not made().is_done(config, {"rows": [full]})


def save_often(out: Path, name: str) -> None:
    """Fifty times, in a process of its own."""
    config = Config(model=name, out=out.parent / name)
    config.out.mkdir()
    (config.out / "log.jsonl").touch()
    for _ in range(50):
        study.Study("table61", study.Arguments(out=out), [config], Dataset, []).save({"machine": MACHINE})


def test_processes_share_a_file(tmp_path):
    out = tmp_path / "out.json"
    processes = [multiprocessing.get_context("fork").Process(target=save_often, args=(out, name)) for name in ("a", "b", "c")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [r["name"] for r in json.loads(out.read_text())["rows"]] == ["a", "b", "c"]


def test_table61_says_which_orderings_hold():
    """TRADES is above Madry in natural accuracy in the thesis, and below TRADES+SPAT under PGD-20."""
    rows = [
        row({"natural": flags(100), "PGD-20": flags(60)}, method="trades", seed=seed) for seed in (0, 1)
    ] + [
        row({"natural": flags(102), "PGD-20": flags(90)}, method="trades", alpha=0.1, seed=seed) for seed in (0, 1)
    ] + [row({"natural": flags(130), "PGD-20": flags(60)}, seed=seed) for seed in (0, 1)]  # fmt: skip
    text = table61.table({"machine": MACHINE, "rows": rows})
    assert "| TRADES | wrn-10-2, fp32 | 2 | 4 | 50.00 ± 0.00 |  | 30.00 ± 0.00 |  | 70 |" in text
    assert "Test images: natural 200 in fp32, PGD-20 200 in bf16;" in text
    thesis = {(cell.target, cell.column): cell.accuracy for cell in TABLES["6.1"].cells}
    gap = 30 - thesis["trades", "PGD-20"]
    assert f"| difference |  |  | −{85.97 - 50:.2f} |  | −{-gap:.2f} |  |" in text
    assert "| TRADES+SPAT(.1) − TRADES | PGD-20 | higher | 2 | +15.00 ± 0.00 | 30 | 0 | 1.9e-09 | +0.90 |" in text
    assert "| TRADES+SPAT(.1) − TRADES | natural | undecided | 2 | +1.00 ± 0.00 | 2 | 0 | 0.5 | −1.37 |" in text
    control = row({"PGD-20": flags(90)}, method="trades", inner="ce")
    with_control = table61.table({"machine": MACHINE, "rows": [*rows, control]})
    assert "| TRADES on CE examples | wrn-10-2, fp32 | 1 | 4 |  |  | 45.00 |  | 70 |" in with_control
    assert "| TRADES+SPAT(.1) − TRADES on CE examples | PGD-20 | undecided | 1 | +0.00 | 0 | 0 | 1 |  |" in with_control
    assert with_control.endswith(text[text.index("| ordering as in the thesis") :])
    assert "fp32 | " not in text.partition("compared")[2]
    rows.append(row({"natural": flags(131)}, precision="bf16"))
    line = "| Madry: bf16 − fp32 | natural | undecided | 1 | +0.50 | 1 | 0 | 1 |  |"
    assert line in table61.table({"machine": MACHINE, "rows": rows})
    assert "| TRADES and TRADES+SPAT(.1) | undecided |  | holds |  |" in text
    assert "| Madry and TRADES+SPAT(.1) | reversed |  | holds |  |" in text
    assert "| Madry and TRADES | reversed |  | undecided |  |" in text
    assert text.endswith("of 6, 2 hold, 2 are reversed, 2 are undecided.")
    apart = [row({"natural": flags(100 + 6 * seed), "PGD-20": flags(60 - 8 * seed)}, seed=seed) for seed in (0, 1)]
    alone = [row({"natural": flags(130), "PGD-20": flags(20)}, method="trades", alpha=a) for a in (0.0, 0.1)]
    words = "Two seeds of one row are apart by 3.00 (natural), 4.00 (PGD-20) (root mean square, in points)."
    assert words in table61.table({"machine": MACHINE, "rows": [*apart, *alone]})
    assert "With one seed of each, how far such networks" in table61.table({"machine": MACHINE, "rows": alone})


def test_figure61_chooses_by_held_out_images():
    """Held-out accuracy is best at alpha = 0.4 here, test accuracy at 0.2: the first decides, the second is what is said."""
    rows = [
        row({"natural": flags(100), "PGD-20": flags(right)}, alpha=a, eps=8.0) for a, right in ((0.0, 60), (0.2, 90), (0.4, 80))
    ]
    text = figure61.table({"machine": MACHINE, "rows": rows, "judge": None})
    assert "Best α on held-out images (bold): 0.4 at 8/255, better than 0." in text
    assert "| 8/255 | **0.4** | 1 | 50.00 | 40.00 | +10.00 | 1.9e-06 | 40.00 |" in text
    assert "| 8/255 | 0.2 |" in text
    unfinished = row({}, alpha=0.6, eps=8.0)
    unfinished["validations"] = [{"pgd": 99.0}]
    assert figure61.table({"machine": MACHINE, "rows": [*rows, unfinished], "judge": None}) == text
    rows[2]["validations"] = [{"pgd": 1.0}, {"pgd": 20.0}, {"pgd": 3.0}]  # the best counts, and of equals the least alpha
    assert "(bold): 0.2 at 8/255" in figure61.table({"machine": MACHINE, "rows": rows, "judge": None})
    other_seed = row({"natural": flags(100), "PGD-20": flags(60)}, alpha=0.4, eps=8.0, seed=1)  # which the others lack
    other_seed["validations"] = [{"pgd": 99.0}]
    assert "(bold): 0.2 at 8/255" in figure61.table({"machine": MACHINE, "rows": [*rows, other_seed], "judge": None})
    for found in rows:
        found["validations"] = []
    assert "Best α" not in figure61.table({"machine": MACHINE, "rows": rows, "judge": None})


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
        assert 100 * study.right_images({"evaluation": {"it": e}}, "it").mean() == pytest.approx(e["accuracy"])
    assert found["evaluation"]["PGD-20"]["accuracy"] <= found["evaluation"]["natural"]["accuracy"]
    shutil.rmtree(tmp_path / "runs")
    assert run("mart+spat") == [found]
    assert not (tmp_path / "runs").exists()
    train = study.train
    stop = lambda run: list(tmp_path.glob("runs/*trades*/last.pt")) and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
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
    with pytest.raises(SystemExit, match="failed, for the reasons above: .*small-cnn-madry-.*, .*small-cnn-mart-"):
        run("madry", "mart")
    for wrong, options in (("--rows spat: choose from madry", {}), ("--epochs 0", {"epochs": 0}), ("--seed -1", {"seeds": [-1]})):
        with pytest.raises(SystemExit, match=wrong):
            run("spat" if not options else "madry", **options)


@pytest.mark.parametrize("other", [{"limit": 9}, {"test_images": 5}, {"test_precision": "bf16"}, {"batch_size": 3}])
def test_a_file_is_of_one_study(tmp_path, tiny_npz, monkeypatch, other):
    """Rows that differ in more than what `table` names are no seeds of each other."""

    def begin(config: Config) -> None:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "log.jsonl").touch()
        raise study.TrainingError("it fails")

    monkeypatch.setattr(study, "train", begin)
    for options, message in (({}, "failed, for the reasons above"), (other, "it holds other results")):
        with pytest.raises(SystemExit, match=message):
            table61.main(arguments(tiny_npz, tmp_path, rows=["madry"], **options))


@pytest.mark.slow
def test_a_run_that_another_process_has_is_waited_for(tmp_path, tiny_npz, monkeypatch, capsys):
    args, seen = arguments(tiny_npz, tmp_path, rows=["madry", "mart"]), []
    held = RunFolder(table61.settings(args, "madry", 0).out)
    held.claim()

    def rows() -> list[str]:
        return [r["config"]["method"] for r in json.loads(args.out.read_text())["rows"] if r["evaluation"]]

    def sleep(seconds: float) -> None:
        seen.append(rows())
        if len(seen) == 2:
            held.release()

    monkeypatch.setattr(study.time, "sleep", sleep)
    table61.main(args)
    assert seen == [["mart"], ["mart"]]
    assert capsys.readouterr().out.count("another process is at work there") == 1
    assert rows() == ["madry", "mart"]
    held.claim()
    with pytest.raises(InUseError):
        table61.prepared(args).test(table61.settings(args, "madry", 0), None)


@pytest.mark.slow
def test_tests_of_another_commit_are_made_again(tmp_path, tiny_npz, monkeypatch):
    """What they mean may have changed. The training is not repeated."""
    args = arguments(tiny_npz, tmp_path, rows=["madry"])

    def tested(commit: str) -> dict:
        monkeypatch.setenv("SPAT_COMMIT", commit)
        monkeypatch.setattr(args, "out", tmp_path / f"{commit}.json")
        table61.main(args)
        assert len(list((tmp_path / "runs").iterdir())) == 1
        return json.loads((*(tmp_path / "runs").glob("*/tested.json"),)[0].read_text())

    first = tested("a")
    monkeypatch.setattr(study, "train", lambda config: None)
    assert tested("b") == first | {"commit": "b"}
    with pytest.raises(SystemExit, match="it holds other results .commit: b, now c"):
        monkeypatch.setattr(study, "train", lambda config: pytest.fail("trained"))
        monkeypatch.setenv("SPAT_COMMIT", "c")
        table61.main(args)


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
        percents = {name: found["traits"][name] for name in ("own", "plain", "kept")}
        assert all(0 <= value <= 100 for value in percents.values())
        assert 0 <= found["traits"]["alignment"] <= 1
    assert rows[0]["traits"]["own"] == rows[0]["traits"]["plain"]  # alpha = 0
    assert "Best α on held-out images" in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = out.read_text()
    shutil.rmtree(runs)
    figure61.main([*command, "--", *common])
    assert json.loads(out.read_text())["rows"] == json.loads(before)["rows"]


def test_what_an_attack_leaves_is_what_the_judge_still_sees():
    """`kept` is the judge's accuracy after the attack, on images that it got right before; the attacked model has no say."""
    x = torch.linspace(0, 1, 8).view(8, 1, 1, 1)
    pixels = torch.round(255 * x.expand(8, 8, 8, 1)).to(torch.uint8).contiguous()
    images = Images(pixels, torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]))
    data = Dataset("bars", images, images, ("dark", "light"))

    class Threshold(torch.nn.Module):
        def __init__(self, at: float):
            super().__init__()
            self.at = torch.nn.Parameter(torch.tensor(at))

        def forward(self, x):
            light = (x.mean((1, 2, 3)) - self.at)[:, None]
            return torch.cat([-light, light], 1)

    found = figure61.traits(Threshold(0.5), Config(method="madry", eps=255 * 0.2), Threshold(0.25), data, 8)
    # Dark images go up by 0.2 and light ones down: 0 1/7 2/7 | 3/7 4/7 5/7 6/7 1 to 0.2 0.34 0.49 | 0.23 0.37 0.51 0.66 0.8.
    # The model gets six of these right. The judge, who was wrong about 2/7 before, loses 1/7 and 3/7 of the others.
    assert found == {"alignment": found["alignment"], "own": 75.0, "plain": 75.0, "kept": pytest.approx(500 / 7)}


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        (["--eps", "0.1"], [], "--eps 0.1"),
        (["--alphas", "2.0"], [], "--alpha 2"),
        (["--seeds"], [], "--seeds: give at least one"),
        (["--test-precision", "tf32"], [], "--test-precision tf32: TF32 is for GPUs"),
        ([], ["--method", "trades"], "--method trades: this study sets it"),
        ([], ["--seed", "3"], "--seed 3: this study sets it"),
        ([], ["--preset", "madry-mnist/natural"], "this study trains by --method madry"),
        ([], ["--preset", "nothing"], "--preset nothing: there is none"),
        ([], ["--patience", "3"], "no --patience"),
    ],
)
def test_figure61_refuses(tmp_path, tiny_npz, monkeypatch, options, training, message):
    monkeypatch.setattr(study, "train", lambda config: pytest.fail("training began"))
    command = ["--out", str(tmp_path / "out.json"), "--eps", "8", *options, "--", "--data", str(tiny_npz), *training]
    with pytest.raises(SystemExit, match=message):
        figure61.main(command)

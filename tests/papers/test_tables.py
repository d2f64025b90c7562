"""Tables: the sources' numbers, which run is which row, ours beside theirs, what is marked, what is trained."""

import json
import re
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from spat_train import cli
from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.errors import InputError
from spat_train.evaluation.evaluate import evaluate
from spat_train.models.checkpoints import load_model
from spat_train.papers import runs, tables
from spat_train.papers.measure import open_images
from spat_train.papers.reported import TABLES
from spat_train.papers.runs import (
    Options,
    Run,
    Scale,
    Wanted,
    closest,
    copy_of,
    differences,
    family,
    find_runs,
    fits,
    scaled,
    title,
    width,
)
from spat_train.presets import PRESETS
from spat_train.training.check import check
from tests.papers.finished_runs import EPS

# As the papers print them; not read from the code.
PRINTED = {
    "6.1": """Madry 84.39 59.93 56.37 54.14 / TRADES 85.97 62.29 57.32 54.38 / MART 83.7 61.93 58.46 53.28
        / TRADES+SPAT(.1) 84.6 61.46 58.22 54.97 / MART+SPAT(.3) 81.93 61.87 59.59 51.57""",
    "6.2": """Madry 61.77 34.42 31.51 30.1 / TRADES 57.13 32.9 31.02 28.07 / MART 58.56 36.46 34.12 30.16
        / TRADES+SPAT(.1) 55.54 33.35 31.20 28.14 / MART+SPAT(.2) 60.28 36.91 34.66 30.93""",
    "6.3": "RST 89.65 63.00 / MART 89.81 63.06 / RST+SPAT(.1) 89.52 63.47 / MART+SPAT(.1) 89.44 63.37",
    "figure-6.1": "Madry+SPAT(1) 32.44 0",
    "6.4": "TRADES 70.15 42.16 / MART 67.89 44.24 / TRADES+SPAT(.1) 69.24 43.33 / MART+SPAT(.2) 67.85 45.19",
    "5.1": """PGD-KL 47.51 / PGD-LS(1e-2) 80.04 / PGD-LS(1e-3) 69.23 / PGD-LS(1e-4) 51.28 / PGD-LS(5e-5) 44.16
        / PGD-LS(1e-5) 25.3""",
    "5.2": """PGD-KL 71.58 / PGD-LS(0.1) 57.7 / PGD-LS(0.2) 62.93 / PGD-LS(0.3) 67.7 / PGD-LS(0.4) 72.14
        / PGD-LS(0.5) 75.57""",
    "madry-mnist": """natural 98.8 / FGSM, A 95.6 / PGD-40, A 93.2 / PGD-100, A 91.8 / PGD-40, 20 restarts, A 90.4
        / PGD-100, 20 restarts, A 89.3 / targeted PGD-40, A 92.7 / CW-40, A 94.0 / CW+-40, A 93.9 / FGSM, A' 96.8
        / PGD-40, A' 96.0 / PGD-100, 20 restarts, A' 95.7 / CW-40, A' 97.0 / CW+-40, A' 96.4 / FGSM, B 95.4 / PGD-40, B 96.4
        / CW+-40, B 95.7""",
    "madry-cifar10": """natural 87.3 / FGSM, A 56.1 / PGD-7, A 50.0 / PGD-20, A 45.8 / CW-30, A 46.8 / FGSM, A' 67.0
        / PGD-7, A' 64.2 / CW-30, A' 78.7 / FGSM, A_nat 85.6 / PGD-7, A_nat 86.0""",
}
COLUMNS = {"6.1": 4, "6.2": 4, "6.3": 2, "6.4": 2, "figure-6.1": 2}


@pytest.fixture
def folder(finished_runs):
    return finished_runs


@pytest.fixture(autouse=True)
def _cheap(one_thread, monkeypatch):
    """One thread, and Madry's table without its attacks of up to 2,000 steps."""
    table = TABLES["madry-mnist"]
    cells = tuple(cell for cell in table.cells if cell.attack in ("clean", "fgsm", "pgd-40", "cw+-40"))
    monkeypatch.setitem(TABLES, "madry-mnist", replace(table, cells=cells))


def fill(name, folder, tmp_path, given=None, **options):
    return tables.fill(name, Options(runs=folder, test_images=12, **options), given or {}, tmp_path / "tables")


# ---- the sources


@pytest.mark.parametrize("name", TABLES)
def test_the_sources_numbers(name, monkeypatch):
    monkeypatch.undo()  # all of Madry's table
    printed = {}
    for row in PRINTED[name].split("/"):
        words = row.split()
        count = COLUMNS.get(name, 1)
        printed[" ".join(words[:-count])] = [float(word) for word in words[-count:]]
    here: dict[str, list[float]] = {}
    for cell in TABLES[name].cells:
        here.setdefault(cell.row, []).append(cell.accuracy)
    assert here == printed


def test_tables_are_measured_by_their_own_attacks(monkeypatch):
    monkeypatch.undo()
    attacks = {name: list(dict.fromkeys(cell.attack for cell in table.cells)) for name, table in TABLES.items()}
    assert attacks["6.1"] == attacks["6.2"] == ["clean", "fgsm", "pgd-20", "cw-30"]
    assert attacks["6.4"] == attacks["figure-6.1"] == ["clean", "pgd-20"]
    assert attacks["6.3"] == ["clean", "pgd-20-rst"]
    assert attacks["5.2"] == ["pgd-kl-20", *(f"pgd-ls-20:alpha=0.{a}" for a in range(1, 6))]
    assert {name: table.eps for name, table in TABLES.items() if table.eps != 8} == {
        "6.3": pytest.approx(7.905),
        "madry-mnist": 76.5,
    }
    for table in TABLES.values():
        assert {cell.target for cell in table.cells} | {cell.source for cell in table.cells} - {""} == set(table.runs)


# ---- which run is which row


def run(name="run", **settings) -> Run:
    return Run(Path("nowhere") / name, Config(**settings))


def test_names_of_models():
    names = [
        "wrn-34-10",
        "mnist-cnn/8",
        "mnist-cnn",
        "mnist-b",
        "resnet-18/stl10",
        "preactresnet-18",
        "timm:vit_tiny",
        "small-cnn",
    ]
    kinds = ["wrn", "mnist-cnn", "mnist-cnn", "mnist-b", "resnet", "preactresnet", "timm:vit_tiny", "small-cnn"]
    assert [family(name) for name in names] == kinds
    assert [width(name) for name in names] == [10, 8, 16, None, None, None, None, None]
    assert title(Config(method="mart", alpha=0.3)) == "MART+SPAT(.3)"
    assert title(Config(method="standard")) == "standard"


@pytest.mark.parametrize(
    ("changed", "matches"),
    [
        ({}, True),
        ({"data": "/somewhere/cifar10.npz", "epochs": 3, "limit": 100, "model": "wrn-10-2", "batch_size": 64}, True),
        ({"eps": 0.031 * 255}, True),
        ({"eps": 16.0}, False),
        ({"alpha": 0.2}, False),
        ({"method": "trades"}, False),
        ({"data": "cifar100"}, False),
        ({"model": "resnet-18"}, False),
        ({"extra": Path("500k.pickle")}, False),
    ],
)
def test_a_run_is_what_its_config_says(changed, matches):
    source = PRESETS["table6.1/mart+spat"]
    found = Run(Path("anything"), replace(source, **changed))
    assert fits(found, Wanted(source), Options()) is matches


def test_on_other_data_model_and_eps_are_asked_for_by_the_options():
    wanted, options = Wanted(PRESETS["table6.1/madry"]), Options(data="/somewhere/mnist.npz")
    found = run(data="mnist", model="mnist-cnn/8", eps=76.5)
    assert fits(found, wanted, options)
    assert fits(found, wanted, replace(options, eps=76.5))
    assert not fits(found, wanted, replace(options, eps=50.0))
    assert fits(found, wanted, replace(options, scale=Scale(model="mnist-cnn/2")))
    assert not fits(found, wanted, replace(options, scale=Scale(model="mnist-b")))
    assert not fits(run(data="mnist", model="mnist-cnn/8", method="standard"), wanted, options)


def test_of_several_runs_the_closest_to_the_source():
    source = PRESETS["table6.1/madry"]

    def best(*changes, **options):
        candidates = [Run(Path(str(i)), replace(source, **change)) for i, change in enumerate(changes)]
        return int(closest(candidates, Wanted(source), Options(**options)).folder.name)

    assert best({"model": "wrn-10-2"}, {"model": "wrn-28-10"}, {"model": "wrn-34-2"}) == 1
    assert best({"limit": 100}, {"limit": 5000}) == 1
    assert best({"epochs": 10}, {"epochs": 120}, {"epochs": 60}) == 1
    assert best({"weight_decay": 0.1, "lr": 1.0}, {"weight_decay": 0.1}) == 1
    assert best({"seed": 3}, {"seed": 0}) == 1
    assert best({"epochs": 10, "model": "wrn-34-10"}, {"model": "wrn-16-4"}, scale=Scale(model="wrn-16-4")) == 1
    assert closest([run(method="trades")], Wanted(source), Options()) is None


def test_a_copy_is_the_same_training_from_another_seed():
    original = run("a", limit=100, seed=3)
    others = [run("same", limit=100, seed=3), run("other", limit=200, seed=4), run("copy", limit=100, seed=5, out=Path("x"))]
    assert copy_of(original, others).folder.name == "copy"
    assert copy_of(original, others[:2]) is None


def test_differences_are_those_that_change_the_weights():
    source = PRESETS["table6.1/mart"]
    assert differences(Run(Path("x"), replace(source, seed=7, out=Path("y"), device="cpu", workers=9, preset="")), source) == []
    assert differences(Run(Path("x"), replace(source, step_size=2.0, beta=5.0)), source) == []  # as by default
    changed = replace(source, model="wrn-10-2", limit=5000, epochs=6, milestones=None, steps=5, method="madry")
    assert differences(Run(Path("x"), changed), source) == [
        "method Madry (MART)",
        "model wrn-10-2 (wrn-34-10)",
        "training images 5,000 (all)",
        "epochs 6 (90)",
        "attack steps 5 (10)",
        "beta none (5)",
    ]
    natural = PRESETS["madry-mnist/natural"]  # attacks nothing: how it would does not count
    assert differences(Run(Path("x"), replace(natural, eps=8.0, steps=3, model="mnist-cnn/16")), natural) == []


def test_runs_in_a_folder(folder, tmp_path):
    assert [found.folder.name for found in find_runs(folder)] == [
        "b",
        "madry",
        "madry-seed1",
        "standard",
        "wide",
        "wide-standard",
    ]
    assert all(found.epochs == found.config.epochs for found in find_runs(folder))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text(Config().to_json())
    assert find_runs(tmp_path) == []
    assert find_runs(None) == []
    with pytest.raises(InputError, match="neither best.pt nor last.pt"):
        runs.read_run(tmp_path / "begun")
    with pytest.raises(InputError, match="no config.json"):
        runs.read_run(tmp_path)


@pytest.mark.parametrize(("config", "reason"), [('{"method": "mad', "cannot be read"), ("[1]", "is no run's")])
def test_a_run_that_cannot_be_read_is_left_out_and_said(folder, tmp_path, capsys, config, reason):
    for name in ("broken", "madry"):
        shutil.copytree(folder / "madry", tmp_path / "runs" / name)
    (tmp_path / "runs" / "broken" / "config.json").write_text(config)
    filled = fill("5.2", tmp_path / "runs", tmp_path, data=str(folder.parent / "mnist.npz"))
    assert filled.runs["robust"].folder.name == "madry"
    err = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(err) == 1
    assert f"{tmp_path}/runs/broken" in err[0]
    assert reason in err[0]
    with pytest.raises(InputError, match=reason):
        fill("5.2", None, tmp_path, {"robust": tmp_path / "runs" / "broken"})


# ---- ours beside theirs


def test_a_table_is_what_evaluate_finds(folder, tmp_path):
    filled = fill("5.2", folder, tmp_path, data=str(folder.parent / "mnist.npz"))
    assert filled.eps == EPS
    assert filled.runs["robust"].folder == folder / "madry"
    images = open_images([filled.runs["robust"]], Options(test_images=12))
    model, _ = load_model(folder / "madry", images.dataset)
    attacks = [entry.cell.attack for entry in filled.entries]
    found = evaluate(model, images.dataset.test, attacks, eps=0.3, rows=images.rows, attack_wrong=True, bar=None)
    for entry in filled.entries:
        low, high = found.interval(entry.cell.attack)
        assert entry.ours == {"accuracy": found.accuracy(entry.cell.attack), "low": low, "high": high}
        assert entry.half_width == (high - low) / 2
        assert entry.difference == entry.ours["accuracy"] - entry.cell.accuracy

    md, written = tables.write(filled, tmp_path / "tables")
    text, content = md.read_text(), json.loads(written.read_text())
    assert [cell["ours"]["accuracy"] for cell in content["cells"]] == [entry.ours["accuracy"] for entry in filled.entries]
    assert [cell["source"] for cell in content["cells"]] == [71.58, 57.7, 62.93, 67.7, 72.14, 75.57]
    assert content["runs"]["robust"]["config"]["limit"] is None
    assert content["test_images"] == 12
    assert content["of"] == 40
    first = filled.entries[0]
    line = f"| PGD-KL† | {first.ours['accuracy']:.2f} ± {first.half_width:.2f} | 71.58 | {first.difference:+.2f} |"
    assert line.replace("-", "−").replace("PGD−KL", "PGD-KL") in text
    assert (
        "test images 12 (40); robust: data mnist (cifar10), model mnist-cnn/1 (wrn-34-10), held-out images 8 (default), "
        "epochs 2 (90), eps 0.3 (8/255)" in text
    )
    assert (
        f"Runs: robust: {folder / 'madry'} (Madry, mnist-cnn/1, the closest of 3)." in text
    )  # the others are another width and another seed


def test_black_boxes(folder, tmp_path):
    given = {"A": folder / "madry"}
    filled = fill("madry-mnist", folder, tmp_path, given)
    assert {key: found.folder.name for key, found in filled.runs.items()} == {"A": "madry", "A'": "madry-seed1", "B": "b"}
    assert "closest" not in tables.markdown(filled).split("A'")[-1]
    data = load(str(folder.parent / "mnist.npz"))
    target, source = (load_model(folder / name, data)[0] for name in ("madry", "b"))
    rows = open_images([filled.runs["A"]], Options(test_images=12)).rows
    found = evaluate(target, data.test, ["fgsm", "pgd-40", "cw+-40"], eps=0.3, source=source, rows=rows, bar=None)
    entries = {entry.cell.row: entry.ours["accuracy"] for entry in filled.entries}
    assert [entries[f"{row}, B"] for row in ("FGSM", "PGD-40", "CW+-40")] == [
        found.accuracy(name) for name in ("fgsm", "pgd-40", "cw+-40")
    ]


def test_what_is_missing_is_shown_as_missing(folder, tmp_path):
    filled = fill("madry-mnist", None, tmp_path, {"A": folder / "madry"})
    text = tables.markdown(filled)
    assert "| FGSM, B | missing | 95.40 |  |" in text
    assert "Missing: A', B." in text
    assert all(entry.ours is None for entry in filled.entries if entry.cell.source)
    content = tables.as_json(filled)
    assert [cell["ours"] for cell in content["cells"] if cell["made_on"] != "A"] == [None] * 6
    assert content["runs"]["B"] is None


def test_many_columns_stand_below_each_other(folder, tmp_path):
    data = str(folder.parent / "mnist.npz")
    filled = fill("6.1", folder, tmp_path, {"mart": folder / "wide"}, data=data)
    lines = tables.markdown(filled).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| MART† | ours |"))
    assert lines[at + 1] == "|  | source | 83.70 | 61.93 | 58.46 | 53.28 |"
    assert lines[at + 2].startswith("|  | difference |")
    assert "| TRADES | ours | missing | missing | missing | missing |" in lines
    assert "mart: method Madry (MART), data mnist (cifar10)" in "\n".join(lines)


def test_a_run_at_full_scale_has_no_mark(folder, tmp_path, monkeypatch):
    table = TABLES["madry-mnist"]
    own = runs.read_run(folder / "madry").config
    full = replace(table, runs={"A": Wanted(own)}, cells=table.cells[:1])
    monkeypatch.setitem(TABLES, "madry-mnist", full)
    filled = tables.fill("madry-mnist", Options(runs=folder), {}, tmp_path)
    assert tables.MARK not in tables.markdown(filled)
    assert not filled.marked(full.cells[0])
    assert tables.MARK in tables.markdown(replace(filled, images=39))


def test_drawn_again_it_costs_nothing(folder, tmp_path, monkeypatch):
    filled = fill("madry-mnist", None, tmp_path, {"A": folder / "madry-seed1"})
    monkeypatch.setattr("spat_train.evaluation.evaluate.broken_by", lambda *args, **kwargs: pytest.fail("attacked again"))
    assert fill("madry-mnist", None, tmp_path, {"A": folder / "madry-seed1"}).entries == filled.entries


# ---- training what is missing


def test_the_scale_changes_a_preset(tmp_path):
    source = PRESETS["table6.1/mart+spat"]
    options = Options(runs=tmp_path, train=True, scale=Scale(limit=500, epochs=9, model="wrn-10-2"))
    config = scaled(Wanted(source), options)
    assert config == replace(
        source, limit=500, epochs=9, model="wrn-10-2", milestones=(8, 9), test=False, resume=True,
        out=tmp_path / "table6.1-mart+spat-wrn-10-2-seed0",
    )  # fmt: skip
    for epochs, drops in ((1, ()), (2, (2,)), (30, (25, 30)), (180, (150, 180))):
        config = scaled(Wanted(source), replace(options, scale=Scale(epochs=epochs)))
        assert config.milestones == drops
        check(config)
    mnist = scaled(Wanted(PRESETS["madry-mnist/madry"]), Options(runs=tmp_path, train=True, eps=51.0, data="digits"))
    assert (mnist.eps, mnist.step_size, mnist.data) == (51.0, pytest.approx(2.55 * 51 / 76.5), "digits")
    fixed = scaled(TABLES["madry-mnist"].runs["B"], replace(options, data="mnist"))
    assert fixed.model == "mnist-b"
    assert fixed.method == "standard"


def test_what_is_missing_is_trained_once_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    scale = Scale(limit=64, epochs=2, model="small-cnn", batch_size=32)
    options = Options(runs=tmp_path / "runs", data="digits", eps=51.0, test_images=8, train=True, scale=scale, device="cpu")
    filled = tables.fill("6.4", options, {}, tmp_path)
    assert [found.config.method for found in filled.runs.values()] == ["trades", "mart", "trades", "mart"]
    assert [found.config.alpha for found in filled.runs.values()] == [0, 0, 0.1, 0.2]
    assert all(found.config.epochs == found.epochs == 2 for found in filled.runs.values())
    assert filled.eps == 51
    assert all(entry.ours for entry in filled.entries)

    trained = []
    monkeypatch.setattr(runs, "train", lambda config: trained.append(config.out))
    assert tables.fill("6.4", options, {}, tmp_path).entries == filled.entries
    assert trained == []
    interrupted = filled.runs["mart"].folder
    lines = (interrupted / "log.jsonl").read_text().splitlines(keepends=True)
    (interrupted / "log.jsonl").write_text("".join(line for line in lines if '"epoch": 2' not in line))
    tables.fill("6.4", options, {}, tmp_path)
    assert trained == [interrupted]
    text = tables.markdown(tables.fill("6.4", replace(options, train=False, scale=Scale()), {}, tmp_path))
    assert "stopped after 1 of its 2 epochs" in text


def test_a_copy_is_trained_from_the_next_seed(folder, tmp_path, monkeypatch):
    trained = []
    original = runs.read_run(folder / "wide")
    monkeypatch.setattr(runs, "train", trained.append)
    monkeypatch.setattr(runs, "read_run", lambda path: run(path.name))
    options = Options(runs=tmp_path, train=True)
    runs.completed(None, Wanted(original.config, copy_of="A"), original, options)
    assert trained == [replace(original.config, seed=1, resume=True, device=None, out=tmp_path / "wide-seed1")]


# ---- the command


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["spat-train", *map(str, arguments)])
    cli.main()


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "table")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(TABLES)
    data = folder.parent / "mnist.npz"
    command(
        monkeypatch,
        "table",
        "5.1",
        "--runs",
        folder,
        "--data",
        data,
        "--test-images",
        "12",
        "--run",
        f"standard={folder / 'wide'}",
    )
    out = capsys.readouterr().out
    assert "Table 5.1" in out
    assert f"Runs: standard: {folder / 'wide'} (Madry, mnist-cnn/2)." in out
    assert "tables/table-5.1.json written" in out
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["table-5.1.json", "table-5.1.md"]
    with pytest.raises(SystemExit):
        command(monkeypatch, "table", "--help")
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert all(name in text for name in TABLES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["7.1"], r"table 7.1: there is none: did you mean .*6.1.* there are 5.1, 5.2"),
        (["6.1"], "no run fits without --runs .looked for madry: Madry on cifar10 wrn at eps 8/255; trades"),
        (["6.1", "--runs", "RUNS"], "no run fits in --runs .*runs .looked for madry: Madry on cifar10"),
        (["6.1", "--runs", "nowhere"], "--runs nowhere: there is no such folder"),
        (["6.1", "--run", "mrat=x"], "--run mrat=x: table 6.1 has no run mrat: it has madry, trades, mart, trades.spat"),
        (["6.1", "--run", "mart"], "--run mart: write KEY=FOLDER"),
        (["6.1", "--run", "mart=nowhere"], "nowhere: no config.json there"),
        (["6.1", "--train"], "--train: give the folder"),
        (["6.1", "--epochs", "3"], "--epochs: it says how to train what is missing: add --train"),
        (["6.1", "--eps", "0.03"], "--eps 0.03: it is in 1/255"),
        (["6.1", "--test-images", "0"], "--test-images 0: give at least 1"),
        (["6.1", "--device", "tpu"], "--device tpu: give cpu"),
        (["6.1", "--out", "file"], "--out file: cannot be written to .file: it is no folder"),
        (["madry-mnist", "--run", "A=RUNS/madry", "--data", "digits"], "as mnist-cnn/1 for digits .10 classes"),
    ],
)
def test_errors_come_before_any_work(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spat_train.papers.measure.evaluate", lambda *args, **kwargs: pytest.fail("work began"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, "table", *(argument.replace("RUNS", str(folder)) for argument in arguments))
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2 and out == "" and err.count("\n") == 1 and re.search(message, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_global_generators_are_left_alone(folder, tmp_path):
    before = torch.get_rng_state()
    fill("madry-mnist", None, tmp_path, {"A": folder / "wide"})
    assert torch.equal(torch.get_rng_state(), before)


def test_committed_evidence_has_the_shape_of_the_sources():
    """Fig. 5.3: accuracy rises with alpha, above clean accuracy at alpha = 1. Tables 5.1, 5.2: the alphas come in their order."""
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "evaluation"
    for model in json.loads((folder / "figure-5.3.json").read_text())["models"].values():
        found = [point["accuracy"] for point in model["pgd-ls"]]
        assert all(b >= a - 0.5 for a, b in pairwise(found))
        assert found[-1] > model["clean"]["accuracy"]
    for name in ("5.1", "5.2"):
        rows = [line.split("|")[1:4] for line in (folder / f"table-{name}.md").read_text().splitlines() if "PGD-LS" in line]
        ours, source = ([float(row[i].split("±")[0]) for row in rows] for i in (1, 2))
        order = sorted(range(len(rows)), key=source.__getitem__)
        assert len(rows) == 5
        assert [ours[i] for i in order] == sorted(ours)
    rows = [line for line in (folder / "table-madry-mnist.md").read_text().splitlines() if "† |" in line]
    assert len(rows) == 17
    assert not any("missing" in row for row in rows)

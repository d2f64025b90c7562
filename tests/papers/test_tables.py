"""Tables: the sources' numbers, ours beside theirs, and what is marked."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from spat_train.data.datasets import load
from spat_train.evaluation.evaluate import evaluate
from spat_train.models.checkpoints import load_model
from spat_train.models.run_config import run_config
from spat_train.papers import tables
from spat_train.papers.loaded_run import open_images
from spat_train.papers.options import Options
from spat_train.papers.reported import TABLES
from spat_train.presets import PRESETS
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
    "awp": "TRADES 85.36 56.17 / MART 84.43 54.23",
    "madry-mnist": """natural 98.8 / FGSM, A 95.6 / PGD-40, A 93.2 / PGD-100, A 91.8 / PGD-40, 20 restarts, A 90.4
        / PGD-100, 20 restarts, A 89.3 / targeted PGD-40, A 92.7 / CW-40, A 94.0 / CW+-40, A 93.9 / FGSM, A' 96.8
        / PGD-40, A' 96.0 / PGD-100, 20 restarts, A' 95.7 / CW-40, A' 97.0 / CW+-40, A' 96.4 / FGSM, B 95.4 / PGD-40, B 96.4
        / CW+-40, B 95.7""",
    "madry-cifar10": """natural 87.3 / FGSM, A 56.1 / PGD-7, A 50.0 / PGD-20, A 45.8 / CW-30, A 46.8 / FGSM, A' 67.0
        / PGD-7, A' 64.2 / CW-30, A' 78.7 / FGSM, A_nat 85.6 / PGD-7, A_nat 86.0""",
    "fastat": """FGSM-RS 77.66 48.27 43.09 / N-FGSM 78.59 53.07 47.77 / Free-AT 75.20 48.83 44.34 / PGD-AT 85.35 46.31 44.33
        / PGD-AT-WA 82.36 54.17 50.49""",
}


@pytest.fixture(autouse=True)
def _cheap(one_thread, monkeypatch):
    """One thread, and Madry's table without its attacks of up to 2,000 steps."""
    table = TABLES["madry-mnist"]
    cells = tuple(cell for cell in table.cells if cell.attack in ("clean", "fgsm", "pgd-40", "cw+-40"))
    monkeypatch.setitem(TABLES, "madry-mnist", replace(table, cells=cells))


def fill(name, folder, tmp_path, given=None, **options):
    return tables.fill(name, Options(runs=folder, test_images=12, **options), given or {}, tmp_path / "tables")


# ---- the sources


def test_the_sources_numbers_and_attacks(monkeypatch):
    monkeypatch.undo()  # all of Madry's table
    attacks = {}
    for name, table in TABLES.items():
        columns = len({cell.column for cell in table.cells})
        printed = [row.split() for row in PRINTED[name].split("/")]
        rows = {" ".join(words[:-columns]): [float(word) for word in words[-columns:]] for words in printed}
        here: dict[str, list[float]] = {}
        for cell in table.cells:
            here.setdefault(cell.row, []).append(cell.accuracy)
        assert here == rows
        assert {cell.target for cell in table.cells} | {cell.source for cell in table.cells} - {""} == set(table.runs)
        assert table.eps == pytest.approx({"6.3": 7.905, "madry-mnist": 76.5}.get(name, 8))
        attacks[name] = list(dict.fromkeys(cell.attack for cell in table.cells))
    assert attacks["6.1"] == attacks["6.2"] == ["clean", "fgsm", "pgd-20", "cw-30"]
    assert attacks["6.4"] == attacks["figure-6.1"] == ["clean", "pgd-20"]
    assert attacks["6.3"] == ["clean", "pgd-20-rst"]
    assert attacks["fastat"] == ["clean", "pgd-50", "autoattack"]
    assert attacks["awp"] == ["clean", "autoattack"]
    assert attacks["5.2"] == ["pgd-kl-20", *(f"pgd-ls-20:alpha=0.{a}" for a in range(1, 6))]


# ---- ours beside theirs


def test_a_table_is_what_evaluate_finds(finished_runs, tmp_path):
    filled = fill("5.2", None, tmp_path, {"robust": finished_runs / "madry"})
    assert filled.eps == EPS
    images = open_images([filled.runs["robust"]], Options(test_images=12))
    model, _ = load_model(finished_runs / "madry", images.dataset)
    attacks = [entry.cell.attack for entry in filled.entries]
    found = evaluate(model, images.dataset.test, attacks, eps=0.3, rows=images.rows, attack_wrong=True, bar=None)
    for entry in filled.entries:
        low, high = found.interval(entry.cell.attack)
        accuracy = found.accuracy(entry.cell.attack)
        more = {"half_width": (high - low) / 2, "difference": accuracy - entry.cell.accuracy}
        assert entry.ours == {"accuracy": accuracy, "low": low, "high": high} | more

    md, written = tables.write(filled, tmp_path / "tables")
    text, content = md.read_text(), json.loads(written.read_text())
    assert [cell["ours"]["accuracy"] for cell in content["cells"]] == [entry.ours["accuracy"] for entry in filled.entries]
    assert [cell["source"] for cell in content["cells"]] == [71.58, 57.7, 62.93, 67.7, 72.14, 75.57]
    assert (content["test_images"], content["of"]) == (12, 40)
    first = filled.entries[0]
    numbers = f"| {first.ours['accuracy']:.2f} ± {first.ours['half_width']:.2f} | 71.58 | {first.ours['difference']:+.2f} |"
    assert "| PGD-KL† " + numbers.replace("-", "−") in text
    assert (
        "test images 12 (40); robust: data mnist (cifar10), model mnist-cnn/1 (wrn-34-10), epochs 2 (90), eps 0.3 "
        "(8/255), attack steps 2 (10), step size 0.075 (2/255), " in text
    )
    assert f"Runs: robust: {finished_runs / 'madry'} (Madry, mnist-cnn/1)." in text


def test_black_boxes(finished_runs, tmp_path):
    filled = fill("madry-mnist", finished_runs, tmp_path)
    assert {key: found.folder.name for key, found in filled.runs.items()} == {"A": "madry", "A'": "madry-seed1", "B": "b"}
    text = tables.markdown(filled)
    assert (
        f"A: {finished_runs / 'madry'} (Madry, mnist-cnn/1), the first of 3 that fit, A': {finished_runs / 'madry-seed1'} "
        in text
    )
    data = load(str(finished_runs.parent / "mnist.npz"))
    target, source = (load_model(finished_runs / name, data)[0] for name in ("madry", "b"))
    rows = open_images([filled.runs["A"]], Options(test_images=12)).rows
    attacks = {"FGSM": "fgsm", "PGD-40": "pgd-40", "CW+-40": "cw+-40"}
    found = evaluate(target, data.test, [*attacks.values()], eps=0.3, source=source, rows=rows, bar=None)
    entries = {entry.cell.row: entry.ours["accuracy"] for entry in filled.entries}
    assert {row: entries[f"{row}, B"] for row in attacks} == {row: found.accuracy(name) for row, name in attacks.items()}


def test_what_is_missing_is_shown_as_missing(finished_runs, tmp_path, monkeypatch):
    given = {"A": finished_runs / "madry-seed1"}
    before = torch.get_rng_state()
    filled = fill("madry-mnist", None, tmp_path, given)
    assert torch.equal(torch.get_rng_state(), before)
    text = tables.markdown(filled)
    assert "| FGSM, B | missing | 95.40 |  |" in text
    assert re.search(r"Missing: A' \(`spat-train train --preset madry-mnist/madry --seed 1 .*`\), B \(`spat-train train", text)
    assert all(entry.ours is None for entry in filled.entries if entry.cell.source)
    content = tables.as_json(filled)
    assert [cell["ours"] for cell in content["cells"] if cell["made_on"] != "A"] == [None] * 6
    assert content["runs"]["B"] is None
    # Filled again it costs nothing.
    monkeypatch.setattr("spat_train.evaluation.evaluate.broken_by", lambda *args, **kwargs: pytest.fail("attacked again"))
    assert fill("madry-mnist", None, tmp_path, given).entries == filled.entries


def test_many_columns_stand_below_each_other(finished_runs, tmp_path):
    filled = fill("6.1", finished_runs, tmp_path, {"mart": finished_runs / "wide"})
    lines = tables.markdown(filled).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| MART† | ours |"))
    assert lines[at + 1] == "|  | source | 83.70 | 61.93 | 58.46 | 53.28 |"
    assert lines[at + 2].startswith("|  | difference |")
    assert "| TRADES | ours | missing | missing | missing | missing |" in lines
    assert "mart: method Madry (MART), data mnist (cifar10)" in "\n".join(lines)


def test_a_run_at_full_scale_has_no_mark(finished_runs, tmp_path, monkeypatch):
    table = TABLES["madry-mnist"]
    full = replace(table, runs={"A": table.runs["A"]}, cells=table.cells[:1])
    monkeypatch.setitem(TABLES, "madry-mnist", full)
    own = vars(run_config(finished_runs / "madry"))
    preset = replace(PRESETS["madry-mnist/madry"], **own | {"milestones": None})
    monkeypatch.setitem(PRESETS, "madry-mnist/madry", preset)
    filled = tables.fill("madry-mnist", Options(runs=finished_runs), {}, tmp_path)
    assert tables.MARK not in tables.markdown(filled)
    assert not filled.marked(filled.entries[0])
    assert tables.MARK in tables.markdown(replace(filled, images=39))


def test_committed_evidence_has_the_shape_of_the_sources():
    """Fig. 5.3: accuracy rises with alpha to within a point of clean (thesis: above). Tables 5.1, 5.2: alphas come in order."""
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "evaluation"
    for model in json.loads((folder / "figure-5.3.json").read_text())["models"].values():
        found = [point["accuracy"] for point in model["pgd-ls"]]
        assert found == sorted(found)
        assert found[-1] >= model["clean"]["accuracy"] - 1
    for name in ("5.1", "5.2"):
        rows = [line.split("|")[1:4] for line in (folder / f"table-{name}.md").read_text().splitlines() if "PGD-LS" in line]
        ours, source = ([float(row[i].split("±")[0]) for row in rows] for i in (1, 2))
        order = sorted(range(len(rows)), key=source.__getitem__)
        assert len(rows) == 5
        assert [ours[i] for i in order] == sorted(ours)
    rows = [line for line in (folder / "table-madry-mnist.md").read_text().splitlines() if "† |" in line]
    assert len(rows) == 17
    assert not any("missing" in row for row in rows)

"""`spat-train figure` and `spat-train table`: what they list, write and refuse."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from spat_train.papers.figures import FIGURES
from spat_train.papers.reported import TABLES
from tests.evaluation.helpers import command
from tests.papers.finished_runs import copy_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "known", "word"), [("figure", FIGURES, "needs"), ("table", TABLES, "runs")])
def test_all_are_listed(monkeypatch, capsys, name, known, word):
    command(monkeypatch, name)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(known)
    assert all(word in line for line in lines)
    with pytest.raises(SystemExit):
        command(monkeypatch, name, "--help")
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert all(each in text for each in known)


def test_a_figure_of_named_runs(finished_runs, monkeypatch, capsys):
    command(monkeypatch, "figure", "training-loss", finished_runs / "madry", finished_runs / "wide", "--out", "there")
    assert "there/figure-training-loss.png written" in capsys.readouterr().out
    content = json.loads(Path("there/figure-training-loss.json").read_text())
    assert list(content["models"]) == ["madry", "wide"]  # the same method, so they are named by their folders


def test_a_table_of_a_run_without_a_preset(finished_runs, monkeypatch, capsys, tmp_path):
    """As version 0.1.0 wrote them."""
    run = copy_run(finished_runs / "wide", tmp_path / "runs" / "mine", preset="")
    command(monkeypatch, "table", "5.1", "--runs", "runs", "--test-images", "12", "--run", f"standard={run}")
    out = capsys.readouterr().out
    assert f"Runs: standard: {run} (Madry, mnist-cnn/2)." in out
    assert "tables/table-5.1.json written" in out
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["table-5.1.json", "table-5.1.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("figure landscap", "figure landscap: there is none: did you mean landscape. there are 4.1"),
        ("figure 5.3", "figure 5.3: it needs one standard and one robust run: name their folders, or give the folder"),
        ("figure 5.3 RUNS/madry", "it needs one standard and one robust run: .*madry .Madry, mnist-cnn/1.: name others"),
        ("figure 5.2 RUNS/madry RUNS/wide", "figure 5.2: it needs one robust run: .*madry .Madry.*wide .Madry.*: name others"),
        ("figure training-loss RUNS/standard", "it needs robust runs, one or more"),
        ("figure capacity RUNS/madry RUNS/b", "it needs runs of wrn-DEPTH-WIDTH"),
        ("figure 6.1 --runs RUNS", "it needs Madry runs that differ in alpha.* no run with --preset figure6.1/eps4-alpha0"),
        ("figure 5.2 --runs RUNS --data digits", "has no run with --preset .*spat-train train --preset .*--data digits --out"),
        ("figure 5.2 nowhere", "nowhere: no config.json there"),
        ("figure 5.2 RUNS/madry --data digits", "as mnist-cnn/1 for digits"),
        ("figure landscape RUNS/madry --restarts 1", "--restarts 1: give at least 2"),
        ("table 7.1", r"table 7.1: there is none: did you mean .*6.1.* there are 5.1, 5.2"),
        ("table 6.1", "table 6.1: it needs runs with --preset table6.1/madry, table6.1/trades, .*: give --runs: say which"),
        ("table 6.1 --runs RUNS", r"none, but .*b .standard, mnist-b. on .*mnist.npz.*by --run madry=FOLDER, or train it: spat-"),
        ("table 6.1 --runs nowhere", "--runs nowhere: there is no such folder"),
        ("table 6.1 --run mrat=x", "--run mrat=x: table 6.1 has no run mrat: it has madry, trades, mart, trades.spat"),
        ("table 6.1 --run mart", "--run mart: write KEY=FOLDER"),
        ("table 6.1 --eps 0.03", "--eps 0.03: it is in 1/255"),
        ("table 6.1 --test-images 0", "--test-images 0: give at least 1"),
        ("table 6.1 --device tpu", "--device tpu: give cpu"),
        ("table 6.1 --out file", "--out file: cannot be written to .file: it is no folder"),
        ("table madry-mnist --run A=RUNS/madry --data digits", "as mnist-cnn/1 for digits .10 classes"),
    ],
)
def test_errors_come_before_any_work(finished_runs, tmp_path, monkeypatch, capsys, arguments, message):
    pytest.importorskip("sklearn")
    monkeypatch.setattr("spat_train.papers.loaded_run.evaluate", lambda *args, **kwargs: pytest.fail("work began"))
    Path("file").touch()
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, *arguments.replace("RUNS", str(finished_runs)).split())
    out, err = capsys.readouterr()
    assert (exit_info.value.code, err.count("\n"), "written" in out) == (2, 1, False)
    assert re.search(message, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

"""Specs of sweeps: the ready ones, the runs that they plan, and what is wrong with one."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

pytest.importorskip("tyro")

from spat_train.cli import training_config
from spat_train.config import Config
from spat_train.errors import InputError
from spat_train.papers.figures.figure_6_1 import trainings
from spat_train.papers.runs import Run
from spat_train.presets import PRESETS
from spat_train.sweeps import spec
from spat_train.sweeps.command import given_options, sweep
from spat_train.sweeps.ready import READY
from spat_train.sweeps.spec import command, plan, read
from tests.evaluation import helpers

GRID = {"alpha": [0, 0.2]}


def write(tmp_path: Path, **keys) -> str:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"grid": GRID} | keys, sort_keys=False))
    return str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", READY)
def test_commands_give_the_configs(name):
    planned = plan(read(name), {"milestones": None, "flip": False, "init": Path("a b.pt"), "mean": (0.5,), "std": (0.2,)})
    runs = {"bag-of-tricks": 144, "alpha-search": 54, "alpha-search-mnist": 54}.get(name, 18)
    assert len(planned.cells) == read(name).runs == runs
    for folder, cell in [*planned.cells.items()][::17]:
        program, train, *arguments = shlex.split(command(cell.config))
        assert (program, train) == ("spat-train", "train")
        assert training_config(arguments) == cell.config
        assert cell.config.resume
        assert cell.config.out == Path("runs") / name / folder


@pytest.mark.parametrize("number", ["6.1", "6.2"])
def test_a_figure_finds_the_runs_of_its_sweep(number):
    cells = plan(read(f"figure{number}"), {"out": Path("there")}).cells
    assert {replace(cell.config, out=None, resume=False) for cell in cells.values()} == {
        config for name, config in PRESETS.items() if name.startswith(f"figure{number}/")
    }
    runs = [Run(cell.config.out, cell.config) for cell in cells.values()]
    assert all(sum(spec.fits(run) for run in runs) == 1 for spec in trainings(number).specs)


def test_options_of_the_command_override_the_base(tmp_path):
    file = write(tmp_path, base={"preset": "table6.1/trades", "lr": "2e-2", "epochs": 30, "milestones": [10, 20]}, seeds=2)
    given = given_options(
        ["--lr", "0.5", "--no-test", "--milestones", "None", "--data=digits", "--seed", "3", "--eval-batch-size", "7"]
    )
    assert given == {"lr": 0.5, "test": False, "milestones": None, "data": "digits", "seed": 3, "eval_batch_size": 7}
    cells = plan(read(file), given).cells
    assert list(cells) == ["alpha0-seed3", "alpha0.2-seed3", "alpha0-seed4", "alpha0.2-seed4"]
    trades = replace(PRESETS["table6.1/trades"], **given, epochs=30, resume=True)
    expected = replace(trades, alpha=0.2, seed=4, out=Path("runs/mine/alpha0.2-seed4"))
    assert cells["alpha0.2-seed4"].config == expected
    assert plan(read(file), {}).cells["alpha0-seed0"].config.lr == 0.02


def test_options_that_move_together(tmp_path):
    batch = [{"batch_size": 128, "lr": 0.1}, {"batch_size": 256, "lr": 0.2}]
    cells = plan(
        read(write(tmp_path, grid={"bn_mode": ["eval", "train"], "batch": batch, "milestones": [[3], [5, 6]]})), {}
    ).cells
    assert len(cells) == 8
    cell = cells["bn-mode-train-batch-size256-lr0.2-milestones-5-6-seed0"]
    assert (cell.config.bn_mode, cell.config.batch_size, cell.config.lr, cell.config.milestones) == ("train", 256, 0.2, (5, 6))
    assert cell.params == {"bn_mode": "train", "batch": "batch-size256-lr0.2", "milestones": "milestones-5-6", "seed": 0}


def test_standard_training_is_judged_on_clean_images(tmp_path):
    assert plan(read(write(tmp_path, base={"method": "standard"}, grid={"lr": [0.1, 0.2]})), {}).maximise == "clean"
    assert plan(read(write(tmp_path)), {}).maximise == "pgd"
    assert plan(read(write(tmp_path, maximise="clean")), {}).maximise == "clean"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grid": {}}, "mine.yaml: grid: a spec needs it"),
        ({"gird": {}, "grid": None}, "mine.yaml: key gird: there is none: did you mean grid"),
        ({"base": {"lr": "high"}}, "mine.yaml: base.lr 'high': give a number"),
        ({"base": {"epochs": 1.5}}, "mine.yaml: base.epochs 1.5: give an integer"),
        ({"base": {"methd": "madry"}}, "mine.yaml: base.methd: option methd: there is none: did you mean method"),
        ({"base": {"out": "x"}}, "mine.yaml: base.out.*given on the command line"),
        ({"base": {"preset": "table6.1/x"}}, "mine.yaml: preset table6.1/x: there is none"),
        ({"base": {"preset": "figure6.1/{eps:g}"}}, "mine.yaml: base.preset figure6.1/{eps:g}: KeyError"),
        ({"base": {"preset": "{eps.__class__}"}}, "base.preset {eps.__class__}: ValueError.*has an option and its format"),
        ({"base": {"preset": "{alpha:999999999}"}}, "base.preset {alpha:999999999}: ValueError"),
        ({"seeds": 10**9}, "grid: it has 2,000,000,000 runs: give one of at most 10,000"),
        ({"base": {"holdout": 0}}, "mine.yaml: run alpha0-seed0: --holdout 0"),
        ({"base": []}, r"mine.yaml: base \[\]: give keys with their values"),
        ({"grid": {"alpha": 0.1}}, r"mine.yaml: grid.alpha 0.1: give a list of values"),
        ({"grid": {"alpha": [0, 0.0]}}, "mine.yaml: grid.alpha: 0.0 is there twice"),
        ({"grid": {"alpha": [0, 1.5]}}, "mine.yaml: run alpha1.5-seed0: --alpha 1.5: give a number in"),
        ({"grid": {"alpha": [0.1, 0.1000000001]}}, "mine.yaml: run alpha0.1-seed0: grid: two runs have this name"),
        ({"grid": {"alpa": [0]}}, "mine.yaml: grid.alpa: it is no option of spat-train train .did you mean alpha"),
        ({"grid": {"seed": [0, 1]}}, "mine.yaml: grid.seed: option seed: .*given on the command line"),
        ({"grid": {"method": ["madry", "mrt"]}}, "mine.yaml: grid.method 'mrt': choose one of standard, madry"),
        ({"grid": {"a": [{"lr": 1}], "lr": [1]}}, "mine.yaml: grid: an option is in two factors"),
        ({"base": {"alpha": 0.5}}, "mine.yaml: base.alpha: the grid has it too: leave it out of one"),
        ({"grid": {}, "base": {"methd": "madry"}}, "mine.yaml: base.methd"),
        ({"search": "random"}, "mine.yaml: search 'random': choose one of grid, halving"),
        ({"min_epochs": 3}, "mine.yaml: search: min_epochs and reduction are for halving"),
        ({"search": "halving", "reduction": 1}, "mine.yaml: reduction 1: give at least 2"),
        ({"seeds": 0}, "mine.yaml: seeds 0: give at least 1"),
        ({"for_each": ["eps"]}, "mine.yaml: for_each: name factors of the grid"),
        ({"hypotheses": [{"says": "x", "factor": "alpha", "expects": "more"}]}, r"hypotheses\[0\].expects 'more': choose one"),
        ({"hypotheses": [{"says": "", "factor": "alpa", "expects": "lower"}]}, r"hypotheses\[0\].factor alpa: .* mean alpha"),
        ({"hypotheses": [{"says": "", "factor": "alpha", "level": 0, "expects": "lower"}]}, "is compared with 0.0 itself"),
        ({"hypotheses": [{"says": "", "factor": "alpha", "level": [3], "expects": "lower"}]}, r"level \[3\]: give a number"),
        ({"grid": {"alpha": [0]}, "hypotheses": [{"says": "", "factor": "alpha", "expects": "differs"}]}, "with 0.0 itself"),
        ({"grid": {"x": [{1: 2}]}}, "mine.yaml: grid.x: option 1: there is none"),
        ({"base": {1: 2}}, "mine.yaml: base.1: option 1: there is none"),
        ({"grid": {"beta": [None]}, "base": {"preset": "table6.1/{beta:g}"}}, "base.preset table6.1/{beta:g}: TypeError"),
        ({"search": "halving", "min_epochs": 100}, "run alpha0-seed0: --epochs 100: halving first decides after 100: lower"),
        ({"search": "halving", "base": {"val_every": 100}}, "--epochs 100: halving first decides after 100: lower"),
        ({"for_each": "alpha"}, "mine.yaml: for_each 'alpha': give a list"),
        ({"hypotheses": [{"says": "", "factor": "alpha", "level": 3, "expects": "lower"}]}, r"hypotheses\[0\].level 3: choose"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_its_file_and_key(tmp_path, keys, message):
    with pytest.raises(InputError, match=message) as error:
        plan(read(write(tmp_path, **keys)), {})
    assert "\n" not in str(error.value)


def test_values_as_yaml_has_them(tmp_path):
    """Among them the example in the docstring of spec.py, whose 5e-4 is a text for YAML."""
    example = spec.__doc__.split("YAML file:")[1]
    (tmp_path / "example.yaml").write_text(example)
    found = read(str(tmp_path / "example.yaml"))
    assert found.base == {"preset": "table6.1/trades", "epochs": 30}
    (decay,) = found.hypotheses
    assert (decay["levels"], decay["than"]) == ([5e-4], 1e-4)
    keys = {"base": {"epochs": 3.0, "flip": 1, "mean": ["1e-1"]}, "grid": {"milestones": [None, [2.0]]}, "seeds": 2.0}
    cells = plan(read(write(tmp_path, **keys)), {}).cells
    assert list(cells) == [f"milestones-{m}-seed{s}" for s in (0, 1) for m in (None, 2)]
    config = cells["milestones-2-seed1"].config
    assert [(v, type(v)) for v in (config.epochs, config.flip, *config.mean)] == [(3, int), (True, bool), (0.1, float)]


def test_other_errors(tmp_path):
    with pytest.raises(InputError, match="sweep alpha-serch: there is none: did you mean alpha-search"):
        read("alpha-serch")
    (tmp_path / "bad.yaml").write_text("about: x\ngrid: [1\nbase: 2\n")
    with pytest.raises(InputError, match="bad.yaml: line 3: it cannot be read as YAML .expected ',' or ']', but got ':'"):
        read(str(tmp_path / "bad.yaml"))
    laughs = "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9))
    for text in ("a0: &a0 [1]\n" + laughs, "grid: &a [*a]\n", "[" * 10_000, "grid: !!python/object/apply:os.getcwd []\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match="bad.yaml: .*it cannot be read as YAML"):
            read(str(tmp_path / "bad.yaml"))
    with pytest.raises(InputError, match="--alpha: alpha-search sweeps it"):
        plan(read("alpha-search"), {"alpha": 0.0})
    with pytest.raises(InputError, match="sweep --out: its spec comes first"):
        sweep(["--out", "x", "alpha-search"])
    with pytest.raises(InputError, match="--milestones .75, 90.: not all come by epoch 10"):
        plan(read("figure6.1"), {"epochs": 10})


def test_errors_of_the_command(tmp_path, monkeypatch, capsys):
    file = write(tmp_path, base={"lr": "high"})
    said = helpers.error(monkeypatch, capsys, "sweep", file, "--data", "digits")
    assert said == f"spat-train: error: {file}: base.lr 'high': give a number\n"
    with pytest.raises(SystemExit, match="2"):
        helpers.command(monkeypatch, "sweep", "alpha-search", "--epochs", "many")
    assert "--epochs" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        helpers.command(monkeypatch, "sweep", "alpha-search", "--epoch", "3")
    assert "spat-train train --help" in capsys.readouterr().err


def test_help_has_the_example(capsys):
    with pytest.raises(SystemExit):
        sweep(["--help"])
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert all(line.strip() in said for line in spec.__doc__.splitlines())


def test_listing_and_dry_run(tmp_path, capsys):
    sweep([])
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [[n, str(read(n).runs)] for n in READY]
    sweep([write(tmp_path, base={"epochs": 3}), "--dry-run", "--data", "digits", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert [Path(training_config(shlex.split(line)[2:]).out).name for line in lines] == ["alpha0-seed0", "alpha0.2-seed0"]
    assert training_config(shlex.split(lines[0])[2:]) == Config(
        data="digits", epochs=3, resume=True, out=tmp_path / "out" / "alpha0-seed0"
    )
    assert not (tmp_path / "out").exists()

"""Which finished runs are taken: by preset, in what order, from which data; what is said where there are none."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")


from spat_train.config import Config
from spat_train.errors import InputError
from spat_train.papers.figures import FIGURES, radius
from spat_train.papers.figures.capacity import family_and_width
from spat_train.papers.figures.semantics import attacked_and_judge
from spat_train.papers.options import Options
from spat_train.papers.reported import TABLES
from spat_train.papers.runs import Run, differences, find_runs, format_eps, read_run, title
from spat_train.papers.selection import RunSpec, candidates
from spat_train.presets import PRESETS
from spat_train.training.check import check
from tests.papers.finished_runs import copy_run


def run(name="run", preset="", **settings) -> Run:
    return Run(Path("nowhere") / name, replace(PRESETS.get(preset, Config()), **settings))


def names(runs) -> list[str]:
    return [found.folder.name for found in runs]


def test_names_and_radii():
    models = ["wrn-34-10", "mnist-cnn/8", "mnist-cnn", "mnist-b", "resnet-18/stl10", "small-cnn"]
    assert [family_and_width(name)[1] for name in models] == [10, 8, 16, None, None, None]
    assert family_and_width("mnist-cnn")[0] == family_and_width("mnist-cnn/2")[0] != family_and_width("wrn-34-2")[0]
    assert title(Config(method="mart", alpha=0.3)) == "MART+SPAT(.3)"
    assert title(Config(method="standard")) == "standard"
    assert [format_eps(eps) for eps in (8, 76.5, 0.031 * 255)] == ["8/255", "0.3", "0.031"]
    standard, robust = run("a", method="standard", eps=4.0), run("b", eps=8.0, eval_eps=16.0)
    assert [radius([standard, robust], Options()), radius([standard], Options())] == [16 / 255, 4 / 255]
    assert radius([robust], Options(eps=2.0)) == 2 / 255


def test_a_run_is_what_its_preset_says():
    spec = RunSpec("table6.1/mart+spat")
    smaller = {"data": "digits", "epochs": 3, "limit": 100, "model": "wrn-10-2", "eps": 16.0}
    runs = [run("c", spec.preset, seed=1), run("b", spec.preset), run("a", spec.preset), run("x", spec.preset, **smaller)]
    unfinished = run("unfinished", spec.preset)
    unfinished.__dict__["epochs"] = 1
    assert names(sorted([unfinished, *runs], key=spec.rank)) == ["a", "b", "c", "x", "unfinished"]
    assert all(map(spec.fits, runs))
    others = {"preset": ""}, {"preset": "table6.2/mart+spat"}, {"method": "trades"}, {"alpha": 0.2}
    assert not any(spec.fits(replace(runs[0], config=replace(spec.config, **changed))) for changed in others)
    variant, plain = RunSpec("madry-mnist/natural", model="mnist-b"), run(preset="madry-mnist/natural")
    assert (variant.fits(run(preset="madry-mnist/natural", model="mnist-b")), variant.fits(plain)) == (True, False)
    variant, plain = RunSpec("table6.1/madry", method="standard"), run(preset="table6.1/madry")
    assert (variant.fits(run(preset="table6.1/madry", method="standard")), variant.fits(plain)) == (True, False)


def test_the_command_that_trains_what_is_missing():
    specs = TABLES["madry-mnist"].runs
    expected = "spat-train train --preset madry-mnist/madry --out 'my runs/madry-mnist-madry'"
    assert specs["A"].command(Path("my runs")) == expected
    assert "--seed 1 --out runs/madry-mnist-madry-1" in specs["A'"].command(None)
    assert "--model mnist-b --data digits --out" in specs["B"].command(None, "digits")
    assert "--extra PSEUDO_LABELS" in TABLES["6.3"].runs["rst"].command(None)
    assert "--preset table6.1/madry --method standard" in TABLES["5.1"].runs["standard"].command(None, "cifar10")
    smaller = {"limit": 2000, "epochs": 6, "milestones": None, "model": "small-cnn", "extra": Path("x.pickle")}
    for spec in (spec for table in TABLES.values() for spec in table.runs.values()):
        check(replace(spec.config, **smaller))


def test_differences_are_those_that_change_the_weights():
    source = PRESETS["table6.1/mart"]
    assert differences(run(preset="table6.1/mart", seed=7, out=Path("y"), device="cpu", workers=9), source) == []
    assert differences(run(preset="table6.1/mart", step_size=2.0, beta=5.0), source) == []  # as by default
    changed = {"model": "wrn-10-2", "limit": 5000, "epochs": 6, "milestones": None, "steps": 5, "method": "madry"}
    assert differences(run(preset="table6.1/mart", **changed), source) == [
        "method Madry (MART)", "model wrn-10-2 (wrn-34-10)", "training images 5,000 (all)", "epochs 6 (90)",
        "attack steps 5 (10)", "beta none (5)",
    ]  # fmt: skip
    views = {"crop": "resized", "rand_augment": (2, 9), "accumulate": 2, "attack": "apgd", "warmup": 5.0}
    assert differences(run(preset="table6.1/mart", **views), source) == [
        "attack apgd (pgd)", "step size none (2/255)", "crops resized (padded)", "RandAugment (2, 9) (default)",
        "parts of a batch 2 (1)", "warm-up 5 (0)",
    ]  # fmt: skip
    natural = PRESETS["madry-mnist/natural"]  # it has no attack whose settings could differ
    assert differences(run(preset="madry-mnist/natural", eps=8.0, steps=3, model="mnist-cnn/16"), natural) == []
    unfinished = run(preset="table6.1/mart")
    unfinished.__dict__["epochs"] = 1.5
    assert differences(unfinished, source) == ["stopped after 1.5 of its 90 epochs"]
    assert differences(run(preset="table6.3/rst", extra=Path("x.pickle")), PRESETS["table6.3/rst"]) == []


def test_runs_in_a_folder(finished_runs, tmp_path, capsys):
    assert names(find_runs(finished_runs)) == ["b", "madry", "madry-seed1", "standard", "wide", "wide-standard"]
    assert all(found.epochs == found.config.epochs for found in find_runs(finished_runs))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    assert find_runs(tmp_path) == find_runs(None) == find_runs(tmp_path / "nowhere") == []
    with pytest.raises(InputError, match=r"neither best.pt nor last.pt"):
        read_run(tmp_path / "begun")
    for content, reason in (('{"method": "mad', "cannot be read"), ("[1]", "is no run's")):
        broken = copy_run(finished_runs / "b", tmp_path / reason[:2])
        (broken / "config.json").write_text(content)
        assert find_runs(tmp_path) == []
        assert re.search(f"left out {broken}.*{reason}", capsys.readouterr().err)
        (broken / "config.json").unlink()


def test_the_runs_of_a_table(finished_runs, tmp_path):
    def keys(given=(), runs=finished_runs, **options):
        found = candidates(TABLES["madry-mnist"].runs, find_runs(runs), Options(runs=runs, **options), dict(given))
        return {key: names(runs) for key, runs in found.items()}

    assert keys() == {"A": ["madry", "wide", "madry-seed1"], "A'": ["madry-seed1"], "B": ["b"]}
    wide = finished_runs / "wide"
    assert keys({"A": wide}) == {"A": ["wide"], "A'": [], "B": ["b"]}  # A' is trained as A was, from another seed
    assert keys({"A": wide}, runs=None) == {"A": ["wide"], "A'": [], "B": []}
    assert keys(data="digits") == {"A": [], "A'": [], "B": []}
    copy_run(finished_runs / "madry", tmp_path / "on-digits", data="digits")
    assert keys(runs=tmp_path)["A"] == ["on-digits"]
    copy_run(finished_runs / "madry", tmp_path / "on-mnist")
    assert keys(runs=tmp_path)["A"] == ["on-mnist"]  # the source's
    assert keys(runs=tmp_path, data="digits")["A"] == ["on-digits"]
    copy_run(finished_runs / "madry", tmp_path / "on-cifar", data="cifar10")
    (tmp_path / "on-mnist" / "config.json").unlink()
    with pytest.raises(InputError, match=r"--data: --runs .* holds runs on cifar10, digits: say which"):
        keys(runs=tmp_path)


def test_the_runs_of_a_figure(finished_runs, tmp_path, capsys):
    def taken(figure, *given, runs=finished_runs, **options):
        given = [finished_runs / name for name in given]
        return names(FIGURES[figure].selector.take(figure, given, Options(runs=runs, **options)))

    assert taken("5.3") == ["standard", "madry"]
    assert "figure 5.3: 6 runs in --runs fit" in capsys.readouterr().out
    assert taken("5.2") == ["madry"]
    assert sorted(taken("training-loss")) == ["madry", "madry-seed1", "wide"]
    assert taken("budget") == ["standard", "madry"]
    assert sorted(taken("capacity")) == ["madry", "standard", "wide", "wide-standard"]
    assert taken("steps", "b", "wide") == ["b", "wide"]
    capsys.readouterr()
    assert taken("5.2", "standard", "madry") == ["madry"]
    assert capsys.readouterr().out == "figure 5.2: standard runs are left out, it needs one robust run\n"
    assert sorted(taken("gradients")) == ["b", "madry", "madry-seed1", "standard", "wide", "wide-standard"]
    assert taken("semantics", "wide", "madry") == ["wide", "madry"]
    assert taken("semantics", "madry", "wide") == ["madry", "wide"]
    assert taken("semantics", "standard", "wide") == ["standard", "wide"]
    attacked, judge = taken("semantics")
    known = {name: read_run(finished_runs / name).held_out for name in ("madry", "madry-seed1", "wide")}
    assert attacked != judge
    assert known[judge] == max(known.values())
    for wrong in (["madry"], ["madry", "madry"], ["madry", "wide", "madry-seed1"]):
        with pytest.raises(InputError, match="figure semantics: it needs two runs, the attacked one and then the judge"):
            taken("semantics", *wrong)
    for alpha in (0, 0.4):
        copy_run(finished_runs / "madry", tmp_path / f"a{alpha}", preset=f"figure6.1/eps8-alpha{alpha:g}", alpha=alpha)
    assert taken("6.1", runs=tmp_path) == ["a0", "a0.4"]
    with pytest.raises(InputError, match=r"has no run with --preset figure6.2/eps4-alpha0: .*train --preset figure6.2/eps4"):
        taken("6.2", runs=tmp_path)


def test_the_best_on_held_out_images_judges(tmp_path):
    """The runs are at one radius. A SPAT run of another architecture or seed is attacked rather than others."""

    def made(name: str, *pgd: float, **settings) -> Run:
        (tmp_path / name).mkdir()
        lines = [json.dumps({"kind": "validation", "step": i, "epoch": i, "clean": 90.0, "pgd": v}) for i, v in enumerate(pgd)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines))
        return Run(tmp_path / name, Config(**settings))

    best, twin, other = made("best", 30.0, 60.0, 50.0), made("twin", 59.0, alpha=0.2), made("other", 40.0, seed=1)
    spat, easy = made("spat", 20.0, seed=1, alpha=0.2), made("easy", 90.0, eps=4.0)
    unknown = Run(tmp_path / "unknown", Config(seed=2))
    assert [run.held_out for run in (best, unknown)] == [60.0, None]
    assert attacked_and_judge([twin, unknown, best]) == [twin, best]
    assert attacked_and_judge([best, twin, easy, other]) == [other, best]
    assert attacked_and_judge([best, twin, other, spat]) == [spat, best]
    assert attacked_and_judge([best, unknown]) == [best]  # too few


def test_runs_without_a_preset_are_to_be_named(finished_runs, tmp_path):
    """As version 0.1.0 wrote them where --preset was not given."""
    for name in ("standard", "madry"):
        copy_run(finished_runs / name, tmp_path / name, preset="")
    with pytest.raises(InputError, match="figure 5.3: it needs one standard and one robust run") as caught:
        FIGURES["5.3"].selector.take("5.3", [], Options(runs=tmp_path))
    assert f"name them, such as spat-train figure 5.3 {tmp_path}/madry {tmp_path}/standard, or" in str(caught.value)
    assert "or train it: spat-train train --preset table6.1/madry --method standard --out" in str(caught.value)

"""The numbers of a sweep's report, against formulas and computations by hand."""

import math
import re
from pathlib import Path

import pytest

pytest.importorskip("optuna")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from scipy import stats

from spat_train.sweeps import report, search
from tests.sweeps.helpers import formula, planned, study_of, work

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
T3 = 3.182446  # Student's t for 95 % and 3 degrees of freedom, from tables


def rows(values: dict) -> list[dict]:
    """Complete runs by (alpha, eps, seed)."""
    names = "alpha", "eps", "seed"
    return [
        {"run": f"run{key}", "params": dict(zip(names, key, strict=True)), "pgd": {"accuracy": value}}
        for key, value in values.items()
    ]


def test_an_effect_is_the_mean_of_paired_differences():
    values = {
        (0, 4, 0): 50,
        (0, 4, 1): 52,
        (0, 8, 0): 40,
        (0, 8, 1): 41,
        (1, 4, 0): 51,
        (1, 4, 1): 55,
        (1, 8, 0): 42,
        (1, 8, 1): 43,
    }
    found = report.effect(rows(values), "pgd", "alpha", 1, 0)
    half = T3 * math.sqrt(((1 - 2) ** 2 + (3 - 2) ** 2) / 3) / 2  # of the differences 1, 3, 2 and 2
    assert found == {
        "level": 1,
        "than": 0,
        "pairs": 4,
        "mean": 2,
        "low": pytest.approx(2 - half, abs=1e-5),
        "high": pytest.approx(2 + half, abs=1e-5),
    }
    a, b = ([value for key, value in values.items() if key[0] == alpha] for alpha in (0, 1))
    theirs = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high))
    eps = report.effect(rows(values), "pgd", "eps", 8, 4)
    assert (eps["mean"], eps["pairs"]) == (pytest.approx((-10 - 11 - 9 - 12) / 4), 4)


def test_runs_without_a_partner_are_left_out():
    values, none = {(0, 4, 0): 50, (1, 4, 0): 53, (1, 8, 0): 20, (2, 4, 0): 1}, {"low": None, "high": None}
    assert report.effect(rows(values), "pgd", "alpha", 1, 0) == {"level": 1, "than": 0, "pairs": 1, "mean": 3} | none
    assert report.effect(rows(values), "pgd", "alpha", 3, 0) == {"level": 3, "than": 0, "pairs": 0, "mean": None} | none


def test_equal_differences_have_no_interval():
    """As on few images: that two seeds differ by just one image is no certainty."""
    values = {(0, 4, 0): 50, (0, 4, 1): 55, (1, 4, 0): 55, (1, 4, 1): 60}
    found = report.effect(rows(values), "pgd", "alpha", 1, 0)
    assert (found["mean"], found["low"], found["high"]) == (5, None, None)


def test_more_runs_on_the_same_images_do_not_narrow_the_interval():
    low, high = (100 * p for p in stats.binomtest(100, 200).proportion_ci(0.95, method="wilson"))
    assert report._accuracy([45.0, 50.0, 55.0], 200) == {"accuracy": 50, "low": pytest.approx(low), "high": pytest.approx(high)}


def test_the_best_alpha_for_each_eps(tmp_path):
    sweep = planned(tmp_path, {"alpha": [0, 0.1, 0.2], "eps": [4, 8]}, seeds=4, for_each=["eps"])
    noise = {0: (0, 0, 0, 0), 0.1: (5, 6, 5, 6), 0.2: (5, 5, 6, 5)}
    values = {
        (alpha, eps, s): 50 - eps + noise[alpha][s] * (1 if eps == 4 else -1)
        for alpha in noise
        for eps in (4, 8)
        for s in range(4)
    }
    first, second = report.suiting(sweep.spec, rows(values), "pgd")
    close, far = first.pop("leads")
    half = float(stats.t.ppf(1 - 0.025 / 2, 3)) * math.sqrt(1 / 3) / 2
    ends = {"low": pytest.approx(5.5 - half), "high": pytest.approx(5.5 + half)}
    assert far == {"over": {"alpha": 0}, "pairs": 4, "mean": 5.5} | ends
    assert (close["over"], close["mean"]) == ({"alpha": 0.2}, 0.25)
    assert first == {
        "for": {"eps": 4}, "setting": {"alpha": 0.1}, "accuracy": 51.5, "seeds": 4, "run": "run(0.1, 4, 0)",
        "alike": [{"alpha": 0.2}],
    }  # fmt: skip
    assert (second["setting"], [lead["over"]["alpha"] for lead in second["leads"]]) == ({"alpha": 0}, [0.2, 0.1])
    assert second["alike"] == []


def test_the_best_setting_is_not_that_of_the_best_run(tmp_path):
    sweep = planned(tmp_path, {"alpha": [0, 0.1], "eps": [4, 8]}, seeds=2)
    values = {(0, 4, 0): 70, (0, 4, 1): 40, (0, 8, 0): 60, (0, 8, 1): 61, (0.1, 8, 0): 59, (0.1, 8, 1): 58}
    (found,) = report.suiting(sweep.spec, rows(values), "pgd")
    assert (found["for"], found["setting"], found["accuracy"], found["run"]) == ({}, {"alpha": 0, "eps": 8}, 60.5, "run(0, 8, 0)")
    assert [(lead["over"]["alpha"], lead["mean"]) for lead in found["leads"]] == [(0.1, 2), (0, 5.5)]


def test_the_best_level_is_compared_with_the_second():
    values = {(alpha, 8, 0): accuracy for alpha, accuracy in enumerate([50, 53, 57, 55, 40, 41])}
    pairs = report.level_pairs(rows(values), "pgd", "alpha", range(7))
    assert pairs == [(2, 3), (2, 1), (2, 0), (2, 5), (2, 4), (2, 6), (3, 1), (3, 0), (3, 5), (3, 4)]
    assert report.level_pairs([], "pgd", "alpha", ["a", "b"]) == [("a", "b")]


def test_the_best_has_the_most_seeds_and_all_others_are_compared_at_once(tmp_path):
    sweep = planned(tmp_path, {"alpha": [0, 0.1, 0.2], "eps": [4, 8]}, seeds=4, for_each=["eps"])
    values = {(0, 4, s): 50.0 for s in range(4)} | {(0.1, 4, s): 46 + 2 * (-1) ** s for s in range(4)} | {(0.2, 4, 0): 60.0}
    (found,) = report.suiting(sweep.spec, rows(values), "pgd")  # 95 % of 4 pairs: half length 3.7; both at once: 4.8
    assert (found["setting"], found["alike"]) == ({"alpha": 0}, [{"alpha": 0.1}, {"alpha": 0.2}])
    (lonely,) = report.suiting(sweep.spec, rows({(0.1, 4, 0): 50.0}), "pgd")
    text, command = report._best_lines(sweep.spec, lonely | {"command": "spat-train train"}, "no pair yet")
    assert text == "- **eps 4, alpha 0.1**: 50.00 % (one seed)\n  - No other has a complete run"
    assert command.strip() == "spat-train train"


@pytest.mark.parametrize(
    ("expects", "shift", "noise", "verdict"),
    [
        ("higher", 3, 1, "supported"),
        ("higher", -3, 1, "against"),
        ("higher", 3, 30, "undecided"),
        ("lower", -3, 1, "supported"),
        ("lower", 3, 1, "against"),
        ("differs", -3, 1, "supported"), ("differs", 3, 30, "undecided"),
    ],
)  # fmt: skip
def test_verdicts(tmp_path, expects, shift, noise, verdict):
    hypothesis = {"says": "x", "factor": "alpha", "level": 0.1, "expects": expects}
    sweep = planned(tmp_path, {"alpha": [0, 0.1]}, seeds=4, hypotheses=[hypothesis, hypothesis | {"factor": "steps"}])
    found = rows({(a, 8, s): 50 + (a > 0) * (shift + noise * (-1) ** s) for a in (0, 0.1) for s in range(4)})
    judged, other = (report.judged(found, "pgd", each) for each in sweep.spec.hypotheses)
    assert (judged["verdict"], other["verdict"]) == (verdict, "not swept")
    assert judged["effects"][0]["mean"] == shift


def test_several_levels_are_judged_with_bonferroni(tmp_path):
    given = {"says": "x", "factor": "alpha", "expects": "differs"}
    (hypothesis,) = planned(tmp_path, {"alpha": [0, 0.1, 0.2]}, seeds=4, hypotheses=[given]).spec.hypotheses
    for mean, verdict in ((4.2, "undecided"), (5, "supported")):  # 95 % intervals of half lengths 3.7, and 97.5 % ones of 4.8
        found = rows({(a, 8, s): 50 + (a == 0.1) * (mean + 2 * (-1) ** s) for a in (0, 0.1, 0.2) for s in range(4)})
        assert report.effect(found, "pgd", "alpha", 0.1, 0)["low"] > 0
        judged = report.judged(found, "pgd", hypothesis)
        low = mean - float(stats.t.ppf(1 - 0.025 / 2, 3)) * math.sqrt(16 / 3) / 2
        assert (judged["verdict"], judged["effects"][0]["low"]) == (verdict, pytest.approx(low))


@pytest.mark.parametrize("factors", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_the_files(tmp_path, monkeypatch, factors):
    grid = dict(
        [("alpha", [0, 0.1]), ("bn_mode", ["eval", "train"]), ("batch", [{"lr": 0.1, "epochs": 2}, {"lr": 0.2, "epochs": 3}])][
            :factors
        ]
    )
    sweep = planned(tmp_path, grid)
    monkeypatch.setattr(search, "train", formula(lambda c, epoch: 40 + 100 * c.alpha - epoch))
    before = report.write(sweep, search.latest(study_of(sweep)))
    assert [path.name for path in before] == ["sweep.md", "sweep.json"]
    assert f"Runs: {2**factors} waiting" in before[0].read_text()
    paths = report.write(sweep, search.latest(work(sweep)))
    assert [path.name for path in paths] == ["sweep.md", "sweep.json", "sweep.png", "sweep.pdf"]
    assert all(path.stat().st_size for path in paths)
    text = Path(paths[0]).read_text()
    low, high = stats.binomtest(98, 200).proportion_ci(0.95, method="wilson")  # 49 % after the first epoch
    best = next(name for name, cell in sweep.cells.items() if cell.config.alpha == 0.1)
    assert f"49.00 ({100 * low:.2f} to {100 * high:.2f})" in text
    assert re.search(r"\*\*alpha 0.1[^*]*\*\*: 49.00 % \(one seed\)", text)
    assert f"--out {tmp_path / 'out' / best} --resume" in text
    assert "| alpha | 0.1 | 0.0 | +10.00 (" in text
    assert f"59.00 ({100 * stats.binomtest(118, 200).proportion_ci(0.95, method='wilson').low:.2f} to" in text


@pytest.mark.parametrize(
    ("levels", "scale", "places"),
    [
        ([0.1, 1e-4, 1e-2], "log", [1e-4, 1e-2, 0.1]),
        ([0.1, 0.0, 1e-3], "linear", [0, 1, 2]),
        ([0.0, 0.2, 1.0], "linear", [0, 0.2, 1]),
    ],
)
def test_axes_of_numbers(tmp_path, levels, scale, places):
    sweep = planned(tmp_path, {"weight_decay": levels}, seeds=2)
    point = {"accuracy": 50.0, "low": 40.0, "high": 60.0}
    known = [
        {"params": cell.params, "state": "complete", "images": 200, "clean": point, "pgd": point} for cell in sweep.cells.values()
    ]
    figure = report.draw(sweep.spec, [*known, {"state": "pruned"}])
    ax = figure.axes[0]
    assert (ax.get_xscale(), list(ax.get_xticks()), list(ax.lines[0].get_xdata())) == (scale, places, places)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [f"{level:g}" for level in sorted(levels)]
    assert not ax.lines[0].get_clip_on()
    assert "95 % (Wilson)" in figure.get_suptitle()
    assert "Seeds: 2. Drawn: 6 complete of 7 runs, without pruned ones." in figure.get_suptitle()


def test_after_the_end_no_pair_is_awaited(tmp_path, monkeypatch):
    sweep = planned(tmp_path, {"alpha": [0.1, 0.2]}, search="halving")
    waiting = [report.row(name, cell.params, None) for name, cell in sweep.cells.items()]
    assert "| no pair yet |" in report.markdown(sweep.spec, report.numbers(sweep, waiting))
    pruned = [r | {"state": "pruned"} for r in waiting]
    text = report.markdown(sweep.spec, report.numbers(sweep, pruned))
    assert "| no pair: pruned |" in text
    assert "the first runs to\ncome to a decision always go on" in text

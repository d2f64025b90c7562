"""Evaluations: attacks with the settings of their sources, the truth about every image, files that any kill leaves whole."""

import base64
import copy
import html
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from multiprocessing import connection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

import spat_kernels
from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.data.images import Folder, Images, floats
from spat_train.errors import InputError
from spat_train.evaluation import attack_specs as registry
from spat_train.evaluation import evaluate as module
from spat_train.evaluation.alarms import alarms, rechecked
from spat_train.evaluation.attack_specs import NAMED, Attack, parse, parse_all
from spat_train.evaluation.command import default_folder
from spat_train.evaluation.evaluate import TEST, accuracies, evaluate, predict, validation, wilson
from spat_train.evaluation.record_log import file_name
from spat_train.evaluation.result import WORST
from spat_train.models.checkpoints import load_model
from spat_train.runtime import logs
from spat_train.runtime.atomic_write import SaveError
from spat_train.runtime.seeding import derived_seed
from spat_train.training.trainer import train
from tests.training.helpers import on_one_thread, processes

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 15.3 / 255


class Features(nn.Module):
    """Random features of 8x8 digits, and a classifier that `fitted` solves for: a good network without training."""

    def __init__(self, num_classes: int = 10, width: int = 300):
        super().__init__()
        self.features = nn.Linear(64, width)
        self.classifier = nn.Linear(width, num_classes, bias=False)

    def forward(self, x):
        return self.classifier(self.features(x.flatten(1)).relu())


def fitted(seed: int = 0, dtype: torch.dtype = torch.float32) -> Features:
    torch.manual_seed(seed)
    x, y = floats(load("digits").train, torch.arange(1347), "cpu")
    model = Features().double()
    with torch.no_grad():
        hidden = model.features(x.double().flatten(1)).relu()
        target = 10 * nn.functional.one_hot(y, 10).double() - 1
        gram = hidden.T @ hidden + 0.1 * torch.eye(hidden.shape[1], dtype=torch.float64)
        model.classifier.weight.copy_(torch.linalg.solve(gram, hidden.T @ target).T)
    return model.to(dtype).eval()


def digits(count: int = 60, dtype: torch.dtype = torch.float32) -> tuple:
    x, y = floats(load("digits").test, torch.arange(count), "cpu", torch.contiguous_format)
    return x.to(dtype), y


def quiet(model, images, attacks, **how):
    return evaluate(model, images, attacks, **{"eps": EPS, "bar": None} | how)


# ---- attacks by name


def test_named_attacks_are_those_of_the_sources(monkeypatch):
    """Written out from the papers, not from the table: steps, length of a step at eps 0.3, start, loss."""
    calls = []
    monkeypatch.setattr(registry, "pgd", lambda model, x, y, eps, **how: calls.append(how) or x)
    x, y = digits(4)
    ce, kl = spat_kernels.losses.CrossEntropy(), spat_kernels.losses.KLDivergence()
    cw, cw_plus = spat_kernels.losses.Margin(0.0), spat_kernels.losses.Margin(50.0)
    expected = {
        "fgsm": (1, 0.3, False, ce), "fgsm-rs": (1, 0.375, True, ce),
        "pgd-7": (7, 0.075, True, ce), "pgd-10": (10, 0.075, True, ce), "pgd-20": (20, 0.03, True, ce),
        "pgd-40": (40, 0.01, True, ce), "pgd-100": (100, 0.01, True, ce),
        "cw-30": (30, 0.03, True, cw_plus), "cw-40": (40, 0.01, True, cw), "cw+-40": (40, 0.01, True, cw_plus),
        "pgd-kl-20": (20, 0.03, True, kl), "pgd-ls-20:alpha=0.3": (20, 0.03, True, spat_kernels.losses.LabelSmoothedCE(0.3)),
        "pgd-l2-20": (20, None, True, ce), "pgd-l2-100": (100, None, True, ce),
    }  # fmt: skip
    for name, (steps, step_size, random_start, loss) in expected.items():
        calls.clear()
        attack = parse(name)
        attack(nn.Flatten(), x, y, 0.3, torch.Generator())
        *drawn, how = calls
        assert how["steps"] == steps and how["step_size"] == (step_size and pytest.approx(step_size)), name
        assert (len(drawn) == 1 and "start" in how) is random_start and how["loss"] == loss and not how["targeted"], name
        assert how["norm"] == ("l2" if "l2" in name else "linf") and attack.restarts == 1, name
    assert parse("noise").steps == 0
    assert parse("clean").describe() == "no attack"
    engines = {name: vars(parse(name)) for name in NAMED if not NAMED[name][0].startswith(("pgd", "clean"))}
    assert {name: (e.get("steps"), e.get("targets"), e.get("queries"), e.get("version")) for name, e in engines.items()} == {
        "apgd-ce": (100, None, None, None), "apgd-dlr": (100, None, None, None), "apgd-t": (100, 9, None, None),
        "fab-t": (100, 9, None, None), "square": (None, None, 5000, None), "autoattack": (100, None, 5000, "standard"),
        "autoattack-plus": (100, None, 5000, "plus"), "autoattack-rand": (100, None, 5000, "rand"),
    }  # fmt: skip
    assert engines["apgd-ce"]["loss"] == "ce"
    assert engines["apgd-dlr"]["loss"] == engines["apgd-t"]["loss"] == "dlr"


class Wavy(nn.Module):
    """Steps along its gradients go past its boundaries and back."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).double())

    def forward(self, x):
        return torch.sin(12 * x.flatten(1) @ self.weight.T)


@pytest.mark.parametrize(
    ("spec", "eps", "steps", "step_size"),
    [
        ("pgd-20-rst", 0.031, 20, 0.007),
        ("pgd:steps=8:right_at=every", 0.031, 8, 0.031 / 4),
        ("pgd-l2-10:right_at=every", 0.2, 10, 0.05),
    ],
)
def test_right_only_if_right_at_every_iterate(spec, eps, steps, step_size):
    model, (x, _), attack = Wavy(), digits(200, torch.float64), parse(spec)
    y = predict(model, x)
    point = attack._draw(x, y, eps, torch.Generator().manual_seed(1))[0]
    assert torch.equal(point, x) == (spec == "pgd-20-rst")
    points, rights = [], []
    for _ in range(steps):
        leaf = point.clone().requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        if attack.norm == "linf":
            point = (point + step_size * grad.sign()).clamp(x - eps, x + eps)
        else:
            moved = point + step_size * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - x
            point = x + moved * (eps / moved.flatten(1).norm(dim=1).clamp(min=eps)).view(-1, 1, 1, 1)
        point = point.clamp(0, 1)
        points.append(point)
        rights.append(model(point).argmax(1) == y)
    every = torch.stack(rights).all(0)
    first_wrong = torch.stack(rights).byte().argmin(0).where(~every, steps - 1)
    found = attack(model, x, y, eps, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, torch.stack(points)[first_wrong, torch.arange(len(x))], rtol=0, atol=1e-9)
    assert torch.equal(predict(model, found) == y, every)
    assert (rights[-1] & ~every).any()


def test_the_grammar():
    attack = parse("pgd:steps=50:step=1/20:loss=margin:restarts=5:eps=16/255:norm=l2:start=clean:target=random")
    assert (attack.steps, attack.step, attack.loss, attack.restarts, attack.norm) == (50, 0.05, "margin", 5, "l2")
    assert (attack.eps, attack.start, attack.target) == (16 / 255, "clean", "random")
    assert attack.runs(10) == 5
    smoothed = parse("pgd-20:alpha=0.2:steps=50")
    assert smoothed.settings == (("alpha", 0.2),)
    assert smoothed.steps == 50
    assert smoothed.spec == "pgd:alpha=0.2:steps=50:step=0.1"
    for name, spec in (  # what evaluations have kept
        ("pgd-ls-20:alpha=1/4:eps=1/8", "pgd:eps=0.125:loss=ls:alpha=0.25:steps=20:step=0.1"),
        ("cw-40:step=1/8", "pgd:loss=margin:kappa=0.0:steps=40:step=0.125"),
        ("apgd-t", "apgd:loss=dlr:targets=9"),
    ):
        assert parse(name).spec == spec
    twenty = parse("pgd-40x20")
    assert (twenty.restarts, twenty.steps, twenty.name) == (20, 40, "pgd-40x20")
    assert parse("pgd-40-least-likely").target == "least-likely"
    assert parse("pgd-40-random").target == "random"
    assert parse("pgd-7-allx2").runs(10) == 18
    assert parse("aa").name == "autoattack"
    assert parse("autoattack-rand").version == "rand"
    for name, plain in (("AA", "autoattack"), ("AutoAttack", "autoattack"), ("PGD-40X20", "pgd-40x20"), ("APGD-T", "apgd-t")):
        assert parse(name) == parse(plain)
        assert parse(name).name == plain
    for norm, plain in (("Linf", "linf"), ("L2", "l2"), ("L∞", "linf")):
        assert parse(f"pgd:norm={norm}").norm == plain
    assert parse("pgd:loss=CE:start=Clean").spec == "pgd:start=clean"
    assert parse("AA:version=Rand").version == "rand"
    assert parse("AAx2").restarts == 2
    assert parse("aa-plusx3:steps=5").name == "autoattack-plusx3:steps=5"
    for own, text in (
        (registry.PGD(norm="L2", start="Clean"), "pgd:norm=l2:start=clean"),
        (registry.FAB(norm="L∞", targets=np.int64(3)), "fab:targets=3"),
    ):
        assert own == parse(text)
        assert own.radius(0.1, 0.5) == parse(text).radius(0.1, 0.5)
    for wrong, message in (({"norm": "l1"}, "norm=l1: choose one of linf, l2"), ({"steps": 2.5}, "steps=2.5: give a whole")):
        with pytest.raises(ValueError, match=message):
            registry.PGD(**wrong)
    assert list(parse_all("pgd-20,fgsm")) == ["clean", "pgd-20", "fgsm"]
    assert list(parse_all(["clean"])) == ["clean"]
    for name in NAMED:
        attack = parse(name + ":alpha=0.1" * (name == "pgd-ls-20"))
        again = parse(attack.spec)
        assert again.spec == attack.spec
        assert again.describe() == attack.describe()
        assert parse(attack) is attack
        assert attack.radius(0.1, 0.5) == (0.5 if attack.norm == "l2" else 0.1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pgd-21", r"attack pgd-21: there is none \(did you mean pgd-20"),
        ("autoatack", "did you mean autoattack"),
        ("Auto-Attack", "did you mean autoattack"),
        ("", "there is none: see spat-train attacks"),
        ("fgsmm", "did you mean fgsm"),
        ("pgd-20-most-likely", "there is none"),
        ("square-random", "there is none"),
        ("pgd:stepz=3", r"pgd has no setting stepz \(did you mean step or steps"),
        ("square:steps=3", "square has no setting steps"),
        ("clean:eps=0.1", "clean has no setting eps: it has none"),
        ("pgd-20:steps", "'steps' is no setting: write key=value"),
        ("pgd-20:steps=1/2", "steps=1/2: give a whole number"),
        ("pgd-20:step=-1", "step=-1: give a number of at least 0"),
        ("pgd-20:step=nan", "step=nan: give a number"),
        ("pgd-20:step=1/0", "step=1/0: give a number"),
        ("pgd-20:step=2/255", "step=2/255: it is in units of eps, not in 1/255: give 1/4"),
        ("pgd-20:step=x", "step=x: give a number of at least 0, such as 0.1"),
        (f"pgd-20:step={'9' * 400}/1", "step=9*/1: give a number of at least 0"),
        ("pgd-20:alpha=x", "alpha=x: give a number"),
        ("pgd-20:norm=l1", "norm=l1: choose one of linf, l2"),
        ("pgd-20:eps=8", "write eps=8/255"),
        ("pgd-20:right_at=first", "right_at=first: choose one of last, every"),
        ("noise:right_at=every", "of no steps there is noise alone"),
        ("pgd-20:kappa=1", "kappa is a setting of loss=margin, not of ce"),
        ("cw-30:alpha=0.1", "alpha is a setting of loss=ce, not of margin"),
        ("square:alpha=0.1", "square has no setting alpha"),
        ("pgd-20:alpha=2", r"alpha=2.0 is outside \[0, 1\]"),
        ("pgd-ls-20", "alpha must be given"),
        ("pgd-kl-20:start=clean", "the gradient of kl is 0 at a clean start"),
        ("pgd-kl-20-all", "loss 'kl' has no targeted form"),
        ("apgd:loss=kl:targets=2", "loss 'kl' has no targeted form"),
        ("pgd:loss=cee", "loss=cee: choose one of ce, kl, margin, dlr, ls, lsce"),
        ("fab-tx2", "restarts would repeat one run"),
        ("fgsmx3", "restarts would repeat one run"),
        ("pgd-20:restarts=0", "restarts=0: give at least 1"),
        ("pgd-20:steps=5:steps=6", "steps is given twice"),
        ("noise-all", "of no steps there is noise alone"),
        ("fgsm:steps=0", "of no steps there is noise alone"),
        ("apgd-ce:steps=0", "steps=0: give at least 1"),
        ("pgd-20,pgd-20", "attack pgd-20: it is named twice"),
        ("fgsm,pgd-20:norm=L2,pgd-20:norm=l2", "attack pgd-20:norm=l2: it is the same as pgd-20:norm=L2: leave one out"),
        ("AAx2,autoattackx2", "attack autoattackx2: it is named twice"),
    ],
)
def test_specs_that_do_not_fit(spec, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_all(spec)
    assert "\n" not in str(caught.value)


CHEAP = {"apgd": ":steps=4", "fab": ":steps=3:targets=2", "square": ":queries=20", "autoattack": ":steps=3:queries=20"}


@pytest.mark.parametrize("name", [*NAMED, "pgd-7-least-likely", "pgd-7-random", "pgd-7-all", "pgd-7x2", "fab:norm=l2:steps=2"])
def test_every_named_attack_runs(name):
    family = parse(name + ":alpha=0.1" * (name == "pgd-ls-20")).family
    spec = name + (":alpha=0.1" if name == "pgd-ls-20" else "" if ":" in name else CHEAP.get(family, ""))
    found = quiet(fitted(), digits(12), [spec], eps_l2=0.5, batch_size=8)
    name = parse(spec).name
    assert found.accuracy(name) <= found.accuracy("clean")
    assert found.accuracy("clean") > 80
    if name != "clean":
        recheck = found.rechecks[name]
        assert recheck.outside == 0
        assert recheck.adversarial == int((found.correct("clean") & ~found.correct(name)).sum())


def test_the_trainer_uses_the_same_attacks():
    """And measures as it always did: every image attacked, all random starts of a batch from seed + its number."""
    model, data = fitted(), load("digits").test
    rows = torch.arange(50)
    found = accuracies(model, data, TEST | {"pgd": validation(3)["pgd"]}, EPS, rows=rows, seed=3, batch_size=20)
    correct = dict.fromkeys(found, 0)
    for number, batch in enumerate(rows.split(20)):
        x, y = floats(data, batch, "cpu")
        how = [{"generator": torch.Generator().manual_seed(3 + number)} for _ in range(4)]
        images = {
            "clean": x,
            "FGSM": spat_kernels.fgsm(model, x, y, EPS, **how[0]),
            "PGD-20": spat_kernels.pgd(model, x, y, EPS, steps=20, step_size=EPS / 10, **how[1]),
            "C&W-inf-30": spat_kernels.cw_linf(model, x, y, EPS, steps=30, step_size=EPS / 10, **how[2]),
            "pgd": spat_kernels.pgd(model, x, y, EPS, steps=3, step_size=EPS / 4, **how[3]),
        }
        for name in found:
            correct[name] += int((model(images[name]).argmax(1) == y).sum())
    assert found == {name: 100 * count / 50 for name, count in correct.items()}
    for name in ("pgd-7-all", "pgd-7x2"):
        with pytest.raises(InputError, match=f"attack {name}: it has several runs"):
            accuracies(model, data, {"pgd": parse(name)}, EPS)
    assert [TEST[name].spec for name in list(TEST)[1:]] == [parse(name).spec for name in ("fgsm", "pgd-20", "cw-30")]


# ---- the truth about every image


def test_autoattack_by_parts(monkeypatch, capsys):
    """What each broke, by its own record, batch for batch; and a bar that moves with them."""
    seen = []

    class Bar(logs.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append((self.postfix, self.n))

    monkeypatch.setattr(logs, "_Lines", Bar)
    model, (x, y) = fitted(), digits(120)
    name = "autoattack:steps=2:queries=60"
    found = quiet(model, (x, y), f"fgsm,{name},pgd-7x3", batch_size=50, eps=0.12, bar="bar")
    parts = [(f"{name} {part}", 100 + 50 * i) for i, part in enumerate(("apgd-ce", "apgd-t", "fab-t", "square"))]
    at = seen.index(parts[0])
    runs = [(f"pgd-7x3 run {run} of 3", 250 + 50 * run) for run in (1, 2, 3)]
    assert seen[at : at + 9] == [*parts, (name, 300), *runs, ("pgd-7x3", 450)]
    assert seen[-1] == ("pgd-7x3", 120 * 9)
    assert "1080/1080" in capsys.readouterr().err
    expected = []
    for number, rows in enumerate(torch.arange(120).split(50)):
        generator = torch.Generator().manual_seed(derived_seed(0, name, number, 0))
        keep = (model(x[rows]).argmax(1) == y[rows]).nonzero()[:, 0]
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        run = spat_kernels.AutoAttack(0.12, steps=2, queries=60, seed=seed, precision="fp32")
        by = torch.full((len(rows),), -1)
        by[keep] = run.run(model, x[rows][keep], y[rows][keep]).broken_by.sub(1).clamp(min=-1)
        expected.append(by)
    expected = torch.cat(expected)
    assert torch.equal(found.part[name], expected)
    assert found.part.keys() == {name}
    after = found.after(name)
    assert list(after) == ["apgd-ce", "apgd-t", "fab-t", "square"] and len(expected.unique()) > 3, "several broke some"
    right = found.correct("clean")
    for number, left in enumerate(after.values()):
        assert torch.equal(left, right & ~((expected >= 0) & (expected <= number)))
    assert torch.equal(left, found.correct(name))
    assert found.after("fgsm") == {}
    lines = found.table().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(name))
    assert [line.split()[:3] for line in lines[at + 1 : at + 5]] == [
        ["after", part, f"{100 * int(left.sum()) / 120:.2f}"] for part, left in after.items()
    ]


def brute_force(model, source, x, y, attack, eps, seed, batch_size) -> torch.Tensor:
    """bool [N]: broken, by attacking all images in every run and looking at all of them."""
    broken = model(x).argmax(1) != y
    for number, rows in enumerate(torch.arange(len(x)).split(batch_size)):
        for run in range(attack.runs(10)):
            generator = torch.Generator().manual_seed(derived_seed(seed, attack.name, number, run))
            x_adv = attack(source, x[rows], y[rows], eps, generator, run=run)
            broken[rows] |= model(x_adv).argmax(1) != y[rows]
    return broken


@pytest.mark.parametrize(
    "name", ["pgd-7x4", "pgd-7-all", "pgd-7-random:restarts=3", "pgd:norm=l2:restarts=3:steps=5", "noisex20"]
)
@pytest.mark.parametrize("black_box", [False, True])
def test_restarts_on_what_is_left_find_what_restarts_on_all_find(name, black_box):
    model, source = fitted(0, torch.float64), fitted(1, torch.float64)
    source = source if black_box else model
    x, y = digits(50, torch.float64)
    found = quiet(model, (x, y), [name, "fgsm"], source=source if black_box else None, seed=5, batch_size=20, precision=None)
    attack = parse(name)
    expected = brute_force(model, source, x, y, attack, attack.radius(EPS, 0.5), 5, 20)
    assert torch.equal(~found.correct(name), expected)
    if name != "noisex20":
        assert 0 < found.accuracy(name) < found.accuracy("clean")
    fgsm = brute_force(model, source, x, y, parse("fgsm"), EPS, 5, 20)
    assert torch.equal(found.correct(WORST), ~(expected | fgsm))
    assert found.worst_case() == 100 * float((~(expected | fgsm)).sum()) / 50
    wrong = model(x).argmax(1) != y
    assert torch.equal(found.predicted[name][wrong], model(x).argmax(1)[wrong])  # as it was, not attacked


def test_a_black_box_is_the_source_attacked_and_the_model_asked():
    model, source = fitted(0), fitted(1)
    images = digits(60)
    white, black, own = (quiet(model, images, "pgd-10", source=other) for other in (None, source, model))
    assert torch.equal(white.predicted["pgd-10"], own.predicted["pgd-10"])
    assert white.accuracy("pgd-10") < black.accuracy("pgd-10") < black.accuracy("clean") == white.accuracy("clean")
    assert white.settings["source_weights"] is None
    assert black.settings["source_weights"] == module.weights_hash(source)


def test_images_that_are_wrong_are_attacked_where_that_is_asked():
    """PGD-LS at alpha = 1 then makes more images right than were (thesis, Fig. 5.3)."""
    model, (x, y) = fitted(), digits(200)
    x = (x + 0.5 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)  # else few are wrong
    name = "pgd-ls-20:alpha=1"
    plain, asked = (quiet(model, (x, y), [name], attack_wrong=wanted, batch_size=200) for wanted in (False, True))
    assert plain.accuracy(name) <= plain.accuracy("clean") < asked.accuracy(name)
    generator = torch.Generator().manual_seed(derived_seed(0, name, 0, 0))
    x_adv = parse(name)(model, x, y, EPS, generator)
    assert torch.equal(asked.predicted[name], model(x_adv).argmax(1))
    parts = quiet(model, (x, y), "autoattack:steps=2:queries=5", attack_wrong=True)
    (part,) = parts.part.values()
    assert (part[parts.correct("clean")] >= 0).any()
    assert (part[~parts.correct("clean")] == -1).all()


def test_targets():
    model, (x, y) = fitted(dtype=torch.float64), digits(40, torch.float64)
    order = model(x).scatter(1, y[:, None], torch.inf).argsort(dim=1, descending=True)

    def told(name, run=0, seed=0):
        return parse(name)._targets(model, x, y, torch.rand(len(x), generator=torch.Generator().manual_seed(seed)), run)

    assert torch.equal(told("pgd-7-least-likely"), order[:, -1])
    every = torch.stack([told("pgd-7-all", run) for run in range(9)], 1)
    assert torch.equal(every, order[:, 1:])
    assert torch.equal(told("pgd-7-all", 9), order[:, 1])
    one, two = told("pgd-7-random"), told("pgd-7-random", seed=1)
    assert (one != y).all()
    assert (two != y).all()
    assert (one != two).any()
    assert len(one.unique()) > 5


def test_wilson():
    stats = pytest.importorskip("scipy.stats")
    for trials in (1, 7, 100, 10_000):
        for successes in {0, 1, trials // 3, trials - 1, trials}:
            expected = stats.binomtest(successes, trials).proportion_ci(0.95, "wilson")
            assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)
    # Newcombe (1998), Table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1


def test_numbers_of_an_evaluation():
    found = quiet(fitted(), digits(40), "pgd-10,noise", rows=torch.arange(39, -1, -2))
    assert len(found) == 20
    assert torch.equal(found.labels, digits(40)[1][torch.arange(39, -1, -2)])
    count = int(found.correct("pgd-10").sum())
    assert found.accuracy("pgd-10") == 5 * count
    assert found.interval("pgd-10") == tuple(100 * p for p in wilson(count, 20))
    assert re.search(rf"^pgd-10 +{5 * count:.2f} ", found.table(), re.MULTILINE)
    assert WORST in found.table()


def test_nothing_else_is_changed():
    model, (x, y) = fitted(), digits(30)
    model.features.weight.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    copies, state, numpy_state = (x.clone(), y.clone()), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    quiet(model, (x, y), "pgd-10x2,pgd-7-random,square:queries=5")
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002  (the global one is meant)
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])
    assert not model.training
    assert not model.features.weight.requires_grad
    assert bool((model.classifier.weight.grad == 1).all())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Maps(nn.Module):
    """Convolutions, and the map of the last one as a vector by `view`, which takes contiguous ones alone."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.maps(x)
        return self.classifier(x.view(len(x), -1))


def test_models_that_take_contiguous_images_alone(tmp_path):
    model, reshaped = Maps().eval(), Maps().eval()
    reshaped.load_state_dict(model.state_dict())
    reshaped.forward = lambda x: reshaped.classifier(reshaped.maps(x).flatten(1))
    names, images = "fgsm,square:queries=5,autoattack:steps=2:queries=5", digits(40)
    found, expected = quiet(model, images, names), quiet(reshaped, images, names, memory_format=torch.contiguous_format)
    assert all(torch.equal(found.predicted[name], expected.predicted[name]) for name in found.attacks)
    formats = [quiet(reshaped, images, "fgsm", source=source).settings["memory_format"] for source in (None, model)]
    assert found.settings["memory_format"] == "contiguous"
    assert formats == [None, "contiguous"]
    assert len(alarms(model, images, eps=EPS, bar=None)) > 10
    with pytest.raises(InputError, match=r"model: it does not take images \[1, 9, 9\]"):
        quiet(model, (torch.rand(4, 1, 9, 9), torch.arange(4)), "fgsm")


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_run_of_such_a_model(tmp_path, monkeypatch, capsys, channels_last):
    config = Config(
        data="digits", model="tests.evaluation.test_evaluate:Maps", method="fgsm",
        limit=100, epochs=1, milestones=(1,), device="cpu",
        test=False, tensorboard=False, channels_last=channels_last, out=tmp_path / "run",
    )  # fmt: skip
    train(config)
    assert ("fails on channels_last: it gets contiguous images" in capsys.readouterr().err) is channels_last
    options = ("--attacks", "fgsm", "--limit", 20, "--no-alarms", "--device", "cpu", "--model-name", config.model)
    command(monkeypatch, "evaluate", tmp_path / "run", *options)
    assert "| memory format | contiguous |" in (tmp_path / "run" / "evaluation" / "report.md").read_text()


def test_images_as_they_come():
    model, (x, y) = fitted(), digits(40)
    expected = quiet(model, (x[::2].clone(), y[::2].clone()), "pgd-10").predicted["pgd-10"]
    assert torch.equal(quiet(model, (x.requires_grad_()[::2], y[::2]), "pgd-10").predicted["pgd-10"], expected)


class Noisy(Features):
    """Draws at random in eval mode."""

    def forward(self, x):
        return super().forward(x + 0.3 * torch.randn_like(x))


def test_a_model_that_draws_is_a_function_of_the_seed_and_leaves_the_global_generator():
    model = Noisy().eval()
    model.load_state_dict(fitted().state_dict())
    state = torch.get_rng_state()
    first, again, other = (
        quiet(model, digits(60), names, seed=seed) for names, seed in (("fgsm,noise", 0), ("noise", 0), ("noise", 1))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first.predicted[name], again.predicted[name]) for name in ("clean", "noise"))
    assert not torch.equal(first.predicted["noise"], other.predicted["noise"])


class NaN(Features):
    def forward(self, x):
        return super().forward(x).log()


@pytest.mark.filterwarnings("ignore:the input gradient was NaN")
def test_logits_that_are_nan_are_no_prediction():
    found = quiet(NaN().eval(), digits(20), "fgsm")
    assert found.accuracy("clean") == 0
    assert (found.predicted["clean"] == -1).all()


# ---- adversarial images, checked again and saved


@dataclass(frozen=True, kw_only=True)
class Escaping(Attack):
    """Leaves the ball by a level and a half, in one pixel of every other image."""

    family = "escaping"

    def _attack(self, model, x, y, eps, draws, run, how):
        x_adv = x.clone()
        x_adv[::2, 0, 4, 4] = (x[::2, 0, 4, 4] - eps - 1.5 / 255).abs().clamp(max=1)
        return x_adv

    def _describe(self):
        return ["escaping"]


def test_an_attack_that_leaves_the_ball_is_caught():
    model, (x, y) = fitted(), digits(30)
    x[:, 0, 4, 4] = 0.9
    found = quiet(model, (x, y), [Escaping(name="escaping"), "fgsm"], batch_size=30)
    attacked = model(x).argmax(1) == y
    assert found.rechecks["escaping"].outside == (int(attacked.sum()) + 1) // 2
    assert found.rechecks["fgsm"].outside == 0
    alarm = rechecked(found)
    assert alarm.raised
    assert alarm.numbers["escaping"] == found.rechecks["escaping"].outside
    assert not rechecked(quiet(model, (x, y), "fgsm,pgd-l2-20")).raised


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_steps_of_a_flat_loss_do_not_mend_what_is_broken(norm):
    """The margin with kappa = 0 has no gradient beyond the boundary."""
    steps = (3, 5, 20, 100)
    names = [f"pgd:norm={norm}:loss=margin:kappa=0:start=clean:steps={n}:step=1/10" for n in steps]
    found = quiet(fitted(), digits(120), names, eps=0.15, eps_l2=0.8)
    broken = [found.correct("clean") & ~found.correct(name) for name in names]
    assert 5 < broken[0].sum() < broken[-1].sum(), "some of both"
    for fewer, more in zip(broken, broken[1:], strict=False):
        assert (more | ~fewer).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inside(norm):
    x = torch.full((4, 1, 8, 8), 0.5)
    far = {"linf": 0.1, "l2": 0.1 / 8}[norm]
    x_adv = x + far * torch.tensor([1.0, 1.001, -1.0, 0.0])[:, None, None, None]
    x_adv[3, 0, 0, 0] = 1 + 1e-6
    assert module.inside(x_adv, x, 0.1, norm).tolist() == [True, False, True, False]
    assert module.inside(x_adv, x, 0.1, norm, 0.5 / 255).tolist() == [True, True, True, False]


def test_saved_images(tmp_path):
    data, model = load("digits").test, fitted()
    found = quiet(
        model, data, "pgd-10,pgd:norm=l2:eps=1/2", rows=torch.arange(50), batch_size=20, folder=tmp_path, save_images=True
    )
    for name, eps in (("pgd-10", EPS), ("pgd:norm=l2:eps=1/2", 0.5)):
        files = sorted((tmp_path / "images" / file_name(name)).iterdir())
        arrays = [np.load(file) for file in files]
        saved = {key: torch.from_numpy(np.concatenate([a[key] for a in arrays])) for key in arrays[0]}
        assert len(files) == 3
        assert saved["x_adv"].dtype == torch.uint8
        assert saved["x_adv"].shape == (50, 8, 8, 1)
        assert torch.equal(saved["rows"], torch.arange(50))
        assert torch.equal(saved["y"], data.labels[:50])
        assert torch.equal(saved["predicted"], found.predicted[name])
        moved = (saved["x_adv"].double() - data.pixels[:50].double()).flatten(1) / 255
        if "l2" in name:
            assert (moved.norm(dim=1) <= eps + 8 * 0.5 / 255).all()
            assert moved.norm(dim=1).max() > 0.95 * eps
        else:
            assert (moved.abs() <= eps + 0.5 / 255).all()
            assert moved.abs().max() > 0.95 * eps
        broken = found.correct("clean") & ~found.correct(name)
        x = saved["x_adv"].permute(0, 3, 1, 2).float() / 255
        kept = int((model(x).argmax(1) != saved["y"])[broken].sum())
        assert found.rechecks[name].adversarial == int(broken.sum()) > 4
        assert found.rechecks[name].rounded == kept
        for example, row in zip(found.examples[name], broken.nonzero()[:4, 0].tolist(), strict=True):
            assert example.index == row
            assert torch.equal(example.image, saved["x_adv"][row])


# ---- interruptions


ATTACKS = "fgsm,pgd-10x3,pgd-7-random,AutoAttack:steps=2:queries=10"


def work(folder: Path, on_progress=lambda: None):
    how = {"rows": torch.arange(90), "batch_size": 30, "save_images": True}
    return quiet(fitted(), load("digits").test, ATTACKS, folder=folder, on_progress=on_progress, **how)


def tell(folder: Path, after: int, pipe) -> None:
    """Evaluate, and say so once that many attacks on batches are done."""

    def on_progress():
        if (folder / "samples.jsonl").read_bytes().count(b"\n") == after:
            pipe.send(after)
            signal.pause()

    work(folder, on_progress)


def killed_after(folder: Path, after: int) -> int:
    ours, its = processes().Pipe(duplex=False)
    child = processes().Process(target=on_one_thread, args=(tell, folder, after, its))
    child.start()
    if ours in connection.wait([child.sentinel, ours]):
        child.kill()
    child.join()
    return child.exitcode


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_and_called_again_it_ends_with_the_same_files(tmp_path):
    found = work(tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    assert len(expected) == 2 + 4 * 3
    assert expected["samples.jsonl"].count(b"\n") == 5 * 3
    for lines in (1, 9):  # attacks on batches, of 15
        assert killed_after(tmp_path / "killed", lines) == -signal.SIGKILL
        kept = (tmp_path / "killed" / "samples.jsonl").read_bytes()
        assert kept.count(b"\n") == lines
        assert expected["samples.jsonl"].startswith(kept)
    with open(tmp_path / "killed" / "samples.jsonl", "ab") as file:
        file.write(b'{"attack": "fgsm", "batch": 2, "pred')  # as a kill while writing leaves it
    (tmp_path / "killed" / "images" / "fgsm" / "00002.npz.tmp").write_bytes(b"PK")
    again = work(tmp_path / "killed")
    assert contents(tmp_path / "killed") == expected
    assert all(torch.equal(again.predicted[name], found.predicted[name]) for name in found.attacks)
    ((name, part),) = found.part.items()
    assert torch.equal(again.part[name], part)
    assert int((part >= 0).sum()) > 3
    work(tmp_path / "killed", lambda: pytest.fail("nothing was left to do"))
    assert contents(tmp_path / "killed") == expected
    with open(tmp_path / "killed" / "samples.jsonl", "r+b") as file:  # as a lost power may leave it
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(100))
    work(tmp_path / "killed")
    assert contents(tmp_path / "killed") == expected


def test_other_attacks_are_added_and_other_settings_refused(tmp_path):
    model, images = fitted(), load("digits").test
    how = {"rows": torch.arange(40), "batch_size": 20, "folder": tmp_path}
    first = quiet(model, images, "fgsm", **how)
    more = quiet(model, images, "pgd-10,fgsm", **how)
    assert torch.equal(more.predicted["fgsm"], first.predicted["fgsm"])
    assert torch.equal(more.predicted["pgd-10"], quiet(model, images, "pgd-10", **how | {"folder": None}).predicted["pgd-10"])
    before = contents(tmp_path)
    changed = Images(images.pixels ^ 1, images.labels)
    for message, arguments, options in (
        ("--eps was 15.3, now 51", (model, images, "fgsm"), {"eps": 0.2}),
        ("--seed was 0, now 1", (model, images, "fgsm"), {"seed": 1, "rows": torch.arange(1, 41)}),
        ("--limit was 40, now 39", (model, images, "fgsm"), {"rows": torch.arange(39)}),
        ("the chosen images differ", (model, images, "fgsm"), {"rows": torch.arange(1, 41)}),
        ("the model differs, in weights, architecture or normalisation", (fitted(1), images, "fgsm"), {}),
        ("the source differs, in weights, architecture or normalisation", (model, images, "fgsm"), {"source": model}),
        ("the images or labels of --data differ", (model, changed, "fgsm"), {}),
        (
            "--eps-l2 was 0.5, now 1.0; --attack-wrong was False, now True",
            (model, images, "fgsm"),
            {"eps_l2": 1.0, "attack_wrong": True},
        ),
        (
            "--batch-size was 20, now 10; --precision was fp32, now bf16",
            (model, images, "fgsm"),
            {"batch_size": 10, "precision": "bf16"},
        ),
    ):
        with pytest.raises(InputError, match=re.escape(f"it holds another evaluation ({message}): give the same, or choose")):
            quiet(*arguments, **how | options)
    with pytest.raises(InputError, match="attack fgsm was pgd:steps=1:step=1.0:start=clean, now escaping"):
        quiet(model, images, [Escaping(name="fgsm")], **how)
    assert contents(tmp_path) == before
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match="it holds samples.jsonl without settings.json"):
        quiet(model, images, "fgsm", **how)


def test_pictures_of_the_same_names_are_other_data(tmp_path, pictures):
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)).eval(), load(str(pictures), image_size=16).test
    quiet(model, images, "fgsm", folder=tmp_path / "out")
    shutil.copy(pictures / "val" / "dog" / "1.png", pictures / "val" / "dog" / "0.png")
    with pytest.raises(InputError, match="the images or labels of --data differ"):
        quiet(model, images, "fgsm", folder=tmp_path / "out")
    (pictures / "val" / "dog" / "0.png").unlink()
    with pytest.raises(InputError, match="dog/0.png cannot be read .No such file"):
        quiet(model, images, "fgsm")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.Conv2d, {"in_channels": 1, "out_channels": 1, "kernel_size": 3, "padding": 1, "dilation": 1}),
        (nn.LeakyReLU, {"negative_slope": 0.5}),
        (nn.Softplus, {"beta": 2}),
        (nn.BatchNorm2d, {"num_features": 1, "eps": 0.1}),
    ],
)
def test_what_leaves_no_trace_in_the_weights_is_another_model(kind, options):
    model = nn.Sequential(kind(**options))
    other = copy.deepcopy(model)
    assert module.weights_hash(other) == module.weights_hash(model)
    name = list(options)[-1]
    setattr(other[0], name, 2 * getattr(model[0], name) if name != "dilation" else (2, 2))
    assert module.weights_hash(other) != module.weights_hash(model)


def test_a_full_disk(tmp_path, monkeypatch):
    from spat_train.evaluation import record_log as samples

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(samples.os, "fsync", full)
        with pytest.raises(SaveError, match="No space left on device"):
            quiet(fitted(), digits(20), "fgsm", folder=tmp_path / "full")
    found = quiet(fitted(), digits(20), "fgsm", folder=tmp_path / "full")
    assert torch.equal(found.predicted["fgsm"], quiet(fitted(), digits(20), "fgsm").predicted["fgsm"])


def test_a_disk_that_is_full_in_the_middle_of_a_line(tmp_path):
    resource = pytest.importorskip("resource")
    arguments = fitted(), digits(60), "fgsm,pgd-10,pgd-20"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        with pytest.raises(SaveError, match=r"samples.jsonl \(File too large\)"):
            quiet(*arguments, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "samples.jsonl").stat().st_size == 1500
    assert quiet(*arguments, folder=tmp_path).worst_case() == quiet(*arguments).worst_case()


# ---- bad input


class Training(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = fitted()
        self.eval()
        self.inner.features.train()

    def forward(self, x):
        return self.inner(x)


class Branching(Features):
    def forward(self, x):
        return super().forward(x if float(x.sum()) > 0 else -x)


X, Y = torch.rand(6, 1, 8, 8), torch.arange(6)
PIXELS = torch.zeros(6, 8, 8, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": fitted().train()}, "model: Features is in training mode.*call model.eval"),
        ({"model": Training()}, "model: inner.features is in training mode"),
        ({"source": fitted().train()}, "source: Features is in training mode"),
        ({"model": lambda x: x}, "model: give a torch.nn.Module, not a function"),
        ({"model": nn.Conv2d(3, 4, 3).eval()}, r"model: it does not take images \[1, 8, 8\]"),
        ({"model": nn.Flatten(0).eval()}, r"model: two images give \[128\]: it must return logits \[2, K\]"),
        ({"source": Features(7).eval()}, r"source: two images give \[2, 7\]: it must return logits \[2, 10\]"),
        ({"images": (X[:0], Y[:0])}, "images: there is none"),
        ({"images": (X - 0.1, Y)}, r"images: x must lie inside .*from -0\.\d+ to .*normalise inside the model.*net\)$"),
        ({"images": (X * 6 - 2, Y)}, r"images: x must lie inside .*normalise inside the model"),
        ({"images": (X.clamp(min=0.1) * 1.9, Y)}, r"images: x must lie inside .*normalise inside the model.*net\)$"),
        ({"images": (torch.where(X < 0.5, X, 1 + 2**-22), Y)}, r"images: x exceeds .* by 2.4e-07.*x.clamp\(0, 1\)"),
        ({"images": (255 * X, Y)}, "divide 8-bit images by 255"),
        ({"images": (X / 0, Y)}, "images: x must lie inside"),
        (
            {"images": (X[0], Y)},
            r"images: they are torch.float32 \[1, 8, 8\]: give torch.float32 or torch.float64 \[N, C, H, W\]",
        ),
        ({"images": (X.half(), Y)}, "images: they are torch.float16"),
        ({"images": (X, Y[:5])}, "images: there are 6 and 5 labels"),
        ({"images": (X, Y + 5)}, "there is a label 10, and the model has classes 0 to 9"),
        ({"images": (X, Y - 1)}, "there is a label -1"),
        ({"images": (X, Y.float())}, "labels must be an int64 tensor"),
        ({"images": Images(PIXELS[..., 0], Y)}, r"images: they are torch.uint8 \[6, 8, 8\]: give torch.uint8 \[N, H, W, C\]"),
        ({"images": Images(PIXELS.float(), Y)}, "images: they are torch.float32"),
        ({"images": Folder(Path("."), [], Y[:0], 8)}, "images: there is none"),
        ({"images": [1, 2]}, "images: give Images"),
        ({"rows": torch.arange(7)}, "rows: they go from 0 to 6, there are 6 images"),
        ({"rows": torch.arange(0)}, "rows: give an int64 tensor"),
        ({"attacks": "fgsm,nosuch"}, "attack nosuch: there is none"),
        (
            {"attacks": "apgd-dlr", "model": Features(2).eval(), "images": (X, Y % 2)},
            "apgd-dlr: it needs 3 classes, the model has 2",
        ),
        *(
            ({"attacks": name, "model": Features(6).eval()}, f"{name}: it needs 10 classes, the model has 6: give fewer targets")
            for name in ("apgd-t", "fab-t")
        ),
        ({"eps": 8}, "eps=8: give a number above 0, for images in .0, 1.: 8/255"),
        ({"eps": 0.0}, "eps=0.0: give a number above 0"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps_l2": -1.0}, "eps_l2=-1.0"),
        ({"eps_l2": 128.0, "attacks": "pgd-l2-20"}, r"attack pgd-l2-20: eps_l2=128 exceeds the diagonal, 8, .*\(128/255 for"),
        ({"attacks": "fgsm,fab:norm=l2:eps=9"}, "attack fab:norm=l2:eps=9: eps=9 exceeds the diagonal, 8,"),
        ({"seed": -1}, "seed=-1: give an integer"),
        ({"batch_size": 0}, "batch_size=0: give an integer from 1"),
        ({"precision": "int8"}, "precision='int8': choose one of"),
        ({"precision": "tf32"}, "precision='tf32': TF32 is for GPUs"),
        ({"images": (X.double(), Y), "model": fitted().double()}, "precision='fp32' is for float32 images"),
        ({"graph": "never"}, "graph='never': choose"),
        ({"graph": True}, "graph=True: CUDA graphs are for GPUs"),
        ({"model": Branching().eval(), "input_gradient": "plan"}, "input_gradient='plan', but torch.fx cannot trace it"),
        ({"save_images": True, "folder": None}, "save_images=True: give a folder"),
        (
            {"attacks": "fgsm,pgd-20-rst", "source": fitted(1)},
            "attack pgd-20-rst: right_at=every asks the model that is attacked: leave it out, or the source",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(module, "broken_by", None)
    given = {"model": fitted(), "images": (X, Y), "attacks": "fgsm", "eps": 0.1, "folder": tmp_path / "out", **arguments}
    with pytest.raises(InputError, match=message) as caught:
        evaluate(given.pop("model"), given.pop("images"), given.pop("attacks"), bar=None, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# ---- the command


FEATURES = "tests.evaluation.test_evaluate:Features"


@pytest.fixture
def a_run(tmp_path):
    """A folder as a run leaves it, of a model that is fitted."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = Config(data="digits", model=FEATURES, eps=15.3)
    (folder / "config.json").write_text(config.to_json())
    torch.save(
        {"format": "spat_train 3", "config": config.to_dict(), "model": fitted().state_dict(), "ema": None}, folder / "best.pt"
    )
    return folder


def command(monkeypatch, *arguments) -> None:
    from spat_train import cli  # takes seconds, and the children above need it not

    if "evaluate" in arguments and "--model-name" not in arguments:
        arguments += ("--model-name", FEATURES)  # code that a run names has to be repeated
    monkeypatch.setattr(sys, "argv", ["spat-train", *map(str, arguments)])
    cli.main()


OPTIONS = ("--limit", 60, "--attacks", "noise,fgsm,pgd-10,pgd-l2-10", "--eps-l2", 1, "--device", "cpu", "--batch-size", 32)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.pictures = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert name not in ("href", "srcset", "data", "action")
            assert not name.startswith("on")
            if name == "src":
                assert value.startswith("data:image/png;base64,")
                self.pictures.append(base64.b64decode(value.split(",")[1]))


def test_the_report(monkeypatch, capsys, a_run):
    image = pytest.importorskip("PIL.Image")
    command(monkeypatch, "evaluate", a_run, *OPTIONS)
    out, folder = capsys.readouterr().out, a_run / "evaluation"
    names = {"evaluation.json", "report.html", "report.md", "samples.jsonl", "settings.json", "alarms"}
    assert {path.name for path in folder.iterdir()} == names
    assert f"{folder / 'report.html'} written" in out

    model, config = load_model(a_run, load("digits"), FEATURES)
    rows = torch.from_numpy(np.random.default_rng(0).permutation(450)[:60])
    expected = evaluate(
        model, load("digits").test, OPTIONS[3], eps=EPS, eps_l2=1.0, rows=rows, batch_size=32, bar=None
    )  # fmt: skip
    assert expected.table() in out
    assert "ALARM" not in out
    assert config.eps == 15.3

    told = json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert told["settings"] == expected.settings
    assert told["about"]["network"] == "tests.evaluation.test_evaluate:Features"
    assert {"spat_kernels", "torch"} <= told["versions"].keys()
    assert told["attacks"]["fgsm"]["source"].startswith("Goodfellow")
    assert told["results"]["pgd-10"]["interval"] == list(expected.interval("pgd-10"))
    assert told["results"][WORST]["accuracy"] == expected.worst_case()
    assert [s["row"] for s in told["samples"]] == rows.tolist()
    assert len(told["alarms"]) == 14
    typed = shlex.join(["spat-train", "evaluate", *map(str, (a_run, *OPTIONS)), "--model-name", FEATURES])
    assert told["about"]["command"] == typed
    assert time.strptime(told["about"]["date"], "%Y-%m-%d %H:%M UTC")
    assert told["about"]["hardware"].endswith("1 threads")
    for i, sample in enumerate(told["samples"]):
        assert sample["predicted"] == {name: int(p[i]) for name, p in expected.predicted.items()}
        assert sample["broken_by"] == [name for name in expected.attacks if not expected.correct(name)[i]]

    report = (folder / "report.md").read_text()
    for name in (*expected.attacks, WORST):
        low, high = expected.interval(name)
        assert f"| {name} | {expected.accuracy(name):.2f} | {low:.2f} to {high:.2f} |" in report
    assert f"```\n{typed}\n```" in report
    assert f"| date | {told['about']['date']} |" in report

    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert '<meta name="viewport" content="width=device-width' in text
    assert f"<pre>{html.escape(typed)}</pre>" in text
    assert page.tags.count("table") == text.count('<div class="wide"><table>') == 4
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    examples = [(name, e) for name, found in expected.examples.items() for e in found]
    assert len(examples) >= 8
    assert len(page.pictures) == 3 * len(examples)
    for i, (_, example) in enumerate(examples):
        original, adversarial, difference = (np.array(image.open(io.BytesIO(p))) for p in page.pictures[3 * i : 3 * i + 3])
        clean = load("digits").test.pixels[rows[example.index], :, :, 0].numpy()
        assert (original == clean).all()
        assert (adversarial == example.image[..., 0].numpy()).all()
        moved = np.sign(adversarial.astype(int) - clean)
        # Half grey is 128; a difference of a level may round to it.
        assert ((np.sign(difference.astype(int) - 128) == moved) | (abs(adversarial.astype(int) - clean) < 2)).all()
        row, true, wrong = int(rows[example.index]), *(int(t[example.index]) for t in (expected.labels, expected.predicted[_]))
        assert f"image {row}: {true}, predicted {wrong};" in text


def test_stopped_the_command_goes_on(monkeypatch, capsys, a_run, tmp_path):
    options = (*OPTIONS, "--no-alarms", "--save-images")
    command(monkeypatch, "evaluate", a_run, *options, "--out", tmp_path / "expected")
    add, count = module.Samples.add, iter(range(100))

    def stopping(self, record):
        add(self, record)
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit_info:
        patched.setattr(module.Samples, "add", stopping)
        command(monkeypatch, "evaluate", a_run, *options, "--out", tmp_path / "stopped")
    assert exit_info.value.code == 143
    assert "the same command goes on" in capsys.readouterr().err
    assert len((tmp_path / "stopped" / "samples.jsonl").read_bytes().splitlines()) == 4
    command(monkeypatch, "evaluate", a_run, *options, "--out", tmp_path / "stopped")
    stopped, expected = (contents(tmp_path / name) for name in ("stopped", "expected"))
    for kept in (stopped, expected):  # the date and the command differ
        told = json.loads(kept.pop("evaluation.json"))
        kept["results"] = {name: value for name, value in told.items() if name != "about"}
        del kept["report.md"], kept["report.html"]
    assert stopped == expected


class Normalised(Features):
    """Takes images that were normalised; then it is as good as `fitted`."""

    def forward(self, x):
        return super().forward(0.05 * x + 1)


def test_a_black_box_by_command(monkeypatch, capsys, a_run, tmp_path):
    shutil.copytree(a_run, tmp_path / "other")
    torch.save(fitted(1).state_dict(), tmp_path / "other" / "best.pt")
    command(
        monkeypatch, "evaluate", a_run, *OPTIONS[:2], "--attacks", "pgd-10", "--source", tmp_path / "other", "--device", "cpu",
        "--source-name", FEATURES,
    )  # fmt: skip
    assert default_folder(tmp_path / "a.pth", tmp_path / "b.pth") == tmp_path / "a-evaluation-from-b"
    report = (a_run / "evaluation-from-other" / "report.md").read_text()
    assert not (a_run / "evaluation").exists()
    assert "black box" in report
    assert "black box is weaker than white box" in report
    assert str(tmp_path / "other") in report
    assert "ALARM" not in capsys.readouterr().out

    torch.save(fitted(1).state_dict(), tmp_path / "theirs.pth")
    options = (*OPTIONS[:2], "--attacks", "pgd-10", "--source", tmp_path / "theirs.pth", "--device", "cpu", "--no-alarms")
    options += ("--source-name",)
    command(monkeypatch, "evaluate", a_run, *options, "tests.evaluation.test_evaluate:Normalised")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ALARM")]
    assert "expected that the source's clean accuracy is beyond chance" in line
    assert "(--source-mean, --source-std)" in line
    options += (
        "tests.evaluation.test_evaluate:Normalised",
        "--source-mean",
        1,
        "--source-std",
        0.05,
        "--source-activation",
        "relu",
    )
    command(monkeypatch, "evaluate", a_run, *options, "--out", tmp_path / "mended")
    about = json.loads((tmp_path / "mended" / "evaluation.json").read_text())["about"]
    assert about["source's normalisation"] == "mean 1, std 0.05"
    assert about["source's network"].endswith("with relu")
    assert "ALARM" not in capsys.readouterr().out


def test_a_checkpoint_of_somebody_else(monkeypatch, capsys, a_run, tmp_path):
    torch.save({"state_dict": fitted().state_dict()}, tmp_path / "theirs.pth")
    options = ("--data", "digits", "--limit", 20, "--attacks", "fgsm", "--no-alarms", "--device", "cpu")
    with pytest.raises(InputError, match="it does not say which architecture it is: give --model-name"):
        load_model(tmp_path / "theirs.pth", load("digits"))
    command(monkeypatch, "evaluate", tmp_path / "theirs.pth", *options)
    told = json.loads((tmp_path / "theirs-evaluation" / "evaluation.json").read_text())
    assert told["settings"]["eps"] == 8 / 255
    assert told["results"]["clean"]["accuracy"] > 80
    with pytest.raises(SystemExit):
        command(monkeypatch, "evaluate", a_run, *options[2:], "--source", tmp_path / "theirs.pth")
    assert "theirs.pth: it does not say which architecture it is: give --source-name" in capsys.readouterr().err
    command(monkeypatch, "evaluate", a_run / "best.pt", *options[2:], "--out", tmp_path / "file")  # a run's knows
    assert json.loads((tmp_path / "file" / "evaluation.json").read_text())["settings"]["eps"] == EPS


def test_an_accuracy_of_chance_is_an_alarm_in_any_case(monkeypatch, capsys, a_run, tmp_path):
    options = ("--limit", 100, "--attacks", "fgsm", "--no-alarms", "--device", "cpu", "--model-name")
    command(monkeypatch, "evaluate", a_run, *options, "tests.evaluation.test_evaluate:Normalised", "--out", tmp_path / "out")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ALARM")]
    report = (tmp_path / "out" / "report.md").read_text()
    assert line.startswith("ALARM: expected that clean accuracy is beyond chance; found clean ")
    assert "chance 10 %" in line
    assert "(--mean, --std)" in line
    assert "| ALARM | clean accuracy is beyond chance |" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attacks", "pgd-21"], "attack pgd-21: there is none"),
        (["--eps", "0.03"], "--eps 0.03: it is in 1/255"),
        (["--limit", "0"], "--limit 0"),
        (["--limit", "10", "--seed", "-1"], "seed=-1: give an integer from 0"),
        (["--device", "teapot"], "--device teapot"),
        (["--precision", "tf32", "--device", "cpu"], "--precision tf32: TF32 is for GPUs"),
        (["--data", "nowhere.npz"], "--data nowhere.npz: there is no such file"),
        (["--model-name", "wrn-33-10"], "as wrn-33-10 for digits"),
        (
            ["--model-name", "small-cnn"],
            r"run as small-cnn for digits \(10 classes, images \[1, 8, 8\]\).*does not fit the model",
        ),
        (["--source", "nowhere"], "nowhere: there is no such run or checkpoint"),
        (["--source-mean", "0.5"], "--source-mean, --source-std: give the --source that they are of, or leave them out"),
        (
            ["--source", ".", "--source-name", FEATURES, "--source-mean", "0.5", "--source-std", "1"],
            "--source-mean, --source-std: . is",
        ),
        (["--data", "three.npz"], r"run as tests.evaluation.test_evaluate:Features for three \(3 classes.*looks like 10 classes"),
        (["--data", "large.npz"], r"does not take images \[1, 9, 9\]"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, a_run, arguments, message):
    monkeypatch.chdir(a_run)
    for name, side, classes in (("three", 8, 3), ("large", 9, 10)):
        x, y = np.zeros((12, side, side), np.uint8), np.arange(12) % classes
        np.savez(f"{name}.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, "evaluate", a_run, *arguments)
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert not (a_run / "evaluation").exists()


def test_test_images_alone_leave_the_number_of_classes_to_the_model(monkeypatch, a_run):
    data = load("digits").test
    some = data.labels < 3
    np.savez(a_run / "test.npz", x_test=data.pixels[some], y_test=data.labels[some].to(torch.uint8))
    command(monkeypatch, "evaluate", a_run, "--data", a_run / "test.npz", *OPTIONS)
    told = json.loads((a_run / "evaluation" / "evaluation.json").read_text())
    assert told["classes"] == list("0123456789")
    assert told["results"]["clean"]["accuracy"] > 80


def test_a_run_that_is_none(tmp_path):
    for path, message in ((tmp_path, "no best.pt or last.pt"), (tmp_path / "x", "there is no such run")):
        with pytest.raises(InputError, match=message):
            load_model(path, load("digits"), "small-cnn")


def test_out_of_memory_says_what_to_change(monkeypatch, capsys, a_run):
    def no_memory(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "broken_by", no_memory)
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, "evaluate", a_run, "--device", "cpu", "--limit", 10)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.endswith("lower it, in another --out\n")
    monkeypatch.setattr(module, "predict", no_memory)
    with pytest.raises(SystemExit):  # of the first batch as it is: nothing is left behind
        command(monkeypatch, "evaluate", a_run, "--device", "cpu", "--limit", 10, "--out", a_run / "none")
    assert capsys.readouterr().err.endswith("--batch-size 256: out of memory on cpu: lower it\n")
    assert not (a_run / "none").exists()


def test_the_list_of_attacks(monkeypatch, capsys):
    command(monkeypatch, "attacks")
    out = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(name)} ", out, re.MULTILINE) for name in NAMED)
    assert "thesis" in out


def test_the_data_of_a_run_that_are_elsewhere(monkeypatch, capsys, a_run):
    config = json.loads((a_run / "config.json").read_text())
    (a_run / "config.json").write_text(json.dumps(config | {"data": "gone.npz"}))
    with pytest.raises(SystemExit):
        command(monkeypatch, "evaluate", a_run)
    assert "was trained on --data gone.npz; give --data where that is now (" in capsys.readouterr().err


def test_a_folder_keeps_the_attacks_that_it_has(tmp_path, capsys):
    data, attack = digits(40), registry.PGD(steps=2, loss="margin", name="mine")
    first = quiet(fitted(), data, ["pgd-7", attack], folder=tmp_path / "kept")
    second = quiet(fitted(), data, "cw-30", folder=tmp_path / "kept")
    assert list(second.attacks) == ["clean", "cw-30", "pgd-7", "mine"]
    assert second.attacks["mine"] == attack
    assert second.worst_case() <= first.worst_case()
    assert all(torch.equal(second.predicted[name], first.predicted[name]) for name in first.attacks)
    path = tmp_path / "kept" / "settings.json"  # as of an attack that another program defined
    path.write_text(path.read_text().replace('"mine": "pgd:', '"mine": "theirs:'))
    assert list(quiet(fitted(), data, "pgd-7", folder=tmp_path / "kept").attacks) == ["clean", "pgd-7", "cw-30"]
    assert "has results of mine, which are left out: attack theirs: there is none" in capsys.readouterr().err


def test_attacks_with_names_of_their_own_may_be_alike():
    """Their random numbers depend on the name."""
    assert list(parse_all([registry.PGD(name="a"), registry.PGD(name="b")])) == ["clean", "a", "b"]

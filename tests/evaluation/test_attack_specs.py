"""Attacks by name and by the grammar, with the settings of their sources."""

import numpy as np
import pytest
import torch
from torch import nn

import spat_kernels
from spat_kernels import PGD
from spat_kernels.attacks._common import Tally
from spat_kernels.attacks.targeting import nearest_classes_of
from spat_train.errors import InputError
from spat_train.evaluation.attack_specs import NAMED, parse, parse_all
from spat_train.evaluation.attack_specs.families import FAB
from spat_train.evaluation.attack_specs.families import PGD as PGDSpec
from spat_train.evaluation.evaluate import predict
from tests.evaluation.helpers import digits, fitted, quiet

pytestmark = pytest.mark.usefixtures("one_thread")


def test_named_attacks_are_those_of_the_sources(monkeypatch):
    """Written out from the papers, not from the table: steps, length of a step at eps 0.3, start, loss."""
    calls = []
    monkeypatch.setattr(PGD, "run", lambda self, model, x, y, start=None: calls.append((self, start)) or Tally(x).result(x))
    x, y = digits(4)
    ce, kl = spat_kernels.losses.CrossEntropy(), spat_kernels.losses.KLDivergence()
    cw, cw_plus = spat_kernels.losses.Margin(0.0), spat_kernels.losses.Margin(50.0)
    expected = {
        "fgsm": (1, 0.3, False, ce), "fgsm-rs": (1, 0.375, True, ce),
        "pgd-7": (7, 0.075, True, ce), "pgd-10": (10, 0.075, True, ce), "pgd-20": (20, 0.03, True, ce),
        "pgd-40": (40, 0.01, True, ce), "pgd-100": (100, 0.01, True, ce), "pgd-1000": (1000, 0.075, True, ce),
        "cw-30": (30, 0.03, True, cw_plus), "cw-40": (40, 0.01, True, cw), "cw+-40": (40, 0.01, True, cw_plus),
        "pgd-kl-20": (20, 0.03, True, kl), "pgd-ls-20:alpha=0.3": (20, 0.03, True, spat_kernels.losses.LabelSmoothedCE(0.3)),
        "pgd-l2-20": (20, None, True, ce), "pgd-l2-100": (100, None, True, ce), "pgd-l1-20": (20, None, True, ce),
    }  # fmt: skip
    for name, (steps, step_size, random_start, loss) in expected.items():
        calls.clear()
        attack = parse(name)
        attack(nn.Flatten(), x, y, 0.3, torch.Generator())
        ((pgd, start),) = calls
        found = {key: getattr(pgd, key) for key in ("steps", "step_size", "loss", "norm", "targeted")}
        step_size = step_size and pytest.approx(step_size)
        norm = next((norm for norm in ("l1", "l2") if norm in name), "linf")
        assert found == {"steps": steps, "step_size": step_size, "loss": loss, "norm": norm, "targeted": False}, name
        assert (start is not None) is pgd.random_start is random_start, name
        assert pgd.stop == ("cycle" if name == "pgd-1000" else None), name
        assert attack.restarts == 1, name
    assert parse("noise").steps == 0
    assert parse("clean").describe() == "no attack"


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


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            "pgd:steps=50:step=1/20:loss=margin:restarts=5:eps=16/255:norm=l2:start=clean:target=random",
            {"steps": 50, "step": 0.05, "loss": "margin", "restarts": 5, "norm": "l2", "eps": 16 / 255, "start": "clean",
             "target": "random"},
        ),
        ("pgd-20:alpha=0.2:steps=50", {"settings": (("alpha", 0.2),), "steps": 50, "spec": "pgd:alpha=0.2:steps=50:step=0.1"}),
        # what evaluations have kept
        ("pgd-ls-20:alpha=1/4:eps=1/8", {"spec": "pgd:eps=0.125:loss=ls:alpha=0.25:steps=20:step=0.1"}),
        ("cw-40:step=1/8", {"spec": "pgd:loss=margin:kappa=0.0:steps=40:step=0.125"}),
        ("apgd-t", {"spec": "apgd:loss=dlr:targets=9", "steps": 100}),
        ("apgd-t:targeting=malt", {"spec": "apgd:loss=dlr:targets=9:targeting=malt"}),
        ("apgd-pma", {"spec": "apgd:loss=pma"}),
        ("pgd-20:loss=pma", {"spec": "pgd:loss=pma:steps=20:step=0.1", "least_classes": 2}),
        ("pgd-20:target=all:targeting=MALT", {"spec": "pgd:steps=20:step=0.1:target=all:targeting=malt"}),
        ("aa-fast", {"exhaustive": False, "parts": ("apgd-pma", "apgd-t-malt", "apgd-ce", "apgd-t", "fab-t", "square")}),
        ("autoattack:version=fast:exhaustive=yes", {"exhaustive": True, "spec": "autoattack:version=fast:exhaustive=True"}),
        ("apgd-ce", {"loss": "ce", "steps": 100, "targets": None}),
        ("apgd-dlr", {"loss": "dlr", "steps": 100, "targets": None}),
        ("fab-t", {"steps": 100, "targets": 9}),
        ("square", {"queries": 5000}),
        ("autoattack-plus", {"version": "plus", "steps": 100, "queries": 5000}),
        ("pgd-40x20", {"restarts": 20, "steps": 40, "name": "pgd-40x20"}),
        ("aa", {"name": "autoattack", "version": "standard"}),
        ("autoattack-rand", {"version": "rand"}),
        ("pgd:norm=L∞", {"norm": "linf"}),
        ("pgd:loss=CE:start=Clean", {"spec": "pgd:start=clean"}),
        ("aa-plusx3:steps=5", {"name": "autoattack-plusx3:steps=5"}),
    ],
)  # fmt: skip
def test_the_grammar(spec, expected):
    attack = parse(spec)
    assert {name: getattr(attack, name) for name in expected} == expected


def test_runs_names_and_settings():
    assert parse("pgd-7-allx2").runs(10) == 18
    assert parse("pgd:restarts=5:target=random").runs(10) == 5
    for name, plain in (("AA", "autoattack"), ("AutoAttack", "autoattack"), ("PGD-40X20", "pgd-40x20"), ("APGD-T", "apgd-t")):
        assert parse(name) == parse(plain)
        assert parse(name).name == plain
    assert PGDSpec(norm="L2", start="Clean") == parse("pgd:norm=l2:start=clean")
    assert FAB(norm="L∞", targets=np.int64(3)) == parse("fab:targets=3")
    for wrong, message in (({"norm": "l0"}, "norm=l0: choose one of linf, l2, l1"), ({"steps": 2.5}, "steps=2.5: give a whole")):
        with pytest.raises(ValueError, match=message):
            PGDSpec(**wrong)
    assert list(parse_all("pgd-20,fgsm")) == ["clean", "pgd-20", "fgsm"]
    assert list(parse_all(["clean"])) == ["clean"]
    assert list(parse_all([PGDSpec(name="a"), PGDSpec(name="b")])) == ["clean", "a", "b"]  # random numbers depend on the name
    for name in NAMED:
        attack = parse(name + ":alpha=0.1" * (name == "pgd-ls-20"))
        again = parse(attack.spec)
        assert again.spec == attack.spec
        assert again.describe() == attack.describe()
        assert parse(attack) is attack
        assert attack.radius(0.1, 0.5, 12.0) == {"linf": 0.1, "l2": 0.5, "l1": 12.0}[attack.norm]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pgd-21", r"attack pgd-21: there is none: did you mean pgd-20"),
        ("autoatack", "did you mean autoattack"),
        ("Auto-Attack", "did you mean autoattack"),
        ("", "there is none: see spat-train attacks"),
        ("pgd-20-most-likely", "there is none"),
        ("pgd:stepz=3", r"pgd has no setting stepz: did you mean (step or steps|steps or step)"),
        ("clean:eps=0.1", "clean has no setting eps: it has none"),
        ("pgd-20:=50", "'=50' is no setting: write key=value"),
        ("pgd-20:", "'' is no setting"),
        ("pgd-20:steps", "'steps' is no setting: write key=value"),
        ("pgd-20:steps=1/2", "steps=1/2: give a whole number"),
        ("pgd-20:step=-1", "step=-1: give a number of at least 0"),
        ("pgd-20:step=1/0", "step=1/0: give a number"),
        ("pgd-20:step=2/255", "step=2/255: it is in units of eps, not in 1/255: give 1/4"),
        (f"pgd-20:step={'9' * 400}/1", "step=9*/1: give a number of at least 0"),
        ("pgd-20:alpha=x", "alpha=x: give a number"),
        ("pgd-20:eps=8", "write eps=8/255"),
        ("noise:right_at=every", "of no steps there is noise alone"),
        ("pgd-20:kappa=1", "kappa is a setting of loss=margin, not of ce"),
        ("pgd-20:alpha=2", r"alpha=2.0 is outside \[0, 1\]"),
        ("pgd-ls-20", "alpha must be given"),
        ("pgd-kl-20:start=clean", "the gradient of kl is 0 at a clean start"),
        ("pgd-kl-20-all", "loss 'kl' has no targeted form"),
        ("pgd:loss=cee", "loss=cee: choose one of ce, kl, margin, dlr, .*ls, lsce"),
        ("fab-tx2", "restarts would repeat one run"),
        ("pgd-20:targeting=malt", "targeting=malt is an order of targets: give target=all"),
        ("pgd-20:target=random:targeting=malt", "targeting=malt is an order of targets: give target=all"),
        ("apgd:targeting=malt", "targeting=malt is an order of targets: give targets=9"),
        ("apgd-t:targeting=near", "targeting=near: choose one of confidence, malt"),
        ("autoattack:exhaustive=yes", "exhaustive=yes goes with version=fast, not standard: leave it out"),
        ("autoattack-fast:exhaustive=2", "exhaustive=2: give yes or no"),
        ("pgd-20:restarts=0", "restarts=0: give at least 1"),
        ("pgd-20:steps=5:steps=6", "steps is given twice"),
        ("pgd-20,pgd-20", "attack pgd-20: it is named twice"),
        ("fgsm,pgd-20:norm=L2,pgd-20:norm=l2", "attack pgd-20:norm=l2: it is the same as pgd-20:norm=L2: leave one out"),
        ("AAx2,autoattackx2", "attack autoattackx2: it is named twice"),
    ],
)
def test_specs_that_do_not_fit(spec, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_all(spec)
    assert "\n" not in str(caught.value)


IN_L1 = [f"{name}:norm=L1" for name in ("apgd-ce:steps=6", "fab:steps=3", "square:queries=20", "aa:steps=3:queries=20")]
CHEAP = {"apgd": ":steps=4", "fab": ":steps=3:targets=2", "square": ":queries=20", "autoattack": ":steps=3:queries=20"}


@pytest.mark.parametrize(
    "name", [*NAMED, "pgd-7-least-likely", "pgd-7-random", "pgd-7-all", "pgd-7x2", "fab:norm=l2:steps=2", *IN_L1]
)
def test_every_named_attack_runs(name):
    family = parse(name + ":alpha=0.1" * (name == "pgd-ls-20")).family
    spec = name + (":alpha=0.1" if name == "pgd-ls-20" else "" if ":" in name else CHEAP.get(family, ""))
    spec = spec.removesuffix(":queries=20") if name == "autoattack-rand" else spec
    found = quiet(fitted(), digits(12), [spec], eps_l2=0.5, eps_l1=3.0, batch_size=8)
    name = parse(spec).name
    assert found.accuracy(name) <= found.accuracy("clean")
    assert found.accuracy("clean") > 80
    if name != "clean":
        recheck = found.rechecks[name]
        assert recheck.outside == 0
        assert recheck.adversarial == int((found.correct("clean") & ~found.correct(name)).sum())


def test_targets():
    model, (x, y) = fitted(dtype=torch.float64), digits(40, torch.float64)
    order = model(x).scatter(1, y[:, None], torch.inf).argsort(dim=1, descending=True)

    def chosen(name, run=0, seed=0):
        which, tally = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)), Tally(x)
        targets = parse(name)._targets(model, x, y, which, run, "auto", tally)
        assert tally.forwards.unique().tolist() == [1]
        assert tally.backwards.unique().tolist() == [9 if "malt" in name else 0]
        return targets

    assert torch.equal(chosen("pgd-7-least-likely"), order[:, -1])
    every = torch.stack([chosen("pgd-7-all", run) for run in range(9)], 1)
    assert torch.equal(every, order[:, 1:])
    assert torch.equal(chosen("pgd-7-all", 9), order[:, 1])
    assert (chosen("pgd-7-random") != chosen("pgd-7-random", seed=1)).any()
    nearest = torch.stack([chosen("pgd-7-all:targeting=malt", run) for run in range(9)], 1)
    assert torch.equal(nearest, nearest_classes_of(model, x, y, "linf")[0])
    assert not torch.equal(nearest, every)

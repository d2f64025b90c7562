"""AutoAttack: which attack broke what, on what is left alone, reproducibly; and no more robust than by torchattacks."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from benchmarks import autoattack as benchmark
from benchmarks import measure
from spat_kernels import APGD, FAB, AutoAttack, Square
from spat_kernels.attacks import autoattack
from spat_kernels.attacks._common import Tally
from spat_kernels.input_gradient.autograd import InputGradient
from tests.helpers import Recorder, assert_inside, attackable, batch, cnn, correct, linear, moved, probability_margin, sharp

QUICK = {"steps": 3, "queries": 20}


@pytest.mark.parametrize("version", ["standard", "fast", "plus", ("square", "apgd-ce"), ("apgd-t-malt", "fab-t", "apgd-pma")])
@pytest.mark.parametrize("norm, eps", [("linf", 0.006), ("l2", 0.06), ("l1", 0.3)])
def test_result_says_what_broke_what(norm, eps, version):
    model, x, y = attackable(40)
    y[::8] = (y[::8] + 1) % 10
    attack = AutoAttack(eps, norm=norm, version=version, **QUICK)
    result = attack.run(model, x, y)
    assert result.names == ("clean", *attack.attacks)
    assert result.broken_by.dtype == torch.int64
    assert torch.equal(result.broken_by == 0, model(x).argmax(1) != y)
    assert torch.equal(model(result.x_adv).argmax(1) == y, result.robust), "what it says of its images is so"
    assert 3 < result.robust.sum() < 33
    assert len(result.broken_by.unique()) >= 3
    untouched = result.robust | (result.broken_by == 0)
    assert torch.equal(moved(result.x_adv, x), ~untouched)
    assert_inside(result.x_adv, x, eps, norm)
    assert torch.equal(attack(model, x, y), result.x_adv), "the same again"


def test_what_is_misclassified_in_half_precision_only_is_attacked_all_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    model[1].bias.data += 1000  # in bf16 all logits are alike
    x = torch.rand(20, 3, 4, 4)
    y = model(x).argmax(1)
    assert not AutoAttack(0.3, version=("apgd-ce",), steps=5).run(model, x, y).robust.any()
    attack = AutoAttack(0.3, version=("apgd-ce",), steps=5, precision="bf16", input_gradient="autograd")
    assert not attack.run(model, x, y).robust[y != 0].any()


def test_published_settings(monkeypatch):
    """The lists of attacks, their restarts and passes are those of the authors' code."""
    made = []
    for attack in (APGD, FAB, Square):
        monkeypatch.setattr(attack, "run", lambda self, model, x, y: made.append(self) or Tally(x).result(x))
    model, (x, y) = cnn().eval(), batch()
    y = model(x).argmax(1)

    def settings(version, **more):
        made.clear()
        AutoAttack(0.1, version=version, **more).run(model, x, y)
        for attack in made:
            kind, loss = type(attack).__name__, getattr(attack, "loss", None)
            targets, eot = getattr(attack, "targets", None), getattr(attack, "eot", 1)
            assert getattr(attack, "targeting", "confidence") == (
                "malt" if attack in made[1:2] and version == "fast" else "confidence"
            )
            yield kind, loss and loss.name, targets, attack.restarts, eot

    ce, dlr = ("APGD", "ce", None), ("APGD", "dlr", None)
    targeted, fab_t, square = ("APGD", "dlr", 9, 1, 1), ("FAB", None, 9, 1, 1), ("Square", None, None, 1, 1)
    assert list(settings("standard")) == [(*ce, 1, 1), targeted, fab_t, square]
    assert all(a.eps == 0.1 and a.norm == "linf" for a in made)
    assert [a.steps for a in made[:3]] == [100] * 3
    assert (made[0].rho, made[3].p_init, made[3].queries) == (0.75, 0.8, 5000)
    assert list(settings("plus")) == [(*ce, 5, 1), (*dlr, 5, 1), ("FAB", None, None, 5, 1), square, targeted, fab_t]
    assert list(settings("rand")) == [(*ce, 1, 20), (*dlr, 1, 20)]
    assert list(settings("standard", norm="l1")) == [(*ce, 5, 1), ("APGD", "dlr", 5, 1, 1), fab_t, square]
    assert [a.in_larger_balls for a in made[:2]] == [True, True]
    assert list(settings("plus", norm="l1")) == list(settings("plus"))
    assert list(settings(("apgd-ce", "apgd-t"), norm="l1")) == [(*ce, 1, 1), targeted]
    shared = {"norm": "l2", "bounds": (-1, 2), "precision": "fp32", "input_gradient": "autograd", "bn_mode": "keep"}
    fast = [("APGD", "pma", None, 1, 1), ("APGD", "dlr", 2, 1, 1)]
    assert list(settings("fast")) == fast
    assert [a.steps for a in made] == [100, 100]
    assert list(settings("fast", exhaustive=True)) == [*fast, *settings("standard")]
    assert list(settings("fast", exhaustive=True, norm="l1")) == [*fast, *settings("standard", norm="l1")]
    list(settings("standard", steps=7, queries=9, graph=False, **shared))
    assert all(getattr(a, name) == value for a in made for name, value in shared.items())
    assert [a.steps for a in made[:3]] == [7] * 3
    assert (made[0].graph, made[1].graph, made[3].queries) == (False, False, 9)


def test_only_what_is_still_correct_is_attacked(monkeypatch):
    model, x, y = attackable(30)
    y[:6] = (y[:6] + 1) % 10
    seen = []
    for attack in (APGD, FAB, Square):
        run = attack.run
        monkeypatch.setattr(attack, "run", lambda self, m, x, y, run=run: seen.append(len(x)) or run(self, m, x, y))
    stages = [stage.robust.clone() for stage in AutoAttack(0.006, **QUICK).stages(model, x, y)]
    assert seen == [int(s.sum()) for s in stages[:4]]
    assert len(stages) == 5
    assert seen[0] == 24
    assert all((later <= earlier).all() for earlier, later in zip(stages, stages[1:], strict=False))
    seen.clear()
    whole = AutoAttack(0.006, **QUICK).run(model, x, y)
    seen.clear()
    parts = AutoAttack(0.006, batch_size=7, **QUICK).run(model, x, y)
    assert seen[:4] == [7, 7, 7, 3], "what is left is packed into full batches"
    assert max(seen) <= 7
    assert (whole.robust == parts.robust).float().mean() > 0.9


def test_fast_asks_standard_about_close_calls(monkeypatch):
    """Those with little left of the margin that the clean image has, by what APGD-PMA and APGD-T by MALT return."""
    model, x, y = attackable(40)
    settings = {"version": "fast", "steps": 3, "queries": 300}
    stages = AutoAttack(0.006, **settings).stages(model, x, y)
    clean, calls, found = lead(model, x, y), [], [next(stages).robust.clone()]
    for attack in (APGD, FAB, Square):
        run = attack.run

        def noted(self, model, x, y, run=run):
            result = run(self, model, x, y)
            calls.append((lead(model, result.x_adv, y), x))
            return result

        monkeypatch.setattr(attack, "run", noted)
    found += [stage.robust.clone() for stage in stages]
    least = clean.clone()
    for robust, (left, attacked) in zip(found[:2], calls[:2], strict=True):
        assert torch.equal(x[robust], attacked)
        least[robust] = least[robust].minimum(left)
    for robust, (left, attacked) in zip(found[2:-1], calls[2:], strict=True):
        close = robust & (least <= autoattack.CLOSE * clean)
        assert torch.equal(x[close], attacked)
        least[close] = least[close].minimum(left)
    assert 0 < len(calls[2][1]) < found[2].sum(), "some are"


def lead(model, x, y):
    return -probability_margin(model(x).detach(), y)


def test_fast_asks_standard_where_it_cannot_tell():
    """Images without a softmax, as one logit is +inf; and those whose budget does not suffice for MALT."""

    class Bright(nn.Module):
        def forward(self, x):
            return net(x).index_fill(1, torch.tensor(0), torch.inf)

    torch.manual_seed(0)
    net, x = linear(192).requires_grad_(False), torch.rand(8, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        bright = AutoAttack(0.01, version="fast", **QUICK).run(Bright().eval(), x, torch.zeros(8, dtype=torch.int64))
    assert bright.robust.all()
    assert (bright.forwards >= QUICK["queries"]).all()
    attack = AutoAttack(1e-4, version="fast", budget=22, **QUICK)  # APGD-PMA takes 9 of these, MALT 10
    y = net(x).argmax(1)
    assert (attack.run(net, x, y).forwards + attack.run(net, x, y).backwards > 16).all()


def test_exhaustive_leaves_what_fast_and_standard_leave():
    model, x, y = attackable(40)
    fast, standard = (AutoAttack(0.006, version=version, **QUICK).run(model, x, y) for version in ("fast", "standard"))
    both = AutoAttack(0.006, version="fast", exhaustive=True, **QUICK).run(model, x, y)
    assert both.names == fast.names == ("clean", "apgd-pma", "apgd-t-malt", "apgd-ce", "apgd-t", "fab-t", "square")
    assert torch.equal(*(r.broken_by.where(r.broken_by <= 2, -1) for r in (both, fast)))
    assert both.robust.sum() <= min(fast.robust.sum(), standard.robust.sum()) + 1, "random numbers differ"
    for version in ("standard", "plus", ("apgd-pma", "apgd-ce")):
        with pytest.raises(ValueError, match="exhaustive=True goes with version='fast', got version="):
            AutoAttack(0.006, version=version, exhaustive=True)


def test_stops_when_nothing_is_left():
    model = Recorder(sharp())
    x = torch.rand(8, 3, 8, 8).double()
    y = (model.model(x).argmax(1) + 1) % 10
    result = AutoAttack(0.5).run(model, x, y)
    assert len(model.inputs) == 1
    assert (result.broken_by == 0).all()
    assert torch.equal(result.x_adv, x)
    assert AutoAttack(0.5).run(model, x[:0], y[:0]).broken_by.shape == (0,)
    assert len(model.inputs) == 1
    result = AutoAttack(0.5, **QUICK).run(model, x[:1], model.model(x[:1]).argmax(1))
    assert result.broken_by.tolist() == [1]


def test_radius_per_sample():
    model, x, y = attackable(20)
    eps = torch.linspace(0, 0.02, 20)
    result = AutoAttack(eps, batch_size=8, **QUICK).run(model, x, y)
    assert_inside(result.x_adv, x, eps, "linf")
    assert result.robust[:2].all()
    assert not result.robust[-3:].all()


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(classes):
    model, (x, _) = cnn(classes=classes).eval(), batch(4)
    y = model(x).argmax(1)
    if classes == 4:
        assert AutoAttack(0.01, **QUICK)(model, x, y).shape == x.shape
        return
    with pytest.raises(ValueError, match=rf"loss of apgd-t needs at least 4 classes, the model has {classes}: use version=\("):
        AutoAttack(0.01, **QUICK)(model, x, y)
    AutoAttack(0.01, version=("apgd-ce", "fab-t", "square"), **QUICK)(model, x, y)
    if classes == 2:
        with pytest.raises(ValueError, match=r"loss of apgd-dlr needs at least 3 classes.*use version=\('apgd-ce',\)"):
            AutoAttack(0.01, version="rand")(model, x, y)


def test_vectors_are_attacked_without_square():
    """By the version that the error names."""
    model, x = nn.Linear(20, 5).eval(), torch.rand(8, 20)
    y = model(x).argmax(1)
    with pytest.raises(ValueError, match="use version=") as error:
        AutoAttack(0.1, **QUICK)(model, x, y)
    version = tuple(re.findall(r"'([a-z-]+)'", str(error.value).split("version=")[1]))
    assert version == ("apgd-ce", "apgd-t", "fab-t")
    assert AutoAttack(0.1, version=version, **QUICK).run(model, x, y).broken_by.max() > 0
    for exhaustive, remedy in ((False, ""), (True, " without exhaustive")):
        with pytest.raises(ValueError, match=re.escape(f"'apgd-pma', 'apgd-t-malt', 'apgd-ce', 'apgd-t', 'fab-t'){remedy}")):
            AutoAttack(0.1, version="fast", exhaustive=exhaustive)(model, x, y)
    with pytest.raises(ValueError, match="choose other attacks"):
        AutoAttack(0.1, version=("square",))(model, x, y)


@pytest.mark.parametrize("norm, eps", [("linf", 0.06), ("l2", 0.4)])
def test_as_robust_as_by_torchattacks(task, norm, eps):
    """By the benchmark, from other random numbers; at torchattacks' settings but for fewer queries, which break few more."""
    pytest.importorskip("torchattacks", reason="it needs torchvision, which needs its own build of torch")
    model, *images = task
    x, y = correct(model, *images, 25)
    model, x = copy.deepcopy(model).float().requires_grad_(False), x.float()
    y[0] = (y[0] + 1) % 10
    providers = {
        "torchattacks": benchmark.torchattacks(eps, norm, queries=30),
        "spat_kernels": benchmark.ours(eps, norm, steps=10, queries=30),
    }
    state = torch.get_rng_state()
    found = benchmark.judged(benchmark.compare(model, x, y, providers, batch_size=15), y)
    torch.set_rng_state(state)
    ours, theirs = found["spat_kernels"], found["torchattacks"]
    assert 3 < sum(theirs["robust"]) < 22, "some of both"
    assert ours["robust"][0] is theirs["robust"][0] is False
    assert ours["agreement"] >= 92
    assert abs(ours["points"]) <= 4
    assert theirs["faster"] == 1
    assert ours["left"]["clean"] == 24
    assert ours["left"]["square"] == sum(ours["robust"])
    assert ours["seconds"].keys() == theirs["seconds"].keys()
    assert min(theirs["seconds"].values()) > 0
    settings = {"model": "m", "network": "n", "norm": norm, "eps": eps, "images": 25, "clean": 96.0}
    settings |= {"batch_size": 15, "queries": 30}
    table = benchmark.table(measure.begun("autoattack", "cpu", settings=settings, autoattack=found))
    assert "| spat_kernels |" in table
    assert "25 images" in table


def test_fast_takes_less_than_a_tenth_of_standards_passes_where_nothing_is_close(monkeypatch):
    """In tenths of the 620 against 9,710 forwards and backwards of the defaults."""
    model, x, y = attackable(3)
    passes = []
    for name in ("forward", "backward", "logits"):
        plain = getattr(InputGradient, name)
        monkeypatch.setattr(InputGradient, name, lambda *a, plain=plain, **k: passes.append(1) or plain(*a, **k))

    def cost(version):
        passes.clear()
        assert AutoAttack(1e-6, version=version, steps=10, queries=500, input_gradient="autograd").run(model, x, y).robust.all()
        return len(passes)

    assert 60 < cost("fast") < 0.1 * cost("standard")


def test_names_of_attacks():
    assert set(autoattack.ATTACKS) == {name for version in autoattack.VERSIONS.values() for name in version}


# --- where it runs ---


def test_whole_on_a_device(device):
    model, x, y = attackable(20)
    attack = AutoAttack(0.006, batch_size=8, **QUICK)
    result = attack.run(model.to(device), x.to(device), y.to(device))
    assert torch.equal(model(result.x_adv).argmax(1) == y.to(device), result.robust)
    assert not result.robust.all()
    assert torch.equal(attack(model, x.to(device), y.to(device)), result.x_adv), "the same again"


@pytest.mark.gpu
def test_eps_of_samples_may_live_on_the_host():
    model, x, y = (t.cuda() for t in attackable(12))
    eps = torch.full((12,), 0.006)
    assert torch.equal(AutoAttack(eps, **QUICK)(model, x, y), AutoAttack(eps.cuda(), **QUICK)(model, x, y))

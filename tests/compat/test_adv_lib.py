"""adv_lib's functions on our attacks: the same arguments, from the same seed the same images, and no adv_lib needed."""

import importlib
import importlib.util
import inspect
import math
import sys
from types import ModuleType

import pytest
import torch

import spat_kernels as sk
from spat_kernels import losses
from spat_kernels.attacks import pgd as attacks
from spat_kernels.compat import adv_lib as ours
from spat_kernels.compat.adv_lib.last_success import LastSuccess, TargetedDLR
from spat_kernels.cuda_graphs.cache import Graphs
from tests.cuda_graphs.fake_graph import FakeGraph, captured_and_eager
from tests.helpers import (
    EPS,
    Recorder,
    assert_inside,
    assert_same,
    attackable,
    batch,
    distance,
    mixed_model,
    moved,
    photographs,
    robust,
    snapshot,
)

RADIUS = 0.006  # breaks some of `attackable`


@pytest.fixture(scope="module")
def theirs():
    """adv_lib.attacks. It imports visdom, which plots, and is not needed here."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("visdom") is None:
            patch.setitem(sys.modules, "visdom", ModuleType("visdom"))
        yield pytest.importorskip("adv_lib.attacks", exc_type=ImportError)


class Callback:
    """What adv_lib's VisdomLogger is asked to plot."""

    def __init__(self):
        self.lines = []

    def line(self, name, x, y):
        self.lines.append((name, x, round(float(y), 6)))


def wrong(model, x, y, targeted=False):
    return (model(x).argmax(1) == y) == targeted


# ---- pgd_linf


def test_signatures(theirs):
    """Ours begin with theirs, names, order and defaults alike."""
    for name in ("pgd_linf", "apgd", "apgd_targeted"):
        given = [(p.name, p.default) for p in inspect.signature(getattr(theirs, name)).parameters.values()]
        taken = [(p.name, p.default) for p in inspect.signature(getattr(ours, name)).parameters.values()]
        assert taken[: len(given)] == given


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"random_init": False},
        {"restarts": 4, "steps": 3, "relative_step_size": 0.5},
        {"loss_function": "dl"},
        {"loss_function": "DLR", "restarts": 2},
        {"targeted": True},
        {"targeted": True, "loss_function": "dl"},
        {"targeted": True, "loss_function": "dlr"},
        {"absolute_step_size": 0.001},
        {"relative_step_size": 0.5, "steps": 7},
        {"steps": 1},
        {"steps": 0},
    ],
    ids=str,
)
def test_same_images(theirs, settings, varying):
    model, x, y = attackable(40)
    targeted = settings.get("targeted", False)
    y, radius = ((y + 1) % 10, 0.04) if targeted else (y, RADIUS)
    eps = torch.linspace(0, 2 * radius, 40).double() if varying else radius
    found = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        callback = Callback()
        x_adv = module.pgd_linf(model, x, y, eps, callback=callback, **settings)
        found.append((x_adv, callback.lines, torch.get_rng_state()))
    (expected, lines, state), (x_adv, our_lines, our_state) = found
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    assert our_lines == lines
    assert settings.get("steps", 2) < 1 or torch.equal(our_state, state)
    broken = wrong(model, x_adv, y, targeted)
    assert settings.get("steps", 2) < 2 or 0 < broken.sum() < 40
    assert torch.equal(moved(x_adv, x) & ~broken, torch.zeros_like(broken)), "what no iterate breaks comes back as it was"
    assert_inside(x_adv, x, eps, "linf")


def test_epsilon_by_its_name():
    model, x, y = attackable(4)
    torch.manual_seed(0)
    by_place = ours.pgd_linf(model, x, y, 8 / 255, steps=3)
    torch.manual_seed(0)
    assert torch.equal(ours.pgd_linf(model, inputs=x, labels=y, ε=8 / 255, steps=3), by_place)
    torch.manual_seed(0)
    assert torch.equal(ours.pgd_linf(model, x, y, ϵ=8 / 255, steps=3), by_place), "another epsilon of Unicode, U+03F5"


def test_restarts_are_for_what_is_not_broken():
    model, x, y = attackable(40)
    recorder, callback = Recorder(model).eval(), Callback()
    ours.pgd_linf(
        recorder, x, y, RADIUS, steps=4, restarts=3, relative_step_size=0.4, callback=callback, input_gradient="autograd"
    )
    left = [40 - round(40 * share) for _, _, share in callback.lines]
    assert 40 > left[0] > left[-1]
    assert recorder.sizes == [size for n in (40, *left[:-1]) for size in [n] * 5], "4 iterates, and a look at the outcome"


def test_last_and_first_success():
    """`stop` breaks the same images, with fewer passes, and by the first iterate, which is nearer."""
    model, x, y = attackable(40)
    settings = {"steps": 30, "random_init": False, "relative_step_size": 0.05}
    recorders = [Recorder(model).eval() for _ in range(2)]
    last = ours.pgd_linf(recorders[0], x, y, 3 * RADIUS, **settings)
    first = ours.pgd_linf(recorders[1], x, y, 3 * RADIUS, stop="success", **settings)
    assert torch.equal(wrong(model, last, y), wrong(model, first, y))
    assert torch.equal(moved(last, x), moved(first, x))
    assert (distance(first, x, "linf") <= distance(last, x, "linf")).all()
    assert distance(first, x, "linf").sum() < 0.8 * distance(last, x, "linf").sum()
    assert sum(recorders[1].sizes) < 0.9 * sum(recorders[0].sizes)


@pytest.mark.parametrize("random_init", [False, True])
def test_no_steps(random_init):
    model, x, y = attackable(20)
    for stop in (None, "success"):
        assert torch.equal(ours.pgd_linf(model, x, y, 0.1, steps=0, random_init=random_init, stop=stop), x)
    assert torch.equal(ours.pgd_linf(model, x, y, 0.1, restarts=0), x)


def test_settings():
    """They go to PGD: half precision gives other images, equal generators equal ones, and torch's own is left alone."""
    model, x, y = attackable(16)
    model, x = model.float(), x.float()
    state = torch.get_rng_state()

    def attack(seed=3, **settings):
        source = torch.Generator().manual_seed(seed)
        return ours.pgd_linf(model, x, y, RADIUS, steps=5, restarts=2, generator=source, **settings)

    plain = attack(input_gradient="plan")
    assert torch.equal(plain, attack(graph=False))
    assert not torch.equal(plain, attack(seed=4))
    assert not torch.equal(plain, attack(precision="bf16"))
    assert torch.equal(state, torch.get_rng_state())


def test_targeted_dlr():
    """Its value and gradient against the formula: the difference counts from the likeliest other class of these very logits."""
    z, t = torch.randn(50, 6).double(), torch.randint(6, (50,))
    sorted_z = z.sort(1, descending=True).values
    others = torch.stack([torch.cat((row[:k], row[k + 1 :])).max() for row, k in zip(z, t, strict=True)])
    expected = (others - z[torch.arange(50), t]) / (sorted_z[:, 0] - (sorted_z[:, 2] + sorted_z[:, 3]) / 2 + 1e-8)
    torch.testing.assert_close(TargetedDLR().value(z, t), expected)
    model, x, y = attackable(4)
    with pytest.raises(ValueError, match="at least 4 classes"):
        ours.pgd_linf(lambda z: model(z)[:, :3], x, y * 0, 0.1, targeted=True, loss_function="dlr")


@pytest.mark.parametrize("loss", ["ce", "dlr", losses.Margin(math.inf)], ids=str)
@pytest.mark.parametrize("targeted", [False, True])
def test_captured(monkeypatch, loss, targeted):
    """A CUDA graph gives what it gives without one, for the batch after it too."""
    monkeypatch.setattr(attacks, "graphs", Graphs(graph=FakeGraph))
    model, x, y = attackable(8)
    for images in (x, x.flip(0)):
        y = (model(images).argmax(1) + targeted) % 10
        settings = {"targeted": targeted, "loss": loss, "steps": 6, "step_size": 0.01}
        captured, eager = captured_and_eager(LastSuccess, 0.03, model, images, y, **settings)
        assert torch.equal(captured, eager)
        assert moved(eager, images).any()
    assert len(attacks.graphs) == 1


# ---- apgd


NORMS = {1: ("l1", 0.8), 2: ("l2", 0.06), math.inf: ("linf", RADIUS)}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["apgd", "apgd_targeted"])
def test_apgd_breaks_as_many(theirs, name, norm):
    """Starts differ, so images do. In L1 ours wastes no step on pixels at the side of the box, and breaks some more."""
    model, x, y = attackable(40)
    model, x = model.float(), x.float()  # adv_lib's has buffers in fp32
    ball, eps = NORMS[norm]
    settings = {"n_iter": 20} if name == "apgd" else {"n_iter": 10, "num_targets": 4}
    x_adv = getattr(ours, name)(model, x, y, eps, norm, **settings)
    broken = wrong(model, x_adv, y)
    expected = wrong(model, getattr(theirs, name)(model, x, y, eps, norm, **settings), y)
    assert 0 < expected.sum() < 40
    assert -2 <= int(broken.sum()) - int(expected.sum()) <= (6 if norm == 1 else 2)
    assert torch.equal(moved(x_adv, x), broken)
    assert_inside(x_adv, x, eps, ball, atol=1e-6)


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_reaches_as_many_targets(theirs, norm, loss):
    model, x, y = attackable(40)
    model, x, targets = model.float(), x.float(), (y + 1) % 10
    settings = {"targeted": True, "n_iter": 20, "loss_function": loss}
    x_adv, expected = (library.apgd(model, x, targets, 3 * NORMS[norm][1], norm, **settings) for library in (ours, theirs))
    there, there_too = (~wrong(model, images, targets) for images in (x_adv, expected))
    assert 0 < there_too.sum() < 40
    assert abs(int(there.sum()) - int(there_too.sum())) <= 2
    assert torch.equal(x_adv[~there], x[~there])


def test_apgd_is_ours():
    model, x, y = attackable(20)
    eps = torch.linspace(0, 4 * RADIUS, 20).double()
    for mine, attack in (
        (ours.apgd(model, x, y, eps, math.inf, False, 8, 2, "CE", 1, 0.6), sk.APGD(eps, steps=8, restarts=2, rho=0.6)),
        (ours.apgd(model, x, y, 1.0, 1, n_iter=8), sk.APGD(1.0, norm="l1", loss="dlr", steps=8, multi_eps=False)),
        (ours.apgd(model, x, y, 1.0, 1, n_iter=8, use_large_reps=True), sk.APGD(1.0, norm="l1", loss="dlr", steps=8)),
        (ours.apgd_targeted(model, x, y, 0.06, 2, n_iter=3), sk.APGD(0.06, norm="l2", loss="dlr", steps=3, targets=9)),
        (ours.apgd_targeted(model, x, y, eps, math.inf, n_iter=3, num_targets=2), sk.APGD(eps, loss="dlr", steps=3, targets=2)),
    ):
        attack.generator, attack.bn_mode = None, "keep"
        broken = wrong(model, mine, y)
        assert 0 < broken.sum() < 20
        again = attack(model, x, y)
        assert abs(int(wrong(model, again, y).sum()) - int(broken.sum())) <= 2


def test_apgd_refuses_what_it_cannot_do():
    model, x, y = attackable(4)
    for name, settings in (("apgd", {"best_loss": True}), ("apgd_targeted", {"targeted": True})):
        with pytest.raises(ValueError, match=f"{[*settings][0]}=True.*use adv_lib.attacks"):
            getattr(ours, name)(model, x, y, 0.1, 2, **settings)
    with pytest.raises(ValueError, match="use_rs=False"):
        ours.apgd(model, x, y, 1.0, 1, use_large_reps=True, use_rs=False)
    with pytest.raises(ValueError, match="norm=3"):
        ours.apgd(model, x, y, 0.1, 3)
    with pytest.raises(ValueError, match="multi_eps=True with norm='l2'"):
        ours.apgd(model, x, y, 0.1, 2, use_large_reps=True)
    with pytest.raises(ValueError, match="targets=0 must be at least 1"):
        ours.apgd_targeted(model, x, y, 0.1, 2, num_targets=0)
    with pytest.raises(ValueError, match="targets=10, but the model has 10 classes"):
        ours.apgd_targeted(model, x, y, 0.1, 2, num_targets=10)


# ---- fgsm, and what all have in common


def test_fgsm():
    model, x, y = attackable(12)
    assert torch.equal(ours.fgsm(model, x, y, ε=RADIUS), sk.fgsm(model, x, y, RADIUS))
    z = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(model(z), (y + 1) % 10).backward()
    expected = (x - RADIUS * z.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(ours.fgsm(model, x, (y + 1) % 10, RADIUS, True), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bn_mode", ["keep", "eval"])
def test_leaves_no_trace(bn_mode):
    model, (x, y) = mixed_model(), batch()
    x.requires_grad_()
    before, short = snapshot(model, x, y), {"bn_mode": bn_mode}
    found = [
        ours.pgd_linf(model, x, y, 0.1, steps=3, restarts=2, **short), ours.fgsm(model, x, y, 0.1, **short),
        ours.apgd(model, x, y, 0.1, math.inf, n_iter=3, **short), ours.apgd_targeted(model, x, y, 1.0, 2, n_iter=3, **short),
    ]  # fmt: skip
    assert_same(before, snapshot(model, x, y))
    assert not any(x_adv.requires_grad for x_adv in found)


def test_errors():
    model, x, y = attackable(6)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="loss_function='mse': choose one of 'ce', 'dl', 'dlr'"):
        ours.pgd_linf(model, x, y, 0.1, loss_function="MSE")
    with pytest.raises(ValueError, match="stop='cycle': choose one of None, 'success'"):
        ours.pgd_linf(model, x, y, 0.1, stop="cycle")
    with pytest.raises(ValueError, match=r"y must have shape \[6\]"):
        ours.pgd_linf(model, x, torch.cat((y, y)), 0.1)
    with pytest.raises(ValueError, match=r"ε has shape \[12\]"):
        ours.pgd_linf(model, x, y, torch.full((12,), 0.1))
    with pytest.raises(ValueError, match="eps=8 exceeds the width"):
        ours.pgd_linf(model, x, y, 8)
    calls = (ours.pgd_linf, ours.fgsm), (0.1,), (ours.apgd, ours.apgd_targeted), (0.1, 2)
    for names, given in zip(calls[::2], calls[1::2], strict=True):
        for call in names:
            with pytest.raises(TypeError, match="unexpected keyword argument 'budget': ours beside its own are precision"):
                call(model, x, y, *given, budget=3)
            with pytest.raises(ValueError, match="precision='fp32' is for float32 images"):
                call(model, x, y, *given, precision="fp32")
    with pytest.raises(ValueError, match="y holds class 10"):
        ours.pgd_linf(model, x, y * 0 + 10, 0.1)
    assert torch.equal(state, torch.get_rng_state())


def test_adv_lib_need_not_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "adv_lib", None)
    monkeypatch.delitem(sys.modules, ours.__name__)
    monkeypatch.setattr(sys.modules["spat_kernels.compat"], "adv_lib", ours)
    assert importlib.import_module(ours.__name__) is not ours


# ---- a script of adv_lib's users

SCRIPT = """
{line}

adv_samples = pgd_linf(model=model, inputs=inputs, labels=labels, ε=8 / 255, steps=8, relative_step_size=0.25)
robust_accuracy = (model(adv_samples).argmax(1) == labels).float().mean().item()
"""


def test_script_with_one_line_changed(theirs):
    """The accuracies that are left are equal, and nearly all pixels: in fp32 some gradients are rounded to the other sign."""
    inputs, labels = photographs()
    model = robust("madry")
    found = []
    for line in ("from adv_lib.attacks import pgd_linf", "from spat_kernels.compat.adv_lib import pgd_linf"):
        torch.manual_seed(0)
        names = {"model": model, "inputs": inputs[50:], "labels": labels[50:]}
        exec(SCRIPT.format(line=line), names)
        found.append(names)
    before, after = found
    assert after["pgd_linf"] is ours.pgd_linf
    assert before["robust_accuracy"] == after["robust_accuracy"]
    assert 0 < after["robust_accuracy"] < (model(inputs[50:]).argmax(1) == labels[50:]).float().mean()
    assert ((before["adv_samples"] - after["adv_samples"]).abs() > 1e-5).float().mean() < 0.01
    assert_inside(after["adv_samples"], inputs[50:], EPS, "linf")

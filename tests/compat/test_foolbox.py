"""foolbox's classes on our PGD: the same arguments, the same images from the same seed, and what neither does is an error."""

import gc
import importlib
import inspect
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import spat_kernels as sk
from tests.helpers import EPS, Recorder, assert_same, attackable, batch, cnn, linear, mixed_model, photographs, robust, snapshot

foolbox = pytest.importorskip("foolbox")
ep = pytest.importorskip("eagerpy")
ours = importlib.import_module("spat_kernels.compat.foolbox")

NAMES = [name for name in vars(ours) if isinstance(getattr(foolbox.attacks, name, None), type)]
PGDS = [
    "LinfProjectedGradientDescentAttack",
    "LinfBasicIterativeAttack",
    "L2ProjectedGradientDescentAttack",
    "L2BasicIterativeAttack",
]
CLASSES = [*PGDS, "LinfFastGradientAttack", "L2FastGradientAttack"]
RADII = {"Li": 0.006, "L2": 0.06}  # that break some of `attackable`


def both(name, fmodel, x, criterion, epsilons, seed=0, **arguments):
    """What foolbox and we return, from the same seed."""
    found = []
    for module in (foolbox.attacks, ours):
        torch.manual_seed(seed)
        found.append(getattr(module, name)(**arguments)(fmodel, x, criterion, epsilons=epsilons))
    return found


def assert_equal_results(theirs, mine, atol=1e-12):
    for a, b in zip(theirs[:2], mine[:2], strict=True):
        for u, v in zip(a, b, strict=True):
            torch.testing.assert_close(u, v, rtol=0, atol=atol)
    assert torch.equal(theirs[2], mine[2])


def wrapped(model, **arguments):
    return foolbox.PyTorchModel(model, bounds=arguments.pop("bounds", (0, 1)), device="cpu", **arguments)


# ---- the same


def test_names():
    assert {"LinfPGD", "L2PGD", "PGD", "FGSM", "FGM", *CLASSES} == set(NAMES)
    for name in NAMES:
        theirs, mine = getattr(foolbox.attacks, name), getattr(ours, name)
        assert issubclass(mine, theirs)
        assert mine.__name__ == theirs.__name__
        assert repr(mine()) == repr(theirs()), "with the same defaults"
        assert mine().distance is theirs().distance
        given = dict.fromkeys(inspect.signature(theirs).parameters, 1) | {"random_start": True}
        assert repr(mine(**given)) == repr(theirs(**given))


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_same_images(name, random_start):
    model, x, y = attackable(24)
    epsilons = [0.0, RADII[name[:2]], 5 * RADII[name[:2]]]
    theirs, mine = both(name, wrapped(model), x, y, epsilons, random_start=random_start)
    assert_equal_results(theirs, mine)
    some, more = mine[2][1:].sum(1)
    assert 0 < some < more, "the first radius breaks some images, the second one more"


@pytest.mark.parametrize("name", PGDS)
def test_targets(name):
    model, x, y = attackable(24)
    criterion = foolbox.TargetedMisclassification((y + 1) % 10)
    theirs, mine = both(name, wrapped(model), x, criterion, [10 * RADII[name[:2]]], abs_stepsize=RADII[name[:2]], steps=20)
    assert_equal_results(theirs, mine)
    assert 0 < mine[2].sum() < 24


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 100.0])
def test_epsilon_beyond_the_box(epsilon):
    """Steps are relative to epsilon itself, in a ball that the box cuts off."""
    model, x, y = attackable(8)
    for name, arguments in (("FGSM", {}), *((f"{norm}BasicIterativeAttack", {"rel_stepsize": 0.01}) for norm in ("Linf", "L2"))):
        assert_equal_results(*both(name, wrapped(model), x, y, [epsilon], **arguments))


def test_results_have_foolbox_types():
    model, x, y = attackable(4)
    raw, clipped, success = ours.FGSM()(wrapped(model), x, y, epsilons=0.01)
    assert type(raw) is type(clipped) is type(success) is torch.Tensor
    assert (raw.shape, clipped.shape, success.shape, success.dtype) == (x.shape, x.shape, (4,), torch.bool)
    raw, clipped, success = ours.FGSM()(wrapped(model), ep.astensor(x), ep.astensor(y), epsilons=[0.01, 0.02])
    assert [type(v) for v in (*raw, *clipped, success)] == [ep.PyTorchTensor] * 5
    assert success.shape == (2, 4)
    assert type(ours.FGSM().run(wrapped(model), x, y, epsilon=0.01)) is torch.Tensor


def test_repeat():
    """`repeat` is foolbox's, on our attack."""
    model, x, y = attackable(24)
    found = []
    for module in (foolbox.attacks, ours):
        torch.manual_seed(0)
        attack = module.LinfPGD(steps=0).repeat(5)
        found.append(attack(wrapped(model), x, y, epsilons=[0.05])[2])
    torch.manual_seed(0)
    once = ours.LinfPGD(steps=0)(wrapped(model), x, y, epsilons=[0.05])[2]
    assert torch.equal(*found)
    assert found[1].sum() > once.sum() > 0


def test_mode_is_the_models_own():
    """In training mode it is that of batch statistics, as in foolbox. The running ones do not change."""
    model = nn.Sequential(nn.BatchNorm2d(3), linear(192)).double().train()
    x, y = (t.double() if t.is_floating_point() else t for t in batch())
    fmodel = foolbox.PyTorchModel(model.eval(), (0, 1), device="cpu")
    model.train()
    before = snapshot(model, x, y)
    torch.manual_seed(0)
    mine = ours.LinfPGD(steps=5).run(fmodel, x, y, epsilon=0.1)
    assert_same(before, snapshot(model, x, y))
    torch.manual_seed(0)
    found = []
    for attack in (foolbox.attacks.LinfPGD(steps=5), ours.LinfPGD(steps=5, bn_mode="eval")):
        torch.manual_seed(0)
        found.append(((attack.run(fmodel, x, y, epsilon=0.1) - mine).abs() > 1e-12).double().mean())
    same_mode, eval_mode = found
    assert same_mode < 0.01, "nearly all: the samples depend on each other, and ours weighs them equally"
    assert eval_mode > 0.02


# ---- preprocessing and bounds

CHANNELS = {"mean": [0.1, 0.2, 0.3], "std": [0.9, 1.0, 1.1], "axis": -3}
PREPROCESSING = {
    "lists": CHANNELS,
    "arrays": {"mean": np.array([0.1, 0.2, 0.3]), "std": np.array([0.9, 1.0, 1.1]), "axis": -3},
    "tensors": {"mean": torch.tensor([0.1, 0.2, 0.3]).double(), "axis": -3},
    "eager": {"std": ep.astensor(torch.tensor([[[0.9]], [[1.0]], [[1.1]]]).double())},
    "numbers": {"mean": torch.tensor(0.4), "std": torch.tensor([0.2])},
    "negative": {"std": torch.tensor([-1.0, 1.0, 2.0]), "axis": -3},
    "flipped": {"flip_axis": -3, **CHANNELS},
    "none": None,
}


@pytest.mark.parametrize("bounds", [(0, 1), (-1, 1), (0, 255)])
@pytest.mark.parametrize("kind", PREPROCESSING)
def test_preprocessing(kind, bounds):
    model, x, _ = attackable(16)
    fmodel = wrapped(model, preprocessing=PREPROCESSING[kind]).transform_bounds(bounds)
    x, scale = x * (bounds[1] - bounds[0]) + bounds[0], bounds[1] - bounds[0]
    theirs, mine = both("LinfPGD", fmodel, x, fmodel(x).argmax(1), [0.006 * scale, 0.03 * scale], steps=10)
    assert_equal_results(theirs, mine, 1e-12 * scale)
    assert mine[2].any()
    expected = "autograd" if kind == "flipped" else "plan"
    assert sk.explain(ours.as_module(fmodel), x, bn_mode="keep").path == expected


def test_module_is_kept():
    """Plans and CUDA graphs belong to a module, which must be the same at each call and go with the model."""
    fmodel = wrapped(cnn().eval(), preprocessing=CHANNELS)
    module = weakref.ref(ours.as_module(fmodel))
    assert ours.as_module(fmodel) is module()
    other = fmodel.transform_bounds((0, 255))
    assert ours.as_module(other) is not module()
    fmodel.transform_bounds((-1, 1), inplace=True)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(ours.as_module(fmodel)(x), fmodel(x)), "not the module of the old bounds"
    del fmodel, other
    gc.collect()
    assert module() is None
    network = cnn().eval()
    assert ours.as_module(wrapped(network)) is network


def test_other_models_are_callables():
    """Models around a PyTorchModel have no module: autograd goes through them."""
    model, x, y = attackable(12)
    fmodel = wrapped(model, preprocessing=CHANNELS)
    for other in (
        foolbox.models.ExpectationOverTransformationWrapper(fmodel, n_steps=2),
        fmodel.transform_bounds((0, 1), wrapper=True),
        type("Own", (foolbox.PyTorchModel,), {"__call__": lambda self, z: super(type(self), self).__call__(z) * 2})(
            model, (0, 1)
        ),
    ):
        assert_equal_results(*both("LinfPGD", other, x, y, [0.01], steps=5))


# ---- what is ours


def test_settings_reach_our_attack():
    model, x, y = attackable(24)
    fmodel, counted = wrapped(model), Recorder(model).eval()
    first = ours.LinfPGD(stop="success", steps=30)(wrapped(counted), x, y, epsilons=0.02)
    assert min(counted.sizes) < 24, "what is broken leaves the batch"
    assert first[2].sum() == ours.LinfPGD(steps=30)(fmodel, x, y, epsilons=0.02)[2].sum()
    half = ours.LinfPGD(precision="bf16", steps=5)
    assert repr(half).endswith("steps=5, random_start=True, settings={'precision': 'bf16'})")
    model.float()
    found = [attack(wrapped(model), x.float(), y, epsilons=0.006)[0] for attack in (half, ours.LinfPGD(steps=5))]
    assert not torch.equal(*found)


def test_generator():
    model, x, y = attackable(8)
    state = torch.get_rng_state()
    attacks = [ours.L2PGD(steps=3, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    one, same, other = (attack.run(wrapped(model), x, y, epsilon=0.1) for attack in attacks)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_leaves_no_trace():
    model, (x, y) = mixed_model(), batch()
    with pytest.warns(UserWarning, match="training mode"):
        fmodel = wrapped(model, preprocessing=CHANNELS)
    before = snapshot(model, x, y)
    for name in CLASSES:
        getattr(ours, name)().run(fmodel, x, y, epsilon=0.1)
    assert_same(before, snapshot(model, x, y))

    def fails(module, args, output):
        raise RuntimeError("of the model")

    state = torch.get_rng_state()
    model[-1].register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="of the model"):
        ours.LinfPGD(steps=3).run(fmodel, x, y, epsilon=0.1)
    assert torch.equal(state, torch.get_rng_state())


# ---- errors


def test_wrong_arguments():
    with pytest.raises(TypeError, match="stpes"):
        ours.LinfPGD(stpes=3)
    with pytest.raises(TypeError, match="steps"):
        ours.FGSM(steps=3)
    with pytest.raises(TypeError, match="restarts"):
        ours.LinfPGD(restarts=3)
    with pytest.raises(ValueError, match="precision='bf17'"):
        ours.LinfPGD(precision="bf17")
    with pytest.raises(ValueError, match="stop='cycle'.*norm='l2'"):
        ours.L2PGD(stop="cycle")


def test_wrong_calls():
    model, x, y = attackable(4)
    fmodel = wrapped(model)
    with pytest.raises(NotImplementedError, match="None in epsilons"):
        ours.LinfPGD()(fmodel, x, y, epsilons=[0.1, None])
    with pytest.raises(TypeError, match="budget"):
        ours.LinfPGD()(fmodel, x, y, epsilons=0.1, budget=3)
    with pytest.raises(AssertionError):
        ours.LinfPGD().run(fmodel, x + 1, y, epsilon=0.1)
    with pytest.raises(ValueError, match="unsupported criterion TargetedMisclassification"):
        ours.FGSM()(fmodel, x, foolbox.TargetedMisclassification(y), epsilons=0.1)
    with pytest.raises(ValueError, match="unsupported criterion"):
        ours.LinfPGD()(fmodel, x, foolbox.Misclassification(y) & foolbox.Misclassification(y), epsilons=0.1)
    with pytest.raises(TypeError, match="model=NumPyModel: this attack is for PyTorch: use the one in foolbox.attacks"):
        ours.LinfPGD()(foolbox.NumPyModel(lambda z: z.mean((2, 3)), (0, 1)), x.numpy(), y.numpy(), epsilons=0.1)


@pytest.mark.parametrize("part", ["get_loss_fn", "get_optimizer", "value_and_grad", "normalize", "project"])
def test_another_loop_is_refused(part):
    """As of foolbox's gradient estimators: it would be ignored without a word."""
    model, x, y = attackable(4)
    changed = type("Own", (ours.FGSM,), {part: lambda *arguments: None})()
    with pytest.raises(TypeError, match=f"Own has a {part}, which is never called: derive it from foolbox.attacks"):
        changed(wrapped(model), x, y, epsilons=0.1)


def test_another_random_start_is_taken():
    model, x, y = attackable(4)
    own = type("Own", (ours.LinfPGD,), {"get_random_start": lambda self, x0, epsilon: x0 - epsilon})(steps=0)
    assert torch.equal(own.run(wrapped(model), x, y, epsilon=0.1), (x - 0.1).clamp(0, 1))


def test_without_foolbox(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    monkeypatch.delitem(sys.modules, ours.__name__)
    with pytest.raises(ImportError, match="spat_kernels.compat.foolbox: .* foolbox, which is not installed: pip install foolbox"):
        importlib.import_module(ours.__name__)


# ---- a script of foolbox's users

SCRIPT = """
from foolbox import PyTorchModel, accuracy
{line}

half = [0.5, 0.5, 0.5]
fmodel = PyTorchModel(network, bounds=(0, 1), preprocessing=dict(mean=half, std=half, axis=-3), device="cpu")
clean = accuracy(fmodel, images, labels)
raw, clipped, success = LinfPGD(rel_stepsize=0.25, steps=4)(fmodel, images, labels, epsilons=[EPS, 2 * EPS])
left = 1 - success.float().mean(-1)
assert abs(accuracy(fmodel, clipped[0], labels) - left[0]) < 1e-6
"""


def test_script_with_one_line_changed():
    """The accuracies that are left are equal, and nearly all pixels: in fp32 some gradients are rounded to the other sign."""
    images, labels = photographs()
    network = nn.Sequential(sk.Normalize([-1.0] * 3, [2.0] * 3), robust("madry"))  # undoes the preprocessing
    found = {}
    for line in ("from foolbox.attacks import LinfPGD", "from spat_kernels.compat.foolbox import LinfPGD"):
        torch.manual_seed(0)
        names = {"network": network.eval(), "images": images[60:], "labels": labels[60:], "EPS": EPS}
        exec(SCRIPT.format(line=line), names)
        found[line] = names
    theirs, mine = found.values()
    assert type(mine["LinfPGD"]) is type(theirs["LinfPGD"])
    assert mine["LinfPGD"] is ours.LinfPGD
    assert torch.equal(theirs["left"], mine["left"])
    assert theirs["clean"] > theirs["left"][0] > theirs["left"][1]
    assert ((theirs["raw"][0] - mine["raw"][0]).abs() > 1e-5).float().mean() < 0.01

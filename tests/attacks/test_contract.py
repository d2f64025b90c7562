"""What all attacks have in common: settings and errors, layouts, seeds, devices, and that they leave no trace."""

import copy
import warnings
from dataclasses import fields
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spat_kernels import ADT, APGD, FAB, PGD, AutoAttack, Square, losses
from tests.helpers import (
    accuracy,
    assert_inside,
    assert_same,
    attackable,
    batch,
    cnn,
    mixed_model,
    moved,
    snapshot,
    strange_layouts,
)

KINDS = [PGD, APGD, FAB, Square, AutoAttack]
ATTACKS = {
    "pgd": partial(PGD, steps=4),
    "pgd-l2": partial(PGD, steps=3, norm="l2", restarts=2, loss="dlr"),
    "pgd-l1": partial(PGD, steps=3, norm="l1", restarts=2),
    "adt": partial(ADT, steps=4, samples=2),
    "apgd": partial(APGD, steps=4, restarts=2),
    "apgd-t-l2": partial(APGD, steps=3, norm="l2", loss="dlr", targets=2),
    "apgd-malt": partial(APGD, steps=3, loss="dlr", targets=2, targeting="malt"),
    "apgd-l1": partial(APGD, steps=6, norm="l1", restarts=2),
    "apgd-t-l1": partial(APGD, steps=4, norm="l1", loss="dlr", targets=2, multi_eps=False),
    "apgd-eot": partial(APGD, steps=3, eot=2),
    "fab-t": partial(FAB, steps=3, targets=2, restarts=2),
    "fab-l2": partial(FAB, steps=3, norm="l2", targets=None, restarts=2),
    "fab-l1": partial(FAB, steps=3, norm="l1", targets=2, restarts=2),
    "square": partial(Square, queries=20, restarts=2),
    "square-l2": partial(Square, queries=20, norm="l2", restarts=2),
    "square-l1": partial(Square, queries=20, norm="l1", restarts=2),
    "autoattack": partial(AutoAttack, steps=3, queries=20),
    "autoattack-fast": partial(AutoAttack, steps=3, queries=20, version="fast"),
    "autoattack-l1": partial(AutoAttack, steps=3, queries=20, norm="l1"),
    "autoattack-plus-l2": partial(AutoAttack, steps=2, queries=10, norm="l2", version="plus"),
}
RADII = {"linf": 0.006, "l2": 0.06, "l1": 0.3}  # that break some of `attackable`
every_attack = pytest.mark.parametrize("name", ATTACKS)


def seeded(name, seed=0, **settings):
    make = ATTACKS[name]
    source = {"seed": seed} if make.func is AutoAttack else {"generator": torch.Generator().manual_seed(seed)}
    return make(**({"eps": RADII[make.keywords.get("norm", "linf")]} | source | settings))


# ---- no trace


@pytest.mark.filterwarnings("ignore:the model:RuntimeWarning")  # it draws random numbers in training mode, which AutoAttack says
@pytest.mark.parametrize("bn_mode", ["eval", "train", "keep"])
@every_attack
def test_leaves_no_trace(name, bn_mode):
    model, (x, y) = mixed_model(), batch()
    x.requires_grad_()
    before, state = snapshot(model, x, y), torch.get_rng_state()
    x_adv = seeded(name, bn_mode=bn_mode)(model, x, y)
    assert_same(before, snapshot(model, x, y))
    assert bn_mode != "eval" or torch.equal(torch.get_rng_state(), state), "a given generator leaves the default one alone"
    assert not x_adv.requires_grad
    assert x_adv.grad_fn is None
    for size in (len(x), 0):
        with torch.inference_mode():
            images, labels = x.detach()[:size] + 0, y[:size] + 0
            inside, called = seeded(name, bn_mode=bn_mode).run(model, images, labels), seeded(name)(model, images, labels)
        assert inside.x_adv.shape == x[:size].shape
        assert not called.is_inference()
        assert not any(t.is_inference() for t in (inside.x_adv, inside.forwards, inside.backwards))


@every_attack
def test_any_layout_and_grad_mode_gives_the_same_images(name):
    model, x, y = attackable(6)
    settings = {"random_start": False} if name == "pgd" else {}
    starts_by_memory = name in (
        "adt",
        "apgd",
        "apgd-malt",
        "apgd-eot",
        "autoattack",
        "autoattack-fast",
    )  # L-infinity draws starts in the order of the memory
    for layout, view in strange_layouts(x):
        labels, before = model(view).argmax(1), view.clone()
        expected, got = (seeded(name, **settings)(model, v, labels) for v in (view.contiguous(), view))
        if layout != "channels_last" or not starts_by_memory:
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, msg=layout)
        assert torch.equal(view, before), "x is not written"
        if layout in ("contiguous", "channels_last"):
            assert got.stride() == view.stride()
    expected = seeded(name)(model, x, y)
    assert torch.equal(seeded(name)(model, x, y.repeat_interleave(2)[::2]), expected), "labels with strides"
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            got = seeded(name)(model, x + 0, y + 0)
        assert torch.equal(got, expected)
        assert not got.is_inference()


# ---- random numbers


@every_attack
def test_random_numbers_follow_the_seed(name):
    model, x, y = attackable(8)
    state = torch.get_rng_state()
    eps = {"l2": 0.2, "l1": 2.0}.get(name[-2:], 0.01)
    first, again, other = (seeded(name, seed, eps=eps)(model, x, y) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other) or "fab" in name, "FAB's first run begins at x, and what it finds stays"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [PGD, APGD, Square])
@pytest.mark.parametrize("norm, eps", [("linf", 0.01), ("l2", 0.2), ("l1", 2.0)])
def test_without_a_generator_it_is_torchs(kind, norm, eps):
    model, x, y = attackable(8)
    attack = kind(eps, norm=norm, **({"queries": 30} if kind is Square else {"steps": 1}))
    torch.manual_seed(3)
    first, second = (attack(model, x, y) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(attack(model, x, y), first)
    assert not torch.equal(first, second)


# ---- what comes out


@every_attack
def test_no_image_or_one(name):
    model, x, y = attackable(3)
    for n in (0, 1):
        assert seeded(name)(model, x[:n], y[:n]).shape == (n, 3, 8, 8)


@pytest.mark.parametrize("kind", [PGD, APGD])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(
    eps=st.sampled_from([0.0, torch.linspace(0, 0.1, 3)]) | st.floats(0, 0.5), step_size=st.none() | st.floats(0, 2),
    steps=st.integers(0, 3), seed=st.integers(0, 99), bounds=st.sampled_from([(0.0, 1.0), (-0.1, 1.3)]),
    loss=st.sampled_from(["ce", "kl", "margin", "dlr", "pma", losses.LabelSmoothedCE(0.5), lambda z, y: z.logsumexp(1)]),
)  # fmt: skip
def test_result_is_inside_ball_and_box(kind, norm, dtype, eps, step_size, steps, seed, loss, bounds):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 5)).to(dtype)
    x, y = torch.rand(3, 3, 3, 3).to(dtype), torch.randint(5, (3,))
    steps = {"steps": steps, "step_size": step_size} if kind is PGD else {"steps": steps + 1}
    assert_inside(kind(eps, loss=loss, norm=norm, bounds=bounds, **steps)(model, x, y), x, eps, norm, bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ["fab-t", "fab", "square"])
def test_result_is_misclassified_inside_ball_and_box_or_x_itself(name, norm, dtype):
    model, x, _ = attackable(24)
    model, x = model.to(dtype), x.to(dtype)
    x[:4] = x[:4].round()
    y = model(x).argmax(1)
    y[::6] = (y[::6] + 1) % 10
    half = dtype in (torch.bfloat16, torch.float16)  # there a plan's logits are not to the last bit the model's
    largest = 0.03 if name == "square" or half else 0.008
    eps = torch.linspace(0, largest * {"linf": 1, "l2": 10, "l1": 60}[norm], 24)
    settings = {"queries": 40} if name == "square" else {"steps": 8, "targets": 2 if name == "fab-t" else None}
    settings["input_gradient"] = "autograd" if half or name == "square" else "plan"
    x_adv = (Square if name == "square" else FAB)(eps, norm=norm, restarts=2, **settings)(model, x, y)
    assert_inside(x_adv, x, eps, norm)
    changed = moved(x_adv, x)
    assert not changed[::6].any(), "misclassified as they are"
    assert 3 < changed.sum() < 20
    # The attack asked in other batches, for which convolutions may round otherwise: two logits there and two here are that wrong.
    z = model(x_adv).double()
    rounding = 4 * (z - copy.deepcopy(model).double()(x_adv.double())).abs().amax()
    margin = z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)
    assert (margin <= rounding)[changed].all()
    if name == "square" and not half:
        assert (margin < 0)[changed].all()


@pytest.mark.parametrize("bounds", [(-1.0, 2.0), (0.25, 0.75)])
@pytest.mark.parametrize("name", ["fab-t", "fab-l1", "square", "square-l2", "square-l1"])
def test_bounds(name, bounds):
    model, x, _ = attackable(12)
    x = bounds[0] + x * (bounds[1] - bounds[0])
    y = model(x).argmax(1)
    x_adv = seeded(name, eps=20.0 if name.endswith("l1") else 0.3, bounds=bounds)(model, x, y)
    assert x_adv.min() >= bounds[0]
    assert x_adv.max() <= bounds[1]
    wrong = model(x_adv).argmax(1) != y
    assert wrong.all() or (wrong.any() and "square" in name)


@pytest.mark.parametrize("attack", [partial(FAB, 0.006, steps=3, targets=1), partial(Square, 0.006, queries=20)])
def test_restarts_lose_nothing(attack):
    model, x, y = attackable(40)
    once, thrice = (attack(restarts=r, generator=torch.Generator().manual_seed(0))(model, x, y) for r in (1, 3))
    kept = moved(once, x)
    assert 0 < kept.sum() <= moved(thrice, x).sum() < 40
    assert attack.func is FAB or kept.sum() < moved(thrice, x).sum()
    assert torch.equal(thrice[kept], once[kept]), "what the first run found stays"


@pytest.mark.parametrize("kind", [PGD, APGD, FAB])
@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 5), (4, 2, 3, 4, 5), (1, 3, 5, 9)])
def test_images_of_any_shape_and_two_classes(kind, shape):
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape[1:]).numel(), 2))
    x = torch.rand(shape)
    y = model(x).argmax(1)
    for norm, eps in (("linf", 0.9), ("l2", 2.0), ("l1", 5.0)):
        for targets in [{}] if kind is PGD else [{"targets": 1}, {"targets": None}]:
            x_adv = kind(eps, norm=norm, steps=20, **targets)(model, x, y)
            assert x_adv.shape == shape
            assert accuracy(model, x_adv, y) < 0.3
    assert kind is APGD or torch.equal(kind(0.5, steps=0)(model, x, y), x) is (kind is FAB)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("how", ["plan", "autograd"])
@pytest.mark.parametrize("attack", [
    partial(FAB, steps=8, targets=2), partial(APGD, steps=8), partial(APGD, steps=8, eot=2),
    partial(APGD, steps=8, norm="l2", loss="dlr", targets=2),
])  # fmt: skip
def test_half_precision_finds_as_much(attack, how, precision):
    model, x, y = attackable(24)
    model, x = model.float(), x.float()
    eps = 0.2 if attack.keywords.get("norm") == "l2" else 0.02
    full, half = (attack(eps, input_gradient=how, precision=p)(model, x, y) for p in (None, precision))
    assert half.dtype == torch.float32
    if attack.func is APGD:
        assert accuracy(model, half, y) <= accuracy(model, full, y) + 0.2 < 0.9
        return
    assert moved(half, x).sum() >= moved(full, x).sum() - 3 > 9, "as the model in half precision sees it"
    assert model(half).topk(2).values.diff(dim=1).abs().max() < 1, "the full one sees it on a boundary"


class Plain(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * 5


class Broken(Plain):
    """Where one pixel is bright, the gradient of one element, or of all, is NaN: that of a root at 0."""

    def __init__(self, part: str):
        super().__init__()
        self.part = part

    def forward(self, x):
        where = x[:, 1, 1, 1] if self.part == "element" else x.flatten(1).sum(1)
        zero = (torch.where(x[:, 2, 3, 3] > 0.9, 0.0, 1.0) + where - where).sqrt() * 0
        return super().forward(x) + zero[:, None]


@pytest.mark.parametrize("part", ["element", "whole"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", [
    partial(PGD, 0.5, random_start=False), partial(APGD, 0.02, steps=5),
    partial(FAB, 0.5, steps=3, targets=2), partial(FAB, 0.5, steps=3, targets=None),
])  # fmt: skip
def test_nan_gradients_are_counted_and_harmless(attack, norm, part):
    """An element that is NaN counts as 0; the others count as they are."""
    x = torch.rand(5, 3, 4, 4) * 0.8
    x[1, 2, 3, 3] = x[4, 2, 3, 3] = 0.95
    y, broken = Broken(part)(x).argmax(1), torch.tensor([False, True, False, False, True])

    def found(model, rows=slice(None)):
        return attack(norm=norm, generator=torch.Generator().manual_seed(0))(model, x[rows], y[rows])

    with pytest.warns(RuntimeWarning, match="NaN for 2 of 5 samples"):
        x_adv = found(Broken(part))
    expected = found(Plain())
    assert_inside(x_adv, x, attack.args[0], norm, atol=1e-6)
    assert torch.equal(x_adv[~broken], expected[~broken])
    assert moved(x_adv, x)[~broken].all()
    if part == "element":
        assert torch.equal(x_adv, expected)
    elif attack.func is not APGD:  # which starts elsewhere
        assert torch.equal(x_adv[broken], x[broken])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found(Broken(part), [0, 2])


@pytest.mark.parametrize("norm, eps", RADII.items())
@pytest.mark.parametrize("name", ["fab-t", "fab-l2"])
def test_one_image_alone_is_attacked_as_in_a_batch(name, norm, eps):
    model, x, y = attackable(8)
    attack = seeded(name, norm=norm, eps=eps, steps=6, restarts=1)
    together = attack(model, x, y)
    assert 0 < moved(together, x).sum() < 8
    for i in range(len(x)):
        torch.testing.assert_close(attack(model, x[i : i + 1], y[i : i + 1])[0], together[i], rtol=0, atol=1e-9)


# ---- where it runs

PARTS = {
    "apgd-ce": partial(APGD, steps=10),
    "apgd-t": partial(APGD, loss="dlr", targets=3, steps=10),
    "fab-t": partial(FAB, targets=3, steps=5),
    "fab": partial(FAB, targets=None, steps=5, restarts=2),
    "square": partial(Square, queries=60),
}


@pytest.mark.parametrize("norm, eps", RADII.items())
@pytest.mark.parametrize("name", PARTS)
def test_devices_agree(device, name, norm, eps):
    """Numbers drawn on the host give the same images in fp64 wherever they are computed, but for ties."""

    def images(device):
        attack = PARTS[name](eps, norm=norm, generator=torch.Generator().manual_seed(0))
        return attack(model.to(device), x.to(device), y.to(device)).cpu()

    model, x, y = attackable(20)
    expected, found = images("cpu"), images(device)
    assert ((found - expected).abs() <= 1e-6).double().mean() > 0.95
    assert found.device == x.device
    model.cpu()
    assert torch.equal(model(found).argmax(1) == y, model(expected).argmax(1) == y)


@pytest.mark.gpu
@pytest.mark.parametrize("norm, eps", RADII.items())
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
def test_replays_on_a_gpu(monkeypatch, name, norm, eps):
    """To the bit where the batches are of one size. Later targets of APGD-T have fewer images left, which replay the capture of
    all of them, and a GPU may round another size otherwise: gradients up to 64 ulp off have moved L2 iterates by 7e-16."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # else a backward may add in any order, by atomics
    model, x, y = (t.cuda() for t in attackable(20))

    def images(graph):
        return PARTS[name](eps, norm=norm, graph=graph, generator=torch.Generator("cuda").manual_seed(0))(model, x, y)

    expected = images(False)
    for _ in range(3):  # captured, then replayed
        torch.testing.assert_close(images(True), expected, rtol=0, atol=1e-14 if name == "apgd-t" else 0)


# ---- errors


@pytest.mark.parametrize("settings, error, message", [
    ({"eps": -0.1}, ValueError, "eps=-0.1 must be finite and >= 0"),
    ({"eps": 2}, ValueError, "eps=2 exceeds the width of bounds"),
    ({"norm": "l0"}, ValueError, "norm='l0': choose one of 'linf', 'l2', 'l1'"),
    ({"restarts": 0}, ValueError, "restarts=0 must be at least 1"),
    ({"bounds": (1.0, 0.0)}, ValueError, r"bounds must be two numbers \(lo, hi\) with lo < hi, got tuple \(1.0, 0.0\)"),
    ({"precision": "fp8"}, ValueError, "precision='fp8': choose one of"),
    ({"input_gradient": "x"}, ValueError, "input_gradient='x': choose one of"),
    ({"bn_mode": "off"}, ValueError, "bn_mode='off': choose one of"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int 3"),
    ({"graph": "maybe"}, ValueError, "graph='maybe': choose one of"),
    ({"graph": 1}, ValueError, "graph=1: choose one of"),
    ({"fuse": "maybe"}, ValueError, "fuse='maybe': choose one of"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [*KINDS, ADT])
def test_bad_settings_of_every_attack(kind, settings, error, message):
    if {f.name for f in fields(kind) if f.init} >= settings.keys():
        with pytest.raises(error, match=message):
            kind(**{"eps": 0.1} | settings)


@pytest.mark.parametrize("kind, settings, error, message", [
    (APGD, {"steps": 0}, ValueError, "steps=0 must be at least 1"),
    (APGD, {"steps": 2.5}, TypeError, "steps must be an int"),
    (APGD, {"eot": 0}, ValueError, "eot=0 must be at least 1"),
    (APGD, {"targets": 0}, ValueError, "targets=0 must be at least 1"),
    (APGD, {"rho": 1.5}, ValueError, r"rho=1.5 must be in \[0, 1\], the share of steps"),
    (APGD, {"rho": "a"}, TypeError, r"rho must be a number in \[0, 1\]"),
    (APGD, {"multi_eps": 3}, TypeError, "multi_eps must be True or False, got int 3"),
    (PGD, {"targeted": "no"}, TypeError, "targeted must be True or False, got str 'no'"),
    (PGD, {"random_start": 1}, TypeError, "random_start must be True or False, got int 1"),
    (AutoAttack, {"version": "fast", "exhaustive": "yes"}, TypeError, "exhaustive must be True or False, got str 'yes'"),
    (APGD, {"multi_eps": True}, ValueError, "multi_eps=True with norm='linf': it is for L1: leave it out"),
    (APGD, {"loss": "mse"}, ValueError, "loss='mse': give one of"),
    (FAB, {"steps": -1}, ValueError, "steps=-1 must be at least 0"),
    (FAB, {"targets": 0}, ValueError, "targets=0 must be at least 1"),
    (FAB, {"targets": 2.0}, TypeError, "targets must be an int"),
    (FAB, {"alpha_max": 1.5}, ValueError, r"alpha_max=1.5 must be in \[0, 1\]"),
    (FAB, {"alpha_max": "a"}, TypeError, "alpha_max must be a number"),
    (FAB, {"eta": 0.9}, ValueError, "eta=0.9 must be finite and >= 1"),
    (FAB, {"eta": True}, TypeError, "eta must be a number"),
    (FAB, {"beta": 0.0}, ValueError, r"beta=0.0 must be in \(0, 1\]"),
    (FAB, {"beta": float("nan")}, ValueError, "beta=nan"),
    (Square, {"queries": -1}, ValueError, "queries=-1 must be at least 0"),
    (Square, {"queries": 1.5}, TypeError, "queries must be an int"),
    (Square, {"p_init": 0}, ValueError, r"p_init=0 must be in \(0, 1\], the share of the image"),
    (Square, {"p_init": "x"}, TypeError, r"p_init must be a number in \(0, 1\]"),
    (AutoAttack, {"version": "quick"}, ValueError, "version='quick': choose one of 'standard', 'fast', 'plus', 'rand'"),
    (AutoAttack, {"version": ("apgd-ce", "pgd")}, ValueError, "version='pgd': choose one of 'apgd-ce', "),
    (AutoAttack, {"version": None}, ValueError, "version=None: choose one of"),
    (AutoAttack, {"version": ()}, ValueError, r"version=\(\) names no attack"),
    (AutoAttack, {"steps": 0}, ValueError, "steps=0 must be at least 1"),
    (AutoAttack, {"queries": -1}, ValueError, "queries=-1 must be at least 0"),
    (AutoAttack, {"seed": -1}, ValueError, "seed=-1 must be at least 0"),
    (AutoAttack, {"seed": None}, TypeError, "seed must be an int"),
    (AutoAttack, {"batch_size": 0}, ValueError, "batch_size=0 must be at least 1"),
], ids=str)  # fmt: skip
def test_bad_settings(kind, settings, error, message):
    with pytest.raises(error, match=message):
        kind(**{"eps": 0.1} | settings)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_as_other_libraries_write_them(kind):
    for written, norm in (("Linf", "linf"), ("L2", "l2"), ("L∞", "linf"), ("LINF", "linf"), ("l2", "l2"), ("L1", "l1")):
        assert kind(0.1, norm=written).norm == norm
    for written in ("L0", "inf", 2, float("inf"), None, ["l2"]):
        with pytest.raises(ValueError, match=r"norm=.*: choose one of 'linf', 'l2', 'l1'$"):
            kind(0.1, norm=written)


@pytest.mark.parametrize("kind", [APGD, FAB, Square, AutoAttack])
def test_bad_batches_of_every_attack(kind):
    model, (x, y) = cnn().eval(), batch()
    for arguments, error, message in [
        ((model, x * 3, y), ValueError, "x must lie inside bounds"), ((model, x, y[:2]), ValueError, "y must have shape"),
        ((model, x, None), TypeError, "y must be an int64"), ((model, x.long(), y), TypeError, "x must be a floating-point"),
        ((3, x, y), TypeError, "model must be"), ((model, x, y + 10), ValueError, r"outside \[0, 10\)"),
        ((model, x, y.float()), TypeError, "y must be an int64 tensor"),
        ((nn.Identity(), x, y), ValueError, r"model must return logits \[B, K\]"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            kind(0.1)(*arguments)
    with pytest.raises(ValueError, match="eps has shape"):
        kind(torch.full((3,), 0.1))(model, x, y)


@pytest.mark.parametrize("kind, settings, message", [
    (APGD, {"loss": "dlr", "targets": 10}, "targets=10, but the model has 10 classes: at most 9"),
    (APGD, {"graph": True}, "graph=True, but x is on cpu"),
    (APGD, {"loss": "kl", "targets": 1}, "loss 'kl' has no targeted form"),
    (APGD, {"loss": "kl", "targeted": True}, "loss 'kl' has no targeted form"),
    (APGD, {"targets": 2, "targeted": True}, "targets=2 with targeted=True: both say where to go"),
    (AutoAttack, {"eps": 14.0, "norm": "l2"}, "eps=14 exceeds the diagonal, 13.8564, of bounds"),
    (AutoAttack, {"eps": 193.0, "norm": "l1"}, "eps=193 exceeds the diagonal, 192, of bounds"),
], ids=str)  # fmt: skip
def test_settings_that_do_not_go_with_the_batch(kind, settings, message):
    model, (x, _) = cnn().eval(), batch()
    with pytest.raises(ValueError, match=message):
        kind(**{"eps": 0.1} | settings)(model, x, model(x).argmax(1))


def test_images_that_square_does_not_take():
    x, y = batch()
    for attack, images, message in [
        (Square(0.1), x.flatten(1), r"x must be images \[B, C, H, W\] of at least 1x1 pixels"),
        (Square(0.1, norm="l2"), x[:, :, :4], r"at least 5x5 pixels for norm='l2', got shape \[6, 3, 4, 8\]"),
        (AutoAttack(0.1), x.flatten(1), r"\[B, C, H, W\] of at least 1x1.*shape \[6, 192\]: use version="),
        (AutoAttack(0.1, version=("square",)), x.flatten(1), r"got shape \[6, 192\]: choose other attacks"),
        (AutoAttack(0.1, norm="l2"), x[..., :4], "of at least 5x5 pixels for norm="),
        (Square(0.1, norm="l1"), x[..., :4], "of at least 5x5 pixels for norm='l1'"),
    ]:
        with pytest.raises(ValueError, match=message):
            attack(nn.Identity(), images, y)

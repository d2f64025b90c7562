"""Bad input: an error of the right type that names the argument, its value and the remedy; and it comes before any work."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels as sk
from spat_kernels import PGD, checks, losses
from tests.helpers import EPS, assert_inside, assert_same, batch, cnn, snapshot

X, Y = batch()
NORMALISE = r": normalise inside the model, nn.Sequential\(spat_kernels.Normalize\(mean, std\), net\), or, .*give the bounds$"


class Untouched(nn.Module):
    def forward(self, x):
        raise AssertionError("the model must not run")


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X * 255, Y, ValueError, r"x must lie inside bounds=\(0.0, 1.0\).*divide 8-bit images by 255"),
        (X * 2 - 1, Y, ValueError, f"found values from -.*{NORMALISE}"),
        (X * 5 - 2.1, Y, ValueError, f"found values from -.*{NORMALISE}"),
        (X * 1.9, Y, ValueError, r"found values from .*: normalise inside the model.*, or, .*give the bounds$"),
        (X.where(X > 0.1, torch.nan), Y, ValueError, "x must lie inside.*found NaN"),
        (X.where(X > 0.1, torch.inf), Y, ValueError, "x must lie inside"),
        ((X * 255).byte(), Y, TypeError, r"x must be a floating-point tensor, got torch.uint8.*/ 255"),
        (X.to(torch.complex64), Y, TypeError, "x must be a floating-point"),
        (X.to(torch.float8_e5m2), Y, TypeError, r"x must be float32.*x.float\(\)"),
        (X[0, 0, 0], Y, ValueError, r"x must be a batch.*unsqueeze"),
        (X, Y.float(), TypeError, r"y must be an int64.*torch.float32 \[6\].*use y.long\(\)"),
        (X, Y[:, None], ValueError, r"y must have shape \[6\].*got \[6, 1\]: use y\[:, 0\]"),
        (X, Y[:, None].float(), TypeError, r"y must be an int64.*use y\[:, 0\].long\(\)"),
        (X, torch.rand(6, 10), TypeError, r"y must be an int64.*\[6, 10\].*use y.argmax\(1\), and for soft.*loss=lambda z, _: F"),
        (X, Y.tolist(), TypeError, r"y must be an int64.*use torch.as_tensor\(y\).long\(\)"),
        (X[0], Y[0], ValueError, r"y must have shape \[3\].*got \[\]: use y\[None\].long\(\), and x\[None\]"),
        (X.numpy(), Y, TypeError, r"x must be a floating-point tensor, got ndarray.*use torch.as_tensor\(x\)"),
        (X, nn.functional.one_hot(Y, 10), ValueError, r"y must have shape \[6\].*got \[6, 10\]: use y.argmax\(1\)"),
        (X, Y[:-1], ValueError, r"y must have shape \[6\]"),
        (X, Y - 20, ValueError, r"y must hold class indices in \[0, K\), found -"),
        (X, None, TypeError, "y=None, but the loss"),
        (X, Y.to("meta"), ValueError, "y is on meta and x on cpu"),
        (X.to("meta"), Y.to("meta"), ValueError, "x is on meta, where tensors have no values"),
        (X.to_sparse(), Y, TypeError, r"x must be a dense tensor, got layout torch.sparse_coo: use x.to_dense\(\)"),
        (torch.nested.nested_tensor(list(X)), Y, TypeError, r"x must be a dense tensor, got a nested one: use x.to_dense\(\)"),
        (X, Y.to_sparse(), TypeError, "y must be a dense tensor, got layout torch.sparse_coo"),
    ],
)
def test_bad_images_and_labels(x, y, error, message):
    for attack in (sk.pgd, sk.fgsm, sk.cw_linf, lambda *a: sk.pgd_ls(*a, alpha=0.1)):
        with pytest.raises(error, match=message):
            attack(Untouched(), x, y, EPS)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"eps": float("nan")}, ValueError, "eps=nan must be finite"),
        ({"eps": 8}, ValueError, r"eps=8 exceeds the width.*8/255"),
        ({"eps": "8/255"}, TypeError, "eps must be a number"),
        ({"eps": torch.tensor([0.1, -0.1])}, ValueError, "eps=.*must be finite and >= 0"),
        ({"step_size": -1.0}, ValueError, "step_size=-1.0 must be"),
        ({"step_size": float("inf")}, ValueError, "step_size=inf must be finite"),
        ({"eps": 10**400}, ValueError, r"eps=10000.*\.\.\. must be finite"),
        ({"eps": torch.ones(6).to_sparse()}, TypeError, "eps must be a dense tensor"),
        ({"eps": torch.ones(6, dtype=torch.complex64)}, TypeError, "eps must be a tensor of numbers"),
        ({"select": torch.ones(2, 2)}, ValueError, r"^select=tensor\(\[\[1., 1.\], \[1., 1.\]\]\): choose one of"),
        ({"stop": torch.ones(3).numpy()}, ValueError, r"^stop=array\(.*: choose one of"),
        ({"norm": torch.ones(3).numpy()}, ValueError, r"^norm=array\(.*: choose one of"),
        ({"loss": torch.ones(2, 2)}, ValueError, r"^loss=tensor\(\[\[1., 1.\], \[1., 1.\]\]\): give one of"),
        ({"steps": -1}, ValueError, "steps=-1 must be at least 0"),
        ({"steps": 2.5}, TypeError, "steps must be an int, got float 2.5"),
        ({"restarts": 2, "random_start": False}, ValueError, "restarts=2 with random_start=False"),
        ({"select": "best"}, ValueError, "select='best': choose one of"),
        ({"bounds": ("0", "1")}, ValueError, r"bounds must be two numbers.*got tuple \('0', '1'\)"),
        ({"bounds": (0.0, 1.0, 2.0)}, ValueError, "bounds must be two numbers"),
        ({"bounds": (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))}, ValueError, r"bounds must be two numbers.*use .item\(\)"),
        ({"eps": torch.tensor([0.1, 8.0])}, ValueError, "eps=8 exceeds the width of bounds"),
        ({"loss": "cross_entropy"}, ValueError, "loss='cross_entropy': give one of 'ce', 'kl', 'margin', 'dlr'"),
        ({"loss": "kl", "targeted": True}, ValueError, "loss 'kl' has no targeted form"),
        ({"loss": nn.CrossEntropyLoss}, ValueError, "loss=.*give one of"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        PGD(**{"eps": EPS} | settings)


def test_any_real_number_is_a_length():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 10))
    expected, found = (PGD(eps, steps=2, random_start=False)(linear, X, Y) for eps in (1 / 8, Fraction(1, 8)))
    assert torch.equal(expected, found)


def test_a_batch_size_may_be_any_integer():
    attack = sk.AutoAttack(EPS, version=("square",), queries=1, batch_size=2**70)
    assert attack(nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 10)), X, Y).shape == X.shape


def test_bad_loss_parameters():
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="alpha=.*outside.*label smoothing, not the step size"):
            sk.pgd_ls(Untouched(), X, Y, EPS, alpha)
    with pytest.raises(TypeError, match="alpha must be a number"):
        losses.LabelSmoothedCE("0.1")
    with pytest.raises(ValueError, match="kappa=-1.0 must be >= 0"):
        losses.Margin(-1.0)


PER_SAMPLE = "must return one value per sample"


@pytest.mark.parametrize("model, settings, error, message", [
    ("resnet18", {}, TypeError, "model must be a module or a callable"),
    (nn.Linear(3, 3, device="meta"), {}, ValueError, "x is on cpu and model on meta: move one"),
    (cnn(2), {"loss": "dlr"}, ValueError, "'dlr' needs at least 3 classes here, the model has 2"),
    (cnn(3), {"loss": "dlr", "targeted": True}, ValueError, "'dlr' needs at least 4 classes here, the model has 3"),
    (cnn(), {"loss": lambda z, y: torch.zeros(len(z))}, ValueError, "does not depend on the logits"),
    (cnn(), {"loss": F.cross_entropy}, ValueError, PER_SAMPLE),
    (cnn(), {"loss": lambda z, y: 0.0}, ValueError, PER_SAMPLE),
    (cnn(), {"loss": lambda z, y: z}, ValueError, PER_SAMPLE),
    (Untouched(), {"eps": torch.full((3,), EPS)}, ValueError, r"eps has shape \[3\].*one value per sample, \[6\]"),
    (Untouched(), {"step_size": torch.full((6, 1), EPS)}, ValueError, r"step_size has shape \[6, 1\]"),
    (Untouched(), {"start": X[:3]}, ValueError, "start must be a tensor like x"),
    (Untouched(), {"start": X.long()}, ValueError, "start must be a tensor like x"),
    (Untouched(), {"start": X.tolist()}, ValueError, "start must be a tensor like x"),
    (Untouched(), {"start": X * torch.nan}, ValueError, "start holds NaN"),
    (Untouched(), {"start": X, "restarts": 2}, ValueError, "restarts=2 from one start"),
])  # fmt: skip
def test_settings_that_do_not_go_with_the_model_or_the_batch(model, settings, error, message):
    with pytest.raises(error, match=message):
        sk.pgd(model, X, Y % 2, **{"eps": EPS} | settings)


def test_kl_needs_a_start_away_from_x():
    with pytest.raises(ValueError, match="random_start=False, but the gradient of this loss is zero"):
        sk.pgd_kl(Untouched(), X, None, EPS, random_start=False)
    sk.pgd_kl(cnn(), X, None, EPS, start=X + 0.001 * torch.randn_like(X))  # the start of TRADES' own code
    with pytest.raises(TypeError, match="y=None, but the loss, the choice of restarts or stop needs labels"):
        sk.pgd_kl(Untouched(), X, None, EPS, restarts=2)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x: x.flatten(), ValueError, r"model must return logits \[B, K\] with B=6.*got shape \(1152,\)"),
        (lambda x: x.flatten(1)[:, :1], ValueError, r"K >= 2, got shape \(6, 1\): return torch.cat\(\[-z, z\], 1\) / 2"),
        (lambda x: x.flatten(1)[:, 0], ValueError, r"K >= 2, got shape \(6,\): return torch.stack\(\[-z, z\], 1\) / 2"),
        (lambda x: x.flatten(1)[:3], ValueError, "B=6"),
        (lambda x: (x.flatten(1), 0), TypeError, "got tuple: wrap it"),
        (lambda x: x.flatten(1).long(), TypeError, "floating-point tensor of logits.*torch.int64"),
        (lambda x: x.flatten(1)[:, :4], ValueError, r"y holds class \d, outside \[0, 4\)"),
        (lambda x: x.flatten(1)[:, :10].detach(), ValueError, "do not depend on x by differentiable operations"),
    ],
)
def test_bad_models(model, error, message):
    y = Y.clone()
    y[0] = 9
    for loss in ("ce", "kl", "margin", "dlr"):
        with pytest.raises(error, match=message):
            sk.pgd(model, X, y, EPS, loss=loss)


IMAGENET = (-2.1179039301310043, 2.6400000000000006)  # no number of fp32


@pytest.mark.parametrize(
    "bounds, value, by",
    [
        ((0.0, 1.0), 1 + 2**-22, "2.4e-07"), ((0, 1), -3e-7, "3e-07"), ((0.0, 1.0), 1.0009, "0.0009"),
        (IMAGENET, -2.118, "9.6e-05"), (IMAGENET, 2.64001, "1e-05"),
    ],
)  # fmt: skip
def test_a_rounding_error_outside_the_bounds_is_to_be_clamped(bounds, value, by):
    x = X.clone()
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError) as error:
        sk.pgd(Untouched(), x, Y, EPS, bounds=bounds)
    assert str(error.value) == f"x exceeds bounds={bounds} by {by}, as de-normalising does: use x.clamp{bounds}"
    sk.pgd(cnn(), x.clamp(*bounds), Y, EPS, bounds=bounds)


def test_bounds_may_be_tensors_without_dimensions_and_infinite():
    assert_inside(sk.pgd(cnn(), X * 255, Y, 8.0, bounds=(0, 255)), X * 255, 8.0, "linf", (0, 255), atol=1e-3)
    assert sk.pgd(cnn(), X - 0.5, Y, EPS, bounds=(-torch.inf, torch.inf)).isfinite().all()
    for attack in (PGD, sk.APGD, sk.FAB, sk.Square, sk.AutoAttack):
        assert attack(EPS, bounds=(X.min() * 0, X.max() * 0 + 1)).bounds == (0.0, 1.0)
        assert attack(EPS, bounds=[0, 1]).bounds == (0, 1)


@pytest.mark.parametrize("attack", [PGD, sk.APGD, sk.FAB, sk.Square, sk.AutoAttack])
def test_an_l2_radius_beyond_the_box(attack):
    message = r"eps=128 exceeds the diagonal, 13.8564, of bounds=\(0.0, 1.0\).*\(128/255 for images in \[0, 1\]\)"
    for eps in (128, torch.tensor([0.1, 128.0, 0.1, 0.1, 0.1, 0.1])):
        with pytest.raises(ValueError, match=message):
            attack(eps, norm="l2")(Untouched(), X, Y)
    if attack is PGD:
        with pytest.raises(ValueError, match=message):
            attack(128, norm="l2").launch(Untouched(), X, Y)
    assert attack(128.0, norm="l2")(Untouched(), X[:0], Y[:0]).shape == X[:0].shape
    with pytest.raises(AssertionError, match="must not run"):
        attack(13.8, norm="l2", input_gradient="autograd")(Untouched(), X, Y)


@pytest.mark.parametrize("attack", [PGD, sk.APGD, sk.FAB, sk.Square, sk.AutoAttack])
def test_an_l1_radius_beyond_the_box(attack):
    with pytest.raises(ValueError, match=r"eps=193 exceeds the diagonal, 192, of bounds=\(0.0, 1.0\): it is in the units of x$"):
        attack(193.0, norm="l1")(Untouched(), X, Y)
    with pytest.raises(AssertionError, match="must not run"):
        attack(191.0, norm="l1", input_gradient="autograd")(Untouched(), X, Y)


def test_lazy_layers_must_be_called_first():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    for call in (PGD(EPS), sk.APGD(EPS), lambda *a: sk.explain(*a[:2])):
        with pytest.raises(ValueError, match=r"model has lazy layers.*call model\(x\) once first"):
            call(model, X, Y)
    model(X)
    PGD(EPS)(model, X, Y)


# ---- values that are checked last, as on GPUs ---------------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch):
    """Attacks check values as they do on a GPU: they launch everything, then read once. The list of those reads."""
    reads, read = [], checks.Values.read
    monkeypatch.setattr(PGD, "_may_check_late", lambda self, model, x: True)
    monkeypatch.setattr(checks.Values, "read", lambda self, *counts: reads.append(len(counts)) or read(self, *counts))
    return reads


WRONG_VALUES = {
    "8-bit images": ({"x": X * 255}, r"x must lie inside bounds=\(0.0, 1.0\).*divide 8-bit images by 255"),
    "NaN": ({"x": X.where(X > 0.1, torch.nan)}, "found NaN"),
    "negative labels": ({"y": Y - 20}, r"y must hold class indices in \[0, K\), found -"),
    "labels beyond the classes": ({"y": Y.clamp(min=1) * 10}, r"y holds class \d+, outside \[0, 10\) of the model"),
    "start": ({"start": X * torch.nan}, "start holds NaN"),
}


@pytest.mark.parametrize("settings", [{}, {"loss": "margin", "restarts": 2}, {"loss": "kl"}, {"loss": "dlr"}, {"norm": "l2"}])
@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_late_checks_raise_the_same_and_leave_no_trace(late, wrong, settings):
    (given, message), model = WRONG_VALUES[wrong], cnn().train()
    if "start" in given:
        settings = {name: value for name, value in settings.items() if name != "restarts"}
    arguments = {"x": X, "y": Y} | given
    before, state = snapshot(model, X, Y), torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    for source in (None, generator):
        with pytest.raises(ValueError, match=message):
            PGD(EPS, generator=source, **settings)(model, **arguments)
    assert len(late) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())
    assert_same(snapshot(model, X, Y), before)


def test_late_checks_read_once(late):
    """The read takes the number of unusable gradients along."""
    torch.manual_seed(1)
    found = PGD(EPS)(cnn(), X, Y)
    assert late == [1]
    assert (found - X).abs().max() <= EPS + 1e-7
    with pytest.warns(RuntimeWarning, match="NaN for 6 of 6"):
        PGD(EPS)(lambda x: x.flatten(1)[:, :10] * torch.nan, X, Y)
    assert late == [1, 1]


def test_late_checks_blame_values_before_the_model(late):
    with pytest.raises(ValueError, match="divide 8-bit images"):
        PGD(EPS)(Untouched(), X * 255, Y)
    with pytest.raises(AssertionError, match="must not run"):
        PGD(EPS)(Untouched(), X, Y)


def test_values_are_checked_first_where_a_wrong_one_could_do_harm(monkeypatch):
    """In code of the model, in a loss that looks something up by the labels, and before there is a plan."""
    on_gpu, model = SimpleNamespace(is_cuda=True, shape=X.shape, dtype=X.dtype), cnn()
    assert not PGD(EPS)._may_check_late(model, on_gpu)
    PGD(EPS)(model, X, Y)
    for loss, late in (("ce", True), ("kl", True), ("margin", True), ("dlr", True), ("mmc", True), (lambda z, y: z[:, 0], False)):
        assert PGD(EPS, loss=loss)._may_check_late(model, on_gpu) is late
    assert PGD(EPS)._may_check_late(nn.DataParallel(model), on_gpu)
    assert not PGD(EPS, loss="dlr", targeted=True)._may_check_late(model, on_gpu)
    assert not PGD(EPS, input_gradient="autograd")._may_check_late(model, on_gpu)
    assert not PGD(EPS)._may_check_late(model, X)
    assert not PGD(EPS)._may_check_late(lambda x: model(x), on_gpu)
    model.register_forward_hook(lambda *_: None)
    assert not PGD(EPS)._may_check_late(nn.DataParallel(model), on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_late_checks_on_the_gpu(wrong, graph):
    (given, message), model = WRONG_VALUES[wrong], cnn().eval().cuda()
    arguments = {name: value.cuda() for name, value in ({"x": X, "y": Y} | given).items()}
    for _ in range(2):
        state = torch.cuda.get_rng_state()
        with pytest.raises(ValueError, match=message):
            PGD(EPS, graph=graph)(model, **arguments)
        assert torch.equal(torch.cuda.get_rng_state(), state)

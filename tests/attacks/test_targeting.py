"""The order of targets: MALT against its formula by autograd, with ties and gradients that say nothing, and in the attacks."""

import pytest
import torch

from spat_kernels import APGD
from spat_kernels.attacks import apgd, targeting
from spat_kernels.attacks.targeting import nearest_classes, nearest_classes_of
from spat_kernels.input_gradient.autograd import InputGradient
from spat_kernels.input_gradient.choose import input_gradient
from spat_kernels.input_gradient.planned_gradient import PlannedGradient
from spat_kernels.predictions import other_classes
from tests.helpers import EPS, Around, attackable, cnn, linear


def malt_distances(model, x, y, norm):
    """(z_y - z_k) / ||d(z_y - z_k)/dx|| [B, K] in fp64 from the Jacobian; NaN at y."""
    model, rows = model.double().eval(), []
    for image, label in zip(x.double(), y.tolist(), strict=True):
        logits = model(image[None])[0]
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], image).flatten(1)
        slopes = jacobian[label] - jacobian
        norms = slopes.abs().sum(1) if norm == "linf" else slopes.square().sum(1).sqrt()
        rows.append((logits[label] - logits) / norms)
    return torch.stack(rows).detach()


def order_of(distances, y):
    return distances.scatter(1, y[:, None], torch.inf).argsort(1)[:, :-1]


@pytest.mark.parametrize("path", ["plan", "autograd"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_order_is_that_of_the_formula(norm, path):
    model, x, y = attackable(16)
    expected = order_of(malt_distances(model, x, y, norm), y)
    found, possible = nearest_classes_of(model, x, y, norm, path)
    assert torch.equal(found, expected)
    assert possible.all()
    assert (found != other_classes(model(x), y)[0]).any(1).sum() > 4, "not just the order of confidence"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_order_in_half_precision(precision):
    """To the accuracy of gradients there, which come with a factor for each sample."""
    model = cnn().eval()
    x, y = torch.rand(16, 3, 8, 8), torch.randint(10, (16,))
    gradient = input_gradient(model, x, "plan", precision)
    assert isinstance(gradient, PlannedGradient)
    with torch.no_grad(), gradient.arithmetic("cpu"):
        gradient.prepare()
        found, _ = nearest_classes(gradient, gradient.forward(x), y, "linf", torch.float32)
    assert gradient.factor is not None
    distances = malt_distances(model, x, y, "linf").gather(1, found)
    off = (distances.cummax(1).values - distances).amax(1)
    assert (off <= 0.02 * distances.abs().amax(1)).all()
    assert (distances.diff(dim=1).abs().amax(1) > 0.1 * distances.abs().amax(1)).all(), "which is less than they differ"


class Given:
    """The part of an `InputGradient` that is asked: the gradient of z_k - z_y is slope_k in one pixel of four, whatever y."""

    factor = None

    def __init__(self, slopes):
        self.slopes = torch.tensor(slopes)

    def backward(self, dlogits, keep=False):
        return torch.stack((self.slopes[dlogits.argmax(1)], *torch.zeros(3, len(dlogits))), 1).view(-1, 1, 2, 2)


def nearest(logits, slopes, norm="linf"):
    """Of two samples alike, with label 0: the classes, and whether they are possible."""
    z, y = torch.tensor([logits] * 2), torch.zeros(2, dtype=torch.int64)
    found, possible = (t.tolist() for t in nearest_classes(Given(slopes), z, y, norm, torch.float32))
    assert found[0] == found[1]
    return found[0], possible[0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_steep_boundary_comes_before_a_likely_class(norm):
    assert nearest([5.0, 4.0, 3.0, 0.0], [9.0, 1.0, 4.0, 6.0], norm)[0] == [2, 3, 1], "at 2/4, 5/6 and 1"


@pytest.mark.parametrize("unknown", [0.0, torch.nan, torch.inf])
def test_what_a_gradient_does_not_say_puts_no_class_first(unknown):
    """A gradient of 0, NaN or infinite: behind those that are known, by confidence. -inf rules out, and is last."""
    inf = torch.inf
    found, possible = nearest([5.0, -inf, 1.0, 5.0, 4.0, 2.0], [0.0, 1.0, 1.0, unknown, unknown, 1.0])
    assert found == [5, 2, 3, 4, 1]
    assert possible == [True, True, True, True, False]
    assert nearest([5.0, 6.0, 7.0, 4.0], [0.0, unknown, 1.0, 1.0])[0] == [2, 3, 1], "also of what is misclassified"
    assert nearest([5.0, 1.0, 3.0, 2.0], [unknown] * 4)[0] == [2, 3, 1], "by confidence"
    assert nearest([-inf, 1.0, -inf, 2.0], [0.0, 1.0, 1.0, 1.0]) == ([3, 1, 2], [True, True, False])
    assert sorted(nearest([torch.nan, 1.0, 3.0], [0.0, 1.0, unknown])[0]) == [1, 2]


def test_of_many_classes_the_likeliest_are_candidates(monkeypatch):
    """The others follow by confidence; each candidate costs a backward, all of them one forward."""
    model, x, y = linear(48, 130).double(), torch.rand(4, 3, 4, 4).double(), torch.arange(4)
    calls = []
    for name in ("forward", "backward"):
        plain = getattr(InputGradient, name)
        monkeypatch.setattr(InputGradient, name, lambda *a, name=name, plain=plain, **k: calls.append(name) or plain(*a, **k))
    found, _ = nearest_classes_of(model, x, y, "l2", "autograd")
    assert calls == ["forward"] + ["backward"] * targeting.CANDIDATES
    likeliest, _ = other_classes(model(x), y)
    assert torch.equal(found[:, 100:], likeliest[:, 100:])
    distances = malt_distances(model, x, y, "l2")
    assert torch.equal(found[:, :100], likeliest[:, :100].gather(1, distances.gather(1, likeliest[:, :100]).argsort(1)))


def test_leaves_the_model_alone():
    model = cnn().train()
    x, y = torch.rand(4, 3, 8, 8), torch.randint(10, (4,))
    nearest_classes_of(model, x, y, "linf")
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        found, _ = nearest_classes_of(model, x + 0, y + 0, "linf")
    assert torch.equal(found, nearest_classes_of(model, x, y, "linf")[0])


# --- in the attacks


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_goes_to_the_nearest_first(norm, monkeypatch):
    model, x, y = attackable(12)
    expected, gone, attack = nearest_classes_of(model, x, y, norm)[0], [], apgd.graphs.attack

    def recorded(settings, model, batch, highest_label):
        gone.append(batch.targets)
        return attack(settings, model, batch, highest_label)

    monkeypatch.setattr(apgd.graphs, "attack", recorded)
    APGD(0.0, norm=norm, loss="dlr", targets=3, targeting="malt", steps=2)(model, x, y)
    assert torch.equal(torch.stack(gone, 1), expected[:, :3])


def test_apgd_passes_classes_that_are_ruled_out():
    class Without(Around):
        def forward(self, x):
            return self.net(x).index_fill(1, torch.tensor([1, 2]), -torch.inf)

    model, x = Without(linear(48, 6)).eval(), torch.rand(16, 3, 4, 4)
    y = model(x).argmax(1)
    x_adv = APGD(0.5, loss="ce", targets=5, targeting="malt", steps=5)(model, x, y)
    assert (model(x_adv).argmax(1) != y).all()


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="targeting='malt' is an order of targets: give targets=9, or leave it out"):
        APGD(EPS, targeting="malt")
    with pytest.raises(ValueError, match="targeting"):
        APGD(EPS, targets=2, targeting="nearest")
    model, x, y = attackable(2)
    with pytest.raises(ValueError, match="targets=10, but the model has 10 classes: at most 9"):
        APGD(EPS, targets=10, targeting="malt")(model, x, y)

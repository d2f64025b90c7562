"""APGD as a training attack: the iterate of the highest loss, as a plain loop finds it, without looking at values."""

import pytest
import torch
import torch.nn.functional as F

from spat_kernels import APGD, losses
from spat_kernels.attacks import apgd
from spat_kernels.attacks.apgd_run import AscentRun
from spat_kernels.cuda_graphs.cache import Graphs
from spat_kernels.input_gradient.trace import _NoLooking
from tests.cuda_graphs.fake_graph import FakeGraph
from tests.helpers import batch, sharp

EPS = 0.02


def plain_apgd(model, x, y, eps, steps, alpha=0.0, start=None):
    """Two or three steps of Croce and Hein's Algorithm 1 from `start`, of which the best iterate by its loss is kept. With so few
    steps the step size is halved after the second alone, where neither of the steps so far raised the loss enough."""

    def loss_and_gradient(images):
        images = images.clone().requires_grad_()
        loss = F.cross_entropy(model(images), y, reduction="none", label_smoothing=alpha)
        return loss.detach(), torch.autograd.grad(loss.sum(), images)[0]

    def project(images):
        return images.clamp(x - eps, x + eps).clamp(0, 1)

    now = x if start is None else start
    value, grad = loss_and_gradient(now)
    best, best_value, before = now.clone(), value.clone(), now
    for step in range(steps):
        z, a = project(now + 2 * eps * grad.sign()), 0.75 if step else 1.0
        now, before = project(now + a * (z - now) + (1 - a) * (now - before)), now
        value, grad = loss_and_gradient(now)
        better = value > best_value
        best[better], best_value = now[better], value.maximum(best_value)
    return best, best_value


@pytest.mark.parametrize("input_gradient", ["plan", "autograd"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("given", [False, True])
def test_two_steps_are_those_of_a_plain_loop(alpha, given, input_gradient):
    """Of misclassified images too: most labels here are wrong."""
    model, (x, y) = sharp(), batch(16)
    x = x.double()
    start = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1) if given else x
    loss = losses.lookup("lsce", alpha=alpha) if alpha else losses.lookup("ce")
    before = x.clone(), start.clone()
    images, nan_seen = APGD(EPS, loss=loss, steps=2, input_gradient=input_gradient).launch(model, x, y, start=start)
    classes = model(x).shape[1]
    smoothing = alpha * classes / (classes - 1)  # over all classes, as PyTorch counts it
    expected, value = plain_apgd(model, x, y, EPS, 2, smoothing, start)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-12)
    assert not nan_seen.any()
    assert (model(x).argmax(1) != y).any()
    assert (value > F.cross_entropy(model(x), y, reduction="none", label_smoothing=smoothing)).all()
    assert torch.equal(x, before[0])
    assert torch.equal(start, before[1])


def test_from_a_random_point_of_the_surface():
    model, (x, y) = sharp().float(), batch(8)
    generator = torch.Generator()
    attack = APGD(EPS, steps=3, generator=generator)
    first, again, other = (attack.launch(model, x, y)[0] for seed in (1, 1, 2) if generator.manual_seed(seed))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first - x).abs().max() <= EPS * (1 + 1e-5)
    at_x, found = (F.cross_entropy(model(images), y, reduction="none") for images in (x, first))
    assert (found > at_x).all()


def test_looks_at_no_value(monkeypatch):
    """A GPU would be waited for, and idle meanwhile."""

    class Watched(AscentRun):
        def attempt(self, captured):
            with _NoLooking():
                super().attempt(captured)

    monkeypatch.setattr(apgd, "AscentRun", Watched)
    model, (x, y) = sharp().float(), batch(8)
    for start in (x, None):
        assert not torch.equal(APGD(EPS, steps=4).launch(model, x, y, start=start)[0], x)


@pytest.mark.parametrize("given", [False, True])
def test_replays_equal_the_attack_itself(monkeypatch, given):
    graphs = Graphs(graph=FakeGraph)
    monkeypatch.setattr(apgd, "graphs", graphs)
    model, generator = sharp().float(), torch.Generator()
    for seed in range(4):
        x, y = batch(16)
        results = []
        for graph in (True, False):
            attack = APGD(EPS, steps=3, graph=graph, generator=generator.manual_seed(seed))
            results.append(attack.launch(model, x + 0, y, start=(x + 0.01).clamp(0, 1) if given else None)[0])
        assert torch.equal(*results), seed
    assert len(graphs) == 1
    assert attack(model, x, y).shape == x.shape  # a call is another kind of run
    assert attack.run_class is apgd.APGDRun


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"restarts": 2}, "restarts=2"), ({"targets": 3, "loss": "dlr"}, "targets=3"), ({"budget": 9}, "budget=9")],
)
def test_is_one_run(settings, message):
    model, (x, y) = sharp().float(), batch(4)
    with pytest.raises(ValueError, match=f"{message}.*: launch is one run"):
        APGD(EPS, **settings).launch(model, x, y)


def test_what_does_not_fit():
    model, (x, y) = sharp().float(), batch(4)
    with pytest.raises(ValueError, match="start"):
        APGD(EPS).launch(model, x, y, start=x[:2])
    images, nan_seen = APGD(EPS).launch(model, x[:0], y[:0])
    assert images.shape == (0, *x.shape[1:])
    assert nan_seen.shape == (0,)

"""The landscape's numbers against plain loops, and its labels."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("matplotlib")

import numpy as np

from spat_train import plotting
from spat_train.papers import loaded_run
from spat_train.papers.figures import landscape

pytestmark = pytest.mark.usefixtures("one_thread")


class Bumpy(nn.Module):
    """With many maxima, and a mode and statistics that must stay."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(3 * torch.randn(6, 3, generator=generator))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(torch.sin(7 * x.flatten(1))) @ self.weight


@pytest.fixture
def bumpy():
    torch.manual_seed(0)
    return Bumpy().double(), torch.rand(4, 1, 2, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


def gradient_of(model, x, y):
    x = x.clone().requires_grad_()
    model = model.eval()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def test_ascents_are_a_plain_loop(bumpy, monkeypatch):
    monkeypatch.setattr(landscape, "CHUNK", 8)  # in rounds of two restarts of four images
    model, x, y = bumpy
    eps, steps, step_size, restarts = 0.2, 6, 0.05, 5
    found = landscape.ascend(model, x, y, eps, restarts=restarts, steps=steps, step_size=step_size, seed=3)
    assert found.losses.shape == (5, 4, 7)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    for r in range(restarts):
        point = found.starts[r]
        assert bool(((point - x).abs() <= eps + 1e-12).all())
        assert 0 <= point.min() <= point.max() <= 1
        for t in range(steps + 1):
            losses = F.cross_entropy(model(point), y, reduction="none")
            assert torch.allclose(found.losses[r, :, t], losses)
            if t < steps:
                point = point + step_size * gradient_of(model, point, y).sign()
                point = torch.minimum(torch.maximum(point, x - eps), x + eps).clamp(0, 1)
        assert torch.allclose(found.ends[r], point, atol=1e-12)
        assert torch.equal(found.predicted[r], model(point).argmax(1))
    assert len(found.starts[:, 0].flatten(1).unique(dim=0)) == restarts  # no two alike


def test_distances_and_angles_of_all_pairs():
    points, centre = torch.rand(5, 2, 3), torch.rand(2, 3)
    distances, cosines = landscape.pairwise(points, centre)
    pairs = [(a.flatten() - centre.flatten(), b.flatten() - centre.flatten()) for a, b in combinations(points, 2)]
    assert distances.tolist() == pytest.approx([float((a - b).square().sum().sqrt()) for a, b in pairs], rel=1e-5)
    assert cosines.tolist() == pytest.approx([float(a @ b / (a @ a * (b @ b)).sqrt()) for a, b in pairs], rel=1e-5)


def test_losses_between_maxima(bumpy):
    model, x, y = bumpy
    points = torch.rand(4, 1, 2, 3, dtype=torch.float64)
    found = landscape.losses_between(model, points, y[0], pairs=2, parts=4)
    model.eval()

    def loss(point):
        return F.cross_entropy(model(point[None]), y[:1]).item()

    expected = [sum(loss(torch.lerp(points[i], points[i + 1], t / 4)) for i in (0, 1)) / 2 for t in range(5)]
    assert found.tolist() == pytest.approx([loss / ((expected[0] + expected[-1]) / 2) for loss in expected])


def test_surface(bumpy):
    model, x, y = bumpy
    eps, found = 0.1, landscape.surface(model, x[0], y[0], 0.1, points=5, seed=2)
    assert model.training
    gradients = loaded_run.input_gradients(model, x, y)
    assert not gradients.requires_grad
    assert torch.allclose(gradients, gradient_of(model, x, y))  # this leaves it in eval mode
    g = gradients[0].sign()
    r = torch.randint(2, x[0].shape, generator=torch.Generator().manual_seed(2)).double() * 2 - 1
    assert found["shares"] == [-1, -0.5, 0, 0.5, 1]
    for row, b in enumerate(found["shares"]):
        for column, a in enumerate(found["shares"]):
            logits = model((x[0] + eps * (a * g + b * r)).clamp(0, 1)[None])[0]
            margin = logits[y[0]] - max(value for k, value in enumerate(logits) if k != y[0])
            assert found["losses"][row][column] == pytest.approx(F.cross_entropy(logits, y[0]).item(), rel=1e-6)
            assert found["margins"][row][column] == pytest.approx(margin.item(), rel=1e-6)


def test_alignment_is_the_cosine_between_weights_and_image():
    """The input gradient of a linear model of two classes is a multiple of the difference of their weights."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2, bias=False)).double()
    x, y = torch.rand(3, 1, 2, 3).double(), torch.tensor([0, 1, 1])
    apart = (model[1].weight[0] - model[1].weight[1]).detach()
    expected = [abs(float(apart @ image.flatten() / apart.norm() / image.norm())) for image in x]
    assert loaded_run.alignment(model, x, y).tolist() == pytest.approx(expected)
    with torch.no_grad():
        model[1].weight *= 1e4  # so sure that the gradient of a loss vanishes
    assert loaded_run.alignment(model.float(), x.float(), y).tolist() == pytest.approx(expected)


def test_what_the_maxima_mean(bumpy):
    model, x, y = bumpy
    found = landscape.ascend(model, x, y, 0.2, restarts=8, steps=20, step_size=0.02, seed=0)
    numbers = landscape.compare(model, x, y, 0.2, found, seed=0)
    distances, cosines = zip(*(landscape.pairwise(found.ends[:, n], x[n]) for n in range(4)), strict=True)
    assert numbers["distances"] == torch.cat(distances).tolist()
    assert numbers["cosines"] == torch.cat(cosines).tolist()
    corners = landscape.corners(x[0], 0.2, 40, seed=0)
    assert ((corners - x[0]).abs().isclose(x.new_tensor(0.2)) | (corners == 0) | (corners == 1)).all()
    assert 0.3 < float((corners > x[0]).double().mean()) < 0.7
    starts = torch.cat([landscape.pairwise(found.starts[:, n], x[n])[0] for n in range(4)])
    assert numbers["random_distance"] == pytest.approx(float(starts.mean()))
    assert numbers["losses"] == found.losses[..., -1].tolist()
    assert numbers["fooled"] == pytest.approx(float((found.predicted != y).float().mean()))
    assert landscape.summary(numbers).startswith("distinct maxima")
    assert landscape.summary(numbers | {"between": [1.0] * 11}).startswith("different points of one plateau")
    assert landscape.summary(numbers | {"distances": [1e-3]}).startswith("all starts lead to one maximum")


@pytest.mark.parametrize(("low", "high", "count"), [(1e-4, 10, 5), (1.36, 2.4, 3), (1.0, 50, 8), (1.37, 1.375, 1)])
def test_labels_of_the_landscape_do_not_overlap(low, high, count):
    generator = np.random.default_rng(0)
    spread = min(0.3, math.log(high / low) / 10)
    models = {name: loss * np.exp(spread * generator.normal(size=(4, count))) for name, loss in (("a", low), ("b", high))}
    pairs = {"distances": generator.normal(5, 1, 99), "cosines": generator.normal(0.5, 0.1, 99), "between": [1, 0.9, 1]}
    random = {f"{kind}_{name}": 0.2 for kind in ("random", "corner") for name in ("distance", "cosine")}
    names = [f"class {i}" for i in range(count)]
    ways = {name: losses[..., None] * np.linspace(0.9, 1, 101) for name, losses in models.items()}
    with plotting.style():
        maxima = landscape.plot_maxima({name: {"losses": losses, **pairs, **random} for name, losses in models.items()}, names)
        assert len(maxima.subfigs[0].axes[0].get_xticks()) > 1
        for figure in (maxima, landscape.plot_ascents(ways, [torch.rand(3, 4, 4)] * count, names)):
            figure.draw_without_rendering()
            for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
                start, end = sorted(axis.get_view_interval())
                labels = [t.label1 for t in axis.get_major_ticks() + axis.get_minor_ticks() if start <= t.get_loc() <= end]
                boxes = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
                assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))

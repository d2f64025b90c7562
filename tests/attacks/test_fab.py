"""FAB: exact projections, step by step what torchattacks does, and true to its settings."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spat_kernels.attacks.fab import FAB, project
from spat_kernels.input_gradient.choose import input_gradient
from spat_train.models.registry import create
from tests.helpers import NORMS, Around, Recorder, batch, cnn, correct, distance, sharp
from tests.input_gradient.models import randomized

# --- projections ---


def planes(n, count=60):
    """Points in [-1, 2], some at its sides, and hyperplanes, some through them, some beyond the box, with zero weights."""
    generator = np.random.default_rng(n)
    points = generator.uniform(-1, 2, (count, n))
    points[generator.random((count, n)) < 0.2] = -1
    points[generator.random((count, n)) < 0.1] = 2
    w = generator.normal(size=(count, n)) * 10 ** generator.uniform(-3, 3, (count, 1))
    w[generator.random((count, n)) < 0.2] = 0
    w[0] = 0
    reach = np.abs(w).sum(1) * 3
    gap = reach * generator.uniform(-0.6, 0.6, count) ** 3
    gap[1:4], gap[4:8] = 0, reach[4:8] * (1.1, -1.1, 4, -4)
    return tuple(torch.tensor(v) for v in (points, w, gap))


def nearest_linf(point, w, gap):
    """min t: |d| <= t, w d = -gap, inside the box, by scipy's linear program; None where there is none."""
    optimize = pytest.importorskip("scipy.optimize")
    n = len(point)
    eye, ones = np.eye(n), np.ones((n, 1))
    bounds = [*zip(-1 - point, 2 - point, strict=True), (0, None)]
    scale = max(np.abs(w).max(), 1e-300)
    result = optimize.linprog(
        [*[0] * n, 1], np.block([[eye, -ones], [-eye, -ones]]), np.zeros(2 * n), [[*w / scale, 0]], [-gap / scale], bounds
    )
    return result.x[-1] if result.status == 0 else None


def nearest_l1(point, w, gap):
    """min sum(a + b), d = a - b inside the box, w d = -gap, by scipy's linear program; None where there is none."""
    optimize = pytest.importorskip("scipy.optimize")
    scale = max(np.abs(w).max(), 1e-300)
    sides = [(0, 2 - p) for p in point] + [(0, p + 1) for p in point]
    result = optimize.linprog(np.ones(2 * len(point)), A_eq=[[*w / scale, *-w / scale]], b_eq=[-gap / scale], bounds=sides)
    return result.fun if result.status == 0 else None


def nearest_l2(point, w, gap):
    """The dual of the quadratic program: d(t) = clip(-t w), t by bisection."""
    optimize = pytest.importorskip("scipy.optimize")

    def move(t):
        return np.clip(-t * w, -1 - point, 2 - point)

    def rest(t):
        return w @ move(t) + gap

    if gap == 0:
        return 0.0
    far = np.sign(gap) * 4 / max(np.abs(w[w != 0]).min(initial=np.inf), 1e-300)
    if not w.any() or rest(far) * gap > 0:
        return None
    return np.linalg.norm(move(optimize.brentq(rest, 0, far, xtol=1e-300, rtol=1e-15, maxiter=1000)))


@pytest.mark.parametrize("norm, nearest", [("linf", nearest_linf), ("l2", nearest_l2), ("l1", nearest_l1)])
@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_projections_are_the_nearest_points(n, norm, nearest):
    points, w, gap = planes(n)
    moves = project(points, w, gap, -1.0, 2.0, norm)
    left, lengths = (w * moves).sum(1) + gap, distance(moves, torch.zeros(()), norm)
    assert (points + moves).min() >= -1 - 1e-12
    assert (points + moves).max() <= 2 + 1e-12
    found = 0
    for i in range(len(points)):
        expected = nearest(*(v[i].numpy() for v in (points, w, gap)))
        if expected is None:  # then every coordinate with a weight goes to its side
            corner = torch.where(w[i] * gap[i] > 0, -1.0, 2.0)
            assert torch.where(w[i] != 0, points[i] + moves[i] - corner, moves[i]).abs().max() <= 1e-12
        else:
            found += 1
            assert left[i].abs() <= 1e-9 * max(w[i].abs().sum(), 1e-300)
            assert lengths[i] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert 30 < found < len(points), "some of both"


def test_projections_in_l1_move_the_steepest_first():
    points, w = torch.tensor([[0.5, 0.5, 0.9, 0.2]]).double(), torch.tensor([[1.0, -3.0, -2.0, 0.0]]).double()
    for gap, moves in ((0.9, [0, 0.3, 0, 0]), (1.6, [0, 0.5, 0.05, 0]), (2.0, [-0.3, 0.5, 0.1, 0]), (9.0, [-0.5, 0.5, 0.1, 0])):
        found = project(points, w, torch.tensor([gap]).double(), 0.0, 1.0, "l1")
        torch.testing.assert_close(found, torch.tensor([moves]).double())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_projections_of_extreme_gradients_are_finite(norm):
    points = torch.rand(6, 50)
    for scale in (1e-38, 1e-30, 1e-12, 1e12, 1e18):
        w = torch.randn(6, 50) * scale
        w[:, ::7] = 0
        w[0] = 0
        for gap in (0.0, scale, 1.0, 1e6):
            moves = project(points, w, torch.full((6,), gap), 0.0, 1.0, norm)
            assert moves.isfinite().all()
            assert (moves[:, ::7] == 0).all()
            assert (points + moves).min() >= -1e-6
            assert (points + moves).max() <= 1 + 1e-6


# --- against the judge ---


def judge(model, x, y, norm, eps, steps, targets, monkeypatch):
    """torchattacks' FAB, which casts to fp32 on its way, in fp64."""
    torchattacks = pytest.importorskip("torchattacks")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            settings = {"multi_targeted": True, "n_classes": targets + 1} if targets else {}
            attack = torchattacks.FAB(model, norm=NORMS[norm], eps=eps, steps=steps, seed=0, **settings)
            return judge_l1(attack, model, x, y, eps, targets) if norm == "l1" else attack(x, y)
        finally:
            torch.set_default_dtype(torch.float32)


def judge_l1(attack, model, x, y, eps, targets):
    """Its runs in L1, one after the other. What it does around them fails there (UnboundLocalError)."""
    found = x.clone()
    for target in range(2, (targets or 1) + 2):
        attack.target_class = target
        x_adv = (attack.attack_single_run_targeted if targets else attack.attack_single_run)(x, y)
        taken = ((found == x).flatten(1).all(1)) & (model(x_adv).argmax(1) != y) & (distance(x_adv, x, "l1") <= eps)
        found[taken] = x_adv[taken]
    return found


@pytest.mark.parametrize("how", ["plan", "autograd"])
@pytest.mark.parametrize("norm, eps", [("linf", 0.5), ("l2", 4.0), ("linf", 0.08), ("l2", 0.5), ("l1", 9.0), ("l1", 2.0)])
@pytest.mark.parametrize("targets", [3, None])
def test_equals_torchattacks(task, norm, eps, targets, how, monkeypatch):
    model, *images = task
    x, y = correct(model, *images, 40)
    with torch.random.fork_rng():
        theirs = judge(model, x, y, norm, eps, 15, targets, monkeypatch)
    ours = FAB(eps, norm=norm, steps=15, targets=targets, input_gradient=how)(model, x, y)
    broken = [model(v).argmax(1) != y for v in (ours, theirs)]
    assert torch.equal(*broken)
    assert broken[0].sum() > 10
    assert eps > 0.3 or not broken[0].all()
    a, b = (distance(v, x, norm) for v in (ours, theirs))
    assert ((a - b).abs() <= 1e-6).double().mean() >= 0.95
    assert ((ours - theirs).abs().flatten(1).amax(1) <= 1e-6).double().mean() >= 0.95


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_linear_models_are_broken_at_their_margin(norm):
    """There the distance to the nearest boundary is known: |f| / ||w||, if the box is far."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double()
    x = torch.rand(20, 3, 4, 4).double() * 0.2 + 0.4
    model[1].bias.data -= model(x).detach().mean(0)  # in L1 a single element moves all the way
    logits, w = model(x).detach(), model[1].weight.detach()
    y = logits.argmax(1)
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    gaps = (logits.gather(1, y[:, None]) - logits) / torch.linalg.vector_norm(w[y][:, None] - w, dual, dim=2)
    margin = gaps.scatter(1, y[:, None], torch.inf).amin(1)
    for targets in (4, None):
        attack = FAB(margin * 1.01, norm=norm, steps=10, targets=targets)
        assert (model(attack(model, x, y)).argmax(1) != y).all()
        attack.eps = margin * 0.999
        assert torch.equal(attack(model, x, y), x)


# --- true to its settings ---


def test_targets_are_the_likeliest_classes():
    """Class 1 is likelier than class 2, but its boundary is far away."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, 0.01, 1.0, 0.0])[:, None] * torch.ones(12))
        model[1].bias.copy_(torch.tensor([6.0, 5.9, -0.1, -9.0]))
    x, y = torch.full((2, 3, 2, 2), 0.4).double(), torch.zeros(2, dtype=torch.int64)
    z = model(x).detach()[0] - 6  # class 1 by 0.0667 / 0.12 each pixel, class 2 by 1.3 / 12
    assert z[1] > z[2] > z[3]
    eps, near, first = 0.2, -z[2] / 12, -z[1] / 0.12
    assert near < eps < first
    for targets, broken in ((1, False), (2, True), (99, True), (None, True)):
        x_adv = FAB(eps, steps=3, targets=targets)(model, x, y)
        assert (x_adv != x).any() == broken
        if broken:
            assert (distance(x_adv, x, "linf") - near).abs().max() < 0.06 * near


def test_costs_what_it_says():
    x = torch.rand(5, 3, 8, 8).double()
    model = Recorder(sharp())
    y = model.model(x).argmax(1)
    for settings, forwards in [
        ({"targets": 2}, 1 + 2 * 2 * 3), ({"targets": 3, "restarts": 2}, 1 + 6 * 2 * 3), ({"targets": None}, 1 + 2 * 3)
    ]:  # fmt: skip
        model.inputs.clear()
        assert torch.equal(FAB(0.0, steps=3, input_gradient="autograd", **settings)(model, x, y), x)
        assert len(model.inputs) == forwards
    model.inputs.clear()
    assert torch.equal(FAB(0.1)(model, x, (y + 1) % 10), x)
    assert len(model.inputs) <= 4, "all misclassified: one forward, and those that make a plan"
    model.inputs.clear()
    assert (FAB(0.3, steps=4, targets=3, input_gradient="autograd")(model, x, y) != x).flatten(1).any(1).all()
    sizes = model.sizes
    assert sizes == sorted(sizes, reverse=True), "what is broken drops out between targets"
    assert len(sizes) < 1 + 2 * 4 * 3


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_restarts_begin_at_random_points_halfway_to_the_rim(norm):
    seen = []

    def model(x):
        seen.append(x.detach())
        return torch.stack((x.flatten(1).sum(1) + 1e6, x.flatten(1).norm(dim=1)), 1)  # nothing breaks it

    x, y = torch.rand(7, 3, 4, 4).double() * 0.2 + 0.4, torch.zeros(7, dtype=torch.int64)
    eps, state = torch.linspace(0.01, 0.3, 7).double(), torch.get_rng_state()
    FAB(eps, norm=norm, steps=1, targets=1)(model, x, y)
    assert torch.equal(torch.get_rng_state(), state), "one run draws nothing"
    starts = []
    for seed in (5, 5, 6):
        seen.clear()
        torch.manual_seed(seed)
        assert torch.equal(FAB(eps, norm=norm, steps=1, targets=1, restarts=3)(model, x, y), x)
        first, *others = (seen[i] for i in (1, 3, 5))  # after the clean images: a start and a look at where it led, three times
        assert torch.equal(first, x)
        for other in others:
            torch.testing.assert_close(distance(other, x, norm), eps / 2)
        starts.append(others)
    assert torch.equal(*(torch.stack(s) for s in starts[:2]))
    assert not torch.equal(starts[0][0], starts[2][0])
    assert not torch.equal(*starts[0])


# --- gradients whose lengths count ---


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
@pytest.mark.parametrize("how", ["plan", "autograd"])
def test_gradients_have_their_lengths(how, precision):
    """In half precision plans scale samples; FAB needs to know by how much."""
    torch.manual_seed(0)
    model, x = randomized(create("wrn-10-1"), torch.float32), torch.rand(4, 3, 16, 16)
    dlogits = torch.randn(4, 10) * torch.logspace(-6, 3, 4)[:, None]
    with torch.no_grad():
        exact, ours = (input_gradient(model, x, *way) for way in (("autograd",), (how, precision)))
        expected = (exact.forward(x), exact.backward(dlogits))[1].flatten(1)
        with ours.arithmetic("cpu"):
            ours.prepare()
            logits = ours.forward(x)
            got = ours.backward(dlogits.to(logits.dtype)).flatten(1).float()
    got = got if ours.factor is None else got * ours.factor[:, None]
    if precision != "fp16" or how == "plan":  # autograd alone loses small ones there
        ratio = got.norm(dim=1) / expected.norm(dim=1)
        assert (ratio - 1).abs().max() <= (0.05 if precision else 1e-4)


class Checkpointed(Around):
    """Re-entrant checkpointing refuses torch.autograd.grad."""

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_one_forward_serves_many_backwards_of_a_checkpoint():
    model, (x, _) = cnn().double().eval(), batch(3)
    x = x.double()
    y = model(x).argmax(1)
    for targets in (2, None):
        ours = FAB(0.01, steps=3, targets=targets)(Checkpointed(model), x, y)
        torch.testing.assert_close(ours, FAB(0.01, steps=3, targets=targets)(model, x, y), rtol=0, atol=1e-12)


def test_no_weight_gradient_is_computed():
    x, _ = batch(4)
    model = cnn().eval()
    y = model(x).argmax(1)
    seen = []
    for p in model.parameters():
        p.register_hook(seen.append)
    FAB(0.01, steps=2, input_gradient="autograd")(model, x, y)
    assert not seen
    assert all(p.grad is None for p in model.parameters())

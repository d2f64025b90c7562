"""APGD: step by step what torchattacks does, in fewer passes, of each sample by itself, and as a capture."""

import pytest
import torch
from torch import nn

import spat_kernels as sk
from spat_kernels import APGD, PGD, balls
from spat_kernels.attacks import apgd, apgd_run
from spat_kernels.attacks.apgd_run import checkpoints
from spat_kernels.cuda_graphs.cache import Graphs
from spat_kernels.input_gradient.planned_gradient import PlannedGradient
from tests.cuda_graphs.fake_graph import FakeGraph, captured_and_eager
from tests.helpers import (
    EPS,
    NORMS,
    Recorder,
    assert_inside,
    attackable,
    batch,
    cnn,
    correct,
    margin,
    moved,
    photographs,
    probability_margin,
    robust,
    sharp,
)

# --- against the judge ---


def same_start(monkeypatch, x, norm, eps):
    """Make torchattacks draw the noise that our attacks start with, the same for every image."""
    noise = torch.rand_like(x[:1]) if norm == "linf" else torch.randn_like(x[:1])
    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, lambda shape: noise.repeat(shape[0], 1, 1, 1))
    direction = 2 * noise - 1 if norm == "linf" else noise
    direction = direction / direction.norm(p={"linf": torch.inf, "l2": 2, "l1": 1}[norm])
    for ball in balls.BALLS.values():
        monkeypatch.setattr(
            ball, "surface_start_", lambda self, x_adv, draws: x_adv.copy_((self.x + eps * direction).clamp(0, 1))
        )


def assert_same_runs(model, ours, y, best, robust):
    """The same samples are broken, and the others end at the same images, but for one or two where the losses of two iterates
    are equal to the last bits, or where PyTorch's cross-entropy cancels, 1 - p being 1e-9."""
    assert torch.equal(model(ours).argmax(1) == y, robust)
    assert ((ours - best).abs() > 1e-6).flatten(1).any(1)[robust].sum() <= 2


@pytest.mark.parametrize("input_gradient", ["plan", "autograd"])
@pytest.mark.parametrize("steps", [10, 33])
@pytest.mark.parametrize("norm, eps", [("linf", 0.02), ("linf", 0.12), ("l2", 0.4)])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_equals_torchattacks(task, loss, norm, eps, steps, input_gradient, monkeypatch):
    torchattacks = pytest.importorskip("torchattacks", reason="it needs torchvision, which needs its own build of torch")
    model, *batch = task
    x, y = correct(model, *batch, 60)
    same_start(monkeypatch, x, norm, eps)
    judge = torchattacks.APGD(model, norm=NORMS[norm], eps=eps, steps=steps, loss=loss)
    best, robust, _, _ = judge.attack_single_run(x, y)
    ours = APGD(eps, norm=norm, steps=steps, loss=loss, input_gradient=input_gradient)(model, x, y)
    assert 5 < robust.sum() < 60, "some of both"
    assert_same_runs(model, ours, y, best, robust)


@pytest.mark.parametrize("norm, eps", [("linf", 0.08), ("l2", 0.5)])
def test_targeted_equals_torchattacks(task, norm, eps, monkeypatch):
    """Each image alone: torchattacks's L2 form takes every step size from the first of the batch."""
    torchattacks = pytest.importorskip("torchattacks", reason="it needs torchvision, which needs its own build of torch")
    model, *batch = task
    x, y = correct(model, *batch, 20)
    same_start(monkeypatch, x, norm, eps)
    judge = torchattacks.APGDT(model, norm=NORMS[norm], eps=eps, steps=10)
    judge.target_class = 2
    found = [judge.attack_single_run(x[i : i + 1], y[i : i + 1])[:2] for i in range(len(x))]
    best, robust = map(torch.cat, zip(*found, strict=True))
    ours = APGD(eps, norm=norm, steps=10, loss="dlr", targets=1)(model, x, y)
    assert 5 < robust.sum() < 19, "some of both"
    assert_same_runs(model, ours, y, best, robust)
    if norm == "linf":
        everything, _ = judge.perturb(x, y)
        ours = APGD(eps, norm=norm, steps=10, loss="dlr", targets=9)(model, x, y)
        assert torch.equal(model(ours).argmax(1) == y, everything)
        assert 2 < everything.sum() <= robust.sum()


def test_checkpoints():
    """Section 3.2 of the paper: p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(100)[41] == 19
    assert checkpoints(100)[99] == 6
    assert list(checkpoints(10)) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert checkpoints(1) == {}


# --- what it gives ---


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_lie_on_the_surface(norm):
    x = torch.full((5, 3, 4, 4), 0.5, dtype=torch.float64)
    ball = balls.BALLS[norm](x, torch.linspace(0.01, 0.1, 5), 0.0, (0.0, 1.0))
    starts = []
    for seed in (1, 1, 2):
        x_adv = torch.empty_like(x)
        ball.surface_start_(x_adv, ball.draw(torch.Generator().manual_seed(seed), 5))
        starts.append(x_adv)
        delta = (x_adv - x).flatten(1)
        torch.testing.assert_close(delta.norm(dim=1, p=2 if norm == "l2" else torch.inf), ball.eps)
        assert delta.unique().numel() > 200
        assert (delta > 0).double().mean() > 0.3
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("input_gradient", ["plan", "autograd"])
def test_samples_are_independent(monkeypatch, norm, targets, input_gradient):
    """Also of whether others drop out. fp64, since a convolution's rounding depends on the batch size."""
    model, x, y = attackable(15)
    y[::5] += 1
    y %= 10
    same_start(monkeypatch, x, norm, eps := {"linf": 0.005, "l2": 0.05, "l1": 0.2}[norm])
    attack = APGD(eps, loss="dlr", norm=norm, targets=targets, steps=12, input_gradient=input_gradient)
    together = attack(model, x, y)
    broken = (model(together).argmax(1) != y)[y == model(x).argmax(1)]
    assert 2 < broken.sum() < 11, "some of both"
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    same = ((alone - together).abs() < 1e-12).flatten(1).all(1)
    assert same.sum() >= 14, "but for one whose iterates' losses are equal to the last bits"
    assert torch.equal(model(alone).argmax(1), model(together).argmax(1))


# --- what it costs, and what it leaves alone ---


def test_no_useless_forward():
    model, (x, y) = Recorder(cnn()), batch(6)
    y = model.model.eval()(x).argmax(1)
    for settings, forwards in [
        ({}, 1 + 6),  # the clean images, the start, and 5 steps
        ({"restarts": 2, "loss": "dlr", "targets": 3}, 1 + 2 * 3 * 6),
        ({"eot": 4}, 1 + 4 * 6),
    ]:
        model.inputs.clear()
        APGD(0.0, steps=5, **settings)(model, x, y)
        assert model.sizes == [6] * forwards, settings


@pytest.mark.parametrize("settings", [{"restarts": 3}, {"loss": "dlr", "targets": 3}], ids=str)
def test_what_is_broken_is_attacked_no_further(settings):
    net, x, y = attackable(32)
    y[::8] = (y[::8] + 1) % 10
    model = Recorder(net)
    x_adv = APGD(0.004, steps=4, input_gradient="autograd", **settings)(model, x, y)
    runs = model.sizes[1::5]
    assert model.sizes == [32] + [n for n in runs for _ in range(5)]
    assert 28 == runs[0] > runs[1] >= runs[2] >= int((net(x_adv).argmax(1) == y).sum()) > 0
    assert torch.equal(x_adv[::8], x[::8]), "misclassified as they are"


def test_inside_of_runs_too_where_samples_are_independent(monkeypatch):
    model, x, y = attackable(32)
    assert sk.explain(model, x).path == "plan"
    seen, forward = [], PlannedGradient.forward
    monkeypatch.setattr(PlannedGradient, "forward", lambda self, x, keep=True: seen.append(len(x)) or forward(self, x, keep))
    x_adv = APGD(0.005, steps=30, input_gradient="plan")(model, x, y)
    robust = int((model(x_adv).argmax(1) == y).sum())
    assert len(seen) == 32
    assert seen[:8] == [32] * 8, "the clean images, the start, and the first 6 steps"
    assert seen == sorted(seen, reverse=True)
    assert 32 > seen[8] >= seen[-1] >= robust > 0
    seen.clear()
    APGD(5.0, bounds=(-9, 9), steps=30, input_gradient="plan")(model, x, y)
    assert seen == [32] * 8, "a run without samples is over"


def test_restarts_and_targets_keep_the_highest_loss():
    model, x, y = attackable(16)
    ce = nn.CrossEntropyLoss(reduction="none")
    generator = torch.Generator()
    attack = APGD(1e-5, norm="l2", steps=1, generator=generator, bounds=(-1, 2))
    generator.manual_seed(5)
    runs = torch.stack([ce(model(attack(model, x, y)), y) for _ in range(3)])
    generator.manual_seed(5)
    attack.restarts = 3
    best = ce(model(attack(model, x, y)), y)
    torch.testing.assert_close(best, runs.amax(0))
    assert not torch.equal(best, runs[0])


@pytest.mark.parametrize("loss", ["ce", "margin", "pma"])
def test_gradients_are_averaged_with_their_lengths(loss, monkeypatch):
    """eot=3 on three networks in turn is one attack on the mean of their losses."""
    nets = [cnn().double().eval() for _ in range(3)]
    x, y = torch.rand(8, 3, 8, 8).double(), torch.randint(10, (8,))
    turn = []

    def model(x):
        turn.append(0)
        return nets[(len(turn) - 2) % 3](x) * 5 ** ((len(turn) - 2) % 3)

    class Together(nn.Module):
        def forward(self, x):
            return torch.cat([net(x) * 5**i for i, net in enumerate(nets)], 1)

    def mean(z, y):
        parts = z.split(10, dim=1)
        if loss == "ce":
            return sum(nn.functional.cross_entropy(part, y, reduction="none") for part in parts)
        if loss == "pma":
            return sum(probability_margin(part, y) for part in parts)
        return sum(margin(part, y).clamp(max=0) for part in parts)

    for module in (apgd, apgd_run):
        monkeypatch.setattr(module, "predictions", lambda logits: y[: len(logits)])  # all stay correct
    start, results = torch.Generator(), []
    for attacked, settings in ((model, {"loss": loss, "eot": 3}), (Together(), {"loss": mean})):
        attack = APGD(EPS, steps=6, generator=start.manual_seed(1), norm="l2", **settings)
        results.append(attack(attacked, x, y))
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)
    assert moved(results[0], x).all()


def test_eot_needs_one_pass_where_nothing_is_random():
    model, (x, y) = cnn().double().eval(), batch(4)
    x, y = x.double(), model(x.double()).argmax(1)
    results = [
        APGD(EPS, steps=4, eot=eot, generator=torch.Generator().manual_seed(1), input_gradient=way)(model, x, y)
        for eot, way in ((1, "plan"), (5, "plan"), (5, "autograd"))
    ]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-12)


# --- captures ---


@pytest.fixture
def graphs(monkeypatch) -> Graphs:
    graphs = Graphs(graph=FakeGraph)
    monkeypatch.setattr(apgd, "graphs", graphs)
    return graphs


SETTINGS = {
    "ce": {},
    "l2": {"norm": "l2"},
    "l1": {"norm": "l1", "eps": 0.2, "steps": 9},
    "l1_alone": {"norm": "l1", "eps": 0.2, "steps": 30, "multi_eps": False},
    "dlr": {"loss": "dlr"},
    "pma_eot": {"loss": "pma", "eot": 2},
    "targeted": {"loss": "dlr", "targets": 3},
    "malt": {"loss": "dlr", "targets": 3, "targeting": "malt"},
    "targeted_ce_l2": {"norm": "l2", "targets": 2},
    "restarts": {"restarts": 3},
    "kl": {"loss": "kl"},
    "radii": {"eps": torch.linspace(0.001, 0.03, 16)},
    "eot": {"eot": 2},
    "train_mode": {"bn_mode": "train"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_replays_equal_the_attack_itself(graphs, name):
    """On the autograd path, where no run drops samples; so in the last bit. Broken samples drop out between runs: shorter
    batches are captures of their own there."""
    settings = {"eps": 0.003, "steps": 6, "input_gradient": "autograd"} | SETTINGS[name]
    model = sharp().float()
    for seed in (1, 2, 3):
        x, _ = batch(16)
        y = model(x).argmax(1)
        images = captured_and_eager(APGD, model=model, x=x, y=y, seed=seed, **settings)
        assert torch.equal(*images)
        broken = int((model(images[0]).argmax(1) != y).sum())
        assert (images[0] != x).any()
        assert broken < 16
    assert len(graphs) >= 1


@pytest.mark.parametrize("settings", [{}, {"norm": "l2", "loss": "dlr", "targets": 4}, {"norm": "l1"}], ids=str)
def test_one_capture_serves_shorter_batches(graphs, settings):
    """A plan's samples are independent, so what is left of a batch is replayed by the capture of the whole."""
    model = sharp()
    for n in (16, 16, 12, 12):
        x = torch.rand(n, 3, 8, 8).double()
        y = model(x).argmax(1)
        images = captured_and_eager(APGD, 0.001, model, x, y, seed=n, steps=12, **settings)
        torch.testing.assert_close(*images, rtol=0, atol=1e-12)
    assert len(graphs) == 1


def test_settings_and_weights_tell_captures_apart(graphs):
    graphs.capacity = 20
    model, (x, _) = cnn().eval(), batch(4)
    y = model(x).argmax(1)
    variants = [
        {}, {"steps": 3}, {"rho": 0.5}, {"norm": "l2"}, {"norm": "l1"}, {"norm": "l1", "multi_eps": False}, {"loss": "dlr"},
        {"targets": 1}, {"bounds": (-1.0, 1.0)},
    ]  # fmt: skip
    for n, variant in enumerate(variants, 1):
        for eps in (0.0, 1e-9):
            APGD(eps, graph=True, **({"steps": 4} | variant))(model, x, y)
        assert len(graphs) == n, variant
    with torch.no_grad():
        model[-1].weight.mul_(-1)
    y = model(x).argmax(1)
    assert torch.equal(*captured_and_eager(APGD, 0.01, model, x, y, steps=4, input_gradient="autograd"))


def test_long_runs_are_captured_only_with_graph_true(graphs):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(2, 3, 2, 2)
    y = model(x).argmax(1)
    for settings in ({"steps": 300}, {"steps": 9, "eot": 30}):
        for _ in range(2):
            APGD(0.0, graph="auto", **settings)(model, x, y)
    assert len(graphs) == 0
    APGD(0.0, graph=True, steps=9, eot=30)(model, x, y)
    assert len(graphs) == 1


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 48 / 255), ("l2", 4.0)])
def test_towards_classes(loss, norm, eps):
    """It brings more images to their targets than PGD does in as many steps, leaves those that are there, and budgets hold."""
    model, (x, y) = robust("madry"), photographs()
    x, targets = x[:40], (y[:40] + 1) % 10
    there = lambda images: model(images).argmax(1) == targets  # noqa: E731
    result = APGD(eps, loss=loss, norm=norm, targeted=True, steps=10).run(model, x, targets)
    assert_inside(result.x_adv, x, eps, norm)
    by_pgd = PGD(eps, loss=loss, norm=norm, targeted=True, steps=10)(model, x, targets)
    with torch.no_grad():
        assert there(by_pgd).sum() - 1 <= there(result.x_adv).sum()
        assert there(result.x_adv).sum() > there(x).sum() + 8
        assert torch.equal(result.x_adv[there(x)], x[there(x)])
    short = APGD(eps, loss=loss, norm=norm, targeted=True, steps=10, budget=8).run(model, x, targets)
    assert (short.forwards + short.backwards).max() <= 8

"""APGD: step by step what torchattacks does, in fewer passes, of each sample by itself, and as a capture."""

import warnings

import pytest
import torch
from torch import nn

import spat_kernels as sk
from spat_kernels import APGD, balls, losses
from spat_kernels.attacks import apgd
from spat_kernels.attacks.apgd import checkpoints
from spat_kernels.cuda_graphs.cache import Graphs
from spat_kernels.input_gradient.planned_gradient import PlannedGradient
from tests.cuda_graphs.fake_graph import FakeGraph, captured_and_eager
from tests.helpers import EPS, NORMS, Around, Recorder, assert_inside, attackable, batch, cnn, correct, moved, sharp

# --- against the judge ---


def same_start(monkeypatch, x, norm, eps):
    """Make torchattacks draw the noise that our attacks start with, the same for every image."""
    noise = torch.randn_like(x[:1]) if norm == "l2" else torch.rand_like(x[:1])
    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, lambda shape: noise.repeat(shape[0], 1, 1, 1))
    direction = noise if norm == "l2" else 2 * noise - 1
    direction = direction / direction.norm(p=2 if norm == "l2" else torch.inf)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin", "kl", losses.LabelSmoothedCE(0.2), lambda z, y: z.logsumexp(1)])
def test_result_is_inside_ball_and_box(norm, dtype, loss):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).to(dtype)
    x, y = torch.rand(7, 3, 4, 4).to(dtype), torch.randint(5, (7,))
    for eps in (0.0, EPS, torch.linspace(0, 0.1, 7)):
        x_adv = APGD(eps, loss=loss, norm=norm, steps=4, bounds=(0.0, 1.0))(model, x, y)
        assert_inside(x_adv, x, eps, norm)
        assert x_adv.stride() == x.stride()
        assert not x_adv.requires_grad


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


def test_half_precision_of_the_model():
    model, x, y = attackable(16)
    model, x = model.float(), x.float()
    for settings in ({}, {"norm": "l2", "loss": "dlr", "targets": 2}, {"eot": 2}):
        for way in ("plan", "autograd"):
            x_adv = APGD(0.02, steps=8, precision="half", input_gradient=way, **settings)(model, x, y)
            assert x_adv.dtype == torch.float32
            assert (x_adv != x).any()
            assert (model(x_adv).argmax(1) != y).any() or settings.get("norm")


def test_what_is_misclassified_comes_back_as_it_is():
    model, (x, y) = cnn(), batch(8)
    model.eval()
    right = model(x).argmax(1)
    y = torch.where(torch.arange(8) < 4, right, (right + 1) % 10)
    x_adv = APGD(0.5, steps=3)(model, x, y)
    assert torch.equal(x_adv[4:], x[4:])
    assert moved(x_adv, x)[:4].all()
    assert torch.equal(APGD(0.5, steps=3)(model, x[4:], y[4:]), x[4:]), "none is left to attack"
    assert (model(x_adv).argmax(1) != y).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("input_gradient", ["plan", "autograd"])
def test_samples_are_independent(monkeypatch, norm, targets, input_gradient):
    """Also of whether others drop out. fp64, since a convolution's rounding depends on the batch size."""
    model, x, y = attackable(15)
    y[::5] += 1
    y %= 10
    same_start(monkeypatch, x, norm, eps := 0.005 if norm == "linf" else 0.05)
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
    APGD(0.0, steps=5)(model, x, y)
    assert model.sizes == [6] * 7, "the clean images, the start, and 5 steps"
    model.inputs.clear()
    APGD(0.0, steps=5, restarts=2, loss="dlr", targets=3)(model, x, y)
    assert model.sizes == [6] * (1 + 2 * 3 * 6)
    model.inputs.clear()
    APGD(0.0, steps=5, eot=4)(model, x, y)
    assert model.sizes == [6] * (1 + 4 * 6)


class Brittle(nn.Module):
    """Class 0 until the first pixel is further than `threshold` above 0.5; linear otherwise. Samples have their own threshold."""

    def forward(self, x):
        gap = x[:, 0, 0, 0] - 0.5 - x[:, 0, 1, 1]
        return torch.stack((torch.zeros_like(gap), 10 * gap, gap - 50, gap - 60), 1)


def brittle(thresholds):
    x = torch.full((len(thresholds), 1, 2, 2), 0.5)
    x[:, 0, 1, 1] = torch.tensor(thresholds) + 0.1
    return x, torch.zeros(len(thresholds), dtype=torch.int64)


def test_what_is_broken_is_attacked_no_further():
    """eps = 0.1 breaks thresholds up to 0.1 (pixel [1, 1] falls by as much)."""
    x, y = brittle([0.05, 0.5, 0.08, 0.6])
    model = Recorder(Brittle())
    x_adv = APGD(0.1, steps=4, restarts=3)(model, x, y)
    assert model.sizes == [4] + [4] * 5 + [2] * 10
    assert (model(x_adv).argmax(1) != y).tolist() == [True, False, True, False]
    model = Recorder(Brittle())
    APGD(0.1, steps=4, loss="margin", targets=3)(model, *brittle([0.05, 0.06]))
    assert model.sizes == [2] + [2] * 5, "the likeliest wrong class was enough"


def test_inside_of_runs_too_where_samples_are_independent(monkeypatch):
    model, x, y = attackable(32)
    assert sk.explain(model, x).path == "plan"
    seen, forward = [], PlannedGradient._forward
    monkeypatch.setattr(PlannedGradient, "_forward", lambda self, x, keep: seen.append(len(x)) or forward(self, x, keep))
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


def test_the_attack_attacks():
    """As well as PGD with a step size tuned by hand; and better towards nine targets than away from the class."""
    model, x, y = attackable(50)
    for norm, eps in (("linf", 0.006), ("l2", 0.07)):
        robust = [
            int((model(x_adv).argmax(1) == y).sum())
            for x_adv in (
                sk.pgd(model, x, y, eps, norm=norm, steps=20),
                APGD(eps, norm=norm, steps=20)(model, x, y),
                APGD(eps, norm=norm, steps=20, loss="dlr")(model, x, y),
                APGD(eps, norm=norm, steps=10, loss="dlr", targets=9)(model, x, y),
            )
        ]
        assert robust[1] <= robust[0] + 2, robust
        assert 5 < robust[3] < min(robust[:2]), robust


class Noisy(Around):
    """Random numbers are added to its logits."""

    def forward(self, x):
        return self.net(x) + torch.randn(len(x), 10, dtype=x.dtype) / 4


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_gradients_are_averaged_with_their_lengths(loss):
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
        total = 0
        for part in z.split(10, dim=1):
            if loss == "ce":
                total = total + nn.functional.cross_entropy(part, y, reduction="none")
            else:
                top, own = part.sort(1, descending=True), part.gather(1, y[:, None])[:, 0]
                other = torch.where(top.indices[:, 0] == y, top.values[:, 1], top.values[:, 0])
                gap = other - own
                total = total + (gap / (top.values[:, 0] - top.values[:, 2] + 1e-12) if loss == "dlr" else gap.clamp(max=0))
        return total

    start, results = torch.Generator(), []
    for attacked, settings in ((model, {"loss": loss, "eot": 3}), (Together(), {"loss": mean})):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "argmax", lambda self, dim: y[: len(self)])  # all stay correct
            attack = APGD(EPS, steps=6, generator=start.manual_seed(1), norm="l2", **settings)
            results.append(attack(attacked, x, y))
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


def test_eot_needs_one_pass_where_nothing_is_random():
    model, (x, y) = cnn().double().eval(), batch(4)
    x, y = x.double(), model(x.double()).argmax(1)
    results = [
        APGD(EPS, steps=4, eot=eot, generator=torch.Generator().manual_seed(1), input_gradient=way)(model, x, y)
        for eot, way in ((1, "plan"), (5, "plan"), (5, "autograd"))
    ]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-12)


def test_eot_on_a_random_model():
    model, x = Noisy(sharp()), torch.rand(16, 3, 8, 8).double()
    y = model.net(x).argmax(1)
    x_adv = APGD(0.03, steps=10, eot=10)(model, x, y)
    assert (model.net(x_adv).argmax(1) != y).float().mean() > 0.3


def test_nan_gradients_are_counted_and_harmless():
    class Broken(nn.Module):
        def forward(self, x):
            z = x.flatten(1)[:, :3] * 5
            return z / (x[:, 0, 0, 0] <= 0.9)[:, None].to(x.dtype).sqrt()  # 5 x / 0 is inf, its gradient NaN

    x, y = torch.rand(5, 3, 4, 4) * 0.8, torch.tensor([0, 1, 2, 0, 1])
    y = (x.flatten(1)[:, :3]).argmax(1)
    x[1, 0, 0, 0] = 0.95
    y[1] = 0
    for norm in ("linf", "l2"):
        with pytest.warns(RuntimeWarning, match="NaN for 1 of 5 samples"):
            x_adv = APGD(0.02, norm=norm, steps=5)(Broken(), x, y)
        assert x_adv.isfinite().all()
        assert ((x_adv - x).flatten(1).abs().amax(1) <= 0.0201).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            APGD(0.02, norm=norm, steps=5)(Broken(), x[[0, 2]], y[[0, 2]])


# --- captures ---


@pytest.fixture
def graphs(monkeypatch) -> Graphs:
    graphs = Graphs(graph=FakeGraph)
    monkeypatch.setattr(apgd, "graphs", graphs)
    return graphs


SETTINGS = {
    "ce": {},
    "l2": {"norm": "l2"},
    "dlr": {"loss": "dlr"},
    "targeted": {"loss": "dlr", "targets": 3},
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


@pytest.mark.parametrize("settings", [{}, {"norm": "l2", "loss": "dlr", "targets": 4}], ids=str)
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
    variants = [{}, {"steps": 3}, {"rho": 0.5}, {"norm": "l2"}, {"loss": "dlr"}, {"targets": 1}, {"bounds": (-1.0, 1.0)}]
    for n, variant in enumerate(variants, 1):
        for eps in (0.0, 1e-9):
            APGD(eps, graph=True, **({"steps": 4} | variant))(model, x, y)
        assert len(graphs) == n, variant
    sk.PGD(1e-9, steps=4, graph=True, generator=None)  # of another class: its captures are others
    with torch.no_grad():
        model[-1].weight.mul_(-1)
    y = model(x).argmax(1)
    assert torch.equal(*captured_and_eager(APGD, 0.01, model, x, y, steps=4, input_gradient="autograd"))


def test_auto_captures_the_second_attack(graphs):
    model, (x, _) = cnn().eval(), batch(4)
    y = model(x).argmax(1)
    for n, captures in enumerate((0, 1, 1)):
        APGD(1e-9 * (1 + n), steps=3)(model, x, y)
        assert len(graphs) == captures


def test_long_runs_are_captured_only_with_graph_true(graphs):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(2, 3, 2, 2)
    y = model(x).argmax(1)
    for settings in ({"steps": 300}, {"steps": 9, "eot": 30}):
        for _ in range(2):
            APGD(0.0, graph="auto", **settings)(model, x, y)
    assert len(graphs) == 0
    APGD(0.0, graph=True, steps=9, eot=30)(model, x, y)
    assert len(graphs) == 1


# --- bad input ---


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(classes):
    model, (x, _) = cnn(classes=classes).eval(), batch(8)
    y = model(x).argmax(1)
    for settings, needed in (({}, 2), ({"targets": 1}, 2), ({"loss": "dlr"}, 3), ({"loss": "dlr", "targets": 1}, 4)):
        attack = APGD(0.02, steps=3, **settings)
        if classes < needed:
            with pytest.raises(ValueError, match=f"at least {needed} classes here, the model has {classes}"):
                attack(model, x, y)
        else:
            assert attack(model, x, y).shape == x.shape

"""PGD(stop=...): the images of the whole run, for fewer passes; budgets; and what each sample of an attack costs."""

from functools import partial

import pytest
import torch
from torch import nn

import spat_kernels
from spat_kernels import APGD, FAB, PGD, AutoAttack, Square, losses
from spat_kernels.attacks import early_stop, pgd_run, square
from spat_kernels.attacks.early_stop import EarlyStop
from spat_kernels.cuda_graphs.cache import Graphs
from spat_kernels.cuda_graphs.run import Batch
from spat_kernels.input_gradient.windows import Windows
from tests.cuda_graphs.fake_graph import FakeGraph
from tests.helpers import EPS, Recorder, attackable, batch, cnn, linear, photographs, robust

STEPS = 90


def wavy(classes: int = 5) -> nn.Module:
    """A network on which iterates run into cycles of several periods."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, stride=2), nn.GELU(), nn.Flatten())
    return nn.Sequential(net, nn.Linear(72, classes)).double()


def task(n: int = 48):
    """`wavy`, images, and the classes that it gives them, of which a third are replaced by others."""
    torch.manual_seed(5)
    model, x = wavy(), torch.rand(n, 3, 8, 8).double()
    y = model(x).argmax(1)
    y[::3] = (y[::3] + 1) % 5
    return model, x, y


def run(model, x, y, seed: int = 3, start=None, eps: float = 0.2, **settings):
    generator = torch.Generator().manual_seed(seed)
    return PGD(eps, **{"steps": STEPS, "step_size": 0.06, "generator": generator} | settings).run(model, x, y, start=start)


def iterates(model, x, y, start, steps: int, eps: float = 0.2, step_size: float = 0.06):
    """Plain PGD on cross-entropy: x_0, ..., x_T."""
    found, point = [start], start
    for _ in range(steps):
        leaf = point.detach().requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        point = (point + step_size * grad.sign()).clamp(x - eps, x + eps).clamp(0, 1)
        found.append(point)
    return found


# ---- the same images


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"steps": STEPS + 1}, {"steps": STEPS + 2}, {"steps": 1}, {"steps": 0}, {"random_start": False}, {"loss": "margin"},
        {"loss": "kl"}, {"loss": losses.LabelSmoothedCE(0.3)}, {"targeted": True}, {"loss": "dlr", "targeted": True},
        {"restarts": 3}, {"restarts": 2, "select": "loss"}, {"restarts": 2, "loss": "kl"}, {"step_size": None},
        {"step_size": torch.linspace(0, 0.3, 48)}, {"input_gradient": "autograd"}, {"bn_mode": "keep"},
    ],
    ids=str,
)  # fmt: skip
def test_cycles_change_nothing_but_the_cost(settings):
    model, x, y = task()
    whole, stopped = run(model, x, y, **settings), run(model, x, y, stop="cycle", **settings)
    assert torch.equal(stopped.x_adv, whole.x_adv)
    if settings.get("steps", STEPS) >= STEPS:
        assert stopped.backwards.double().mean() < 0.7 * whole.backwards.double().mean()
        assert len(stopped.backwards.unique()) > 1


def test_radii_of_their_own_and_layouts():
    model, x, y = task()
    eps = torch.linspace(0, 0.3, len(x))
    for images in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        found = [PGD(eps, steps=50, random_start=False, stop=stop)(model, images, y) for stop in (None, "cycle")]
        assert torch.equal(*found)
        assert found[1].stride() == found[0].stride()


@pytest.mark.parametrize("input_gradient", ["plan", "autograd"])
def test_cycles_on_a_robust_network(input_gradient):
    """In fp32; `wavy` is in fp64."""
    model, (x, y) = robust("madry"), photographs()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero()[:8, 0]
    x, y = x[right], y[right]
    how = {"steps": 160, "random_start": False, "input_gradient": input_gradient}
    whole, stopped = (PGD(EPS, stop=stop, **how).run(model, x, y) for stop in (None, "cycle"))
    assert torch.equal(whole.x_adv, stopped.x_adv)
    assert whole.forwards.tolist() == whole.backwards.tolist() == [160] * len(x)
    assert stopped.backwards.double().mean() < 120


def test_the_period_decides_which_iterate_comes_out(monkeypatch):
    """Checked against all iterates, with looks after every 5 steps, which no period divides."""
    for module in (early_stop, pgd_run):
        monkeypatch.setattr(module, "SEGMENT", 5)
    model, x, y = task()
    points = torch.stack(iterates(model, x, y, x, 60))
    cycles = set()
    for steps in range(40, 46):
        x_adv = run(model, x, y, steps=steps, random_start=False, stop="cycle").x_adv
        same = (points == x_adv).flatten(2).all(2)
        assert same[steps].all()
        for sample in same[:steps].T:
            back = sample.nonzero()
            cycles |= {steps - int(back[-1])} if len(back) else set()
    assert {1, 2} <= cycles, "a period of 1 alone would not show anything"


@pytest.mark.parametrize("targeted", [False, True])
def test_success_returns_the_first_misclassified_iterate(targeted):
    model, x, y = task()
    y = (y + 2) % 5 if targeted else y
    sign = -1.0 if targeted else 1.0
    points, point = [x], x
    for _ in range(STEPS):
        leaf = point.detach().requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum") * sign, leaf)
        point = (point + 0.01 * grad.sign()).clamp(x - 0.03, x + 0.03).clamp(0, 1)
        points.append(point)
    success = torch.stack([(model(p).argmax(1) == y) == targeted for p in points[:-1]])
    first = torch.where(success.any(0), success.int().argmax(0), STEPS)
    expected = torch.stack([points[t][i] for i, t in enumerate(first.tolist())])
    for stop in ("success", "exact"):
        found = run(model, x, y, eps=0.03, step_size=0.01, random_start=False, targeted=targeted, stop=stop)
        assert torch.equal(found.x_adv, expected)
        early = first < STEPS
        assert 3 < early.sum() < len(x) - 3
        compared = early_stop.COMPARISON // 2 * len(x) // early_stop.MULTIPLE
        assert (found.backwards[early] <= first[early] + 1 + early_stop.SEGMENT + compared).all(), "out by the end of its segment"


def test_success_in_l2():
    model, x, y = attackable(20)
    found = PGD(0.2, norm="l2", steps=30, random_start=False, stop="success").run(model, x, y)
    broken = model(found.x_adv).argmax(1) != y
    assert broken.sum() > 3
    assert found.backwards[broken].double().mean() < 20
    whole = PGD(0.2, norm="l2", steps=30, random_start=False)(model, x, y)
    assert torch.equal(found.x_adv[~broken], whole[~broken])


def test_a_start_outside_of_the_ball_is_no_success():
    model, x, y = task()
    start = 1 - x
    assert (model(start).argmax(1) != y).sum() > 5
    found = run(model, x, y, stop="exact", start=start)
    assert (found.x_adv - x).abs().max() <= 0.2 + 1e-12
    none = run(model, x, y, stop="exact", steps=0, start=start)
    assert torch.equal(none.x_adv, run(model, x, y, steps=0, start=start).x_adv)


def test_restarts_leave_out_what_is_broken():
    model, x, y = task()
    found = run(model, x, y, stop="exact", restarts=4)
    once = run(model, x, y, stop="exact")
    first = model(once.x_adv).argmax(1) != y
    broken = model(found.x_adv).argmax(1) != y
    assert (broken | ~first).all()
    assert (found.forwards[first] == once.forwards[first] + 1).all(), "and one to judge it"
    assert (found.forwards[~first] > once.forwards[~first] + 1).all()


# ---- batches


def test_a_smaller_batch_with_other_bits_is_not_taken(monkeypatch):
    model, x, y = task()
    whole = run(model, x, y).x_adv
    usual = run(model, x, y, stop="cycle")
    gradient = EarlyStop.gradient
    monkeypatch.setattr(EarlyStop, "gradient", lambda self, b, *args: gradient(self, b, *args) * (1 + 1e-15 * len(b.x)))
    sizes = []
    segment = early_stop._Climb._segment
    monkeypatch.setattr(early_stop._Climb, "_segment", lambda self, n: sizes.append(len(self.index)) or segment(self, n))
    refused = run(model, x, y, stop="cycle")
    assert set(sizes) == {len(x)}
    assert torch.equal(refused.x_adv, whole)
    assert torch.equal(usual.x_adv, whole)


@pytest.mark.parametrize("stop", ["success", "cycle"])
def test_a_smaller_batch_is_tried_where_it_pays(monkeypatch, stop):
    """Where the comparison costs at most half of what the smaller batch saves in the steps to come."""
    model, x, y = task()
    tried, bits = [], early_stop._Climb._has_equal_gradients
    monkeypatch.setattr(
        early_stop._Climb, "_has_equal_gradients",
        lambda self, rows: tried.append((len(self.live), len(rows), self.steps - self.done)) or bits(self, rows),
    )  # fmt: skip
    run(model, x, y, stop=stop, eps=0.03, step_size=0.01)
    assert tried
    for size, smaller, steps in tried:
        ahead = min(steps, early_stop.AHEAD if stop == "cycle" else steps)
        assert 2 * (size - smaller) * ahead >= 2 * (2 * 2 * size)
    if stop == "success":
        assert min(size - smaller for size, smaller, _ in tried) <= early_stop.MULTIPLE, "few samples less are worth it too"
    tried.clear()
    monkeypatch.setattr(early_stop, "_equal", lambda a, b: False)
    run(model, x, y, stop=stop, eps=0.03, step_size=0.01)
    assert all(later[1] <= early_stop.SHRINK * earlier[1] for earlier, later in zip(tried, tried[1:], strict=False))


def test_where_no_bits_are_kept_the_iterates_before_are_forgotten(monkeypatch):
    """As on GPUs. Here the bits are the same all the same, so the last iterates are."""
    model, x, y = task()
    whole = run(model, x, y, steps=200)
    monkeypatch.setattr(early_stop, "keeps_bits", lambda x: False)
    monkeypatch.setattr(early_stop, "_equal", lambda a, b: False)
    forgotten, shrink = [], early_stop._Climb._shrink
    monkeypatch.setattr(early_stop._Climb, "_shrink", lambda self: shrink(self) or forgotten.append(self.first))
    found = run(model, x, y, steps=200, stop="cycle")
    assert torch.equal(found.x_adv, whole.x_adv)
    assert found.backwards.sum() < 0.5 * whole.backwards.sum()
    assert forgotten
    assert max(forgotten) > 0


def test_batches_are_multiples_and_shrink(monkeypatch):
    model, x, y = task(60)
    recorder = Recorder(model)
    run(recorder, x, y, stop="cycle", input_gradient="autograd")
    sizes = sorted(set(recorder.sizes))
    assert sizes[-1] == 60
    assert len(sizes) > 1
    assert all(n % early_stop.MULTIPLE == 0 for n in sizes[:-1])


def test_in_graphs(monkeypatch):
    model, x, y = task()
    expected = [run(model, x, y, seed=seed, stop="exact", graph=False) for seed in (1, 2)]
    graphs = Graphs(graph=FakeGraph)
    monkeypatch.setattr(early_stop, "graphs", graphs)
    for _ in range(2):  # captured on the way, replayed
        for seed in (1, 2):
            found = run(model, x, y, seed=seed, stop="exact")
            assert torch.equal(found.x_adv, expected[seed - 1].x_adv)
            assert torch.equal(found.forwards, expected[seed - 1].forwards)
            assert torch.equal(found.backwards, expected[seed - 1].backwards)
    assert 0 < len(graphs) <= 8


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "cycle", "norm": "l2"}, "stop='cycle' looks for cycles.*norm='l2'.*use stop='success'"),
        ({"stop": "exact", "norm": "l2"}, "stop='exact'"),
        ({"stop": "exact", "bn_mode": "train"}, "bn_mode='train'.*use bn_mode='eval'"),
        ({"stop": "exact", "loss": lambda z, y: z.sum(1)}, "stop='exact' needs a loss"),
        ({"stop": "never"}, "stop='never': choose one of None, 'success', 'cycle', 'exact'"),
        ({"budget": 0}, "budget=0 must be at least 1"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PGD(0.1, **settings)


class Coupled(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.net = how, cnn().eval()

    def forward(self, x):
        if self.how == "noise":
            return self.net(x + 0.01 * torch.rand_like(x))
        return self.net(x - 0.1 * x.mean(0))


def test_models_whose_samples_depend_on_each_other_or_on_chance_are_refused():
    x, y = batch(8)
    noisy = nn.Sequential(cnn(), nn.Dropout(0.2))
    models = {"noise": Coupled("noise").eval(), "mean": Coupled("mean").eval(), "dropout": noisy.train(), "bn": cnn().train()}
    models["callable"] = Coupled("mean").eval().forward
    for name, model in models.items():
        how = {"bn_mode": "keep"} if name in ("dropout", "bn") else {}
        with pytest.raises(ValueError, match="changes with the others of its batch, or from call to call"):
            PGD(0.1, stop="cycle", **how)(model, x, y)
    assert PGD(0.1, stop="cycle")(cnn().train(), x, y).shape == x.shape, "in eval mode batch norm couples nothing"


def test_labels_are_needed_and_launch_refuses():
    model, x, y = task()
    with pytest.raises(TypeError, match="stop needs labels"):
        PGD(0.1, loss="kl", stop="exact")(model, x, None)
    assert PGD(0.1, loss="kl", stop="cycle")(model, x, None).shape == x.shape
    for settings in ({"stop": "cycle"}, {"budget": 9}):
        with pytest.raises(ValueError, match="launch"):
            PGD(0.1, **settings).launch(model, x, y)


# ---- costs and budgets

KINDS = {
    "pgd": partial(PGD, steps=6, restarts=2),
    "pgd-kl": partial(PGD, steps=5, loss="kl"),
    "pgd-exact": partial(PGD, steps=60, stop="exact", restarts=2),
    "apgd": partial(APGD, steps=9, restarts=2),
    "apgd-eot": partial(APGD, steps=4, eot=3),
    "apgd-t-l2": partial(APGD, steps=4, norm="l2", loss="dlr", targets=2),
    "fab-t": partial(FAB, steps=3, targets=3, restarts=2),
    "fab": partial(FAB, steps=2, targets=None),
    "square": partial(Square, queries=30, restarts=2),
    "square-l2": partial(Square, queries=20, norm="l2"),
    "autoattack": partial(AutoAttack, steps=4, queries=20),
    "autoattack-fast": partial(AutoAttack, steps=4, queries=20, version="fast"),
}


@pytest.mark.parametrize("name", KINDS)
def test_passes_are_those_that_the_model_saw(name):
    model, x, y = attackable(24)
    recorder, backwards = Recorder(model), []
    handle = recorder.register_full_backward_hook(lambda *_: backwards.append(recorder.sizes[-1]))
    attack = KINDS[name](0.003 if "l2" not in name else 0.05, input_gradient="autograd")
    found = attack.run(recorder, x, y)
    handle.remove()
    assert found.forwards.dtype == found.backwards.dtype == torch.int64
    # AutoAttack asks a few images for signs of masked gradients; an early stop fills up its batches and carries on what has left
    if not name.startswith("autoattack") and name != "pgd-exact":
        assert int(found.forwards.sum()) == sum(recorder.sizes)
    if name.startswith("autoattack"):
        assert sum(recorder.sizes) - 5 * len(x) <= int(found.forwards.sum()) <= sum(recorder.sizes)
    planned = KINDS[name](0.003 if "l2" not in name else 0.05, input_gradient="plan").run(model, x, y)
    if name in ("pgd", "pgd-kl"):
        expected = {"pgd": (14, 12), "pgd-kl": (6, 5)}[name]
        assert [f.unique().tolist() for f in planned[1:]] == [[n] for n in expected]
        assert torch.equal(planned.forwards, found.forwards)
    assert (planned.forwards > 0).all()


@pytest.mark.parametrize("budget", [1, 2, 3, 8, 21, 50, 10_000])
@pytest.mark.parametrize("name", KINDS)
def test_no_sample_costs_more_than_the_budget(name, budget):
    model, x, y = attackable(12)
    eps = 0.05 if "l2" in name else 0.003
    torch.manual_seed(0)
    found = KINDS[name](eps, budget=budget).run(model, x, y)
    cost = found.forwards + found.backwards
    assert cost.max() <= budget
    torch.manual_seed(0)
    whole = KINDS[name](eps).run(model, x, y)
    needed = whole.forwards + whole.backwards
    if budget == 10_000:
        assert torch.equal(found.x_adv, whole.x_adv)
        own = int(name == "autoattack-fast")  # under a budget MALT takes a forward of its own
        assert (needed <= cost).all()
        assert (cost <= needed + own).all()
    elif name in ("pgd", "pgd-kl", "apgd", "square"):
        assert cost.max() >= min(budget, int(needed.max())) - (3 if name == "pgd" else 2)


def test_a_budget_ends_pgd_at_the_iterate_that_it_suffices_for():
    model, x, y = task()
    points = iterates(model, x, y, x, 12)
    for budget in range(1, 25):
        assert torch.equal(run(model, x, y, steps=12, random_start=False, budget=budget).x_adv, points[budget // 2])


def test_a_start_outside_of_the_ball_is_projected_where_the_budget_does_not_suffice_for_a_step():
    model, x, y = task()
    for budget in (1, 2, 3):
        found = run(model, x, y, eps=0.01, loss="kl", budget=budget, start=1 - x)
        assert (found.x_adv - x).abs().max() <= 0.01 + 1e-12
        assert (found.forwards + found.backwards).max() <= budget


def test_a_budget_for_each_sample():
    model, x, y = task()
    budget = torch.arange(1, 49)
    found = run(model, x, y, random_start=False, steps=12, budget=budget)
    points = iterates(model, x, y, x, 12)
    steps = (budget // 2).clamp(max=12)
    assert torch.equal(found.x_adv, torch.stack([points[t][i] for i, t in enumerate(steps.tolist())]))
    assert torch.equal(found.forwards + found.backwards, 2 * steps)
    for kind in (partial(APGD, steps=9), partial(FAB, steps=3, targets=3), partial(Square, queries=30), AutoAttack):
        found = kind(0.003, budget=budget).run(*attackable(48))
        assert (found.forwards + found.backwards <= budget).all()
    with pytest.raises(ValueError, match="budget for each sample with bn_mode='train'"):
        PGD(0.1, bn_mode="train", budget=budget)
    with pytest.raises(ValueError, match="budget has shape"):
        run(model, x[:3], y[:3], budget=budget)
    with pytest.raises(TypeError, match="budget must be an int, or int64"):
        PGD(0.1, budget=[3, 4])


def test_budgets_that_suffice_split_no_batch(monkeypatch):
    sizes = []
    attack = early_stop.graphs.attack
    monkeypatch.setattr(early_stop.graphs, "attack", lambda s, m, batch, h: sizes.append(len(batch.x)) or attack(s, m, batch, h))
    model, x, y = task()
    run(model, x, y, budget=torch.arange(1000, 1048), steps=8, restarts=3)
    APGD(0.003, steps=4, restarts=2, budget=torch.arange(1000, 1048)).run(model, x, y)
    assert set(sizes[:6]) == {48}
    assert len(sizes) == 6 + 2


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_square_keeps_to_its_budget_where_looking_waits(norm, monkeypatch):
    monkeypatch.setattr(square._Run, "waits", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr(Windows, "supports", lambda gradient: False)
    model, x, y = attackable(6)
    found = Square({"linf": 0.003, "l2": 0.05, "l1": 0.2}[norm], norm=norm, queries=60, budget=10).run(model, x, y)
    assert found.forwards.max() == 10


def test_an_early_stop_says_what_is_wrong_as_well_as_other_attacks():
    x, y = batch(4)
    for how in ({}, {"stop": "cycle", "input_gradient": "autograd"}):
        with pytest.raises(ValueError, match="lazy layers"):
            PGD(0.1, **how)(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), x, y)
        with pytest.raises(ValueError, match="needs at least 3 classes"):
            PGD(0.1, loss="dlr", **how)(linear(192, 2), x, y.clamp(max=1))


def test_passes_in_graphs():
    model, x, y = task()
    graphs, spat_kernels.cuda_graphs.cache.graphs._graph = spat_kernels.graphs, FakeGraph
    try:
        for settings in ({"steps": 5}, {"steps": 3, "restarts": 3}, {"steps": 4, "loss": "kl"}):
            for _ in range(3):
                found = PGD(0.1, **settings).run(model, x, y)
                once = settings["steps"] + (settings.get("loss") == "kl")
                runs = settings.get("restarts", 1)
                assert found.forwards.unique().tolist() == [once * runs + runs * (runs > 1)]
                assert found.backwards.unique().tolist() == [settings["steps"] * runs]
        for _ in range(3):
            found = APGD(1e-6, steps=6).run(model, x, model(x).argmax(1))
            assert found.forwards.unique().tolist() == [8]
            assert found.backwards.unique().tolist() == [6]
    finally:
        graphs._graph = type(graphs)()._graph
        graphs.free()


def test_linear_models_end_where_the_box_does():
    """A constant gradient: a period of 1, as soon as all pixels are at the side of the ball."""
    model, (x, y) = linear(pixels=192).double(), batch(16)
    found = PGD(0.1, steps=1000, stop="cycle").run(model, x.double(), y)
    assert found.backwards.max() <= 20


def test_the_gradient_at_an_iterate_is_that_of_a_step():
    """With batch statistics it is of the sum of the losses, so that the lengths of the samples' gradients count."""
    model, (x, y) = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 10)).double(), batch(6)
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    attack = EarlyStop(PGD(EPS, bn_mode="train"), model, Batch(leaf.detach(), y, EPS, EPS), 9)
    torch.testing.assert_close(attack.gradient(attack.batch, leaf.detach(), torch.arange(6)), expected)

"""Square Attack: query by query what torchattacks does with the same random numbers, with fewer forwards; inside ball and box."""

import math

import pytest
import torch
from torch import nn

from spat_kernels.attacks import square
from spat_kernels.attacks._common import Tally
from spat_kernels.attacks.square import Square
from spat_kernels.input_gradient.choose import input_gradient
from spat_kernels.input_gradient.windows import Windows
from spat_kernels.rng import rng_lock
from tests.helpers import NORMS, Recorder, assert_inside, attackable, correct, moved, nearest_in_l1

EPS = 0.125  # to be added exactly


def seeded(eps, seed=0, **settings):
    return Square(eps, generator=torch.Generator().manual_seed(seed), **settings)


def finished_run(settings, model, x, y):
    """A run by itself, without the images dropping out of it."""
    with torch.no_grad():
        run = square.RUNS[settings.norm](
            settings, input_gradient(model, x, "autograd"), x, y, torch.full((len(x),), settings.eps, dtype=x.dtype),
            torch.arange(len(x)), Tally(x),
        )  # fmt: skip
        run(x.clone(), torch.ones(len(x), dtype=torch.bool))
    return run


# --- against the judge ---


@pytest.fixture
def drawn(monkeypatch):
    """What Square draws, call by call."""
    calls, draw = [], square.draw
    monkeypatch.setattr(square, "draw", lambda *args, **kwargs: calls.append(draw(*args, **kwargs)) or calls[-1])
    return calls


def judge(model, x, y, norm, eps, queries, numbers, monkeypatch):
    """torchattacks' Square in fp64, which draws `numbers` one after the other: (queries of each sample, images)."""
    torchattacks = pytest.importorskip("torchattacks")
    attack = torchattacks.Square(model, norm=NORMS[norm], eps=eps, n_queries=queries)
    attack.init_hyperparam(x)
    numbers = iter(numbers)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda shape: next(numbers).reshape(shape))
        torch.set_default_dtype(torch.float64)
        try:
            return attack.attack_single_run(x, y)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", ["autograd", "plan"])
def test_linf_equals_torchattacks(task, how, drawn, monkeypatch):
    model, *images = task
    x, y = correct(model, *images, 120)
    ours = seeded(EPS, queries=200, input_gradient=how)(model, x, y)
    stripes, places, signs = drawn
    numbers = [stripes]
    for place, sign in zip(places, signs, strict=True):
        numbers += [place[0], place[1], sign]
    queries, theirs = judge(model, x, y, "linf", EPS, 200, numbers, monkeypatch)
    broken = model(theirs).argmax(1) != y
    assert 12 < broken.sum() < 108
    assert queries.max() == 201
    assert torch.equal(moved(ours, x), broken)
    assert torch.equal(ours[broken], theirs[broken])


def test_l2_equals_torchattacks(task, drawn, monkeypatch):
    """With an eps that breaks nobody: torchattacks draws signs for those that are left only."""
    model, *images = task
    x, y = correct(model, *images, 40)
    x, model = nn.functional.pad(x, (1, 1, 1, 1)), nn.Sequential(nn.ZeroPad2d(-1), model)  # 5 bumps of 2 pixels fill 10
    settings = seeded(0.1, norm="l2", queries=120)
    run = finished_run(settings, model, x, y)
    assert len(run.index) == 40, "nobody is broken"
    turns, stripes, *blocks = drawn
    numbers = [n for i in range(len(turns)) for j in range(turns.shape[1]) for n in (turns[i, j], stripes[i, j])]
    for places, signs in zip(blocks[::2], blocks[1::2], strict=True):
        for place, sign in zip(places, signs, strict=True):
            numbers += [*place, sign]
    _, theirs = judge(model, x, y, "l2", 0.1, 120, numbers, monkeypatch)
    assert ((run.best - theirs).abs() <= 1e-9).flatten(1).all(1).double().mean() >= 0.95
    assert moved(theirs, x).all()


# --- query by query ---


def bump(side):
    """Two halves of opposite sign, each 1 + 1/16 + 1/81 + ... at its middle, of L1 norm 1."""

    def hill(height, width):
        found = torch.zeros(height, width).double()
        for row in range(height):
            for column in range(width):
                nearest = max(abs(row - height // 2), abs(column - width // 2))
                found[row, column] = sum(1 / i**4 for i in range(nearest + 1, max(height // 2, width // 2) + 2))
        return found / found.sum()

    return torch.cat((hill(side // 2, side), -hill(side - side // 2, side))) / 2


def eager_l1(model, x, y, eps, queries, numbers):
    """The attack as it is in the authors' code, on images of 10x10: (margins after each query, images)."""
    turns, signs, *blocks = numbers
    (b, c), n, radius = x.shape[:2], x[0].numel(), torch.full((1, 1), eps).double()

    def placed(delta):
        return nearest_in_l1((x + delta).view(b, n), x.view(b, n), radius).view_as(x)

    def margin(images):
        z = model(images)
        return (z.gather(1, y[:, None]) - z.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]

    def total(v, dims=(2, 3)):
        return v.abs().sum(dims, keepdim=True)

    def signed(numbers):
        return torch.where(numbers < 0.5, -1.0, 1.0)

    delta = torch.zeros_like(x)
    for i in range(5):
        for j in range(5):
            shape = bump(2) if turns[i, j] < 0.5 else bump(2).T
            delta[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = shape * signed(signs[i, j])
    best = placed(delta)
    least, margins = margin(best), []
    places, signs = (torch.cat(part) for part in (blocks[::2], blocks[1::2]))
    for i in range(queries):
        p = 0.8 / [d for first, d in square.SCHEDULE if int(i / queries * 10_000) >= first][-1]
        side = max(round(math.sqrt(p * 100)), 3)
        side = min(side + (side % 2 == 0), 9)
        top, left, top_2, left_2 = (int(u * (10 - side)) for u in places[i, :4].tolist())
        gains = ..., slice(top, top + side), slice(left, left + side)
        loses = ..., slice(top_2, top_2 + side), slice(left_2, left_2 + side)
        delta, both = best - x, torch.zeros_like(x)
        both[gains] = both[loses] = 1
        new = (bump(side) if places[i, 4] < 0.5 else bump(side).T) * signed(signs[i])
        new = new + delta[gains] / (total(delta[gains]) + 1e-12)
        unused = (eps - total(delta, (1, 2, 3))).clamp_min(0)
        new = new / (total(new) + 1e-12) * (unused / c + total(delta * both)) * c
        delta[loses] = 0
        delta[gains] = new
        images = placed(delta)
        value = margin(images)
        better = value < least
        best, least = torch.where(better.view(-1, 1, 1, 1), images, best), torch.where(better, value, least)
        margins.append(least)
    return torch.stack(margins), best


def eager_linf(model, x, y, eps, queries, numbers, p_init=0.8):
    """The attack as it is written in the paper: every query of every image is asked."""
    stripes, places, signs = numbers
    sign = torch.where(stripes < 0.5, -1.0, 1.0)
    best = (x + eps * sign).clamp(0, 1)
    margins, asked = [], torch.zeros(len(x), dtype=torch.int64)

    def margin(images):
        z = model(images)
        own = z.gather(1, y[:, None])
        return (own - z.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]

    least = margin(best)
    height, width = x.shape[2:]
    for i in range(queries):
        left = least >= 0
        p = p_init / [d for first, d in square.SCHEDULE if int(i / queries * 10_000) >= first][-1]
        side = min(max(round(math.sqrt(p * height * width)), 1), height, width)
        top, start = (int(u * (n - side)) for u, n in zip(places[i].tolist(), (height, width), strict=True))
        at = ..., slice(top, top + side), slice(start, start + side)
        new = best.clone()
        new[at] += 2 * eps * torch.where(signs[i] < 0.5, -1.0, 1.0)
        new = new.clamp(x - eps, x + eps).clamp(0, 1)
        asked += left & (new != best).flatten(1).any(1)
        value = margin(new)
        better = left & (value < least)
        best[better], least = new[better], torch.where(better, value, least)
        margins.append(least.clone())
    return best, torch.stack(margins), asked


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (17, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_linf_is_the_eager_loop_without_the_queries_that_change_nothing(channels, size, drawn):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.Softplus(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.LazyLinear(5)
    ).double()  # fmt: skip
    x = torch.rand(24, channels, *size).double().mul(64).round().div(64)
    model(x)
    with torch.no_grad():
        model[-1].bias -= model(x).mean(0)
        model[-1].weight *= 20
        model[-1].bias *= 20
        y = model(x).argmax(1)
        results = {}
        for how, network in (("autograd", Recorder(model)), ("plan", model)):
            drawn.clear()
            results[how] = seeded(EPS / 8, queries=150, input_gradient=how)(network, x, y)
            if how == "autograd":
                expected, margins, asked = eager_linf(model, x, y, EPS / 8, 150, drawn)
                assert sum(network.sizes) == 24 + 24 + asked.sum(), "the clean images, where they start, and what was asked"
    broken = margins[-1] < 0
    assert 3 < broken.sum() < 24
    assert (margins[1:] <= margins[:-1]).all()
    for result in results.values():
        assert torch.equal(result, torch.where(broken.view(-1, 1, 1, 1), expected, x))


def test_squares_shrink_as_published():
    """AutoAttack's schedule for 5,000 queries of 32x32 images."""
    run = square._LinfRun.__new__(square._LinfRun)
    run.settings, run.batch = Square(0.1), (1, 3, 32, 32)
    sides = [run._side(i) for i in range(5000)]
    firsts = [0] + [i for i in range(1, 5000) if sides[i] != sides[i - 1]]
    assert [(i, sides[i]) for i in firsts] == [
        (0, 29), (6, 20), (26, 14), (101, 10), (251, 7), (501, 5), (1001, 4), (2001, 3), (3001, 2), (4001, 1)
    ]  # fmt: skip
    for kind in (square._L2Run, square._L1Run):
        run = kind.__new__(kind)
        run.settings, run.batch = Square(0.1), (1, 3, 32, 32)
        assert sorted({run._side(i) for i in range(5000)}) == [3, 5, 7, 11, 15, 21, 29]


def test_l1_is_the_eager_loop(drawn):
    model, x, y = attackable(30, size=10)
    run = finished_run(seeded(0.05, norm="l1", queries=120), model, x, y)
    left = run.index.tolist()
    assert len(left) > 20
    with torch.no_grad():
        margins, best = eager_l1(model, x, y, 0.05, 120, drawn)
    assert (margins[-1] < 0).sum() == 30 - len(left)
    assert (margins[-1] < margins[0]).sum() > 20
    torch.testing.assert_close(run.margin, margins[-1][left], rtol=0, atol=1e-9)
    torch.testing.assert_close(run.best, best[left], rtol=0, atol=1e-9)
    assert_inside(run.best, x[left], 0.05, "l1")


# --- true to its settings ---


@pytest.mark.parametrize("norm, eps", [("linf", 0.006), ("l2", 0.1), ("l1", 0.6)])
def test_samples_are_independent(norm, eps):
    """All see the same squares. What is drawn for one alone is drawn for the first of a batch."""
    model, x, y = attackable(12)
    together = seeded(eps, norm=norm, queries=80)(model, x, y)
    broken = moved(together, x)
    assert 0 < broken.sum() < 12
    others = torch.cat((x[:6], torch.rand_like(x[6:])))
    labels = torch.cat((y[:6], (model(others[6:]).argmax(1) + 1) % 10))
    assert torch.equal(seeded(eps, norm=norm, queries=80)(model, others, labels)[:6], together[:6])


def test_parts_and_chunks_change_nothing(monkeypatch):
    model, x, y = attackable(16)
    expected = seeded(0.003, queries=80)(model, x, y)
    assert 0 < moved(expected, x).sum() < 16
    monkeypatch.setattr(square, "PART", 7)
    monkeypatch.setattr(square, "CHUNK", 3)
    assert torch.equal(seeded(0.003, queries=80)(model, x, y), expected)
    monkeypatch.setattr(square, "PART_BYTES", 1)
    assert torch.equal(seeded(0.003, queries=80)(model, x, y), expected)
    monkeypatch.setattr(Windows, "supports", lambda gradient: False)
    assert torch.equal(seeded(0.003, queries=80)(model, x, y), expected)


@pytest.mark.parametrize("norm, eps", [("linf", 0.004), ("l2", 0.06), ("l1", 0.4)])
def test_where_looking_waits_samples_drop_out_between_blocks(norm, eps, monkeypatch):
    """As on a GPU: broken samples stay for a while, and nothing is skipped."""
    model, x, y = attackable(24)
    expected = seeded(eps, norm=norm, queries=120, input_gradient="autograd")(model, x, y)

    class Waits(square.RUNS[norm]):
        waits = property(lambda run: True, lambda run, value: None)

    monkeypatch.setitem(square.RUNS, norm, Waits)
    network = Recorder(model)
    got = seeded(eps, norm=norm, queries=120, input_gradient="autograd")(network, x, y)
    sizes = network.sizes
    changes = {i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]}
    assert len(sizes) == 2 + 120
    assert changes <= {2, 52, 102}, "it looks before queries 0, 50 and 100"
    assert sizes[-1] < sizes[2]
    broken = [moved(v, x) for v in (expected, got)]
    assert torch.equal(*broken)
    assert 0 < broken[0].sum() < 24
    assert (model(got).argmax(1) != y)[broken[0]].all()


def test_costs_and_edges():
    model, x, y = attackable(6)
    network = Recorder(model)
    assert torch.equal(seeded(0.1)(network, x, (y + 1) % 10), x)
    assert sum(network.sizes) <= 6 + 4, "all misclassified: one forward, and those that make a plan"
    for norm, reach in (("linf", 0.2), ("l2", 0.2), ("l1", 2.0)):
        assert torch.equal(seeded(0.0, norm=norm, queries=9)(model, x, y), x), "eps=0"
        one = seeded(reach, norm=norm, queries=50)(model, x[:1], y[:1])
        assert (model(one).argmax(1) != y[:1]).all()
        network.inputs.clear()
        start = seeded(0.2, norm=norm, queries=0, input_gradient="autograd")(network, x, y)
        assert sum(network.sizes) == 12
        assert start.shape == x.shape
        network.inputs.clear()
        hopeless = seeded(1e-9, norm=norm, queries=11, input_gradient="autograd")(network, x, y)
        assert torch.equal(hopeless, x)
        assert len(network.inputs) <= 2 + 11
        if norm != "linf":
            assert sum(network.sizes) == 6 * (2 + 11)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_two_classes_and_images_of_any_size(norm):
    for size in [(5, 5), (6, 6), (9, 9), (14, 13), (5, 31), (40, 7)] + [(1, 1), (2, 3), (1, 12)] * (norm == "linf"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(2 * math.prod(size), 2)).double()
        x = torch.rand(3, 2, *size).double() * 0.5 + 0.25
        y = model(x).argmax(1)
        for p_init in (0.8, 1.0, 1e-4):
            x_adv = seeded(0.25, norm=norm, queries=30, p_init=p_init)(model, x, y)
            assert x_adv.shape == x.shape
            assert x_adv.isfinite().all()


# --- bad input ---


def test_draws_no_random_numbers_while_others_capture(monkeypatch):
    """torch forbids it. What draws holds the lock that a capture holds."""
    model, x, y = attackable(4)
    held, uniform_ = [], torch.Tensor.uniform_
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda t, **how: held.append(rng_lock._is_owned()) or uniform_(t, **how))
    Square(0.01, queries=3)(model, x, y)
    assert held
    assert all(held)

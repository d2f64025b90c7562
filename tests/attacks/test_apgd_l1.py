"""APGD in L1: iterate by iterate what the paper and its authors' code describe, in larger balls first, sparser and sparser."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spat_kernels import APGD, balls
from spat_kernels.attacks.apgd_l1 import checkpoints, larger_first
from tests.helpers import Recorder, assert_inside, attackable, nearest_in_l1

EPS, STEPS, IMAGES = 0.35, 60, 12


class Seen(nn.Module):
    """Keeps what it was given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inputs = model, []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return self.model(x)


def loop(model, x, y, start, eps, steps, adapt):
    """One search on one image, fp64 [n]: (iterates, best iterate, misclassified iterates)."""
    shape, n = (1, 3, 8, 8), len(x)

    def look(point):
        point = point.clone().requires_grad_()
        logits = model(point.view(shape))
        value = F.cross_entropy(logits, y)
        return float(value.detach()), torch.autograd.grad(value, point)[0], bool(logits.argmax(1) != y)

    point, iterates, broken = start, [start], []

    def count(point):
        """Counts the elements that have moved. The bisection leaves rounding errors in the others."""
        return int(((point - x).abs() > 1e-11).sum())

    value, grad, wrong = look(point)
    best, best_value, best_grad = point, value, grad
    broken += [(value, point)] * wrong
    step, sparsity, before = eps, Fraction(1, 5), n
    if adapt:
        before = count(point)
        sparsity = Fraction(2 * before, 3 * n)
    for t in range(1, steps + 1):
        place = min(math.floor((1 - sparsity) * n), n - 1)
        sparse = torch.where(grad.abs() >= grad.abs().sort().values[place], grad.sign(), 0.0)
        moved = point + step * sparse / sparse.abs().sum()
        point = nearest_in_l1(moved[None], x[None], eps)[0]
        iterates.append(point)
        value, grad, wrong = look(point)
        broken += [(value, point)] * wrong
        if value > best_value:
            best, best_value, best_grad = point, value, grad
        if t % max(int(0.04 * steps), 1) == 0:
            now = count(best)
            sparsity = Fraction(2 * now, 3 * n)
            if now / before < 0.95:
                step, point, grad = eps, best, best_grad
            else:
                step = max(step / 1.5, eps / 10)
            before = now
    return iterates, best, broken


def expected_run(model, x, y, noise, eps, multi_eps):
    """On one image: every iterate, the best of the last search, and whether one of that was misclassified."""
    thirds = math.ceil(0.3 * STEPS)
    stages = [(3, thirds), (2, thirds), (1, STEPS - 2 * thirds)] if multi_eps else [(1, STEPS)]
    best, found = nearest_in_l1((x + noise)[None], x[None], stages[0][0] * eps)[0], []
    for times, steps in stages:
        start = nearest_in_l1(best[None], x[None], times * eps)[0]
        iterates, best, broken = loop(model, x, y, start, times * eps, steps, adapt=multi_eps)
        found += iterates
    return torch.stack(found), best, bool(broken)


@pytest.mark.parametrize("multi_eps", [False, True])
def test_equals_a_plain_loop(multi_eps):
    model, x, y = attackable(IMAGES)
    seen, draws = Seen(model), balls.L1Ball(x, EPS, EPS, (0.0, 1.0)).draw(torch.Generator().manual_seed(3), IMAGES)
    generator = torch.Generator().manual_seed(3)
    attack = APGD(EPS, norm="l1", steps=STEPS, multi_eps=multi_eps, input_gradient="autograd", generator=generator)
    x_adv = attack(seen, x, y).flatten(1)
    iterates = torch.stack([v for v in seen.inputs if len(v) == IMAGES][-STEPS - (3 if multi_eps else 1) :]).flatten(2)
    still = model(x_adv.view_as(x)).argmax(1) == y
    assert 3 < still.sum() < IMAGES - 1
    for i in range(IMAGES):
        theirs, best, broken = expected_run(model, x[i].flatten(), y[i : i + 1], draws[0][i].flatten(), EPS, multi_eps)
        assert broken == (not still[i])
        if not broken:
            torch.testing.assert_close(iterates[:, i], theirs, rtol=0, atol=1e-9)
            torch.testing.assert_close(x_adv[i], best, rtol=0, atol=1e-9)


def test_published_schedule():
    assert larger_first(100) == [(3, 30), (2, 30), (1, 40)]
    assert list(checkpoints(100)) == list(range(4, 100, 4))
    assert list(checkpoints(40)) == list(range(1, 40))
    assert list(checkpoints(1)) == []
    for steps in range(1, 60):
        searches = larger_first(steps)
        assert sum(each for _, each in searches) == steps
        assert searches[-1][0] == 1
        assert min(each for _, each in searches) >= 1


def test_costs_what_it_says():
    model, x, y = attackable(4)
    for settings, forwards in [({}, 10 + 3), ({"multi_eps": False}, 10 + 1), ({"steps": 2}, 2 + 1), ({"eot": 3}, 3 * (10 + 3))]:
        seen = Recorder(model)
        attack = APGD(1e-9, norm="l1", input_gradient="autograd", **({"steps": 10} | settings))
        attack(seen, x, y)
        assert seen.sizes == [4] * (1 + forwards)
        assert attack.passes == forwards or settings == {"steps": 2}, "at most"


def test_what_breaks_in_a_larger_ball_alone_is_not_broken():
    model, x, y = attackable(24)
    for multi_eps in (True, False):
        x_adv = APGD(0.1, norm="l1", steps=30, multi_eps=multi_eps)(model, x, y)
        assert_inside(x_adv, x, 0.1, "l1", atol=1e-9)
        assert (model(x_adv).argmax(1) == y).sum() > 8
    assert (model(APGD(0.3, norm="l1", steps=30)(model, x, y)).argmax(1) == y).sum() < 24


def test_perturbations_are_sparse():
    model, x, y = attackable(8)
    changed = (APGD(0.3, norm="l1", steps=50)(model, x, y) != x).flatten(1).sum(1)
    assert 0 < changed.max() < 60, "of 192"

"""Plans and the life of a model: one trace for each structure and image size, and no model kept alive."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels as sk
from spat_kernels.input_gradient import plan_cache, trace
from spat_kernels.input_gradient.autograd import InputGradient
from spat_train.models.registry import create
from tests.input_gradient.models import EPS, assert_equals_autograd, images, logits_and_gradient, planned, randomized


@pytest.fixture
def traces(monkeypatch):
    """Counts the traces that are made."""
    made = []

    def counted(model, x):
        made.append(model)
        return trace.trace(model, x)

    monkeypatch.setattr(plan_cache, "trace", counted)
    yield made
    made.clear()


def test_training_needs_no_new_trace(traces):
    torch.manual_seed(0)
    model, x, y = create("wrn-10-1"), images(4, dtype=torch.float32), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        x_adv = sk.pgd(model, x, y, EPS, steps=2, input_gradient="plan")
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x_adv), y).backward()
        optimizer.step()
    assert len(traces) == 1
    model.eval()
    ours, theirs = logits_and_gradient(planned(model, x), x), logits_and_gradient(InputGradient(model), x)
    assert (ours[0] - theirs[0]).norm() < 1e-4 * theirs[0].norm()
    assert len(traces) == 1


def test_a_changed_model_is_traced_again(traces):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = create("wrn-10-1"), 1.0

        def forward(self, x):
            return self.net(x) * self.scale

    model, x = Scaled().double().eval(), images()
    assert_equals_autograd(model, x)
    model.scale = -3.0
    assert_equals_autograd(model, x)
    model.net.fc = nn.Linear(64, 5).double()
    assert_equals_autograd(model, x)
    model.net.relu = nn.SiLU()
    assert_equals_autograd(model, x)
    assert len(traces) == 4
    assert_equals_autograd(model, x)
    assert len(traces) == 4


def test_untied_weights_are_noticed(traces):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(2)), nn.Flatten(), nn.Linear(48, 4)).double().requires_grad_(False)
    x, model[1].weight = images(size=8), model[0].weight
    planned(model, x)
    model[1].weight = nn.Parameter(torch.randn_like(model[0].weight), requires_grad=False)
    assert_equals_autograd(model, x)
    assert len(traces) == 2


def test_the_cache_keeps_no_model_alive():
    model, x = create("wrn-10-1"), images(dtype=torch.float32)
    sk.pgd(model, x, torch.tensor([0, 1]), EPS, steps=1, input_gradient="plan")
    alive = [weakref.ref(model), weakref.ref(model.fc.weight), weakref.ref(model.conv1)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [ref() for ref in alive] == [None] * 3  # at once: no cycle waits for the collector
    finally:
        gc.enable()


def test_threads_share_models_and_plans():
    torch.manual_seed(0)
    models = [randomized(create("wrn-10-1"), torch.float32) for _ in range(2)]
    x, y = images(2, dtype=torch.float32), torch.tensor([0, 1])
    expected = [sk.pgd(m, x, y, EPS, steps=3, random_start=False, input_gradient="autograd") for m in models]

    def attack(i):
        for _ in range(4):
            x_adv = sk.pgd(models[i % 2], x, y, EPS, steps=3, random_start=False)
            assert ((x_adv - expected[i % 2]).abs() > 1e-6).float().mean() <= 0.01

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attack, range(4)))

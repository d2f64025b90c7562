"""ADT: the loop of its paper in plain PyTorch, at the same noise; in every precision, captured, and true to its settings."""

import pytest
import torch
import torch.nn.functional as F

import spat_kernels
from spat_kernels import ADT, losses
from spat_kernels.attacks.adt import ADTRun
from spat_kernels.cuda_graphs.cache import Graphs
from spat_kernels.ops.adt import normals
from tests.cuda_graphs.fake_graph import FakeGraph, captured_and_eager
from tests.helpers import EPS, assert_inside, batch, cnn

ENTROPY = 0.3  # which then decides about a part of the steps


def eager_adt(model, x, y, seed, steps=7, samples=1, lr=0.3, entropy=0.01, smoothing=0.0, sign=1.0):
    """ADT-EXP as its authors write it, but that gradients are zeroed, and that each image has its own mean."""
    mu, rho = (torch.zeros_like(x, requires_grad=True) for _ in range(2))
    adam = torch.optim.Adam([mu, rho], lr=lr, betas=(0.0, 0.0), maximize=True)

    def sample(draw):
        r = normals(x, seed, draw)
        tanh = (mu + F.softplus(rho) * r).tanh()
        h = r**2 / 2 + (F.softplus(rho) + 1e-8).log() + (1 - tanh**2 + 1e-8).log()
        return (x + EPS * tanh).clamp(0, 1), h.flatten(1).mean(1).sum()

    for step in range(steps):
        adam.zero_grad()
        for i in range(samples):
            x_adv, h = sample(step * samples + i)
            ce = F.cross_entropy(model(x_adv), y, label_smoothing=smoothing, reduction="sum")
            ((sign * ce + entropy * h) / samples).backward()
        adam.step()
    return sample(steps * samples)[0].detach()


@pytest.mark.parametrize("path, layout", [("plan", torch.channels_last), ("autograd", torch.contiguous_format)], ids=str)
@pytest.mark.parametrize(("settings", "plain"), [
    ({}, {}),
    ({"samples": 3, "steps": 3, "lr": 0.5, "entropy": ENTROPY}, {"samples": 3, "steps": 3, "lr": 0.5, "entropy": ENTROPY}),
    ({"loss": losses.LabelSmoothedCE(0.3)}, {"smoothing": 0.3 * 10 / 9}),
    ({"targeted": True, "entropy": ENTROPY}, {"sign": -1.0, "entropy": ENTROPY}),
    ({"steps": 0}, {"steps": 0}),
], ids=["default", "samples", "smoothed", "targeted", "no steps"])  # fmt: skip
def test_equals_the_loop_of_the_paper(settings, plain, path, layout):
    model, (x, y) = cnn().double().eval(), batch()
    x = x.double()
    seed = torch.empty(2, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(4))
    attack = ADT(EPS, input_gradient=path, generator=torch.Generator().manual_seed(4), **settings)
    expected = eager_adt(model, x.contiguous(memory_format=layout), y, seed, **plain)  # noise is in the order of the memory
    # A step is as steep as 1e8 where gradients are 0, and those of two ways through a network are about 1e-17 apart.
    torch.testing.assert_close(attack(model, x, y), expected, rtol=0, atol=1e-8)
    assert_inside(expected, x, EPS, "linf")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("path", ["plan", "autograd"])
def test_half_precision_keeps_the_lengths_of_gradients(monkeypatch, path, precision):
    """Scales of the loss in fp16, and those of each sample in a plan, are divided out: they would outweigh the entropy."""
    model, (x, y) = cnn().eval(), batch()

    def images(precision):
        attack = ADT(EPS, entropy=ENTROPY, input_gradient=path, precision=precision, generator=torch.Generator().manual_seed(4))
        return attack(model, x.contiguous(memory_format=torch.channels_last), y)

    full, half = images("fp32"), images(precision)
    share = ((half - full).abs() < 0.1 * EPS).double().mean()
    assert share > 0.95
    if path == "plan" or precision == "fp16":
        monkeypatch.setattr(ADTRun, "_factor", lambda self, logits, dtype: torch.ones(1))
        assert ((images(precision) - full).abs() < 0.1 * EPS).double().mean() < 0.8, "the test would see it"


def test_the_distribution_is_worse_than_the_uniform_one_and_has_entropy():
    model, (x, y) = cnn().eval(), batch(32)

    def loss(**settings):
        return F.cross_entropy(model(ADT(EPS, **settings)(model, x, y)), y)

    assert loss() > loss(samples=3, targeted=True)
    assert loss() > loss(steps=0) + 0.5 * (loss(steps=20) - loss(steps=0)) > loss(steps=0)
    distances = [(ADT(EPS, steps=20, entropy=e)(model, x, y) - x).abs().mean() for e in (0.0, 1e4)]
    assert distances[1] < 0.8 * distances[0], "entropy keeps samples off the corners"


@pytest.mark.parametrize("settings", [{}, {"samples": 2, "steps": 2}, {"loss": "kl"}, {"bn_mode": "train"}], ids=str)
def test_captured_it_gives_the_same_images(monkeypatch, settings):
    graphs = Graphs(graph=FakeGraph)
    monkeypatch.setattr(spat_kernels.attacks.pgd, "graphs", graphs)
    model, (x, y) = cnn().eval(), batch(6)
    for n, seed in ((6, 1), (6, 2), (4, 3)):
        eps = EPS / seed
        assert torch.equal(*captured_and_eager(ADT, eps, model, x[:n], y[:n], seed=seed, **settings))
    assert len(graphs) == (2 if settings.get("bn_mode") == "train" else 1), "a part of a batch replays the capture of all"
    assert torch.equal(*captured_and_eager(ADT, EPS, model, x, y, entropy=1.0, **settings))
    assert len(graphs) == (3 if settings.get("bn_mode") == "train" else 2)


def test_launch_and_run_give_the_images_of_a_call():
    model, (x, y) = cnn().eval(), batch()

    def attack():
        return ADT(EPS, samples=2, generator=torch.Generator().manual_seed(1))

    expected = attack()(model, x, y)
    images, nan_seen = attack().launch(model, x, y)
    assert torch.equal(images, expected)
    assert (nan_seen.dtype, nan_seen.any()) == (torch.uint8, False)
    found = attack().run(model, x, y)
    assert torch.equal(found.x_adv, expected)
    assert found.forwards.tolist() == found.backwards.tolist() == [14] * len(x)


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"samples": 0}, ValueError, "samples=0 must be at least 1"),
    ({"samples": 1.5}, TypeError, "samples must be an int"),
    ({"lr": -1.0}, ValueError, r"lr=-1.0 must be in \[0, 1e\+06\]"),
    ({"lr": 1e39}, ValueError, "lr=1e\\+39 must be in"),
    ({"lr": "a"}, TypeError, r"lr must be a number in \[0, 1e\+06\], got str 'a'"),
    ({"entropy": float("inf")}, ValueError, "entropy=inf must be in"),
    ({"steps": -1}, ValueError, "steps=-1 must be at least 0"),
    ({"norm": "l2"}, TypeError, "norm"),
    ({"step_size": 0.1}, TypeError, "step_size"),
    ({"restarts": 2}, TypeError, "restarts"),
    ({"stop": "cycle"}, TypeError, "stop"),
], ids=str)  # fmt: skip
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        ADT(0.1, **settings)


def test_a_start_is_refused():
    model, (x, y) = cnn().eval(), batch()
    with pytest.raises(ValueError, match="start is given, but ADT draws its first sample around x: leave it out"):
        ADT(0.1)(model, x, y, start=x)

"""The objectives against their formulas, written out sample by sample in fp64; the examples that they are trained on."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("tyro")

from spat_kernels import ADT, PGD, losses
from spat_train.config import Config
from spat_train.errors import InputError
from spat_train.models.centres import put_centres
from spat_train.objectives import METHODS, MethodName
from spat_train.training.check import check
from spat_train.training.step import Objective, training_attack, wide_start

CLASSES, BETA = 5, 3.0


def network(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Softplus(), nn.Flatten(), nn.Linear(6 * 36, CLASSES)).to(dtype)


def batch(dtype=torch.float64, count=7):
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(count, 3, 8, 8, generator=generator, dtype=dtype)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=generator, dtype=dtype)).clamp(0, 1)
    return x, x_adv, torch.randint(CLASSES, (count,), generator=generator)


def ce(row, y, smoothing=0.0):
    p = row.softmax(0)
    return sum(-(smoothing / CLASSES + (1 - smoothing if k == y else 0)) * p[k].log() for k in range(CLASSES))


def trades_sample(z, a, y, smoothing):
    p, q = z.softmax(0), a.softmax(0)
    return ce(z, y, smoothing) + BETA * (p * (p / q).log()).sum()


def mart_sample(z, a, y, smoothing):
    p, q = z.softmax(0), a.softmax(0)
    worst = max(q[k] for k in range(CLASSES) if k != y)
    bce = ce(a, y, smoothing) - (1.0001 - worst + 1e-12).log()
    return bce + BETA * (p * (p.log() - (q + 1e-12).log())).sum() * (1.0000001 - p[y])


def mmc_sample(squared_distances, y, smoothing):
    label = [smoothing / CLASSES + (1 - smoothing if k == y else 0) for k in range(CLASSES)]
    return sum(p * d / 2 for p, d in zip(label, squared_distances, strict=True))


FORMULAS = {
    "standard": lambda z, a, y, s: ce(z, y, s),
    "madry": lambda z, a, y, s: ce(a, y, s),
    "fgsm": lambda z, a, y, s: (ce(z, y, s) + ce(a, y, s)) / 2,
    "adt": lambda z, a, y, s: ce(a, y, s),
    "trades": trades_sample,
    "rst": trades_sample,
    "mart": mart_sample,
    "fast": lambda z, a, y, s: ce(a, y, s),
    "n-fgsm": lambda z, a, y, s: ce(a, y, s),
    "free": lambda z, a, y, s: ce(a, y, s),
    "mmc": lambda z, a, y, s: mmc_sample(-a, y, s),
    "mmc-clean": lambda z, a, y, s: mmc_sample(-z, y, s),
    "g-sce": lambda z, a, y, s: ce(a, y, s),
}


@pytest.mark.parametrize("forwards", ["clean-adv", "adv-clean", "clean-adv-clean", "adv-clean-clean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_loss_gradients_and_statistics_are_those_of_the_formula(method, smoothing, forwards):
    """The network of the formula runs every forward in training mode, in the order asked for, so that batch norm moves alike."""
    ours, theirs = network(), network()
    x, x_adv, y = batch()
    config = Config(method=method, beta=BETA, label_smoothing=smoothing, forwards=forwards)
    loss, terms = Objective(ours, config)(x, x_adv, y)
    loss.backward()
    images = {"clean": x, "adv": x_adv}
    z = [(kind, theirs(images[kind])) for kind in forwards.split("-") if kind in METHODS[method].reads]
    found = dict.fromkeys(images, [None] * len(y)) | dict(z)
    samples = zip(found["clean"], found["adv"], y.tolist(), strict=True)
    expected = sum(FORMULAS[method](*sample, smoothing) for sample in samples) / len(y)
    expected.backward()
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(sum(terms.values()), loss.detach(), rtol=1e-12, atol=0)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    for (name, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(b, c), name


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(("method", "read"), [("mmc", "adv"), ("mmc-clean", "clean"), ("g-sce", "adv"), ("standard", "clean")])
def test_losses_on_distances_to_centres_are_those_of_the_formula(method, read, smoothing):
    """From the features on: distances are written out, sample by sample and centre by centre."""
    ours = network()
    put_centres(ours, "it", CLASSES)
    theirs = copy.deepcopy(ours)
    features, centres = nn.Sequential(*theirs[:-1], theirs[-1].linear), theirs[-1].centres
    x, x_adv, y = batch()
    config = Config(method=method, classifier="centres", label_smoothing=smoothing)
    loss, _ = Objective(ours, config)(x, x_adv, y)
    loss.backward()
    expected = 0
    for f, label in zip(features(x if read == "clean" else x_adv), y.tolist(), strict=True):
        distances = torch.stack([(f - centre).square().sum() for centre in centres])
        term = mmc_sample(distances, label, smoothing) if "mmc" in method else ce(-distances, label, smoothing)
        expected = expected + term / len(y)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_fp32_under_autocast(method):
    """MART's 1.0001 and 1e-12 vanish in half precision: the head must see fp32, and give what fp32 gives on the same logits."""
    model = network(torch.float32)
    x, x_adv, y = batch(torch.float32)
    objective = Objective(model, Config(method=method))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        loss, terms = objective(x, x_adv, y)
        clean, adv = objective.logits(x), objective.logits(x_adv)
    assert loss.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in terms.values())
    expected = sum(METHODS[method].head(clean.double(), adv.double(), y, **objective.settings).values())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_mart_stays_finite_on_confident_mistakes():
    clean, adv = (torch.tensor([[-z, z, 0.0]], requires_grad=True) for z in (200.0, -200.0))
    loss = sum(METHODS["mart"].head(clean, adv, torch.tensor([1]), beta=5.0).values())
    loss.backward()
    assert all(t.isfinite().all() for t in (loss, adv.grad, clean.grad))


def test_defaults_of_the_methods():
    assert get_args(MethodName) == tuple(METHODS)
    assert Config(method="mart").kl_weight == 5
    assert Config(method="trades").kl_weight == 6
    assert [Config(method=m).inner_loss for m in ("madry", "mart", "trades", "rst")] == ["ce", "ce", "kl", "kl"]
    assert Config(method="trades", alpha=0.1).inner_loss == "lsce"
    assert Config().attack_settings == (8 / 255, 2 / 255, 10, "uniform")
    assert Config(method="fgsm").attack_settings == (8 / 255, 8 / 255, 1, "clean")
    assert Config(method="fast").attack_settings == (8 / 255, 10 / 255, 1, "uniform")
    assert Config(method="n-fgsm").attack_settings == (8 / 255, 8 / 255, 1, "wide")
    assert [Config(method=m).updates_per_batch for m in ("madry", "free")] == [1, 8]
    assert [Config(method=m).inner_loss for m in ("mmc", "g-sce")] == ["mmc", "ce"]
    assert Config(method="mmc", alpha=0.1).maximised == losses.LabelSmoothedCE(0.1)
    assert [Config(method=m).last_layer for m in ("madry", "mmc", "mmc-clean", "g-sce")] == ["linear", *["centres"] * 3]
    assert Config(classifier="centres").last_layer == "centres"


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"method": "madry"}, {"loss": "ce"}),
        ({"method": "madry", "alpha": 0.4}, {"loss": losses.LabelSmoothedCE(0.4)}),
        ({"method": "trades"}, {"loss": "kl"}),
        ({"method": "trades", "inner": "ce", "steps": 3, "step_size": 4.0}, {"loss": "ce", "steps": 3, "step_size": 4 / 255}),
        ({"method": "mart", "bn_mode": "train"}, {"loss": "ce", "bn_mode": "train"}),
        ({"method": "mmc"}, {"loss": "mmc"}),
        ({"method": "fgsm"}, {"loss": "ce", "steps": 1, "step_size": 8 / 255, "random_start": False}),
        ({"method": "fast"}, {"loss": "ce", "steps": 1, "step_size": 10 / 255}),
    ],
)
def test_examples_are_those_of_the_attack(options, settings):
    model, (x, _, y) = network(torch.float32), batch(torch.float32)
    examples, nan_seen = training_attack(Config(**options))(model, x, y, torch.Generator().manual_seed(1))
    expected = PGD(8 / 255, **{"step_size": 2 / 255} | settings, generator=torch.Generator().manual_seed(1))(model, x, y)
    assert torch.equal(examples, expected)
    assert (nan_seen.shape, nan_seen.any()) == (y.shape, False)
    assert model.training
    assert (examples - x).abs().max() <= 8 / 255 + 1e-6
    assert not torch.equal(examples, x)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"steps": 7, "lr": 0.3, "entropy": 0.01, "samples": 1}),
        ({"alpha": 0.4, "steps": 2}, {"steps": 2, "loss": losses.LabelSmoothedCE(0.4)}),
        ({"inner_lr": 0.1, "entropy": 0.5, "inner_samples": 2}, {"lr": 0.1, "entropy": 0.5, "samples": 2}),
    ],
)
def test_examples_of_adt_are_samples_of_the_distribution(options, settings):
    model, (x, _, y) = network(torch.float32), batch(torch.float32)
    attack = training_attack(Config(method="adt", **options))
    for n in (7, 3):  # the last batch of an epoch is shorter
        examples, nan_seen = attack(model, x[:n], y[:n], torch.Generator().manual_seed(1))
        expected = ADT(8 / 255, **settings, generator=torch.Generator().manual_seed(1))(model, x[:n], y[:n])
        assert torch.equal(examples, expected)
        assert (nan_seen.shape, nan_seen.any()) == ((n,), False)
    assert model.training


@pytest.mark.parametrize("method", METHODS)
def test_options_that_do_nothing_are_refused(method):
    others = {
        "alpha": 0.2, "beta": 2.0, "forwards": "adv-clean", "awp": 0.01, "replays": 3, "inner": "margin", "step_size": 2.0,
        "steps": 3, "start": "normal", "bn_mode": "train", "inner_lr": 0.2, "entropy": 0.1, "inner_samples": 2,
        "attack": "apgd",
    }  # fmt: skip
    c = Config(method=method, device="cpu", extra=Path("rst.pickle") if method == "rst" else None)
    assert c.objective.idle.keys() <= others.keys()
    for option, value in others.items():
        changed = replace(c, **{option: value})
        if option == "steps" and c.attack_settings.steps == 1 and option not in c.objective.idle:
            with pytest.raises(InputError, match=f"^--steps 3: {method} takes one step: leave it out, or give --method madry"):
                check(changed)
            check(replace(c, steps=1))
            continue
        if option == "attack" and option not in c.objective.idle and c.attack_settings.steps == 1:
            with pytest.raises(InputError, match=f"^--attack apgd: {method} takes a step of its own: give --method madry, or"):
                check(changed)
            continue
        if option not in c.objective.idle:
            check(changed)
            continue
        name = option.replace("_", "-")
        with pytest.raises(InputError, match=f"^--{name} {value}: {method} .*: leave it out, or give {getattr(c, option)}$"):
            check(changed)


def test_other_starts():
    model, (x, _, y) = network(torch.float32), batch(torch.float32)
    attack = training_attack(Config(method="trades", start="normal"))
    noise = 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected = PGD(8 / 255, loss="kl", step_size=2 / 255)(model, x, y, start=x + noise)
    assert torch.equal(attack(model, x, y, torch.Generator().manual_seed(1))[0], expected)
    images, nan_seen = training_attack(Config(method="standard"))(model, x, y, torch.Generator())
    assert images is x
    assert (nan_seen.shape, nan_seen.any()) == (y.shape, False)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("method", ["fast", "n-fgsm"])
def test_single_steps_are_those_of_the_papers(method, bn_mode, alpha, monkeypatch):
    """One step along the sign of the gradient in fp64, from the same noise; N-FGSM's leaves the ball of eps."""
    model, (x, _, y), eps = network(), batch(), 8 / 255
    monkeypatch.setattr(Config, "precision_of_attacks", None)  # that of the model
    ours, _ = training_attack(Config(method=method, alpha=alpha, bn_mode=bn_mode))(model, x, y, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    uniform = PGD(eps, steps=0, generator=generator)
    start = uniform(model, x, y) if method == "fast" else wide_start(x, eps, generator)
    other = network().train(bn_mode == "train")
    images = start.clone().requires_grad_()
    smoothing = alpha * CLASSES / (CLASSES - 1)
    (grad,) = torch.autograd.grad(F.cross_entropy(other(images), y, label_smoothing=smoothing), images)
    if method == "fast":
        expected = torch.min(torch.max(start + 1.25 * eps * grad.sign(), x - eps), x + eps).clamp(0, 1)
    else:
        expected = (start + eps * grad.sign()).clamp(0, 1)
    clear = grad.abs() > 1e-12 * grad.abs().max()  # else roundings decide on the sign
    assert (~clear).sum() <= 2
    torch.testing.assert_close(ours[clear], expected[clear], rtol=0, atol=1e-15)
    assert ((ours - x).abs().max() > 2.5 * eps) == (method == "n-fgsm")


def test_the_wide_start_is_uniform_in_the_ball_of_two_eps():
    x, eps = torch.full((4, 3, 32, 32), 0.5), 8 / 255
    noise = (wide_start(x, eps, torch.Generator().manual_seed(1)) - x) / (2 * eps)
    assert 0.999 < noise.abs().max() <= 1 + 1e-6
    spread = noise.flatten().sort().values - torch.linspace(-1, 1, noise.numel())
    assert spread.abs().max() < 2 * 1.95 / noise.numel() ** 0.5  # Kolmogorov and Smirnov, at 0.1 %
    black = wide_start(torch.zeros(2, 3, 8, 8), eps, torch.Generator())
    assert (black.min(), black.max() > 1.9 * eps) == (0, True)

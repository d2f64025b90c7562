"""Losses by name. A loss without a kernel is one class: everything else knows it by its registration."""

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spat_kernels import APGD, PGD, AutoAttack, losses, pgd
from spat_kernels.attacks.autoattack import VERSIONS, fewest_classes
from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.errors import InputError
from spat_train.evaluation.attack_specs import parse
from spat_train.evaluation.command import attacks_command
from spat_train.evaluation.evaluate import evaluate
from spat_train.training.check import check
from spat_train.training.step import training_attack
from spat_train.training.trainer import train
from tests.helpers import EPS, batch, cnn, margin, probability_margin


@pytest.fixture
def toy():
    @losses.register
    @dataclass(frozen=True)
    class Toy(losses.AutogradLoss):
        """The logit of the label, pushed down; of three classes or more."""

        name, title = "toy", "the toy loss"
        slope: float
        offset: float = 0.5

        @classmethod
        def fewest_classes(cls, targeted):
            return 4 if targeted else 3

        def value(self, logits, y):
            return self.offset - self.slope * logits.gather(1, y[:, None])[:, 0]

    yield Toy
    del losses.LOSSES["toy"]


@pytest.fixture
def plain():
    @losses.register
    class Plain(losses.AutogradLoss):
        name = "plain"
        needs_random_start = True
        has_targeted_form = False

        def value(self, logits, y):
            return -logits.gather(1, y[:, None])[:, 0]

    yield Plain
    del losses.LOSSES["plain"]


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, z):
        return self.factor * z


def reference(logits, y):
    return -logits.gather(1, y[:, None])[:, 0]


def seeded():
    return torch.Generator().manual_seed(3)


def test_names_are_those_of_the_registry():
    assert {kind.name for kind in losses.OURS} <= losses.LOSSES.keys()
    assert losses.lookup("ls", alpha=0.2) == losses.lookup("lsce", alpha=0.2) == losses.LabelSmoothedCE(0.2)
    assert losses.lookup("ce") == losses.CrossEntropy()
    assert losses.lookup("margin", kappa=3.0) == losses.Margin(3.0)
    with pytest.raises(ValueError, match="loss='ls': alpha must be given, as .*losses.LabelSmoothedCE"):
        losses.as_loss("ls")
    with pytest.raises(ValueError, match="kappa is a setting of loss=margin, not of ce"):
        losses.lookup("ce", kappa=1.0)


def test_a_name_is_taken_once(plain):
    losses.register(plain)
    for name in ("plain", "ce", "ls", ""):
        with pytest.raises(ValueError, match="give a name that no other loss has"):
            losses.register(type("Other", (losses.AutogradLoss,), {"name": name}))
    assert losses.LOSSES["plain"] is plain


def test_attacks_know_a_registered_loss(toy, plain):
    model, (x, y) = cnn().eval(), batch()
    expected = pgd(model, x, y, EPS, loss=reference, generator=seeded())
    assert not torch.equal(expected, pgd(model, x, y, EPS, generator=seeded()))
    assert torch.equal(pgd(model, x, y, EPS, loss="plain", generator=seeded()), expected)
    assert torch.equal(pgd(model, x, y, EPS, loss=toy(slope=1.0), generator=seeded()), expected)
    apgd = [APGD(EPS, loss=loss, steps=5, generator=seeded())(model, x, y) for loss in ("plain", reference)]
    assert torch.equal(*apgd)
    with pytest.raises(ValueError, match="loss='toy': slope must be given, as .*losses.Toy"):
        pgd(model, x, y, EPS, loss="toy")
    with pytest.raises(ValueError, match="loss='nothing': give one of 'ce', 'kl', 'margin', 'dlr', .*'toy', 'plain'"):
        pgd(model, x, y, EPS, loss="nothing")
    for settings in ({"random_start": False}, {"targeted": True}):
        with pytest.raises(ValueError, match="gradient of this loss is zero|loss 'plain' has no targeted form"):
            pgd(model, x, y, EPS, loss="plain", **settings)


@pytest.mark.parametrize("targeted", [False, True])
def test_gradient_of_the_probability_margin(targeted):
    """Its value and direction against autograd in fp64, and its true length where attacks average gradients."""
    z, y, sign = (3 * torch.randn(32, 7)).double(), torch.randint(7, (32,)), -1 if targeted else 1
    leaf = z.clone().requires_grad_()
    expected = sign * probability_margin(leaf, y)
    (exact,) = torch.autograd.grad(expected.sum(), leaf)
    loss, dlogits, value = losses.as_loss("pma"), torch.empty_like(z), torch.empty(32).double()
    assert loss == losses.PMA()
    loss.gradient(z, loss.reference(y, None, targeted), dlogits, value, targeted=targeted, scale=2.0)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dlogits, 2 * exact / exact.abs().amax(1, keepdim=True), rtol=1e-12, atol=1e-14)
    loss.unnormalized().gradient(z, y, dlogits, None, targeted=targeted, scale=2.0)
    torch.testing.assert_close(dlogits, 2 * exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("targeted", [False, True])
def test_mmc_is_the_logit_of_the_label(targeted):
    z, y, sign = 3 * torch.randn(8, 7).double(), torch.arange(8) % 7, 1 if targeted else -1
    z[3, 0] = torch.inf  # another class's
    y[1], y[2] = 7, -1  # no classes: NaN, as of the kernels
    loss, dlogits, value = losses.as_loss("mmc"), torch.full_like(z, torch.nan), torch.full((8,), torch.nan).double()
    loss.gradient(z, loss.reference(y, None, targeted), dlogits, value, targeted=targeted, scale=0.3)
    right = [0, 3, 4, 5, 6, 7]
    assert torch.equal(value[right], sign * z[right, y[right]])
    assert torch.equal(dlogits[right], sign * 0.3 * F.one_hot(y[right], 7).double())
    assert value[[1, 2]].isnan().all()
    assert dlogits[[1, 2]].isnan().all()
    with pytest.raises(ValueError, match="labels"):
        pgd(cnn().eval(), *batch(4)[:1], torch.tensor([0, 1, 2, 10]), EPS, loss="mmc")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_on_mmc_are_those_on_its_formula(norm):
    model, (x, y) = cnn().eval(), batch()
    eps = EPS if norm == "linf" else 0.5
    for make in (PGD, APGD):
        attacks = [make(eps, loss=loss, norm=norm, steps=5, generator=seeded()) for loss in ("mmc", reference)]
        assert torch.equal(*(attack(model, x, y) for attack in attacks))
    targets = (y + 1) % 10
    towards = PGD(eps, loss="mmc", targeted=True, norm=norm, steps=5, generator=seeded())(model, x, targets)
    assert (model(towards).gather(1, targets[:, None]) > model(x).gather(1, targets[:, None])).all()
    assert parse("pgd-20:loss=mmc").maximised == parse("apgd:loss=mmc").maximised == losses.MMC()


def test_unnormalized_losses():
    for loss in (losses.CrossEntropy(), losses.LabelSmoothedCE(0.2), losses.PMA()):
        assert loss.unnormalized() == replace(loss, normalize=False) != loss
        assert loss.unnormalized().describe() == loss.describe()
    for loss in (losses.DLR(), losses.Margin(2.0), losses.KLDivergence()):
        assert loss.unnormalized() == loss


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_climb_the_probability_margin(norm):
    """Also of samples that the model is sure of, whose gradient of the true length is 0 in fp32: z_y is ahead by 200 and more."""
    model, (x, _) = cnn().eval(), batch(16)
    y, eps = model(x).argmax(1), EPS if norm == "linf" else 0.5
    sure = nn.Sequential(model, Scale(200 / margin(model(x), y).abs().amin().item())).eval()
    for attack in (PGD, APGD):
        x_adv = attack(eps, loss="pma", norm=norm, steps=8, generator=seeded())(model, x, y)
        assert (probability_margin(model(x_adv), y) > probability_margin(model(x), y)).all()
    x_adv = PGD(eps, loss="pma", norm=norm, steps=8, generator=seeded())(sure, x, y)
    noise = PGD(eps, loss="pma", norm=norm, steps=0, generator=seeded())(sure, x, y)
    assert (margin(model(x_adv), y) > margin(model(noise), y)).all()
    target = model(x).argsort(1)[:, -2]
    towards = PGD(eps, loss="pma", targeted=True, norm=norm, steps=8, generator=seeded())(model, x, target)
    assert (probability_margin(model(towards), target) < probability_margin(model(x), target)).all()


def test_own_loss_object_with_state_per_batch():
    """The documented way: subclass Loss. Here, the squared distance of the logits from the clean ones."""

    class Distance(losses.Loss):
        needs_clean_logits = True
        needs_random_start = True
        uses_labels = False

        def reference(self, y, clean_logits, targeted):
            return clean_logits

        def gradient(self, logits, reference, dlogits, value, *, targeted, scale):
            dlogits.copy_(2 * scale * (logits - reference))
            if value is not None:
                value.copy_((logits - reference).square().sum(1))

    model, (x, _) = cnn().eval(), batch()
    x_adv = pgd(model, x, None, EPS, loss=Distance())
    noise = pgd(model, x, None, EPS, loss=Distance(), steps=0)
    assert ((model(x_adv) - model(x)).norm(dim=1) > (model(noise) - model(x)).norm(dim=1)).all()


def test_soft_targets_go_through_a_loss_of_your_own():
    """As the error about labels advises."""
    model, (x, _) = cnn().eval(), batch()
    soft = torch.rand(len(x), 10).softmax(1)
    x_adv = pgd(model, x, soft.argmax(1), EPS, loss=lambda z, _: F.cross_entropy(z, soft, reduction="none"))
    assert F.cross_entropy(model(x_adv), soft) > F.cross_entropy(model(x), soft)


def test_the_grammar_knows_a_registered_loss(toy, capsys):
    attack = parse("pgd:loss=toy:slope=2:steps=4")
    assert attack.spec == "pgd:loss=toy:slope=2.0:steps=4"
    assert attack.least_classes == 3
    assert attack.describe().startswith("PGD on the toy loss (slope 2, offset 0.5), 4 steps")
    assert parse("pgd:loss=toy:slope=1:target=random").least_classes == 4
    assert parse("apgd:offset=0:loss=toy:slope=1").maximised == toy(1.0, 0.0)
    with pytest.raises(InputError, match="loss='toy': slope must be given"):
        parse("apgd:loss=toy")
    with pytest.raises(InputError, match="slope is a setting of loss=toy, not of ce"):
        parse("pgd:slope=1")
    attacks_command()
    assert "toy               slope, offset" in capsys.readouterr().out

    model, (x, y) = nn.Sequential(cnn()).eval(), batch(8)
    found = evaluate(model, (x, y), "pgd:loss=toy:slope=1:steps=2,apgd:loss=toy:slope=1:steps=3", eps=EPS, bar=None)
    assert len(found) == 8
    assert set(found.predicted) == {"clean", *list(found.attacks)[1:]}
    with pytest.raises(InputError, match="attack pgd:loss=toy:slope=1: it needs 3 classes, the model has 2"):
        evaluate(cnn(2).eval(), (x, y % 2), "pgd:loss=toy:slope=1", eps=EPS, bar=None)


def test_the_trainer_knows_a_registered_loss(plain, toy):
    model, (x, y) = cnn(), batch()
    config = Config(method="madry", inner="plain", device="cpu")
    check(config)
    examples, _ = training_attack(config)(model, x, y, seeded())
    assert torch.equal(examples, pgd(model, x, y, EPS, loss=reference, step_size=2 / 255, generator=seeded()))
    for options, message in [
        ({"inner": "toy"}, "--inner toy: loss='toy': slope must be given"),
        ({"inner": "plain", "start": "clean"}, "--start clean: the gradient of plain is 0"),
        ({"inner": "plain", "alpha": 0.1}, "--inner plain: alpha = 0.1 needs lsce"),
    ]:
        with pytest.raises(InputError, match=message):
            check(Config(device="cpu", **options))
    for name in ("ls", "lsce"):
        assert Config(inner=name, alpha=0.3).maximised == Config(alpha=0.3).maximised == losses.LabelSmoothedCE(0.3)


def test_fewest_classes(toy):
    assert {version: max(map(fewest_classes, attacks)) for version, attacks in VERSIONS.items()} == {
        "standard": 4, "fast": 4, "plus": 4, "rand": 3,
    }  # fmt: skip
    model, (x, _) = cnn(2).eval(), batch()
    y = model(x).argmax(1)
    for attack in (APGD(EPS, loss=toy(1.0)), lambda *args: pgd(*args, EPS, loss=toy(1.0)), AutoAttack(EPS, version="rand")):
        with pytest.raises(ValueError, match="needs at least 3 classes"):
            attack(model, x, y)
    with pytest.raises(ValueError, match="needs at least 4 classes here, the model has 2"):
        APGD(EPS, loss="dlr", targets=1)(model, x, y)


def test_the_trainer_counts_the_classes_first():
    data = load("digits")
    two = replace(data, train=replace(data.train, labels=data.train.labels % 2), classes=("0", "1"))
    with pytest.raises(InputError, match="--inner dlr: loss 'dlr' needs at least 3 classes here, the model has 2"):
        train(Config(inner="dlr", data="digits", device="cpu", model="tests.training.helpers:without_parameters"), two)


def test_a_setting_is_not_called_as_one_of_the_attack():
    @losses.register
    @dataclass(frozen=True)
    class Steps(losses.AutogradLoss):
        name = "stepped"
        steps: float = 2.0

    try:
        with pytest.raises(InputError, match="steps is a setting of its own and of a loss: rename"):
            parse("pgd:loss=stepped:steps=5")
    finally:
        del losses.LOSSES["stepped"]


def test_commands_import_the_module_of_the_model_which_may_register_losses(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "from spat_kernels import losses\n"
        "@losses.register\n"
        "class Entropy(losses.AutogradLoss):\n"
        "    name = 'entropy'\n"
        "    def value(self, logits, y):\n"
        "        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )

    def command(*words):
        words = [sys.executable, "-m", "spat_train", *words]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    small = ("--epochs=1", "--limit=64", "--steps=1", "--val-steps=1", "--track=none", "--no-test", "--out=run")
    trained = command("train", "--data", "digits", "--model", "mine:net", "--inner", "entropy", *small)
    assert trained.returncode == 0, trained.stderr
    attacks = "pgd:loss=entropy:steps=2"
    options = ("--model-name", "mine:net", "--limit", "20", "--no-alarms", "--device", "cpu")
    evaluated = command("evaluate", "run", "--attacks", attacks, *options)
    assert evaluated.returncode == 0, evaluated.stderr
    assert attacks in evaluated.stdout
    missing = command("train", "--data", "digits", "--model", "none:net", "--inner", "entropy")
    assert missing.returncode == 2
    assert "--model none:net" in missing.stderr
    assert "cannot be imported" in missing.stderr

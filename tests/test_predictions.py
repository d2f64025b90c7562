"""What is a prediction, and what is a class: NaN logits are none, and -inf rules a class out, for every attack."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels as sk
from spat_kernels import APGD, FAB, PGD, AutoAttack, Square
from spat_kernels.attacks._common import Tally
from spat_kernels.predictions import other_classes, predictions
from tests.helpers import Around, accuracy, linear, moved

EPS = 0.1

# ---- classes


def test_a_nan_is_no_prediction():
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[nan, nan, nan], [1, nan, 2], [nan, 1, 2], [1, 3, 2], [-inf, -inf, 0], [1, inf, 2], [2, 2, 1]])
    assert predictions(logits).tolist() == [-1, -1, -1, 1, 2, 1, 0]
    assert predictions(logits.half()).tolist() == [-1, -1, -1, 1, 2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_classes_are_never_the_label(dtype):
    inf = torch.inf
    logits = torch.tensor([[1, -inf, 2, -inf], [-inf, -inf, 1, -inf], [inf, 1, inf, 0], [0, 0, 0, 0]], dtype=dtype)
    for label in range(4):
        y = torch.full((4,), label)
        others, possible = other_classes(logits, y)
        assert torch.equal(torch.cat((others, y[:, None]), 1).sort(1).values, torch.arange(4).expand(4, 4))
        values = logits.gather(1, others)
        assert (values[:, :-1] >= values[:, 1:]).all()
        assert torch.equal(possible, values > -inf)


# ---- NaN logits


class Overflows(Around):
    """NaN away from grey, and class 0 there."""

    def forward(self, x):
        far = ((x - 0.5).abs().flatten(1).amax(1) > 0.01)[:, None]
        return (self.net(x) + 50 * F.one_hot(torch.tensor(0), 4)).masked_fill(far, torch.nan)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "attack",
    [
        PGD(EPS), PGD(EPS, restarts=3), APGD(EPS, steps=3), APGD(EPS, steps=3, restarts=2), AutoAttack(EPS, steps=3),
        APGD(EPS, steps=3, targets=2, eot=2), Square(EPS, queries=20), Square(1.0, norm="l2", queries=20),
        AutoAttack(EPS, version=("square",), queries=20),
    ],
    ids=lambda attack: f"{type(attack).__name__}-{getattr(attack, 'restarts', 1)}-{attack.norm}",
)  # fmt: skip
def test_images_with_nan_logits_are_not_robust(attack):
    model, x, y = Overflows(linear(192, 4)).eval(), torch.full((6, 3, 8, 8), 0.5), torch.zeros(6, dtype=torch.int64)
    assert (predictions(model(attack(model, x, y))) == -1).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_images_whose_logits_are_nan_as_they_are_count_as_misclassified():
    model, x, y = Overflows(linear(192, 4)).eval(), torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64)
    assert (AutoAttack(EPS, steps=3, queries=5).run(model, x, y).broken_by == 0).all()
    for attack in (APGD(EPS, steps=3), FAB(EPS, steps=3), Square(EPS, queries=5)):
        assert torch.equal(attack(model, x, y), x)


def test_square_goes_on_where_logits_overflow_together():
    """Two logits of +inf are a tie, as predictions have it, and no NaN."""

    class Bright(Around):
        def forward(self, x):
            z = self.net(x)
            return torch.cat((z[:, :2].masked_fill(x.flatten(1).mean(1, keepdim=True) > 0.5, torch.inf), z[:, 2:]), 1)

    torch.manual_seed(0)
    model = Bright(linear(192)).eval()
    x = torch.rand(64, 3, 8, 8)
    y = predictions(model(x))
    x_adv = Square(EPS, queries=100, generator=torch.Generator().manual_seed(0))(model, x, y)
    assert moved(x_adv, x).any()
    assert torch.equal(moved(x_adv, x), predictions(model(x_adv)) != y)


# ---- classes that are ruled out


class Masked(Around):
    """5 of 10 classes are ruled out, as in subsets of ImageNet."""

    def forward(self, x):
        return self.net(x).masked_fill(torch.arange(10) >= 5, -torch.inf)


class Subset(Around):
    def forward(self, x):
        return self.net(x)[:, :5]


def subset(dtype=torch.float32):
    """A network, 40 images, and what it gives them of the first 5 classes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(dtype).eval()
    x = torch.rand(40, 1, 8, 8, dtype=dtype)
    return net, x, Subset(net)(x).argmax(1)


@pytest.mark.parametrize(
    "attack",
    [
        FAB(EPS, steps=10, targets=None), FAB(EPS, steps=10, targets=4), FAB(0.5, steps=10, targets=None, norm="l2"),
        APGD(EPS, steps=10, targets=4), APGD(EPS, steps=10, loss="dlr", targets=4), APGD(EPS, steps=10),
        PGD(EPS, restarts=2, loss="margin"), PGD(EPS, loss="kl"),
    ],
    ids=lambda attack: f"{type(attack).__name__}-{type(getattr(attack, 'loss', None)).__name__}-{attack.norm}",
)  # fmt: skip
def test_classes_that_are_ruled_out_change_nothing(attack):
    """Same images, no warnings."""
    (net, x, y), found = subset(torch.float64), []
    attack = replace(attack, input_gradient="autograd")  # only one of the two has a plan, which rounds otherwise
    for model in (Subset(net).eval(), Masked(net).eval()):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(attack(model, x, y))
    assert torch.equal(found[0], found[1])
    assert accuracy(Subset(net), found[0], y) < 0.9


def test_more_targets_than_classes_that_are_possible():
    net, x, y = subset()
    for kind in (FAB, APGD):
        left = []
        for targets, model in ((4, Subset(net).eval()), (9, Masked(net).eval())):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                left.append(accuracy(Subset(net), kind(EPS, steps=10, targets=targets)(model, x, y), y))
        assert abs(left[0] - left[1]) < 0.1
        assert max(left) < 0.9


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_labels_that_are_ruled_out_are_misclassified_in_silence(loss):
    net, x, y = subset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x_adv = sk.pgd(Masked(net).eval(), x, torch.full_like(y, 7), EPS, loss=loss)
    assert x_adv.isfinite().all()


@pytest.mark.parametrize("possible", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "attack", [APGD(0.3, loss="dlr", steps=20), PGD(0.3, loss="dlr"), APGD(0.3, loss="dlr", steps=20, targets=9)]
)
def test_dlr_of_few_possible_classes_is_the_margin(attack, possible):
    class Few(Around):
        def forward(self, x):
            return self.net(x).masked_fill(torch.arange(10) >= possible, -torch.inf)

    torch.manual_seed(0)
    net = linear(192)
    model, x = Few(net).eval(), torch.rand(40, 3, 8, 8)
    y = predictions(model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left = accuracy(model, attack(model, x, y), y)
    assert left == 1 if possible == 1 else left < 0.5


def test_targets_of_an_evaluation_are_possible_classes():
    pytest.importorskip("tqdm")
    from spat_train.evaluation.attack_specs import parse

    (net, x, y), which, seen = subset(), torch.rand(40), set()
    for name, runs in (("pgd-10-least-likely", 1), ("pgd-10-random", 1), ("pgd-10-all", 9)):
        attack = parse(name)
        for run in range(runs):
            targets = attack._targets(Masked(net), x, y, which, run, "auto", Tally(x))
            assert (targets < 5).all()
            assert (targets != y).all()
            assert torch.equal(targets, attack._targets(Subset(net), x, y, which, run, "auto", Tally(x)))
            seen |= set(targets.tolist())
    assert seen == set(range(5))

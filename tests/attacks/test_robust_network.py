"""Attacks on networks that are robust, as their users have them, at real images.

Random networks are broken by any attack. Here an attack must work: the numbers of images left are those that were measured, the
same on every path, and ordered as the attacks are strong.
"""

import pytest
import torch

from spat_kernels import APGD, PGD, AutoAttack, cw_linf, fgsm, pgd, pgd_ls
from spat_train.evaluation.alarms import alarms
from tests.helpers import EPS, assert_inside, photographs, robust

# correctly classified images of 100, clean and under each attack
LEFT = {
    "madry": {"clean": 32, "fgsm": 24, "pgd": 23, "cw": 20},
    "trades+spat": {"clean": 36, "fgsm": 23, "pgd": 21, "cw": 17},
}
# the same in L1, at AutoAttack's radius for CIFAR-10
LEFT_IN_L1 = {"madry": {"pgd": 24, "apgd": 21}, "trades+spat": {"pgd": 21, "apgd": 21}}


def right(model, x, y) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


@pytest.mark.parametrize("name", LEFT)
def test_accuracies(name):
    model, (x, y) = robust(name), photographs()
    attacks = {"fgsm": fgsm, "pgd": pgd, "cw": lambda *batch: cw_linf(*batch, steps=10)}
    x_adv = {"clean": x} | {attack: call(model, x, y, EPS) for attack, call in attacks.items()}
    left = {attack: right(model, images, y) for attack, images in x_adv.items()}
    assert left == pytest.approx(LEFT[name], abs=1)  # another CPU rounds otherwise
    assert left["clean"] > left["fgsm"] >= left["pgd"] >= left["cw"]
    (other,) = LEFT.keys() - {name}
    assert right(robust(other), x_adv["pgd"], y) > left["pgd"] + 3  # made on one network, the images fool another less


def test_every_path_finds_as_much():
    """The plan and autograd, fp32 and bf16, from the same start: pixels differ, accuracies do not."""
    model, (x, y) = robust("madry"), photographs()
    for settings in ({"input_gradient": "autograd"}, {"input_gradient": "plan", "precision": "bf16"}):
        torch.manual_seed(0)
        assert right(model, pgd(model, x, y, EPS, **settings), y) == pytest.approx(LEFT["madry"]["pgd"], abs=1)


def test_smoothing_weakens_the_attack():
    """Thesis, Figure 5.3: accuracy under PGD-LS rises with alpha, and at alpha = 1 it is not below that on clean images."""
    model, (x, y) = robust("trades+spat"), photographs()
    left = [right(model, pgd_ls(model, x, y, EPS, alpha, precision="bf16"), y) for alpha in (0.0, 0.8, 1.0)]
    assert left == sorted(left)
    assert left[0] < left[1] - 5
    assert left[2] >= LEFT["trades+spat"]["clean"]


@pytest.mark.parametrize("name", LEFT_IN_L1)
def test_in_l1_apgd_finds_more_than_pgd(name):
    model, (x, y) = robust(name), photographs()
    left = {}
    for attack, kind in (("pgd", PGD), ("apgd", APGD)):
        torch.manual_seed(0)
        x_adv = kind(12.0, norm="l1", steps=20)(model, x, y)
        assert_inside(x_adv, x, 12.0, "l1")
        left[attack] = right(model, x_adv, y)
    assert left == pytest.approx(LEFT_IN_L1[name], abs=1)
    assert LEFT[name]["clean"] > left["pgd"] >= left["apgd"]
    assert name != "madry" or left["pgd"] > left["apgd"]


@pytest.mark.slow
def test_autoattack_in_l1_finds_most():
    model, (x, y) = robust("madry"), photographs()
    result = AutoAttack(12.0, norm="l1", steps=20, queries=200).run(model, x, y)
    assert_inside(result.x_adv, x, 12.0, "l1")
    assert int(result.robust.sum()) <= 17, "of 32, and 21 by APGD alone"


@pytest.mark.slow
def test_no_alarm():
    """Checks for hidden gradients have nothing to say of a network that does not hide them."""
    raised = [alarm.name for alarm in alarms(robust("madry"), photographs(), eps=EPS, count=50) if alarm.raised]
    assert not raised

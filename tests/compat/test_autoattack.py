"""The reference package's AutoAttack on our kernels: parameters, results, logs and states."""

import json
import warnings

import pytest
import torch
from torch import nn

import spat_kernels
from spat_kernels.compat.autoattack import AutoAttack
from tests.helpers import EPS, assert_inside, photographs, robust


@pytest.fixture(scope="module")
def batch():
    x, y = photographs()
    return x[:24], y[:24]


def small(model, **options):
    """An adversary of few steps."""
    adversary = AutoAttack(model, eps=EPS, seed=0, **{"verbose": False} | options)
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 3
    adversary.square.n_queries = 20
    return adversary


def accuracy(model, x, y) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_parameters_of_the_versions():
    """Facts of the reference package."""
    standard = AutoAttack(nn.Flatten(), verbose=False)
    assert standard.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (standard.norm, standard.epsilon, standard.apgd.n_restarts, standard.apgd.n_iter) == ("Linf", 0.3, 1, 100)
    assert (standard.fab.n_restarts, standard.square.n_queries, standard.square.rescale_schedule) == (1, 5000, False)
    in_l1 = AutoAttack(nn.Flatten(), norm="L1", verbose=False)
    assert (in_l1.apgd.n_restarts, in_l1.apgd_targeted.n_target_classes, in_l1.apgd.use_largereps) == (5, 5, True)
    plus = AutoAttack(nn.Flatten(), version="plus", verbose=False)
    assert plus.attacks_to_run == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert (plus.apgd.n_restarts, plus.fab.n_restarts, plus.apgd_targeted.n_restarts) == (5, 5, 1)
    rand = AutoAttack(nn.Flatten(), version="rand", verbose=False)
    assert (rand.attacks_to_run, rand.apgd.eot_iter, rand.apgd.n_restarts) == (["apgd-ce", "apgd-dlr"], 20, 1)
    assert AutoAttack(nn.Flatten(), version="custom", verbose=False).attacks_to_run == []
    standard.set_version("plus")
    assert (standard.apgd, standard.fab) == (plus.apgd, plus.fab), "nothing of the version before"
    with pytest.raises(AttributeError):
        standard.apgd.n_restart = 3


@pytest.mark.parametrize(
    ("version", "norm"), [("standard", "Linf"), ("standard", "L2"), ("standard", "L1"), ("plus", "Linf"), ("plus", "L2")]
)
def test_the_attacks_are_those_of_our_autoattack(version, norm):
    """Every setting but the generator, which is one of each attack's own there."""
    with_names = AutoAttack(nn.Flatten(), norm=norm, eps=1.0, version=version, verbose=False)
    ours = spat_kernels.AutoAttack(1.0, norm=norm, version=version, bn_mode="keep")
    for name in ours.attacks:
        settings = []
        for attack in (with_names.attack(name, 10, torch.device("cpu")), ours._attack(name, 10, 1.0, None, None)):
            values = {k: v for k, v in vars(attack).items() if k != "generator"}
            values["multi_eps"] = getattr(attack, "in_larger_balls", None)
            settings.append((type(attack), values))
        assert settings[0] == settings[1]


def test_what_is_found(batch):
    model, (x, y) = robust("madry"), batch
    adversary = small(model)
    found, labels = adversary.run_standard_evaluation(x, y, bs=16, return_labels=True)
    assert_inside(found, x, EPS, "linf")
    with torch.no_grad():
        assert torch.equal(labels, model(found).argmax(1))
        assert torch.equal(found[model(x).argmax(1) != y], x[model(x).argmax(1) != y]), "wrong without an attack"
    left = accuracy(model, found, y)
    assert left < adversary.clean_accuracy(x, y, bs=7) == accuracy(model, x, y)
    each = small(model).run_standard_evaluation_individual(x, y, bs=16)
    assert list(each) == adversary.attacks_to_run
    assert min(accuracy(model, images, y) for images in each.values()) >= left
    assert torch.equal(found, small(model).run_standard_evaluation(x, y, bs=16)), "the seed decides"


def test_as_much_as_our_autoattack(batch):
    model, (x, y) = robust("madry"), batch
    adversary = AutoAttack(model, eps=EPS, version="custom", attacks_to_run=["apgd-ce", "apgd-t"], verbose=False)
    adversary.apgd.n_restarts, adversary.apgd.n_iter, adversary.apgd_targeted.n_iter = 1, 10, 10
    left = accuracy(model, adversary.run_standard_evaluation(x, y), y)
    ours = spat_kernels.AutoAttack(EPS, version=("apgd-ce", "apgd-t"), steps=10).run(model, x, y)
    assert left == pytest.approx(float(ours.robust.float().mean()), abs=1.01 / len(x))


def test_states(batch, tmp_path, monkeypatch):
    """Stopped in its second attack, the same call goes on; another evaluation does not."""
    model, (x, y), path = robust("madry"), batch, tmp_path / "state.json"
    whole = accuracy(model, small(model).run_standard_evaluation(x, y, bs=2), y)
    adversary = small(model)
    make, calls = adversary.attack, []

    def stops(name, *rest):
        calls.append(name)
        if calls.count("apgd-t") == 2:
            raise KeyboardInterrupt
        return make(name, *rest)

    monkeypatch.setattr(adversary, "attack", stops)
    with pytest.raises(KeyboardInterrupt):
        adversary.run_standard_evaluation(x, y, bs=2, state_path=path)
    saved = json.loads(path.read_text())
    assert saved["run_attacks"] == ["apgd-ce"]
    assert saved["clean_accuracy"] == accuracy(model, x, y)
    calls.clear()
    monkeypatch.setattr(adversary, "attack", lambda name, *rest: (calls.append(name), make(name, *rest))[1])
    adversary.run_standard_evaluation(x, y, bs=2, state_path=path)
    assert "apgd-ce" not in calls
    saved = json.loads(path.read_text())
    assert sum(saved["robust"]) / len(x) == whole
    assert saved["run_attacks"] == adversary.attacks_to_run
    with pytest.raises(ValueError, match="another evaluation .*eps="):
        AutoAttack(model, eps=4 / 255, verbose=False).run_standard_evaluation(x, y, state_path=path)
    with pytest.raises(ValueError, match="another evaluation .*data="):
        adversary.run_standard_evaluation(x, (y + 1) % 10, state_path=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json: no evaluation here wrote it"):
        adversary.run_standard_evaluation(x, y, state_path=path)


def test_log(batch, tmp_path, capsys):
    model, (x, y), path = robust("madry"), batch, tmp_path / "log.txt"
    adversary = small(model, version="custom", attacks_to_run=["apgd-ce"], verbose=True, log_path=path)
    left = accuracy(model, adversary.run_standard_evaluation(x, y, bs=64), y)
    adversary.run_standard_evaluation_individual(x, y, bs=64)
    assert adversary.verbose
    lines = path.read_text().splitlines()
    assert f"robust accuracy: {left:.2%}" in lines
    assert f"robust accuracy by APGD-CE: {left:.2%}" in lines[-1]
    assert capsys.readouterr().out.splitlines() == lines


def test_nothing_changes(batch):
    """A model in mixed modes is attacked and left in them, and torch's generator draws nothing."""
    model, (x, y) = robust("madry"), (batch[0][:8], batch[1][:8])
    modes = [m.training for m in model.modules()]
    state, copies = torch.get_rng_state(), (x.clone(), y.clone())
    small(model).run_standard_evaluation(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])


def test_warns_of_masked_gradients(batch):
    """Outputs that are drawn at random, as the reference package's log says."""
    x, y = batch

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = robust("madry")

        def forward(self, x):
            return self.model(x) + torch.rand(len(x), 10)

    with pytest.warns(RuntimeWarning, match="random numbers"):
        small(Noisy(), version="custom", attacks_to_run=["apgd-ce"]).run_standard_evaluation(x[:4], y[:4])


def test_in_inference_mode_and_without_images(batch):
    model, (x, y) = robust("madry"), (batch[0][:6], batch[1][:6])
    expected = small(model).run_standard_evaluation(x, y)
    with torch.inference_mode():
        assert torch.equal(small(model).run_standard_evaluation(x.clone(), y), expected)
    assert small(model).run_standard_evaluation(x[:0], y[:0]).shape == x[:0].shape
    nothing = AutoAttack(model, version="custom", verbose=False)
    assert torch.equal(nothing.run_standard_evaluation(x, y), x)


def test_square_alone_is_no_sign(batch):
    """It is one where attacks by gradients came before, and found less."""
    model, (x, y) = robust("madry"), batch
    adversary = small(model, version="custom", attacks_to_run=["square", "apgd-ce"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adversary.run_standard_evaluation(x, y)


def test_what_does_not_fit():
    model = nn.Flatten()
    for options, message in (
        ({"norm": "linf"}, "norm"),
        ({"version": "fast"}, "version"),
        ({"attacks_to_run": ["fab"]}, "goes with version='custom'"),
        ({"is_tf_model": True}, "PyTorch"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoAttack(model, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        AutoAttack(model, epsilon=0.3)
    adversary = AutoAttack(model, version="custom", verbose=False)
    adversary.attacks_to_run = ["apgd"]
    with pytest.raises(ValueError, match="attacks_to_run='apgd'"):
        adversary.run_standard_evaluation(torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    x, y = torch.rand(2, 3, 2, 2), torch.zeros(2, dtype=torch.int64)
    three = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    for call, message in (
        (lambda a: a.run_standard_evaluation(x, y), "apgd-t needs 4 classes, the model has 3"),
        (lambda a: a.run_standard_evaluation(x, y + 3), "y holds class 3"),
        (lambda a: a.run_standard_evaluation(x * 3, y), "inside bounds"),
        (lambda a: a.run_standard_evaluation(x, y, bs=0), "bs=0"),
        (lambda a: a.run_standard_evaluation(x, y, state_path="no/folder/state.json"), "there is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            call(AutoAttack(three, verbose=False))
    in_linf = small(three, version="custom", attacks_to_run=["apgd-ce"])
    in_linf.apgd.use_largereps = True
    with pytest.raises(ValueError, match="use_largereps=True with norm='Linf'"):
        in_linf.run_standard_evaluation(x, three(x).argmax(1))

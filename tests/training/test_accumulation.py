"""Gradient accumulation: a batch in parts gives the gradients and losses of the whole."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_kernels import PGD
from spat_train.errors import InputError
from spat_train.runtime.distributed import World
from spat_train.training.free import make_step
from spat_train.training.trainer import train
from tests.training import helpers
from tests.training.helpers import events, in_two, new_run, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = {
    "standard": {"steps": None},
    "madry": {"ema": 0.9, "optimizer": "adam", "lr": 1e-3},
    "fgsm": {"steps": None},
    "trades": {"inner": "ce", "forwards": "adv-clean-clean"},
    "mart": {"alpha": 0.3, "awp": 0.02, "label_smoothing": 0.1},
    "free": {"steps": None, "replays": 3},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", [3, 4])
def test_parts_of_a_batch_are_the_whole_one(method, parts):
    """In fp64, over updates of 11 images, which no number of parts divides, and of 5, which come in 2 parts."""
    torch.manual_seed(0)
    x, y = torch.rand(11, 1, 8, 8, dtype=torch.float64), torch.randint(10, (11,))
    model = helpers.frozen(10).double().train()
    start = copy.deepcopy(model.state_dict())
    steps, launched, sizes = [], [], []
    for count in (1, parts):
        config = settings(method=method, accumulate=count, batch_size=11, **METHODS[method])
        step = make_step(config, copy.deepcopy(model))

        def attack(model, x, y, generator, config=config):
            sizes.append(len(x))
            return PGD(0.1, loss=config.maximised, steps=2, random_start=False).launch(model, x, y)

        if config.objective.attacks:
            step.attack = attack
        steps.append(step)
        launched.append([step(x[:n], y[:n], epoch=0, part=0.1, seed=1, length=0.1) for n in (11, 5, 11)])
    if config.objective.attacks and method != "free":
        assert sizes == [11, 5, 11, *({3: [4, 4, 3], 4: [3, 3, 3, 2]}[parts] + [3, 2] + {3: [4, 4, 3], 4: [3, 3, 3, 2]}[parts])]
    for a, b in zip(*launched, strict=True):
        assert a.names == b.names
        assert torch.allclose(a.values, b.values, rtol=1e-11, atol=1e-13)
        assert torch.allclose(a.x_adv, b.x_adv, rtol=0, atol=1e-12)
    one, several = (step.state_dict() for step in steps)
    for kind in ("model", "ema") if one["ema"] else ("model",):
        assert sum(float((w - start[name]).double().norm()) for name, w in one[kind].items()) > 1e-3
        for name, w in one[kind].items():
            assert torch.allclose(w, several[kind][name], rtol=1e-10, atol=1e-12), name


def test_statistics_are_those_of_the_parts():
    """As of three batches: each part moves them once."""
    torch.manual_seed(0)
    model = helpers.network(10).train()
    plain = copy.deepcopy(model)
    x, y = torch.rand(12, 1, 8, 8), torch.randint(10, (12,))
    make_step(settings(method="standard", steps=None, accumulate=3), model)(x, y, epoch=0, part=0.1, seed=1)
    with torch.no_grad():
        for part in x.split(4):
            plain(part)
    assert torch.allclose(model[1].running_mean, plain[1].running_mean, rtol=1e-5)
    assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_agree_with_one(tmp_path, compile):
    """DDP averages the gradients once an update, of all parts; the last batch, of 7, is shared 4 to 3."""
    config = settings(
        tmp_path / "one", model="tests.training.helpers:frozen", momentum=0.0, epochs=1, accumulate=3, start="clean"
    )
    train(replace(config, accumulate=1))
    assert in_two(counted, replace(config, out=tmp_path / "two", compile=compile)) == [0, 0]
    one, two = (weights(tmp_path / name)["model"] for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6), name
    before, after = (events(tmp_path / name, "train")[0]["loss"] for name in ("one", "two"))  # of full batches
    assert after == pytest.approx(before, rel=1e-5)


def counted(config) -> None:
    """Train, and see that gradients are exchanged once an update."""
    exchanged, wrap = [], World.wrap
    with pytest.MonkeyPatch.context() as patched:

        def hooked(world, module):
            wrapped = wrap(world, module)

            def counting(state, bucket):
                exchanged.append(bucket.index())
                return default_hooks.allreduce_hook(state, bucket)

            wrapped.register_comm_hook(None, counting)
            return wrapped

        patched.setattr(World, "wrap", hooked)
        train(config)
    assert len(exchanged) == 5, exchanged  # one bucket, five updates


def test_a_stopped_run_ends_in_the_same_bits(tmp_path):
    config = helpers.expected_and_other(tmp_path, method="trades", accumulate=2, ema=0.9, epochs=2)
    helpers.train_until_stopped(config, helpers.after(3, helpers.send))
    helpers.assert_ends_alike(config)


@pytest.mark.parametrize(
    ("count", "message"), [(0, "--accumulate 0: give at least 1"), (17, "--accumulate 17: of a batch of 32 over 1 process it")]
)
def test_refused(count, message):
    with pytest.raises(InputError, match=message):
        train(settings(accumulate=count), save=False)
    new_run(settings(accumulate=16))

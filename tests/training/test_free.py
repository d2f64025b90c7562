"""Free AT: against a plain loop, resumed bit by bit, on several processes, and what captures its updates."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_train.runtime.signals import Stopped
from spat_train.training import graphed as graphed_module
from spat_train.training.free import FreeStep
from spat_train.training.optim import learning_rate
from spat_train.training.step import Objective
from spat_train.training.trainer import train
from tests.training import helpers
from tests.training.helpers import assert_same, assert_same_run, in_two, network, new_run, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")

FREE = {"method": "free", "steps": None, "replays": 3}


def test_free_training_is_a_plain_loop(tmp_path):
    """Bit by bit, with batch norm and dropout: delta stays, and the last batch, of 7, uses its first rows."""
    config = settings(tmp_path / "run", **FREE, step_size=10.2, schedule="constant", epochs=2)
    train(config)
    run, eps, step_size = new_run(config), torch.tensor(25.5 / 255), torch.tensor(10.2 / 255)
    torch.manual_seed(0)
    plain = network(10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True)
    delta = torch.zeros(32, 1, 8, 8)
    for epoch in range(2):
        for x, y in run.loader.epoch(epoch):
            images = (x + delta[: len(x)]).clamp(0, 1)
            for _ in range(3):
                images.requires_grad_()
                optimizer.zero_grad()
                F.cross_entropy(plain(images), y).backward()
                optimizer.step()
                moved = images.detach() + step_size * images.grad.sign()
                images = moved.clamp(x - eps, x + eps).clamp(0, 1)
            delta[: len(x)] = images - x
    found = weights(config.out)
    assert_same(found["model"], plain.state_dict())
    assert torch.equal(found["processes"][0]["step"]["delta"], delta)
    assert 0.5 * eps < delta.abs().max() <= eps + 1e-6
    assert found["model"]["1.num_batches_tracked"] == 2 * 5 * 3


def test_the_rate_moves_within_replays(monkeypatch):
    config, rates, update = settings(**FREE, schedule="cyclic"), [], FreeStep.update
    run = new_run(config)

    def recorded(step, *batch, **options):
        rates.append(step.optimizer.param_groups[0]["lr"])
        return update(step, *batch, **options)

    monkeypatch.setattr(FreeStep, "update", recorded)
    for number, (x, y) in zip(range(2), run.loader.epoch(0), strict=False):
        run.progress.step = number
        run.train_on(x, y, len(x))
    assert rates == pytest.approx([learning_rate(config, 0, k / 3 / 5) for k in range(1, 7)])


@pytest.mark.parametrize("steps", [3, 8])
def test_a_stopped_run_ends_in_the_same_bits(tmp_path, steps):
    config = helpers.expected_and_other(tmp_path, **FREE, ema=0.9, optimizer="adam", lr=1e-3)
    helpers.train_until_stopped(config, helpers.after(steps, helpers.send))
    assert weights(config.out)["processes"][0]["step"]["delta"].abs().max() > 0
    helpers.assert_ends_alike(config)


def stopped(config) -> None:
    with pytest.raises(Stopped):
        train(config, on_step=helpers.after(2, helpers.send))


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one_and_resume_to_the_same_bits(tmp_path):
    """Without momentum, and with full batches: of a smaller one, each process uses the first rows of its own."""
    options = {**FREE, "replays": 2, "momentum": 0.0, "epochs": 1, "limit": 143, "holdout": 15}
    config = settings(tmp_path / "one", model="tests.training.helpers:frozen", **options)
    train(config)
    expected, other = replace(config, out=tmp_path / "expected"), replace(config, out=tmp_path / "other", resume=True)
    assert in_two(train, expected) == [0, 0]
    one, two = (weights(tmp_path / name)["model"] for name in ("one", "expected"))
    start = new_run(config).model.state_dict()
    for name in one:
        moved = (one[name] - start[name]).float().norm()
        assert (one[name] - two[name]).float().norm() <= 1e-4 * moved, name
    deltas = [own["step"]["delta"] for own in weights(tmp_path / "expected")["processes"]]
    assert [len(delta) for delta in deltas] == [16, 16]
    assert not torch.equal(*deltas)
    assert in_two(stopped, other) == [0, 0]
    assert in_two(train, other) == [0, 0]
    assert_same_run(other.out, expected.out)


def test_rows_that_no_batch_had_begin_at_zero():
    step, x = new_run(settings(**FREE)).step, torch.rand(5, 1, 8, 8)
    step.warm_rows(x[:2]).fill_(0.1)
    rows = step.warm_rows(x)
    assert (rows[:2] == 0.1).all()
    assert (rows[2:] == 0).all()
    assert step.warm_rows(x[:3]).data_ptr() == rows.data_ptr()


def test_half_precision(tmp_path):
    """An overflow, which GradScaler deals with, is no unusable gradient of an attack: no warning, and the run goes on."""
    config = settings(tmp_path / "run", **FREE, precision="fp16", attack_precision="fp32", epochs=2)
    train(config)
    assert weights(config.out)["scaler"]["scale"] > 0


# ---- CUDA graphs


def stand_in(calls: list):
    """For `torch.cuda.make_graphed_callables`: runs the module three times, as its warm-up does, and counts the calls after."""

    def make(module, sample, allow_unused_input=False):
        for _ in range(3):
            module(*sample)
        forward = module.forward

        def counted(*args):
            calls.append(len(args[0]))
            return forward(*args)

        module.forward = counted
        return module

    return make


def test_full_batches_are_captured_and_nothing_else_changes(monkeypatch):
    """With the capture replaced by a stand-in on the CPU: statistics and generators are those of a run without."""
    config, calls = settings(**FREE, epochs=1), []
    expected = train(config, save=False).model
    init = FreeStep.__init__
    monkeypatch.setattr(FreeStep, "__init__", lambda step, *args: init(step, *args) or setattr(step, "captures", True))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in(calls))
    model = train(config, save=False).model
    assert calls == [32] * 3 * 4  # the last batch, of 7, runs as before
    assert_same(dict(model.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_what_cannot_be_captured_runs_without_and_says_so(monkeypatch, error):
    def failing(*args, **options):
        raise error("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", failing)
    run = new_run(settings(**FREE))
    run.step.captures = True
    x, y = next(iter(run.loader.epoch(0)))
    with pytest.warns(RuntimeWarning, match="cannot be captured in a CUDA graph .*not permitted.* --graph never"):
        run.train_on(x, y, len(x))
    run.settle()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *args, **options: 1 / 0)  # it is not tried again
    run.train_on(x, y, len(x))


def test_out_of_memory_in_a_capture_is_an_error(monkeypatch):
    def exhausted(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", exhausted)
    run = new_run(settings())
    x, y = next(iter(run.loader.epoch(0)))
    with pytest.raises(torch.OutOfMemoryError):
        graphed_module.graphed(Objective(run.model, run.config), x, y, None)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_replayed_updates_are_the_eager_ones(precision):
    """Two steps of three updates.

    cuDNN's sums do not repeat to the last bit, and signs of gradients turn: two eager runs in fp32 were up to 0.09 apart.
    """
    config = settings(**FREE, device="cuda", precision=precision, model="small-cnn", momentum=0.0)
    runs = [new_run(config), new_run(replace(config, graph="never"))]
    assert [run.step.captures for run in runs] == [True, False]
    start = copy.deepcopy(runs[0].model.state_dict())
    for run in runs:
        for number, (x, y) in zip(range(2), run.loader.epoch(0), strict=False):
            run.progress.step = number
            run.train_on(x, y, len(x))
        run.settle()
    assert runs[0].step.replayed is not runs[0].step.eager
    for name, t in runs[1].model.state_dict().items():
        moved = (t - start[name]).float().norm()
        assert (runs[0].model.state_dict()[name] - t).float().norm() <= 0.3 * moved, name

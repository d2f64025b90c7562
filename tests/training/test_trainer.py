"""The trainer: that it trains as written, goes on bit by bit after any interruption, and says clearly what stops it."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import connection

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_kernels.input_gradient.trace import _NoLooking
from spat_train.config import Config, check
from spat_train.data.datasets import load
from spat_train.data.images import Dataset
from spat_train.errors import InputError
from spat_train.runtime import atomic_write as files
from spat_train.runtime import logs, signals
from spat_train.runtime.atomic_write import SaveError
from spat_train.runtime.signals import Stopped
from spat_train.training import trainer as module
from spat_train.training.optim import learning_rate, make_optimizer, perturbed_weights
from spat_train.training.trainer import Run, TrainingError, train

pytestmark = pytest.mark.usefixtures("one_thread")
TIMEOUT = 600  # seconds: only a process that hangs takes as long


def network(num_classes: int) -> nn.Module:
    """With batch norm and dropout: statistics and the global random generator must survive an interruption too."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(72, num_classes)
    )


def for_colour(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, num_classes))


def for_8x8(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))


def for_three_classes(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class GivingADict(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x.flatten(1))}


def giving_a_dict(num_classes: int) -> nn.Module:
    return GivingADict(64, num_classes)


def without_parameters(num_classes: int) -> nn.Module:
    return nn.Flatten()


def settings(folder=None, **options) -> Config:
    """4 epochs of 5 steps on 135 digits (the last batch has 7), in well under a second."""
    chosen = {
        "data": "digits", "model": "tests.training.test_trainer:network", "eps": 25.5, "steps": 2, "epochs": 4, "batch_size": 32,
        "limit": 150, "holdout": 15, "lr": 0.05, "schedule": "cosine", "tensorboard": False, "test": False, "val_steps": 2,
        "device": "cpu", "log_every": 3, "pad": 1, "flip": True, "out": folder,
    }  # fmt: skip
    return Config(**chosen | options)


ALONE = module.World(0, 1, torch.device("cpu")), module.GracefulStop(), module.RunFolder(None)
EVERYTHING = {"method": "mart", "alpha": 0.3, "ema": 0.9, "awp": 0.01, "nesterov": True, "start": "uniform"}


def weights(folder, name="last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def assert_same(a, b, where="") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (v, w) in enumerate(zip(a, b, strict=True)):
            assert_same(v, w, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(folder, expected) -> None:
    """Equal in every tensor of the checkpoint: weights, optimiser, averages, generators; and in the log, but for times."""
    ours, theirs = weights(folder), weights(expected)
    for state in (ours, theirs):
        state.pop("id")
        for option in ("out", "resume", "checkpoint_minutes", "test"):
            state["config"].pop(option)
        state["progress"].pop("log_bytes")
    assert_same(ours, theirs)
    assert_same(weights(folder, "best.pt")["model"], weights(expected, "best.pt")["model"])
    for kind in ("train", "validation"):
        lines = [
            [{k: v for k, v in e.items() if k != "images_per_second"} for e in logs.read(f, kind)] for f in (folder, expected)
        ]
        assert lines[0] == lines[1]


# ---- it trains as written


def test_standard_training_is_a_plain_loop():
    config = settings(method="standard", model="small-cnn", weight_decay=1e-3, epochs=2, holdout=0)
    model = train(config, save=False).model
    torch.manual_seed(0)
    from spat_train.models.registry import create

    plain = create("small-cnn", 10, (1, 8, 8)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    run = Run(config, None, *ALONE)
    for epoch in range(2):
        for step, (x, y) in enumerate(run.loader.epoch(epoch)):
            optimizer.param_groups[0]["lr"] = learning_rate(config, epoch, (step + 1) / 5)
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
    assert_same(model.state_dict(), plain.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["madry", "trades", "mart", "fgsm"])
def test_every_method_learns(method, device):
    config = settings(
        method=method, model="small-cnn", limit=None, holdout=0, epochs=4, pad=0, flip=False, lr=0.1, schedule="one-cycle",
        test=True, device=device,
    )  # fmt: skip
    test = train(config, save=False).test
    assert test["clean"] > 80
    assert test["PGD-20"] > 40
    assert list(test) == ["clean", "FGSM", "PGD-20", "C&W-inf-30"]


@pytest.mark.slow
def test_rst_learns_from_extra_images(tmp_path):
    import numpy as np

    data = load("digits")
    np.savez(tmp_path / "extra.npz", image=data.train.pixels.numpy(), label=data.train.labels.numpy())
    given = Run(settings(method="rst", extra=tmp_path / "extra.npz"), data, *ALONE)
    assert given.batch_sizes()[-1] == 32
    assert len(given.loader.order.epoch(0)[0][1]) == 16
    config = settings(
        method="rst", extra=tmp_path / "extra.npz", limit=64, holdout=0, epochs=60, batch_size=64, pad=0, flip=False, test=True
    )
    with_extra = train(replace(config, model="small-cnn"), save=False).test
    without = train(replace(config, model="small-cnn", method="trades", extra=None), save=False).test
    assert with_extra["clean"] > without["clean"] + 3


def test_awp_moves_weights_up_the_gradient_and_back():
    model = nn.Linear(3, 2)
    model(torch.randn(4, 3)).square().sum().backward()
    before, grad = model.weight.detach().clone(), model.weight.grad.clone()
    bias = model.bias.detach().clone()
    with perturbed_weights(model, 0.5):
        expected = before + 0.5 * before.norm() * grad / grad.norm()
        torch.testing.assert_close(model.weight.detach(), expected)
        assert torch.equal(model.bias, bias)
    assert torch.equal(model.weight, before)


def test_awp_updates_with_the_gradient_at_the_moved_weights():
    """One step of plain SGD; the statistics of batch norm move once, as without AWP."""
    config = settings(
        method="standard", model="small-cnn", awp=0.1, momentum=0.0, weight_decay=0.0, epochs=1, batch_size=200, holdout=0
    )
    run = Run(config, None, *ALONE)
    import copy

    theirs = copy.deepcopy(run.model)
    ((x, y),) = run.loader.epoch(0)
    run.step(x, y, len(x))
    probe = copy.deepcopy(theirs)
    F.cross_entropy(probe(x), y).backward()
    moved = copy.deepcopy(theirs)
    with torch.no_grad():
        for p, q in zip(moved.parameters(), probe.parameters(), strict=True):
            if p.ndim > 1:
                p += 0.1 * q.norm() * q.grad / q.grad.norm()
    F.cross_entropy(moved(x), y).backward()
    lr = learning_rate(config, 0, 1.0)
    for p, start, q in zip(run.model.parameters(), theirs.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), start.detach() - lr * q.grad)
    for b, c in zip(run.model.buffers(), moved.buffers(), strict=True):
        torch.testing.assert_close(b, c)


def test_ema_is_the_average_of_the_weights_and_is_what_is_kept(tmp_path):
    config = settings(tmp_path / "run", ema=0.5, epochs=1)
    run = Run(config, None, *ALONE)
    average = None
    for x, y in run.loader.epoch(0):
        run.step(x, y, len(x))
        now = [p.detach().clone() for p in run.model.parameters()]
        average = now if average is None else [0.5 * a + 0.5 * p for a, p in zip(average, now, strict=True)]
        run.progress.step += 1
    for a, p in zip(average, run.evaluated.parameters(), strict=True):
        torch.testing.assert_close(a, p)
    train(replace(config, out=tmp_path / "trained"))
    best = weights(tmp_path / "trained", "best.pt")["model"]
    for a, (name, _) in zip(average, run.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, best[name])
    assert not torch.allclose(run.model[5].weight, best["5.weight"])


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"awp": 0.01, "method": "trades"}])
def test_an_update_looks_at_no_value(options):
    """A GPU would be waited for, and idle meanwhile."""
    run = Run(settings(**options), None, *ALONE)
    (x, y), *_ = run.loader.epoch(0)
    with _NoLooking():
        for _ in range(2):
            run.update(x, x, y, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "precision": "bf16"}, {"awp": 0.01, "method": "trades"}])
def test_a_step_waits_for_nothing_but_the_loss_before(options, monkeypatch):
    run = Run(settings(device="cuda", limit=None, **options), None, module.World(0, 1, torch.device("cuda:0")), *ALONE[1:])
    run.model.train()
    batches = run.loader.epoch(0)
    for _ in range(4):  # the second attack is captured
        run.step(*next(batches), 32)
        run.progress.step += 1
    run.settle()
    monkeypatch.setattr(run, "settle", lambda: None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(*next(batches), 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_unusable_gradients_are_told_of_when_the_loss_is_read():
    run = Run(settings(), None, *ALONE)
    ((x, y), *_) = run.loader.epoch(0)
    attack = run.attack
    run.attack = lambda *batch: (attack(*batch)[0], torch.tensor([0, 1, 1], dtype=torch.uint8))
    run.step(x, y, len(x))
    with pytest.warns(RuntimeWarning, match="NaN for 2 of 3"):
        run.settle()


def test_labels_outside_of_the_classes_are_refused():
    dataset = load("digits", limit=50)
    wrong = replace(dataset, train=replace(dataset.train, labels=dataset.train.labels + 1))
    with pytest.raises(InputError, match="labels outside of 0 to 9"):
        train(settings(), wrong, save=False)
    untested = replace(dataset, test=dataset.test.subset(torch.arange(0)))
    assert train(settings(epochs=1, test=False), untested, save=False).best


def test_weight_decay_can_spare_batch_norm():
    model = network(10)
    spared = make_optimizer(model, settings(decay_norm=False, weight_decay=0.1)).param_groups
    assert [g["weight_decay"] for g in spared] == [0.1, 0.0]
    assert [sorted(p.ndim for p in g["params"]) for g in spared] == [[2, 4], [1, 1, 1, 1]]
    assert len(make_optimizer(model, settings()).param_groups) == 1


def test_schedules():
    def rates(**options):
        config = Config(lr=1.0, epochs=100, **options)
        return [learning_rate(config, epoch, 1.0) for epoch in range(100)]

    piecewise = rates(schedule="piecewise", milestones=(75, 90))
    # "At epoch 75": the 75th is the first with the lower rate, as in the public code, which counts from 1.
    assert piecewise[73] == 1
    assert piecewise[74] == pytest.approx(0.1)
    assert piecewise[89] == pytest.approx(0.01)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for rate in rates(schedule="cosine"):
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        assert rate > 0
        optimizer.step()
        scheduler.step()
    assert learning_rate(Config(lr=1.0, epochs=100, schedule="cosine"), 0, 0.01) == 1
    cycle = rates(schedule="one-cycle")
    assert cycle[29] == pytest.approx(1)
    assert 0.04 < cycle[0] < 0.06
    assert cycle[99] == pytest.approx(1 / 25e4)
    warm = rates(schedule="constant", warmup=10.0)
    assert warm[0] == pytest.approx(0.1)
    assert warm[4] == pytest.approx(0.5)
    assert warm[9:] == [1.0] * 91
    assert Config(lr=0.1, batch_size=512, scale_lr=True).peak_lr == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("epochs", "drops"), [(1, ()), (2, (2,)), (5, (4, 5)), (10, (8, 9)), (30, (23, 27)), (100, (75, 90)), (200, (150, 180))]
)
def test_the_rate_drops_within_the_run(epochs, drops):
    config = Config(epochs=epochs, data="digits")
    check(config)
    assert config.lr_drops == drops
    rates = [learning_rate(config, epoch, 0.5) for epoch in range(epochs)]
    assert rates == pytest.approx([0.1 * 0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(1, epochs + 1)])


def test_ragged_last_batch_of_one_image():
    assert train(settings(method="madry", limit=33, holdout=0, epochs=2), save=False).best is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision, device, monkeypatch):
    seen = []

    def logits(objective, x):
        z = objective.model(x)
        seen.append(z.dtype)
        return z.float()

    monkeypatch.setattr(module.Objective, "logits", logits)
    # The attack in fp32: on CPUs without units for fp16 it takes ten times as long, and tests of its own see to it.
    config = settings(
        method="madry", model="small-cnn", precision=precision, attack_precision="fp32", limit=640, holdout=0, epochs=6, lr=0.1,
        schedule="one-cycle", pad=0, flip=False, test=True, device=device,
    )  # fmt: skip
    result = train(config, save=False)
    assert result.test["clean"] > 70
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_first_step_that_overflows_leaves_no_trace(optimizer, device):
    """GradScaler skips it, and what the optimiser allocated then must not be read in the next one."""

    def steps(*factors) -> list[torch.Tensor]:
        p = nn.Parameter(torch.ones(3, 5, device=device))
        update = make_optimizer(nn.ParameterList([p]), settings(optimizer=optimizer, weight_decay=0.0))
        scaler = torch.amp.GradScaler(device, init_scale=2.0)
        for factor in factors:
            scaler.scale((p * factor).sum()).backward()
            scaler.step(update)
            scaler.update()
            update.zero_grad()
        return [p.detach()]

    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        assert_same(steps(float("inf"), 1.0, 0.5), steps(1.0, 0.5))
    finally:
        torch.use_deterministic_algorithms(deterministic)


@pytest.mark.slow
def test_compiled_update_is_the_eager_one(device):
    config = settings(method="trades", forwards="clean-adv-clean", model="small-cnn", epochs=1, holdout=0, device=device)
    torch._dynamo.utils.counters.clear()
    eager = train(config, save=False).model
    assert not torch._dynamo.utils.counters["frames"]
    compiled = train(replace(config, compile=True), save=False).model
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for p, q in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_and_model_have_the_memory_format_asked_for(channels_last, monkeypatch):
    seen = []

    def watched(num_classes: int) -> nn.Module:
        model = network(num_classes)
        model[0].register_forward_hook(lambda layer, args, z: seen.append((args[0].is_contiguous(), z.is_contiguous())))
        return model

    monkeypatch.setitem(globals(), "watched", watched)
    options = {"model": "tests.training.test_trainer:watched", "epochs": 1, "test": True, "channels_last": channels_last}
    train(settings(**options, input_gradient="autograd"), save=False)
    assert {z for _, z in seen} == {not channels_last}
    # one channel is contiguous either way
    config = settings(model="wrn-10-1", channels_last=channels_last, epochs=1, limit=20)
    pixels = torch.zeros(20, 8, 8, 3, dtype=torch.uint8)
    labels = torch.arange(20) % 10
    images = module.Images(pixels, labels)
    run = Run(config, Dataset("colours", images, images, tuple("0123456789")), *ALONE)
    x, _ = next(iter(run.loader.epoch(0)))
    assert x.is_contiguous() is not channels_last


def test_attacks_get_the_options_of_the_engine(monkeypatch):
    made, asked = [], []
    monkeypatch.setattr("spat_train.training.objectives.PGD", lambda *args, **how: made.append(how))
    monkeypatch.setattr(module, "accuracies", lambda *args, **how: asked.append((args[3], how)) or {"clean": 0.0, "pgd": 0.0})
    options = {"graph": "never", "input_gradient": "autograd", "attack_precision": "bf16", "eval_eps": 51.0, "bn_mode": "batch"}
    run = Run(settings(**options, eval_batch_size=7), None, *ALONE)
    run.validate()
    (how,) = made
    assert (how["graph"], how["input_gradient"], how["precision"], how["bn_mode"]) == (False, "autograd", "bf16", "batch")
    ((eps, how),) = asked
    assert (eps, how["batch_size"], how["precision"], how["input_gradient"]) == (0.2, 7, "bf16", "autograd")


# ---- validation


class Untouchable:
    """A test set that must not be looked at, but for its fingerprint."""

    def __getattr__(self, name):
        raise AssertionError(f"the test set was asked for {name}")


def test_nothing_is_selected_by_the_test_set(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fingerprint", lambda images: "")
    data = load("digits", limit=150)
    train(settings(tmp_path / "run", epochs=2), Dataset("digits", data.train, Untouchable(), data.classes))


def test_held_out_images_are_not_trained_on():
    run = Run(settings(), None, *ALONE)
    held = set(run.held_out.tolist())
    used = {int(row) for rows, _ in run.loader.order.epoch(0) for row in rows}
    assert len(held) == 15
    assert len(used) == 135
    assert not held & used


def test_best_checkpoint_and_early_stopping(tmp_path, monkeypatch):
    scores = iter([30.0, 50.0, 50.0, 40.0, 99.0])
    monkeypatch.setattr(module, "accuracies", lambda *args, **kwargs: {"clean": 80.0, "pgd": next(scores)})
    result = train(settings(tmp_path / "run", epochs=9, patience=2))
    assert result.best == {"epoch": 2, "clean": 80.0, "pgd": 50.0}
    assert [event["pgd"] for event in logs.read(tmp_path / "run", "validation")] == [30, 50, 50, 40]
    assert_same(dict(result.model.state_dict()), weights(tmp_path / "run", "best.pt")["model"])
    assert weights(tmp_path / "run")["progress"]["epoch"] == 4


def test_validation_repeats_and_leaves_training_alone():
    run = Run(settings(), None, *ALONE)
    run.model.train()
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    state = torch.get_rng_state()
    run.validate()
    first = run.progress.best
    run.progress.best = None
    run.validate()
    assert run.progress.best == first
    assert run.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(before, dict(run.model.state_dict()))


def test_the_bar_shows_a_validation_when_it_was_made(monkeypatch):
    shown = []
    monkeypatch.setattr(logs.Log, "show", lambda log, **values: shown.append(values))
    best = train(settings(epochs=2), save=False).best
    seen = [values["best_pgd"] for values in shown if "best_pgd" in values]
    assert "best_pgd" in shown[-1]
    assert len(seen) == 2
    assert seen[-1] == best["pgd"]


def test_bars_in_a_file_are_a_line_a_minute(monkeypatch, capsys):
    for seconds, lines in ((60.0, 0), (0.0, 3)):
        monkeypatch.setattr(logs, "MINUTE", seconds)
        with logs.bar(100, "training") as bar:
            bar.update(50)
            bar.set_postfix_str("FGSM")
        err = capsys.readouterr().err
        assert (err.count("\n"), err.count("\r")) == (lines + (seconds == 0.0), 0)
    assert "training: 50%" in err.replace("  ", " ")
    assert "FGSM" in err
    assert logs.bar(100, None).disable


# ---- interruptions


def processes() -> multiprocessing.context.ForkServerContext:
    """Forked, quickly, from a process that has imported everything but run nothing: autograd does not survive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_distributed", "sklearn.datasets"])
    return context


def on_one_thread(function, *arguments) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def tell(pipe, after: int, config: Config) -> None:
    """Train, and say so once that many steps are done."""
    step, done = Run.step, iter(range(1, 10**6))

    def counted(self, *batch):
        step(self, *batch)
        if next(done) == after:
            pipe.send(after)

    Run.step = counted
    if not after:
        pipe.send(after)
    train(config)


def in_child(config: Config, after: int = 10**6, seconds: float = 0.0) -> int:
    """Train in a process of its own, killed by SIGKILL so many seconds after a step, or the start. Returns its exit code."""
    ours, its = processes().Pipe(duplex=False)
    child = processes().Process(target=on_one_thread, args=(tell, its, after, config))
    child.start()
    if ours in connection.wait([child.sentinel, ours]):
        child.join(seconds)
        child.kill()
    child.join()
    return child.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("options", [EVERYTHING, {"method": "trades", "optimizer": "adam", "lr": 1e-3, "schedule": "one-cycle"}])
def test_killed_at_any_moment_the_run_ends_bit_by_bit_alike(tmp_path, options):
    expected = settings(tmp_path / "expected", **options)
    assert in_child(expected) == 0
    step = 32 / logs.read(tmp_path / "expected", "train")[-1]["images_per_second"]
    killed = replace(expected, out=tmp_path / "killed", resume=True, checkpoint_minutes=1e-9)  # after every step
    chance, kills, code = random.Random(1), 0, None
    while code != 0:
        after = chance.randrange(5)
        code = in_child(killed, after, chance.uniform(0, 2 * step) if kills else 0)  # the first dies early, however fast it is
        kills += code != 0
        assert code in (0, -signal.SIGKILL)
    assert kills
    assert_same_run(tmp_path / "killed", tmp_path / "expected")


def interrupt(monkeypatch, after: int, how) -> None:
    """Call `how` after so many steps."""
    step, count = Run.step, iter(range(10**6))

    def counted(self, *batch):
        step(self, *batch)
        if next(count) + 1 == after:
            how()

    monkeypatch.setattr(Run, "step", counted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after", [1, 5, 8])
def test_signals_save_first(tmp_path, monkeypatch, number, after):
    expected = settings(tmp_path / "expected", **EVERYTHING)
    train(expected)
    stopped = replace(expected, out=tmp_path / "stopped", resume=True)
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        interrupt(patched, after, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped, match="last.pt, to go on with by --resume") as stop:
            train(stopped)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    progress = weights(tmp_path / "stopped")["progress"]
    assert 5 * progress["epoch"] + progress["step"] == after
    train(stopped)
    assert_same_run(tmp_path / "stopped", tmp_path / "expected")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"ema": 0.9, "optimizer": "adam", "lr": 1e-3}])
def test_a_stopped_run_goes_on_on_the_gpu(tmp_path, monkeypatch, options):
    """Generators, scaler and fused optimisers too; cuDNN's sums are not repeatable to the last bit."""
    expected = settings(tmp_path / "expected", method="mart", alpha=0.3, device="cuda", **options)
    train(expected)
    stopped = replace(expected, out=tmp_path / "stopped", resume=True)
    with monkeypatch.context() as patched:
        interrupt(patched, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            train(stopped)
    train(stopped)
    ours, theirs = (weights(tmp_path / name) for name in ("stopped", "expected"))
    assert_same(ours["progress"]["epoch"], 4)
    assert_same(ours["processes"][0]["random"], theirs["processes"][0]["random"])
    for name, t in theirs["model"].items():
        assert (ours["model"][name] - t).float().norm() <= 0.05 * t.float().norm(), name


def test_a_second_sigterm_does_not_stop_the_save(tmp_path, monkeypatch):
    save = Run.save

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        save(self)

    interrupt(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(Run, "save", interrupted)
    with pytest.raises(Stopped):
        train(settings(tmp_path / "run"))
    assert weights(tmp_path / "run")["progress"]["step"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("method", ["load", "make_model"])
def test_signals_before_the_first_step_end_the_run_at_once(tmp_path, monkeypatch, number, method):
    original = getattr(Run, method)

    def interrupted(*args):
        try:
            os.kill(os.getpid(), number)
        except Exception:  # of a reader that takes everything for a broken file
            pytest.fail("the signal was swallowed")
        return original(*args)

    monkeypatch.setattr(Run, method, interrupted)
    with pytest.raises(Stopped, match="before the first step: there is nothing to save") as stop:
        train(settings(tmp_path / "runs" / "run"))
    assert stop.value.exit_code == 128 + number
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("copy", "codes"), [(0.0, [143]), (600.0, [])])
def test_a_second_sigterm_ends_what_never_comes_to_an_end(monkeypatch, copy, codes):
    """Though the main thread is busy outside of Python; not one that may be the first, sent twice."""
    seen, busy = [], [True]
    monkeypatch.setattr(signals, "COPY", copy)
    monkeypatch.setattr(os, "_exit", lambda code: seen.append((code, *busy)))
    send = "import os, sys, time; [(time.sleep(0.1), os.kill(int(sys.argv[1]), 15)) for _ in range(2)]"
    with signals.GracefulStop().heard() as wish:
        sender = subprocess.Popen([sys.executable, "-S", "-c", send, str(os.getpid())])
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # seconds outside of Python
        busy.clear()
        sender.wait()
    assert seen == [(code, True) for code in codes]
    assert wish.number == signal.SIGTERM


def test_signals_of_forked_processes_are_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(signals, "COPY", 0.0)
    monkeypatch.setattr(os, "_exit", seen.append)
    with signals.GracefulStop().heard() as wish:
        for _ in range(2):
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(TIMEOUT,))
            child.start()
            time.sleep(0.1)
            child.terminate()
            time.sleep(0.1)
            child.kill()
            child.join()
    assert not seen
    assert not wish.number


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_reader_that_dies_ends_the_run(tmp_path, monkeypatch, number):
    expected = settings(tmp_path / "expected", stream=True, epochs=3, limit=400, log_every=1)
    train(expected)
    killed = replace(expected, out=tmp_path / "killed", resume=True)
    name = {signal.SIGKILL: "Killed", signal.SIGBUS: "Bus error"}[number]
    with monkeypatch.context() as patched:
        interrupt(patched, 15, lambda: [os.kill(p.pid, number) for p in multiprocessing.active_children()[:1]])
        with pytest.raises(TrainingError, match=f"reader process .*({name}|exited).*--workers 0.*last.pt; with --resume"):
            train(killed)
    for reader in multiprocessing.active_children():  # killed, but perhaps not gone yet
        reader.join(TIMEOUT)
        assert not reader.is_alive()
    train(killed)
    assert_same_run(tmp_path / "killed", tmp_path / "expected")


def exit_code(config: Config) -> None:
    os.setsid()
    try:
        train(config)
    except Stopped as stopped:
        os._exit(stopped.exit_code)


def test_a_signal_to_the_group_does_not_kill_the_readers_before_the_save(tmp_path):
    config = settings(tmp_path / "run", stream=True, workers=2, limit=None, holdout=0, batch_size=16, epochs=1000)
    child = processes().Process(target=exit_code, args=(config,))
    child.start()
    while not logs_of(tmp_path / "run", "train"):
        assert child.is_alive()
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGTERM)
    child.join(TIMEOUT)
    assert child.exitcode == 143
    assert weights(tmp_path / "run")["progress"]["count"] >= 0


def logs_of(folder, kind) -> list[dict]:
    return logs.read(folder, kind) if (folder / "log.jsonl").exists() else []


def test_a_signal_during_validation(tmp_path, monkeypatch):
    train(settings(tmp_path / "expected"))
    stopped = settings(tmp_path / "stopped", resume=True)
    with monkeypatch.context() as patched:
        original = module.accuracies

        def interrupted(*args, on_progress, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, on_progress=on_progress, **kwargs)

        patched.setattr(module, "accuracies", interrupted)
        with pytest.raises(Stopped):
            train(stopped)
    assert weights(tmp_path / "stopped")["progress"]["step"] == 5
    train(stopped)
    assert_same_run(tmp_path / "stopped", tmp_path / "expected")


def test_a_signal_during_the_test(tmp_path, monkeypatch):
    """The model has its best weights by then, which are not the last ones."""
    train(settings(tmp_path / "expected", epochs=3))
    stopped = settings(tmp_path / "stopped", epochs=3, test=True, resume=True)
    interrupted = iter([os.kill])

    def on_progress(run):
        if run.finished:
            next(interrupted)(os.getpid(), signal.SIGTERM)
        return original(run)

    with monkeypatch.context() as patched:
        original = Run.between_batches
        patched.setattr(Run, "between_batches", on_progress)
        with pytest.raises(Stopped, match="last.pt, to go on with by --resume"):
            train(stopped)
    assert_same_run(tmp_path / "stopped", tmp_path / "expected")
    assert train(stopped).test is not None


@pytest.mark.parametrize("options", [{"test": True}, {"test": False}, {"test": True, "patience": 1, "lr": 1e-9}])
def test_a_finished_run_resumes_to_its_result(tmp_path, monkeypatch, capsys, options):
    config = settings(tmp_path / "run", epochs=3, **options)
    first = train(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.delattr(Run, "epoch")
    monkeypatch.delattr(Run, "test")
    again = train(replace(config, resume=True))
    assert "run is finished: nothing is done again" in capsys.readouterr().err
    assert (again.test, again.best, again.summary) == (first.test, first.best, first.summary)
    assert_same(dict(again.model.state_dict()), dict(first.model.state_dict()))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    if first.test:
        assert json.loads(before["result.json"])["test"] == first.test


@pytest.mark.parametrize(
    ("schedule", "before", "after"), [("constant", None, None), ("piecewise", (2,), (2, 4)), ("piecewise", None, (2, 3))]
)
def test_more_epochs_extend_a_finished_run(tmp_path, schedule, before, after):
    expected = settings(tmp_path / "expected", epochs=4, test=True, schedule=schedule, milestones=after)
    result = train(expected)
    longer = replace(expected, out=tmp_path / "longer", resume=True)
    train(replace(longer, epochs=2, milestones=before))
    assert train(longer).test == result.test
    assert_same_run(tmp_path / "longer", tmp_path / "expected")
    with pytest.raises(InputError, match=r"other options \(epochs: 4 -> 3(; .*)?\): give the same"):
        train(replace(longer, epochs=3, milestones=after and (2, 3)))


@pytest.mark.parametrize(
    ("schedule", "why"),
    [
        ("cosine", "which --schedule cosine cannot change"),
        ("one-cycle", "which --schedule one-cycle cannot change"),
        ("piecewise", "where lr dropped at 2: let --milestones begin with these"),
    ],
)
def test_epochs_that_the_schedule_is_spread_over_stay(tmp_path, schedule, why):
    config = settings(tmp_path / "run", epochs=2, schedule=schedule)
    train(config)
    with pytest.raises(InputError, match=f"epochs: 2 -> 4, {why}"):
        train(replace(config, epochs=4, resume=True))


def test_another_number_of_threads_is_told_on_resume(tmp_path, monkeypatch, capsys):
    config = settings(tmp_path / "run", epochs=2, schedule="constant")
    train(config)
    train(replace(config, epochs=3, resume=True))
    assert "rounding" not in capsys.readouterr().err
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    train(replace(config, epochs=4, resume=True))
    assert "spat-train: saved with threads 1, now 7: going on is equal but for rounding\n" in capsys.readouterr().err


@pytest.mark.parametrize("every", [1, 2])
def test_the_log_names_the_steps_that_its_losses_are_of(tmp_path, every):
    train(settings(tmp_path / "run", epochs=2, log_every=every))
    rows = logs_of(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == ([*range(1, 11)] if every == 1 else [2, 4, 5, 7, 9, 10])
    assert all(row["images_per_second"] > 0 for row in rows)


def test_two_runs_do_not_share_a_folder(tmp_path):
    config = settings(tmp_path / "run", epochs=1)
    other = module.RunFolder(tmp_path / "run")
    other.claim()
    with pytest.raises(InputError, match="another run is at work there"):
        train(config)
    other.release()
    train(config)
    (tmp_path / "run" / "best.pt").unlink()
    assert not train(replace(config, resume=True)).model.training
    assert (tmp_path / "run" / "best.pt").exists()  # written anew, though the run was over


def test_readers_that_outlive_a_run_hold_no_lock(tmp_path):
    folder, again = module.RunFolder(tmp_path / "run"), module.RunFolder(tmp_path / "run")
    folder.claim()
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    reader = context.Process(target=lambda: begun.set() or time.sleep(TIMEOUT), daemon=True)
    reader.start()
    assert begun.wait(TIMEOUT)
    with pytest.raises(InputError, match="another run is at work there"):
        again.claim()
    folder._unlock()  # as when the run is killed
    again.claim()
    assert reader.is_alive()
    reader.kill()
    reader.join()
    again.release()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)
    train(settings(tmp_path / "run", epochs=1))
    assert (tmp_path / "run" / "last.pt").exists()


def test_a_loser_leaves_the_winner_s_folder(tmp_path, monkeypatch):
    """Of two that start at once, the one that made the folder may be the one that is refused."""
    winner, loser = module.RunFolder(tmp_path / "run"), module.RunFolder(tmp_path / "run")
    flock = fcntl.flock

    def late(*how):
        with monkeypatch.context() as patched:
            patched.setattr(fcntl, "flock", flock)
            winner.claim()
        flock(*how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="another run is at work there"):
        loser.claim()
    loser.release()
    assert (tmp_path / "run").is_dir()
    winner.release()


def lazy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))


def test_lazy_layers_and_strided_weights():
    assert train(settings(model="tests.training.test_trainer:lazy", epochs=1), save=False).model[0].weight.shape == (4, 1, 3, 3)
    p, q = nn.Parameter(torch.ones(2, 4)[:, ::2]), nn.Parameter(torch.ones(2, 2))
    for weight in (p, q):
        optimizer = make_optimizer(nn.ParameterList([weight]), settings())
        weight.sum().backward()
        optimizer.step()
    assert torch.equal(p, q)


def test_a_refused_run_leaves_no_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("run", "mine", "runs/of/mine", "mine/run"):
        with pytest.raises(InputError, match="there is no such file"):
            train(settings(tmp_path / name, data="nowhere.npz"))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_the_best_weights_are_written_when_they_change(tmp_path, monkeypatch):
    scores, written = iter([30.0, 50.0, 20.0, 40.0]), []
    monkeypatch.setattr(module, "accuracies", lambda *args, **kwargs: {"clean": 80.0, "pgd": next(scores)})
    original = files.write_torch
    monkeypatch.setattr(
        files, "write_torch", lambda path, *args, **how: written.append(path.name) or original(path, *args, **how)
    )
    train(settings(tmp_path / "run"))
    assert written == ["last.pt", "best.pt"] * 2 + ["last.pt"] * 2


def test_a_run_is_not_overwritten(tmp_path):
    config = settings(tmp_path / "run", epochs=1)
    train(config)
    with pytest.raises(InputError, match="holds a run: add --resume"):
        train(config)


def test_results_alone_are_not_overwritten(tmp_path):
    config = settings(tmp_path / "run", epochs=1)
    train(config)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    for resume, message in ((False, "holds a run"), (True, "holds best.pt but no last.pt")):
        with pytest.raises(InputError, match=message):
            train(replace(config, resume=resume))


def test_best_weights_come_from_the_checkpoint(tmp_path, monkeypatch):
    """best.pt is written after last.pt: killed in between, it is older, or not there; going on writes it anew."""
    train(settings(tmp_path / "expected"))
    config = settings(tmp_path / "run", resume=True)
    with monkeypatch.context() as patched:
        interrupt(patched, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            train(config)
    (tmp_path / "run" / "best.pt").unlink()
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "expected")


def test_a_changed_model_is_refused(tmp_path, monkeypatch):
    config = settings(tmp_path / "run", epochs=1)
    train(config)
    monkeypatch.setattr(
        "tests.training.test_trainer.network", lambda num_classes: for_three_classes(3).append(nn.Linear(3, num_classes))
    )
    with pytest.raises(InputError, match="--model tests.training.test_trainer:network: its weights differ from those in"):
        train(replace(config, resume=True))


def test_changed_options_are_refused(tmp_path):
    train(settings(tmp_path / "run", epochs=1))
    with pytest.raises(InputError, match=r"alpha: 0.0 -> 0.5.*give the same"):
        train(settings(tmp_path / "run", epochs=1, alpha=0.5, resume=True))
    train(settings(tmp_path / "run", epochs=1, resume=True, log_every=7))  # which changes no weight


@pytest.mark.parametrize("changed", [("train",), ("test",), ("extra",), ("train", "test", "extra")])
def test_changed_images_are_refused(tmp_path, changed):
    data, extra = load("digits", limit=150), tmp_path / "extra.npz"
    np.savez(extra, image=data.train.pixels, label=data.train.labels)
    config = settings(tmp_path / "run", epochs=1, extra=extra)
    train(config, data)
    for name in changed:
        if name == "extra":
            np.savez(extra, image=data.train.pixels, label=9 - data.train.labels)
        else:
            getattr(data, name).pixels[3, 2, 2, 0] ^= 1
    with pytest.raises(
        InputError, match=rf"{' and '.join(changed)} images or labels differ .*\(--data digits, --extra {extra}\)"
    ):
        train(replace(config, resume=True), data)
    if changed == ("extra",):
        with pytest.raises(InputError, match="extra images or labels differ"):
            train(replace(config, extra=None, resume=True), data)


def test_moved_images_are_the_same(tmp_path):
    data, first, second = load("digits", limit=150), tmp_path / "first", tmp_path / "second"
    first.mkdir()
    arrays = {f"{xy}_{s}": t for s in ("train", "test") for xy, t in zip("xy", vars(getattr(data, s)).values(), strict=True)}
    np.savez(first / "data.npz", **arrays)
    np.savez_compressed(first / "extra.npz", image=data.train.pixels, label=data.train.labels)
    config = settings(tmp_path / "run", epochs=1, schedule="constant", data=str(first / "data.npz"), extra=first / "extra.npz")
    train(config)
    first.rename(second)
    train(replace(config, epochs=2, resume=True, data=str(second / "data.npz"), extra=second / "extra.npz"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(second / "data.npz")


def test_a_run_goes_on_when_a_broken_picture_is_repaired(tmp_path, pictures, capsys):
    path = pictures / "train" / "dog" / "2.png"
    config = settings(
        tmp_path / "run", data=str(pictures), image_size=8, model="tests.training.test_trainer:for_8x8", batch_size=2,
        holdout=0, epochs=2,
        limit=None, workers=0, checkpoint_minutes=1e-9, resume=True,
    )  # fmt: skip
    train(replace(config, out=tmp_path / "expected"))
    good = path.read_bytes()
    path.write_bytes(b"broken")
    with pytest.raises(InputError, match="dog/2.png cannot be decoded .*: repair or remove it"):
        train(config)
    path.write_bytes(good)
    train(config)
    assert "1 of 6 train pictures, dog/2.png the first, have another size than before" in capsys.readouterr().err
    assert_same(weights(tmp_path / "run")["model"], weights(tmp_path / "expected")["model"])


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_checkpoint(tmp_path, size):
    train(settings(tmp_path / "expected"))
    config = settings(tmp_path / "run", resume=True)
    train(replace(config))
    last = tmp_path / "run" / "last.pt"
    os.truncate(last, size if size >= 0 else last.stat().st_size - 50)
    with pytest.raises(InputError, match="last.pt is damaged .*previous.pt"):
        train(config)
    last.unlink()
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "expected")


@pytest.mark.parametrize("call", range(1, 9))
def test_full_disk(tmp_path, monkeypatch, call):
    """The disk is full at one of the first writes: an error, what was good stays, and the run goes on from there."""
    train(settings(tmp_path / "expected", epochs=3))
    config, fsync, count = settings(tmp_path / "run", epochs=3, resume=True), os.fsync, iter(range(1, 1000))

    def full(descriptor):
        if next(count) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(SaveError, match="No space left"):
            train(config)
    assert not list((tmp_path / "run").glob("*.tmp"))
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "expected")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_full_disk_of_the_log(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(SaveError, match="cannot write .*log.jsonl .*No space left"):
        train(settings(tmp_path / "run"))


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    files.write(path, b"old")
    files.write(path, b"newer", keep=tmp_path / "kept")
    assert (path.read_bytes(), (tmp_path / "kept").read_bytes()) == (b"newer", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="cannot write .*file.*No space left.*is as it was"):
        files.write(path, b"newest", keep=tmp_path / "kept")
    assert (path.read_bytes(), (tmp_path / "kept").read_bytes()) == (b"newer", b"old")
    assert sorted(os.listdir(tmp_path)) == ["file", "kept"]
    with pytest.raises(SaveError, match="cannot write"):
        files.write(tmp_path / "nowhere" / "file", b"new")


def test_non_finite_loss_stops_with_its_batch(tmp_path, monkeypatch):
    config = settings(tmp_path / "run")
    update, count = Run.update, iter(range(100))

    def broken(self, *batch):
        loss, terms = update(self, *batch)
        return (loss * torch.nan, terms) if next(count) == 6 else (loss, terms)

    monkeypatch.setattr(Run, "update", broken)
    with pytest.raises(TrainingError, match=r"epoch 2, step 2 is not finite.*nonfinite-rank0.pt.*last.pt.*lower --lr"):
        train(config)
    batch = torch.load(tmp_path / "run" / "nonfinite-rank0.pt", weights_only=True)
    assert batch["x"].shape == batch["x_adv"].shape == (32, 1, 8, 8)
    assert (batch["epoch"], batch["step"]) == (1, 1)
    assert weights(tmp_path / "run")["progress"]["epoch"] == 1
    assert all(t.isfinite().all() for t in weights(tmp_path / "run")["model"].values())


def test_diverging_weights_are_never_saved(tmp_path):
    with pytest.raises(TrainingError, match="not finite.*no checkpoint was written yet"):
        train(settings(tmp_path / "run", lr=1e30, schedule="constant"))
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("where", ["update", "make_model", "validate"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you ..."),
        MemoryError(), RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)  # fmt: skip
def test_out_of_memory_says_what_to_change(tmp_path, monkeypatch, where, error):
    def exhausted(self, *batch):
        raise error

    monkeypatch.setattr(Run, where, exhausted)
    with pytest.raises(InputError, match="--batch-size 32: out of memory.*--precision bf16.*--eval-batch-size"):
        train(settings(tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no-such-model"}, "--model no-such-model"),
        ({"holdout": 150}, "--holdout 150: there are 150 training images"),
        ({"eps": 0.031}, "--eps 0.031: it is in 1/255"),
        ({"inner": "kl", "alpha": 0.5}, "--inner kl: alpha = 0.5 needs lsce"),
        ({"method": "rst"}, "--extra None: this needs pseudo-labelled images"),
        ({"method": "standard", "alpha": 0.5}, "--alpha 0.5: standard training attacks nothing"),
        ({"method": "trades", "start": "clean"}, "--start clean: the gradient of kl is 0"),
        ({"precision": "tf32"}, "--precision tf32: TF32 is for GPUs"),
        ({"device": "cuda:9"}, "--device cuda:9"),
        ({"device": "teapot"}, "--device teapot: give cpu"),
        ({"device": "meta"}, "--device meta: torch has no such device here"),
        ({"optimizer": "adam", "momentum": 1.0}, "--momentum 1.0: give a number below 1"),
        ({"optimizer": "adam", "nesterov": True}, "--nesterov True: it is SGD's"),
        ({"method": "madry", "beta": 5.0}, "--beta 5.0: madry has no KL term"),
        ({"awp_warmup": 3}, "--awp-warmup 3: it needs --awp"),
        ({"extra": "x.npz", "extra_fraction": 0.01}, "--extra-fraction 0.01: of 32 images it leaves one kind none"),
        ({"model": "wrn-10-1", "data": "digits", "batch_size": 0}, "--batch-size 0: give at least 1"),
        ({"model": "tests.training.test_trainer:for_colour"}, r"for digits, it does not take images \[1, 8, 8\]"),
        (
            {"model": "tests.training.test_trainer:for_three_classes"},
            r"two images give \[2, 3\]: it must return logits \[2, 10\]",
        ),
        ({"model": "tests.training.test_trainer:without_parameters"}, "it has no parameter to train"),
        ({"model": "tests.training.test_trainer:giving_a_dict"}, r"two images give dict: it must return logits \[2, 10\]"),
        ({"method": "xyz"}, "--method xyz: choose one of standard, madry"),
        ({"schedule": "cosin"}, "--schedule cosin: choose one of constant, piecewise"),
        ({"inner": "xyz"}, "--inner xyz: loss='xyz': give one of 'ce', 'kl'"),
        ({"milestones": (90, 75)}, "--milestones"),
        ({"schedule": "piecewise", "milestones": (2, 5)}, r"--milestones \(2, 5\): not all come by epoch 4: give others"),
        ({"method": "madry", "forwards": "adv-clean"}, "--forwards adv-clean: madry has one forward: give clean-adv"),
        ({"forwards": "adv"}, "--forwards adv: choose one of clean-adv, adv-clean, clean-adv-clean"),
        ({"patience": 3, "holdout": 0}, "--patience 3: it needs held-out images"),
        ({"epochs": 0}, "--epochs 0: give at least 1"),
        ({"alpha": float("nan")}, "--alpha nan: give a number in"),
        ({"lr": 0.0}, "--lr 0.0: give a number above 0"),
        ({"limit": 1, "holdout": None}, "--data digits: no batch would have 2 images"),
        ({"limit": 5, "holdout": 4}, "of 5 training images 4 are held out: give more, or a lower --holdout"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(settings(tmp_path / "run", **options))

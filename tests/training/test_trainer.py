"""The training: that it does what is written, selects on held-out images alone, and refuses options that do not fit."""

import copy
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_kernels.input_gradient.trace import _NoLooking
from spat_train.config import Config
from spat_train.data.datasets import load
from spat_train.data.images import Dataset, Images
from spat_train.errors import InputError
from spat_train.runtime import atomic_write as files
from spat_train.runtime import logs
from spat_train.training import checkpoint, setup
from spat_train.training import run as run_module
from spat_train.training.check import check
from spat_train.training.optim import learning_rate, make_optimizer
from spat_train.training.run import Run, TrainingError
from spat_train.training.step import Objective, TrainStep
from spat_train.training.trainer import train
from tests.training.helpers import assert_same, events, network, new_run, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- it trains as written


def test_standard_training_is_a_plain_loop(tmp_path):
    """Of batch norm and dropout: validation leaves statistics and random generators alone."""
    config = settings(tmp_path / "run", method="standard", steps=None, weight_decay=1e-3, epochs=2)
    train(config)
    run = new_run(config)
    assert not set(run.held_out.tolist()) & {int(row) for rows, _ in run.loader.order.epoch(0) for row in rows}
    torch.manual_seed(0)
    plain = network(10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True)
    for epoch in range(2):
        for step, (x, y) in enumerate(run.loader.epoch(epoch)):
            optimizer.param_groups[0]["lr"] = learning_rate(config, epoch, (step + 1) / 5)
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
    assert_same(weights(config.out)["model"], plain.state_dict())


LEARNS = {
    "method": "madry", "model": "small-cnn", "holdout": 0, "pad": 0, "flip": False, "lr": 0.1, "schedule": "one-cycle",
    "test": True,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["madry", "trades", "mart", "fgsm"])
def test_every_method_learns(method, device):
    changes = {"method": method} | ({"steps": None} if method == "fgsm" else {})  # which takes one step
    test = train(settings(**LEARNS | changes, limit=None, epochs=4, device=device), save=False).test
    assert test["clean"] > 80
    assert test["PGD-20"] > 40
    assert list(test) == ["clean", "FGSM", "PGD-20", "C&W-inf-30"]


def test_awp_updates_with_the_gradient_at_the_moved_weights():
    """One step of plain SGD; the statistics of batch norm move once, as without AWP."""
    one_batch = {"epochs": 1, "batch_size": 200, "holdout": 0}
    config = settings(method="standard", model="small-cnn", awp=0.1, momentum=0.0, weight_decay=0.0, **one_batch)
    run = new_run(config)
    moved, probe = copy.deepcopy(run.model), copy.deepcopy(run.model)
    start = [p.detach().clone() for p in moved.parameters()]
    ((x, y),) = run.loader.epoch(0)
    run.train_on(x, y, len(x))
    F.cross_entropy(probe(x), y).backward()
    with torch.no_grad():
        for p, q in zip(moved.parameters(), probe.parameters(), strict=True):
            if p.ndim > 1:
                p += 0.1 * q.norm() * q.grad / q.grad.norm()
    F.cross_entropy(moved(x), y).backward()
    lr = learning_rate(config, 0, 1.0)
    for p, before, q in zip(run.model.parameters(), start, moved.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), before - lr * q.grad)
    for b, c in zip(run.model.buffers(), moved.buffers(), strict=True):
        torch.testing.assert_close(b, c)


def test_ema_is_the_average_of_the_weights_and_is_what_is_kept(tmp_path):
    config = settings(tmp_path / "run", ema=0.5, epochs=1)
    run, average = new_run(config), []
    for x, y in run.loader.epoch(0):
        run.train_on(x, y, len(x))
        run.progress.step += 1
        now = [p.detach().clone() for p in run.model.parameters()]
        average = [0.5 * a + 0.5 * p for a, p in zip(average or now, now, strict=True)]
    torch.testing.assert_close(average, list(run.step.evaluated.parameters()))
    train(config)
    best = weights(config.out, "best.pt")["model"]
    torch.testing.assert_close(average, [best[name] for name, _ in run.model.named_parameters()])
    assert not torch.allclose(run.model[5].weight, best["5.weight"])


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"awp": 0.01, "method": "trades"}])
def test_an_update_looks_at_no_value(options):
    """A GPU would be waited for, and idle meanwhile."""
    run = new_run(settings(**options))
    (x, y), *_ = run.loader.epoch(0)
    with _NoLooking():
        for _ in range(2):
            run.step.update(x, x, y, perturb="awp" in options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "precision": "bf16"}, {"awp": 0.01, "method": "trades"}])
def test_a_step_waits_for_nothing_but_the_loss_before(options, monkeypatch):
    run = new_run(settings(device="cuda:0", limit=None, **options))
    run.model.train()
    batches = run.loader.epoch(0)
    for _ in range(4):  # the second attack is captured
        run.train_on(*next(batches), 32)
        run.progress.step += 1
    run.settle()
    monkeypatch.setattr(run, "settle", lambda: None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train_on(*next(batches), 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_unusable_gradients_warn_when_the_loss_is_read():
    run = new_run(settings())
    ((x, y), *_) = run.loader.epoch(0)
    attack = run.step.attack
    run.step.attack = lambda *batch: (attack(*batch)[0], torch.tensor([0, 1, 1], dtype=torch.uint8))
    run.train_on(x, y, len(x))
    with pytest.warns(RuntimeWarning, match="NaN for 2 of 3"):
        run.settle()


def test_labels_outside_of_the_classes_are_refused():
    dataset = load("digits", limit=50)
    wrong = replace(dataset, train=replace(dataset.train, labels=dataset.train.labels + 1))
    with pytest.raises(InputError, match="labels outside of 0 to 9"):
        train(settings(), wrong, save=False)
    untested = replace(dataset, test=dataset.test.subset(torch.arange(0)))
    assert train(settings(epochs=1, test=False), untested, save=False).best


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

    monkeypatch.setattr(Objective, "logits", logits)
    # The attack in fp32: on CPUs without units for fp16 it takes ten times as long, and tests of its own see to it.
    options = {"precision": precision, "attack_precision": "fp32", "device": device}
    result = train(settings(**LEARNS, limit=640, epochs=6, **options), save=False)
    assert result.test["clean"] > 70
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}


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
def test_images_and_model_have_the_memory_format_asked_for(channels_last):
    images, seen = Images(torch.zeros(20, 8, 8, 3, dtype=torch.uint8), torch.arange(20) % 10), []
    config = settings(model="wrn-10-1", channels_last=channels_last, limit=20, input_gradient="autograd")
    run = new_run(config, Dataset("colours", images, images, tuple("0123456789")))
    first = next(layer for layer in run.model.modules() if isinstance(layer, nn.Conv2d))
    first.register_forward_hook(lambda layer, args, z: seen.extend((args[0].is_contiguous(), z.is_contiguous())))
    x, y = next(iter(run.loader.epoch(0)))
    run.train_on(x, y, len(x))
    run.validate()
    assert {x.is_contiguous(), *seen} == {not channels_last}


def test_attacks_get_the_options_of_the_engine(monkeypatch):
    made, asked = {}, {}
    monkeypatch.setattr("spat_train.training.step.PGD", lambda *args, **used: made.update(used))
    score = lambda *args, **used: asked.update(used, eps=args[3]) or {"clean": 0.0, "pgd": 0.0}  # noqa: E731
    monkeypatch.setattr(run_module, "accuracies", score)
    engine = {"input_gradient": "autograd", "bn_mode": "batch", "eval_eps": 51.0}
    new_run(settings(**engine, graph="never", attack_precision="bf16", eval_batch_size=7)).validate()
    assert made.items() >= {"graph": False, "input_gradient": "autograd", "precision": "bf16", "bn_mode": "batch"}.items()
    assert asked.items() >= {"eps": 0.2, "batch_size": 7, "precision": "bf16", "input_gradient": "autograd"}.items()


# ---- optimiser and learning rate


def test_weight_decay_can_spare_batch_norm():
    model = network(10)
    spared = make_optimizer(model, settings(decay_norm=False, weight_decay=0.1)).param_groups
    assert [g["weight_decay"] for g in spared] == [0.1, 0.0]
    assert [sorted(p.ndim for p in g["params"]) for g in spared] == [[2, 4], [1, 1, 1, 1]]
    assert len(make_optimizer(model, settings()).param_groups) == 1


def rates(**options) -> list[float]:
    config = Config(**{"lr": 1.0, "epochs": 100, "data": "digits"} | options)
    check(config)
    return [learning_rate(config, epoch, 1.0) for epoch in range(config.epochs)]


def test_schedules():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for rate in rates(schedule="cosine"):
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        assert rate > 0
        optimizer.step()
        scheduler.step()
    assert learning_rate(Config(lr=1.0, epochs=100, schedule="cosine"), 0, 0.01) == 1
    cycle = rates(schedule="one-cycle")
    assert (cycle[29], cycle[99]) == pytest.approx((1, 1 / 25e4))
    assert 0.04 < cycle[0] < 0.06
    cyclic = rates(schedule="cyclic", epochs=30)
    assert cyclic == pytest.approx([t / 15 for t in range(1, 16)] + [2 - t / 15 for t in range(16, 31)])
    assert learning_rate(Config(lr=1.0, epochs=30, schedule="cyclic"), 14, 0.5) == pytest.approx(14.5 / 15)
    assert rates(schedule="constant", warmup=10.0) == pytest.approx([0.1 * t for t in range(1, 11)] + [1.0] * 90)
    assert Config(lr=0.1, batch_size=512, scale_lr=True).peak_lr == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("epochs", "drops"), [(1, ()), (2, (2,)), (5, (4, 5)), (10, (8, 9)), (30, (23, 27)), (100, (75, 90)), (200, (150, 180))]
)
def test_the_rate_drops_within_the_run(epochs, drops):
    """At epoch 75: the 75th is the first with the lower rate, as in the public code, which counts from 1."""
    assert Config(epochs=epochs).lr_drops == drops
    for milestones in (None, drops):
        expected = [0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(1, epochs + 1)]
        assert rates(epochs=epochs, milestones=milestones) == pytest.approx(expected)


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

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        assert_same(steps(float("inf"), 1.0, 0.5), steps(1.0, 0.5))
    finally:
        torch.use_deterministic_algorithms(False)


def test_lazy_layers_and_strided_weights():
    assert train(settings(model="tests.training.helpers:lazy", epochs=1), save=False).model[0].weight.shape == (4, 1, 3, 3)
    p, q = nn.Parameter(torch.ones(2, 4)[:, ::2]), nn.Parameter(torch.ones(2, 2))
    for weight in (p, q):
        optimizer = make_optimizer(nn.ParameterList([weight]), settings())
        weight.sum().backward()
        optimizer.step()
    assert torch.equal(p, q)


# ---- validation and the log


def test_nothing_is_selected_by_the_test_set(tmp_path, monkeypatch):
    """It has no attribute to look at."""
    monkeypatch.setattr(checkpoint, "fingerprint", lambda images: "")
    data = load("digits", limit=150)
    train(settings(tmp_path / "run", epochs=2), Dataset("digits", data.train, SimpleNamespace(), data.classes))


def test_best_checkpoint_and_early_stopping(tmp_path, monkeypatch):
    scores, written, shown, write = iter([30.0, 50.0, 50.0, 40.0, 99.0]), [], [], files.write_torch
    monkeypatch.setattr(logs.Log, "show", lambda log, **values: shown.append(values.get("best_pgd")))
    monkeypatch.setattr(run_module, "accuracies", lambda *args, **options: {"clean": 80.0, "pgd": next(scores)})
    monkeypatch.setattr(files, "write_torch", lambda path, *args, **kept: written.append(path.name) or write(path, *args, **kept))
    result = train(settings(tmp_path / "run", epochs=9, patience=2))
    assert result.best == {"epoch": 2, "clean": 80.0, "pgd": 50.0}
    assert [event["pgd"] for event in events(tmp_path / "run", "validation")] == [30, 50, 50, 40]
    assert_same(dict(result.model.state_dict()), weights(tmp_path / "run", "best.pt")["model"])
    assert weights(tmp_path / "run")["progress"]["epoch"] == 4
    assert written == ["last.pt", "best.pt"] * 2 + ["last.pt"] * 2
    assert [best for best in shown if best] == [30, 50, 50, 50]
    assert shown[-1] == 50  # when it was made, not with the next step


def test_a_network_that_guesses_is_called_so(tmp_path, monkeypatch):
    for clean, guesses in ((12.0, True), (80.0, False)):
        monkeypatch.setattr(run_module, "accuracies", lambda *args, clean=clean, **options: {"clean": clean, "pgd": 1.0})
        result = train(settings(tmp_path / str(clean)))
        assert ("Clean accuracy is not beyond chance" in result.summary) is guesses


def test_without_an_attack_clean_accuracy_chooses(tmp_path, monkeypatch):
    """A model trained on clean images loses what it had under PGD: its first epoch is not its best."""
    scores = iter([(26.0, 4.8), (60.0, 0.0), (70.0, 0.0), (70.0, 0.1), (69.0, 9.0)])
    monkeypatch.setattr(run_module, "accuracies", lambda *args, **options: dict(zip(("clean", "pgd"), next(scores), strict=True)))
    result = train(settings(tmp_path / "run", method="standard", steps=None, epochs=5, test=False))
    assert result.best == {"epoch": 4, "clean": 70.0, "pgd": 0.1}


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


def test_without_a_terminal_there_is_a_line_at_the_start_and_one_an_epoch(tmp_path, monkeypatch, capsys):
    train(settings(tmp_path / "run", epochs=2))
    start, *epochs = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        f"spat-train: on 1 x .+, 2 epochs of 135 images, 15 more held out; tail -f {tmp_path}/run/log.jsonl", start
    )
    assert len(epochs) == 2
    for line, found, losses in zip(epochs, events(tmp_path / "run", "validation"), (5, 10), strict=True):
        (loss,) = (e["loss"] for e in events(tmp_path / "run", "train") if e["step"] == losses)
        for part in (
            f"epoch={found['epoch']}/2",
            f"loss={loss:.4g}",
            f"val_clean={found['clean']:.4g}",
            f"val_pgd={found['pgd']:.4g}",
        ):
            assert part in line
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(settings(epochs=1), save=False)
    assert "spat-train" not in capsys.readouterr().err


def test_a_broken_test_picture_is_found_before_the_first_step(tmp_path, pictures):
    path = pictures / "val" / "dog" / "1.png"
    path.write_bytes(b"broken")
    config = settings(
        tmp_path / "run", data=str(pictures), image_size=8, model="tests.training.helpers:for_8x8_colour", batch_size=2,
        holdout=0, epochs=1, limit=None, workers=0,
    )  # fmt: skip
    train(config, save=False)  # which does not test
    for options in ({"test": True}, {"test": True, "resume": True}):
        with pytest.raises(InputError, match="dog/1.png cannot be decoded .*: repair or remove it, or start with --skip-broken"):
            train(replace(config, **options))
    assert not config.out.exists()
    train(replace(config, test=True, skip_broken=True))


@pytest.mark.parametrize("every", [1, 2])
def test_the_log_names_the_steps_that_its_losses_are_of(tmp_path, every):
    train(settings(tmp_path / "run", epochs=2, log_every=every))
    rows = events(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == ([*range(1, 11)] if every == 1 else [2, 4, 5, 7, 9, 10])
    assert all(row["images_per_second"] > 0 for row in rows)


# ---- what stops it


def test_non_finite_loss_stops_with_its_batch(tmp_path, monkeypatch):
    config = settings(tmp_path / "run")
    update, count = TrainStep.update, iter(range(100))

    def broken(self, *batch, **options):
        loss, terms = update(self, *batch, **options)
        return (loss * torch.nan, terms) if next(count) == 6 else (loss, terms)

    monkeypatch.setattr(TrainStep, "update", broken)
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


@pytest.mark.parametrize(("owner", "name"), [(TrainStep, "update"), (setup, "make_model"), (Run, "validate")])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory"), (RuntimeError, "CUDA error: out of memory"), (MemoryError, ""),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you ..."), (RuntimeError, "CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)  # fmt: skip
def test_out_of_memory_says_what_to_change(tmp_path, monkeypatch, owner, name, kind, text):
    def exhausted(*args, **options):
        raise kind(text)

    monkeypatch.setattr(owner, name, exhausted)
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
        ({"method": "standard", "steps": None, "alpha": 0.5}, "--alpha 0.5: standard training attacks nothing"),
        ({"method": "trades", "start": "clean"}, "--start clean: the gradient of kl is 0"),
        ({"precision": "tf32"}, "--precision tf32: TF32 is for GPUs"),
        ({"device": "cuda:9"}, "--device cuda:9"),
        ({"device": "teapot"}, "--device teapot: give cpu"),
        ({"device": "meta"}, "--device meta: torch has no such device here"),
        ({"optimizer": "adam", "momentum": 1.0}, "--momentum 1.0: give a number below 1"),
        ({"optimizer": "adam", "nesterov": True}, "--nesterov True: it is SGD's"),
        ({"method": "madry", "beta": 5.0}, "--beta 5.0: madry has no KL term"),
        ({"awp_warmup": 3}, "--awp-warmup 3: it needs --awp"),
        ({"method": "mart", "entropy": 0.1}, "--entropy 0.1: mart has none"),
        ({"method": "adt", "inner_lr": -1.0}, "--inner-lr -1.0: give a number above 0"),
        ({"method": "adt", "step_size": 2.0}, "--step-size 2.0: adt has none: its steps have --inner-lr: leave it out"),
        ({"inner_lr": 0.2}, "--inner-lr 0.2: madry has none, unlike --method adt: leave it out"),
        ({"method": "fgsm", "steps": 2}, "--steps 2: fgsm takes one step: .* --method madry --start clean for PGD"),
        ({"method": "fast", "steps": 5}, "--steps 5: fast takes one step: .* --method madry --start uniform for PGD"),
        ({"method": "n-fgsm", "steps": 5}, "--steps 5: n-fgsm takes one step: .* --method madry --start wide for PGD"),
        ({"val_every": 0}, "--val-every 0: give at least 1, or --holdout 0 for no validation"),
        ({"extra": "x.npz", "extra_fraction": 0.01}, "--extra-fraction 0.01: of 32 images it leaves one kind none"),
        ({"model": "tests.training.helpers:for_8x8_colour"}, r"for digits, it does not take images \[1, 8, 8\]"),
        ({"model": "tests.training.helpers:for_three_classes"}, r"two images give \[2, 3\]: it must return logits \[2, 10\]"),
        ({"model": "tests.training.helpers:without_parameters"}, "it has no parameter to train"),
        ({"model": "tests.training.helpers:giving_a_dict"}, r"two images give dict: it must return logits \[2, 10\]"),
        ({"method": "xyz"}, "--method xyz: choose one of standard, madry"),
        ({"inner": "xyz"}, "--inner xyz: loss='xyz': give one of 'ce', 'kl'"),
        ({"milestones": (90, 75)}, "--milestones"),
        ({"schedule": "piecewise", "milestones": (2, 5)}, r"--milestones \(2, 5\): not all come by epoch 4: give others"),
        (
            {"method": "madry", "forwards": "adv-clean"},
            "--forwards adv-clean: madry has one forward: .* give clean-adv",
        ),
        ({"method": "standard"}, "--steps 2: standard training attacks nothing: leave it out, or give None"),
        ({"method": "mmc-clean", "steps": None, "bn_mode": "train"}, "--bn-mode train: mmc-clean training attacks nothing"),
        ({"patience": 3, "holdout": 0}, "--patience 3: it needs held-out images"),
        ({"epochs": 0}, "--epochs 0: give at least 1"),
        ({"schedule": "cyclic", "warmup": 1.0}, "--warmup 1.0: cyclic warms up by itself"),
        ({"replays": 4}, "--replays 4: madry has one update a batch, unlike --method free: leave it out"),
        ({"method": "free", "steps": None, "replays": 0}, "--replays 0: give at least 1"),
        ({"method": "free", "steps": None, "alpha": 0.2}, "--alpha 0.2: free takes .* update itself, which --label-smoothing"),
        ({"method": "free", "steps": None, "inner": "kl"}, "--inner kl: free takes its examples from"),
        ({"method": "free", "steps": 1}, "--steps 1: free takes its examples from"),
        ({"method": "free", "steps": None, "start": "clean"}, "--start clean: free takes its examples from"),
        ({"method": "free", "steps": None, "bn_mode": "train"}, "--bn-mode train: free takes its examples from"),
        ({"method": "free", "steps": None, "awp": 0.01}, "--awp 0.01: free takes its examples from"),
        ({"catastrophic_overfitting": "stop", "holdout": 0}, "--catastrophic-overfitting stop: it needs held-out images"),
        ({"catastrophic_overfitting": "warn", "method": "standard", "steps": None}, "--catastrophic-overfitting warn: standard"),
        ({"alpha": float("nan")}, "--alpha nan: give a number in"),
        ({"lr": 0.0}, "--lr 0.0: give a number above 0"),
        ({"limit": 5, "holdout": 4}, "--data digits: no batch would have 2 images.*5 training images 4 are held out"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(settings(tmp_path / "run", **options))

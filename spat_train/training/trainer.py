"""A training run: attack, update, validate, save, for each epoch; and go on exactly there after any interruption.

What a step does is a function of the config, the weights and (seed, epoch, step): the images of a batch, their crops, the random
starts and the learning rate are derived anew, not saved. A checkpoint therefore holds the weights, the optimiser, the averages,
the random generators (which only a model's own randomness reads, such as dropout) and where the run is.
"""

import json
import platform
import random
import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spat_kernels.attacks._common import warn_of_nan
from spat_kernels.precision import tf32_switches

from ..config import Config, check
from ..data.datasets import load
from ..data.images import Dataset, Folder, Images, fingerprint, hold_out
from ..data.loader import Loader, Order, death
from ..data.pseudo_labels import load_extra
from ..errors import InputError, first_line, is_out_of_memory
from ..evaluation.evaluate import TEST, Attack, accuracies, validation
from ..models.checkpoints import checkpoint_file, load_checkpoint, normalisation
from ..models.registry import create, try_on
from ..runtime.atomic_write import write_torch
from ..runtime.distributed import World, world
from ..runtime.logs import Log
from ..runtime.run_folder import RunFolder, random_state, set_random_state
from ..runtime.seeding import derived_seed
from ..runtime.signals import GracefulStop, Stopped
from .objectives import Objective, attack_precision, training_attack
from .optim import Average, kept_buffers, learning_rate, make_optimizer, perturbed_weights

PEER = r"Connection (closed|reset) by peer|[Tt]imed out|ncclRemoteError"  # what a process hears of another that ended


class TrainingError(RuntimeError):
    """The run cannot go on. The message says what was saved, and what to change."""


@dataclass
class Progress:
    """Where a run is."""

    epoch: int = 0  # epochs that are trained and validated
    step: int = 0  # updates done in the current one
    best: dict | None = None  # a validation's record
    stale: int = 0  # validations since the best
    sums: dict[str, float] = field(default_factory=dict)  # of the loss and its terms, since the last line of the log,
    count: int = 0  # over so many steps
    log_bytes: int = 0


@dataclass(frozen=True)
class Result:
    """The model, in eval mode, has the best weights where there was a validation, else the last ones. `test` is in percent.

    `summary` is a line on all that; "" where nothing was kept, and in all processes but the main one.
    """

    model: nn.Module
    best: dict | None
    test: dict[str, float] | None
    folder: Path | None
    summary: str = ""


def train(config: Config, dataset: Dataset | None = None, *, save: bool = True) -> Result:
    """Run, or go on with, the training that `config` describes. Seeds torch's, NumPy's and Python's generators.

    Args:
        dataset: instead of loading `config.data`.
        save: write the run's folder; without, everything stays in memory.

    Raises:
        InputError: an option, the data or a checkpoint does not fit.
        TrainingError: the loss is not finite, or a reader process died. SaveError: the disk is full.
        Stopped: by SIGTERM or Ctrl-C, after saving.
    """
    check(config)
    folder = RunFolder(config.folder if save else None)
    # First the processes: while they wait for each other, signals act as ever.
    with world(config.device) as processes, GracefulStop(heeded=False).heard() as wish, gpu_arithmetic(config.precision):
        try:
            run = Run(config, dataset, processes, wish, folder)
            wish.heeded = True
            return run.all()
        except (RuntimeError, MemoryError) as error:
            if reason := death(error):
                raise TrainingError(f"{reason}; {folder.kept()}; with --resume the same command goes on") from error
            if processes.size > 1 and not is_out_of_memory(error) and re.search(PEER, str(error)):
                raise TrainingError(
                    f"another process ended, and may say why ({first_line(error)}); {folder.kept()}, to go on with by --resume"
                ) from error
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"--batch-size {config.batch_size}: out of memory on {processes.device}: lower it, or use --precision bf16 or "
                "more GPUs (torchrun); where that is enough, and on --resume too: --graph never, --stream, or a lower "
                f"--eval-batch-size ({config.evaluation_batch}); {folder.kept()}"
            ) from error
        finally:
            folder.release()


class Run:
    def __init__(self, config: Config, dataset: Dataset | None, processes: World, wish: GracefulStop, folder: RunFolder):
        self.config, self.world, self.wish, self.folder = config, processes, wish, folder
        saved = self.find_saved()
        self.resumed = saved is not None
        self.dataset, self.extra = processes.in_turn(lambda: self.load(dataset))
        self.images: dict[str, Images | Folder] = {"train": self.dataset.train, "test": self.dataset.test}
        self.images |= {"extra": self.extra} if self.extra else {}
        self.fingerprints = {name: fingerprint(images) for name, images in self.images.items()}
        folders = {name: images for name, images in self.images.items() if isinstance(images, Folder)}
        self.file_sizes = {name: images.bytes() for name, images in folders.items()} if self.world.main else {}
        if saved is not None:
            self.compare_images(saved)
        self.make_model()
        self.make_loader()
        self.progress = Progress()
        self.log: Log | None = None
        self.pending: tuple | None = None  # what `settle` reads of the last step
        self.best_weights: dict[str, Tensor] | None = None
        if saved is not None:
            self.restore(saved)
        self.saved_at = time.monotonic()

    # ---- what a run consists of

    def load(self, dataset: Dataset | None) -> tuple[Dataset, Images | None]:
        c = self.config
        data = dataset or load(
            c.data, root=c.root, download=c.download, image_size=c.image_size, limit=c.limit, seed=c.seed,
            skip_broken=c.skip_broken,
        )  # fmt: skip
        labels = data.train.labels
        if ((labels < 0) | (labels >= data.num_classes)).any():  # the attack does not look at them, nor do GPUs before they fail
            raise InputError(f"{data.name}: there are labels outside of 0 to {data.num_classes - 1}: give those of its classes")
        try:
            c.maximised.check_classes(data.num_classes, targeted=False)
        except ValueError as error:
            raise InputError(f"--inner {c.inner_loss}: {error}") from error
        if c.extra is None:
            return data, None
        return data, load_extra(c.extra, image_shape=data.image_shape, num_classes=data.num_classes)

    def make_loader(self) -> None:
        config, train = self.config, self.dataset.train
        colour, side = train.image_shape[0] == 3, train.image_shape[1]
        count = min(len(train) // 10, 1000) if config.holdout is None else config.holdout
        if count >= len(train):
            raise InputError(f"--holdout {count}: there are {len(train)} training images: hold out fewer")
        rows, self.held_out = hold_out(train.labels, count, config.seed)
        extra, fraction = (len(self.extra), config.extra_fraction) if self.extra else (0, 0.0)
        order = Order(rows, config.batch_size, config.seed, extra, fraction)
        if order.batch_size < self.world.size:
            raise InputError(
                f"--batch-size {config.batch_size}: it is over all {self.world.size} processes: give at least so many"
            )
        self.loader = Loader(
            train, order, device=self.world.device, extra=self.extra, workers=config.workers,
            pad=config.pad if config.pad is not None else side // 8 if colour else 0,
            flip=colour if config.flip is None else config.flip,
            rank=self.world.rank, world=self.world.size, resident=False if config.stream else None,
            memory_format=self.memory_format,
        )  # fmt: skip
        if max(self.batch_sizes()) < self.smallest_batch:
            raise InputError(
                f"--data {config.data}: no batch would have {self.smallest_batch} images, the fewest to train on; "
                f"of {len(train)} training images {count} are held out: give more, or a lower --holdout"
            )

    def make_model(self) -> None:
        config, device = self.config, self.world.device
        seed_generators(config.seed)  # alike in all processes, for equal weights
        shape, classes = self.dataset.image_shape, self.dataset.num_classes
        try:
            model = create(config.model, classes, shape, activation=config.activation, mean=config.mean, std=config.std)
        except ValueError as error:
            raise InputError(f"--model {config.model}: {error}") from error
        self.model = model.to(device)
        self.try_model(shape, classes)  # first: lazy layers have no weights before
        if config.init and not self.resumed:
            try:
                before = normalisation(self.model)
                load_checkpoint(self.model, checkpoint_file(config.init))
                if (its := normalisation(self.model)) != before:
                    raise InputError(f"--mean, --std: {config.init} has others: give its own ({its})")
            except InputError as error:
                raise InputError(f"--init: {error}") from error
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's hints do not know this form
        if config.sync_bn:
            if self.world.size == 1:
                raise InputError("--sync-bn: there is one process: leave it out, or start several by torchrun")
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.statistics = [b for b in self.model.buffers() if b.is_floating_point()]
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.ema = Average(self.model, config.ema) if config.ema else None
        self.objective: Callable[..., Any] = self.world.wrap(Objective(self.model, config))
        if config.compile:
            self.objective = torch.compile(self.objective)
        self.attack = training_attack(config)
        self.generator = torch.Generator(device)
        if self.world.rank:
            seed_generators(config.seed + self.world.rank)  # from here on for dropout and its like

    def try_model(self, shape: tuple[int, int, int], classes: int) -> None:
        """Two images through the model, so that one that does not fit them says so before any work."""
        if not any(p.requires_grad for p in self.model.parameters()):
            raise InputError(f"--model {self.config.model}: it has no parameter to train")
        self.model.eval()
        try:
            _, self.memory_format = try_on(self.model, shape, classes, self.config.memory_format, differentiate=True)
        except ValueError as error:
            raise InputError(f"--model {self.config.model}: for {self.config.data}, {error}") from error
        if self.memory_format != self.config.memory_format and self.world.main:
            print(f"spat-train: --model {self.config.model} fails on channels_last: it gets contiguous images", file=sys.stderr)
        self.model.train()

    @property
    def evaluated(self) -> nn.Module:
        """What is validated and tested."""
        return self.ema.module if self.ema else self.model

    # ---- the loop

    def all(self) -> Result:
        config, progress = self.config, self.progress
        result = self.world.gather(self.folder.result())[0] if self.finished else None
        if self.finished and (result or not config.test):
            self.say(f"{self.folder.path} is finished: nothing is done again")
            return self.result(result and result["test"])
        if self.world.main:
            self.folder.write("config.json", config.to_json())
            sizes = self.batch_sizes()  # the same in every epoch
            done = progress.epoch * sum(sizes) + sum(sizes[: progress.step])
            self.log = Log(
                self.folder.path, total=config.epochs * sum(sizes), done=done, position=progress.log_bytes,
                step=self.global_step, tensorboard=config.tensorboard, name=config.preset or config.label,
            )  # fmt: skip
            where = {"epoch": progress.epoch + 1, "step": self.global_step, "steps_per_epoch": len(sizes)}
            self.log.write("start", **where, **self.environment())
            if progress.best:
                self.log.show(best_pgd=progress.best["pgd"])
        try:
            while not self.finished:
                self.epoch()
            self.take_best()
            test = self.test() if config.test else None
        finally:
            if self.log:
                self.log.close()
        return self.result(test)

    def take_best(self) -> None:
        if self.best_weights is not None:
            self.evaluated.load_state_dict(self.best_weights)

    def result(self, test: dict[str, float] | None) -> Result:
        self.take_best()
        folder, best = self.folder.path, self.progress.best
        name, epoch = ("best.pt", best["epoch"]) if best else ("last.pt", self.progress.epoch)
        summary = f"{folder}: {name}, of epoch {epoch} of {self.progress.epoch}"
        if percent := test or best:
            kind, count = ("test", len(self.dataset.test)) if test else ("held-out", len(self.held_out))
            found = ", ".join(f"{k} {v:.2f} %" for k, v in percent.items() if k != "epoch")
            summary += f": {found} on {count} {kind} images"
        return Result(self.evaluated.eval(), best, test, folder, summary if folder and self.world.main else "")

    def say(self, text: str) -> None:
        if self.world.main:
            print(f"spat-train: {text}", file=sys.stderr)

    @property
    def finished(self) -> bool:
        patience = self.config.patience
        return self.progress.epoch >= self.config.epochs or (patience is not None and self.progress.stale >= patience)

    @property
    def global_step(self) -> int:
        return self.progress.epoch * self.loader.order.steps + self.progress.step

    def epoch(self) -> None:
        config, progress = self.config, self.progress
        self.model.train()
        sizes = self.batch_sizes()
        for x, y in self.loader.epoch(progress.epoch, progress.step):
            size = sizes[progress.step]
            if size >= self.smallest_batch:
                self.step(x, y, size)
            progress.step += 1
            if self.log:
                self.log.advance(size)
            self.between_steps()
        self.settle()
        self.write_losses()
        if len(self.held_out) and ((progress.epoch + 1) % config.val_every == 0 or progress.epoch + 1 == config.epochs):
            self.validate()
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.save()

    @property
    def smallest_batch(self) -> int:
        """What is trained on: less would leave a process without an image, or batch norm with one."""
        return min(2 * self.world.size, self.config.batch_size)

    def batch_sizes(self) -> list[int]:
        """Images in each batch of an epoch, over all processes."""
        return [len(rows) + len(extra) for rows, extra in self.loader.order.epoch(0)]

    def step(self, x: Tensor, y: Tensor, size: int) -> None:
        """Attack and update on this process's part of a batch of `size` images.

        Nothing here waits for the device but `settle`, and that for the step before: an update's hundreds of launches take longer
        than its kernels, and are made while the attack runs.
        """
        self.generator.manual_seed(self.random_seed())
        x_adv, nan_seen = self.attack(self.model, x, y, self.generator)
        lr = learning_rate(self.config, self.progress.epoch, (self.progress.step + 1) / self.loader.order.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Gradients are averaged over processes, whose parts may differ in size.
        loss, terms = self.update(x, x_adv, y, len(x) * self.world.size / size)
        values = torch.stack([loss.detach(), *terms.values()]).to("cpu", non_blocking=True)
        nan_seen = nan_seen.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if self.world.device.type == "cuda" else None
        self.settle()  # the loss of the step before: the device is busy with this one meanwhile
        place = self.progress.epoch, self.progress.step
        self.pending = ["loss", *terms], values, nan_seen, arrived, (x, x_adv, y), *place

    def update(self, x: Tensor, x_adv: Tensor, y: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        config, objective = self.config, self.objective

        def differentiate() -> tuple[Tensor, dict[str, Tensor]]:
            with self.forward_precision():
                loss, terms = objective(x, x_adv, y)
            self.scaler.scale(loss * weight).backward()
            return loss, terms

        if config.awp and self.progress.epoch >= config.awp_warmup:
            with kept_buffers(self.model):
                differentiate()
            with perturbed_weights(self.model, config.awp):
                self.optimizer.zero_grad()
                loss, terms = differentiate()
        else:
            loss, terms = differentiate()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.world.average_buffers(self.statistics)
        if self.ema:
            self.ema.update(self.model)
        return loss, terms

    def forward_precision(self):
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision)
        return torch.autocast(self.world.device.type, half, enabled=half is not None)

    def random_seed(self) -> int:
        """Of this process in this step."""
        return derived_seed(self.config.seed, self.global_step, self.world.rank)

    # ---- between steps

    def settle(self) -> None:
        """Read the loss of the last step, and stop where it is not finite; warn of unusable gradients in its attack."""
        if self.pending is None:
            return
        names, values, nan_seen, arrived, batch, epoch, step = self.pending
        self.pending = None
        if arrived:
            arrived.synchronize()
        warn_of_nan(int(nan_seen.sum()), len(nan_seen))
        losses = dict(zip(names, values.tolist(), strict=True))
        if not values.isfinite().all():
            self.stop_at(losses, batch, epoch, step)
        sums = self.progress.sums
        for name, number in losses.items():
            sums[name] = sums.get(name, 0.0) + number
        self.progress.count += 1
        if self.log:
            self.log.show(**losses, lr=self.optimizer.param_groups[0]["lr"])

    def stop_at(self, values: dict[str, float], batch: tuple[Tensor, Tensor, Tensor], epoch: int, step: int) -> None:
        where = ""
        if self.folder.path:
            self.folder.path.mkdir(parents=True, exist_ok=True)  # other machines may have a disk of their own
            path = self.folder.path / f"nonfinite-rank{self.world.rank}.pt"
            x, x_adv, y = (t.cpu() for t in batch)
            write_torch(path, {"x": x, "x_adv": x_adv, "y": y, "epoch": epoch, "step": step, "loss": values})
            where = f" its batch is in {path};"
        raise TrainingError(
            f"the loss of epoch {epoch + 1}, step {step + 1} is not finite ({values});{where} {self.folder.kept()}: "
            "train anew with a lower --lr, or --precision bf16 or fp32"
        )

    def between_steps(self) -> None:
        """Log; save where it is time; stop where a signal asks for it."""
        if self.progress.count >= self.config.log_every:
            self.write_losses()
        late = time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
        signal, due = self.world.agree(self.wish.number, late and self.world.main)
        if signal:
            self.stop(int(signal))
        elif due:
            self.save()

    def stop(self, signal: int) -> None:
        if not self.finished:  # else all is saved, and the model may have its best weights now
            self.save()
        raise Stopped(
            signal,
            f"stopped by signal {signal} in epoch {self.progress.epoch + 1}; {self.folder.kept()}, to go on with by --resume",
        )

    def write_losses(self) -> None:
        progress = self.progress
        totals = self.world.add(*progress.sums.values())
        if self.log and progress.count:
            means = {name: t / progress.count / self.world.size for name, t in zip(progress.sums, totals, strict=True)}
            lr = self.optimizer.param_groups[0]["lr"]
            step = self.global_step - (self.pending is not None)  # whose loss is not read yet
            self.log.write("train", epoch=progress.epoch + 1, step=step, lr=lr, **means, images_per_second=self.log.rate())
        progress.sums, progress.count = {}, 0

    def validate(self) -> None:
        progress = self.progress
        percent = self.accuracies("validation", self.dataset.train, validation(self.config.val_steps), self.held_out)
        record = {"epoch": progress.epoch + 1, **percent}
        if progress.best is None or (record["pgd"], record["clean"]) > (progress.best["pgd"], progress.best["clean"]):
            progress.best, progress.stale = record, 0
            self.best_weights = {name: t.detach().cpu().clone() for name, t in self.evaluated.state_dict().items()}
        else:
            progress.stale += 1
        if self.log:
            self.log.show(best_pgd=progress.best["pgd"])
            self.log.write("validation", step=self.global_step, **record)
            self.log.rate()  # the validation's time is not the training's

    def test(self) -> dict[str, float]:
        percent = self.accuracies("test", self.dataset.test, TEST)
        if self.log:
            self.log.write("test", step=self.global_step, **percent)
            result = {
                "test": percent, "test_images": len(self.dataset.test), "best": self.progress.best,
                "checkpoint": self.folder.saved_id, "config": self.config.to_dict(), **self.environment(),
            }  # fmt: skip
            self.folder.write("result.json", json.dumps(result, indent=1))
        return percent

    def accuracies(
        self, name: str, images: Images | Folder, attacks: dict[str, Attack], rows: Tensor | None = None
    ) -> dict[str, float]:
        config = self.config
        # Without graphs, which would hold memory beside the training's for a handful of replays.
        return accuracies(
            self.evaluated, images, attacks, config.evaluation_eps / 255, rows=rows, seed=config.seed, world=self.world,
            batch_size=config.evaluation_batch, on_progress=self.between_batches, precision=attack_precision(config),
            memory_format=self.memory_format, bar=name if self.world.main else None,
            input_gradient=config.input_gradient, graph=False,
        )  # fmt: skip

    def between_batches(self) -> None:
        """Of an evaluation: stop where a signal asks for it."""
        (signal,) = self.world.agree(self.wish.number)
        if signal:
            self.stop(int(signal))

    # ---- checkpoints

    def save(self) -> None:
        self.saved_at = time.monotonic()
        if not self.folder.path:
            return
        self.settle()
        own = self.world.gather({"random": random_state(), "sums": self.progress.sums})
        if not self.world.main:
            return
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise TrainingError(
                f"weights are not finite; {self.folder.kept()}: train anew with a lower --lr, or --precision bf16 or fp32"
            )
        if self.log:
            self.progress.log_bytes = self.log.position()
        state = {
            "config": self.config.to_dict(),
            "data": self.fingerprints,
            "file_sizes": self.file_sizes,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "averaged": self.ema.count if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "processes": own,
            "arithmetic": self.arithmetic(),
            "progress": asdict(self.progress),
            "best": self.best_weights,
        }
        self.folder.save(state)

    def find_saved(self) -> dict | None:
        if self.world.main:
            self.folder.claim()  # before reading: another run may be at its last save
        saved = self.folder.open(self.config.resume)
        seen = self.world.gather(saved and saved["id"])
        if len(set(seen)) > 1:
            raise InputError(
                f"--out {self.folder.path}: processes find different checkpoints there: give a folder that all machines share"
            )
        if saved and (changed := self.config.differences(saved["config"])):
            raise InputError(
                f"--resume: {self.folder.path} was made with other options ({'; '.join(changed)}): "
                "give the same, or choose another --out"
            )
        return saved

    def compare_images(self, saved: dict) -> None:
        """Refuse others than the run began with. Files of another size may have been repaired: a note names them."""
        before, now = saved["data"], self.fingerprints
        if changed := [kind for kind in {**before, **now} if before.get(kind) != now.get(kind)]:
            given = ", ".join(f"--{name} {saved['config'][name]}" for name in ("data", "extra") if saved["config"][name])
            raise InputError(
                f"--resume: {' and '.join(changed)} images or labels differ from those that {self.folder.path} was trained on "
                f"({given}): give those, or choose another --out"
            )
        for kind, images in self.images.items():
            if isinstance(images, Folder) and self.world.main:
                others = (self.file_sizes[kind] != saved["file_sizes"][kind]).nonzero()[:, 0].tolist()
                if others:
                    print(
                        f"spat-train: {len(others)} of {len(images)} {kind} pictures, {images.files[others[0]]} the first, have "
                        "another size than before: right if they were repaired",
                        file=sys.stderr,
                    )

    def restore(self, saved: dict) -> None:
        try:
            self.model.load_state_dict(saved["model"])
        except RuntimeError as error:
            raise InputError(
                f"--model {self.config.model}: its weights differ from those in {self.folder.path}: restore its code, or choose "
                "another --out"
            ) from error
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(saved["ema"])
            self.ema.count = saved["averaged"]
        self.progress, self.best_weights = Progress(**saved["progress"]), saved["best"]
        if self.world.main:
            self.folder.write_best(saved)
        was, now = saved.get("arithmetic", {}), self.arithmetic()
        changed = [f"{name} {value}, now {now[name]}" for name, value in was.items() if value != now[name]]
        if changed and not self.finished:
            self.say(f"saved with {'; '.join(changed)}: going on is equal but for rounding")
        own = saved["processes"][self.world.rank % len(saved["processes"])]
        set_random_state(own["random"])
        self.progress.sums = own["sums"]

    def arithmetic(self) -> dict:
        """What rounding depends on."""
        device = self.world.device
        on_gpu = device.type == "cuda"
        return {
            "spat_kernels": version("spat_kernels"),
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
            "threads": None if on_gpu else torch.get_num_threads(),
            "processes": self.world.size,
        }

    def environment(self) -> dict:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return self.arithmetic() | {"threads": torch.get_num_threads(), "time": now}


@contextmanager
def gpu_arithmetic(precision: str):
    """Within: TF32 only where `precision` asks for it, and the fastest of cuDNN's engines; set back afterwards."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with tf32_switches(precision, "cuda" if torch.cuda.is_available() else "cpu"):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


def seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (for models that use the global one)

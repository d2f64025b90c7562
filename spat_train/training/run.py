"""The loop of a training run: for each epoch attack, update, validate and save.

What a step does is a function of the config, the weights and (seed, epoch, step): the images of a batch, their crops, the random
starts and the learning rate are computed from these, not saved. A checkpoint therefore holds the weights, the optimiser, the
averages, the random generators (which only a model's own randomness reads, such as dropout) and where the run is.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from ..config import Config
from ..data.images import Dataset, Folder, Images
from ..errors import InputError
from ..evaluation.attack_specs import Attack
from ..evaluation.evaluate import TEST, accuracies, validation
from ..runtime.distributed import World
from ..runtime.logs import Log
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import derived_seed, random_state, set_random_state
from ..runtime.signals import GracefulStop, Stopped
from .checkpoint import ImageRecord, Progress, arithmetic, environment, find_saved, warn_of_rounding
from .messages import FINER, TrainingError, not_finite, say
from .setup import batch_sizes, load_images, make_loader, make_log, make_model, seed_generators, smallest_batch
from .step import Launched, Span, TrainStep, no_span, spanned

OnStep = Callable[["Run"], object]


@dataclass(frozen=True)
class Result:
    """What a training gives.

    Attributes:
        model: in eval mode, with the best weights where there was a validation, else the last ones.
        best: the validation that chose them: epoch, clean and pgd accuracy in percent. None without validation.
        test: accuracies in percent by attack. None without `config.test`.
        folder: of the run; None where nothing was saved.
        summary: a line on all that; "" where nothing was saved, and in all processes but the main one.
    """

    model: nn.Module
    best: dict | None
    test: dict[str, float] | None
    folder: Path | None
    summary: str = ""


class Run:
    """The loop around `TrainStep`: batches, logs, validation, checkpoints and signals.

    Args:
        wish: asks the run to stop, between two steps or during an evaluation.
        on_step: called with this run after every step.
        span: surrounds the parts of the loop, for timers: "loader", those of `TrainStep`, "settle", "between" and "save".
    """

    def __init__(
        self, config: Config, dataset: Dataset | None, processes: World, wish: GracefulStop, folder: RunFolder,
        *, on_step: OnStep | None = None, span: Span = no_span,
    ):  # fmt: skip
        self.config, self.world, self.wish, self.folder = config, processes, wish, folder
        self.on_step, self.span = on_step or (lambda run: None), span
        saved = find_saved(config, processes, folder)
        self.dataset, extra = processes.in_turn(lambda: load_images(config, dataset))
        self.images = ImageRecord(self.dataset, extra, processes)
        if saved is not None:
            self.images.compare(saved, folder)
        self.model, self.memory_format = make_model(config, self.dataset, processes, init=saved is None)
        self.step = TrainStep(config, self.model, processes, span)
        if processes.rank:
            seed_generators(config.seed + processes.rank)  # from here on for dropout and its like
        self.loader, self.held_out = make_loader(config, self.dataset, extra, processes, self.memory_format)
        self.progress = Progress()
        self.log: Log | None = None
        self.pending: tuple[Launched, int, int] | None = None  # the last step, its epoch and number: `settle` reads its loss
        self.best_weights: dict[str, Tensor] | None = None
        if saved is not None:
            self.restore(saved)
        self.saved_at = time.monotonic()

    # ---- the loop

    def all(self) -> Result:
        result = self.world.gather(self.folder.result())[0] if self.finished else None
        if self.finished and (result or not self.config.test):
            say(self.world, f"{self.folder.path} is finished: nothing is done again")
            return self.result(result and result["test"])
        if self.world.main:
            self.log = make_log(self.config, self.loader.order, self.progress, self.folder, self.world)
        try:
            while not self.finished:
                self.epoch()
            self.take_best()
            test = self.test() if self.config.test else None
        finally:
            if self.log:
                self.log.close()
        return self.result(test)

    def epoch(self) -> None:
        config, progress = self.config, self.progress
        self.model.train()
        sizes, smallest = batch_sizes(self.loader.order), smallest_batch(config, self.world)
        for x, y in spanned(self.span, "loader", self.loader.epoch(progress.epoch, progress.step)):
            size = sizes[progress.step]
            if size >= smallest:
                self.train_on(x, y, size)
            progress.step += 1
            if self.log:
                self.log.advance(size)
            with self.span("between"):
                self.between_steps()
        self.settle()
        self.write_losses()
        if len(self.held_out) and ((progress.epoch + 1) % config.val_every == 0 or progress.epoch + 1 == config.epochs):
            self.validate()
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.save()

    def train_on(self, x: Tensor, y: Tensor, size: int) -> None:
        """A step on this process's part of a batch of `size` images."""
        epoch, step = self.progress.epoch, self.progress.step
        launched = self.step(
            x, y, epoch=epoch, part=(step + 1) / self.loader.order.steps,
            seed=derived_seed(self.config.seed, self.global_step, self.world.rank),
            weight=len(x) * self.world.size / size,  # gradients are averaged over processes, whose parts may differ in size
        )  # fmt: skip
        self.settle()  # the loss of the step before: the device is busy with this one meanwhile
        self.pending = launched, epoch, step
        self.on_step(self)

    @property
    def finished(self) -> bool:
        patience = self.config.patience
        return self.progress.epoch >= self.config.epochs or (patience is not None and self.progress.stale >= patience)

    @property
    def global_step(self) -> int:
        return self.progress.epoch * self.loader.order.steps + self.progress.step

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

    def between_batches(self) -> None:
        """During an evaluation: stop where a signal asks for it."""
        (signal,) = self.world.agree(self.wish.number)
        if signal:
            self.stop(int(signal))

    def stop(self, signal: int) -> None:
        if not self.finished:  # else all is saved, and the model may have its best weights now
            self.save()
        place = f"epoch {self.progress.epoch + 1}; {self.folder.kept()}, to go on with by --resume"
        raise Stopped(signal, f"stopped by signal {signal} in {place}")

    # ---- losses and the log

    def settle(self) -> None:
        """Read the loss of the last step, and stop where it is not finite; warn of unusable gradients in its attack."""
        if self.pending is None:
            return
        (launched, epoch, step), self.pending = self.pending, None
        with self.span("settle"):
            losses = launched.read()
        if not all(map(math.isfinite, losses.values())):
            raise not_finite(self.folder, self.world.rank, launched, losses, epoch, step)
        sums = self.progress.sums
        for name, number in losses.items():
            sums[name] = sums.get(name, 0.0) + number
        self.progress.count += 1
        if self.log:
            self.log.show(**losses, lr=self.learning_rate)

    @property
    def learning_rate(self) -> float:
        return self.step.optimizer.param_groups[0]["lr"]

    def write_losses(self) -> None:
        """Their means since the last call, over all processes, to the log."""
        progress = self.progress
        totals = self.world.add(*progress.sums.values())
        if self.log and progress.count:
            means = {name: t / progress.count / self.world.size for name, t in zip(progress.sums, totals, strict=True)}
            place = {
                "epoch": progress.epoch + 1,
                "step": self.global_step - (self.pending is not None),
            }  # whose loss is not read yet
            self.log.write("train", **place, lr=self.learning_rate, **means, images_per_second=self.log.rate())
        progress.sums, progress.count = {}, 0

    # ---- validation and test

    def validate(self) -> None:
        progress = self.progress
        percent = self.accuracies("validation", self.dataset.train, validation(self.config.val_steps), self.held_out)
        record = {"epoch": progress.epoch + 1, **percent}
        if progress.best is None or (record["pgd"], record["clean"]) > (progress.best["pgd"], progress.best["clean"]):
            progress.best, progress.stale = record, 0
            self.best_weights = {name: t.detach().cpu().clone() for name, t in self.step.evaluated.state_dict().items()}
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
                "checkpoint": self.folder.saved_id, "config": self.config.to_dict(), **environment(self.world),
            }  # fmt: skip
            self.folder.write("result.json", json.dumps(result, indent=1))
        return percent

    def accuracies(
        self, name: str, images: Images | Folder, attacks: dict[str, Attack], rows: Tensor | None = None
    ) -> dict[str, float]:
        c = self.config
        # Without graphs, which would hold memory beside the training's for a handful of replays.
        return accuracies(
            self.step.evaluated, images, attacks, c.evaluation_eps_in_x, rows=rows, seed=c.seed, world=self.world,
            batch_size=c.evaluation_batch, on_progress=self.between_batches, precision=c.precision_of_attacks,
            memory_format=self.memory_format, bar=name if self.world.main else None,
            input_gradient=c.input_gradient, graph=False,
        )  # fmt: skip

    def take_best(self) -> None:
        if self.best_weights is not None:
            self.step.evaluated.load_state_dict(self.best_weights)

    def result(self, test: dict[str, float] | None) -> Result:
        self.take_best()
        folder, best = self.folder.path, self.progress.best
        name, epoch = ("best.pt", best["epoch"]) if best else ("last.pt", self.progress.epoch)
        summary = f"{folder}: {name}, of epoch {epoch} of {self.progress.epoch}"
        if percent := test or best:
            kind, count = ("test", len(self.dataset.test)) if test else ("held-out", len(self.held_out))
            found = ", ".join(f"{k} {v:.2f} %" for k, v in percent.items() if k != "epoch")
            summary += f": {found} on {count} {kind} images"
        return Result(self.step.evaluated.eval(), best, test, folder, summary if folder and self.world.main else "")

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
            raise TrainingError(f"weights are not finite; {self.folder.kept()}: start again {FINER}")
        if self.log:
            self.progress.log_bytes = self.log.position()
        state = {
            "config": self.config.to_dict(),
            "data": self.images.fingerprints,
            "file_sizes": self.images.file_sizes,
            **self.step.state_dict(),
            "processes": own,
            "arithmetic": arithmetic(self.world),
            "progress": asdict(self.progress),
            "best": self.best_weights,
        }
        with self.span("save"):
            self.folder.save(state)

    def restore(self, saved: dict) -> None:
        try:
            self.step.load_state_dict(saved)
        except RuntimeError as error:
            raise InputError(
                f"--model {self.config.model}: its weights differ from those in {self.folder.path}: restore its code, or choose "
                "another --out"
            ) from error
        self.progress, self.best_weights = Progress(**saved["progress"]), saved["best"]
        if self.world.main:
            self.folder.write_best(saved)
        if not self.finished:
            warn_of_rounding(saved, self.world)
        own = saved["processes"][self.world.rank % len(saved["processes"])]
        set_random_state(own["random"])
        self.progress.sums = own["sums"]

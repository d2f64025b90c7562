"""The loop of a training run: for each epoch attack, update, validate and save.

What a step does is a function of the config, the weights and (seed, epoch, step): the images of a batch, their crops, the random
starts and the learning rate are computed from these, not saved. A checkpoint therefore holds the weights, the optimiser, the
averages, the random generators (which only a model's own randomness reads, such as dropout) and where the run is.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from ..config import Config
from ..data.images import Dataset, Folder, Images
from ..data.picture_folders import check_readable
from ..data.sizes import parse_sizes, resized, side_in
from ..errors import InputError, is_out_of_memory
from ..evaluation.attack_specs import Attack
from ..evaluation.evaluate import TEST, accuracies, validation
from ..evaluation.result import beats_guessing
from ..models.hub import PRIVATE, published
from ..runtime.atomic_write import write_torch
from ..runtime.distributed import World
from ..runtime.logs import Log
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import derived_seed, random_state, set_random_state
from ..runtime.signals import GracefulStop, Stopped
from ..runtime.trackers import Trackers
from . import checkpoint, overfitting, setup
from .checkpoint import say
from .free import make_step
from .saved_form import Progress, as_written, check_loaded
from .step import Launched, Span, spanned

OnStep = Callable[["Run"], object]
OnValidation = Callable[["Run", dict], object]
FINER = "with a lower --lr, or --precision bf16 or fp32"


class TrainingError(RuntimeError):
    """The run cannot continue. The message says what was saved, and what to change."""


@dataclass(frozen=True)
class Result:
    """What a training gives.

    Attributes:
        model: in eval mode, with the best weights where there was a validation, else the last ones.
        best: the validation that chose them: epoch, clean and pgd accuracy in percent. None without validation.
        test: accuracies in percent by attack. None without `config.test`.
        folder: of the run; None where nothing was saved.
        summary: a line on all that; "" where nothing was saved, and in all processes but the main one.
        held_out: number of images of a validation.
    """

    model: nn.Module
    best: dict | None
    test: dict[str, float] | None
    folder: Path | None
    summary: str = ""
    held_out: int = 0


class Run:
    """The loop around `TrainStep`: batches, logs, validation, checkpoints and signals.

    Args:
        wish: asks the run to stop, between two steps or during an evaluation.
        on_step: called with this run after every step.
        on_validation: called with this run and the validation's record, after every validation and its save.
        span: surrounds the parts of the loop, for timers: "loader", those of `TrainStep`, "settle", "between" and "save".
    """

    def __init__(
        self, config: Config, dataset: Dataset | None, processes: World, wish: GracefulStop, folder: RunFolder,
        *, on_step: OnStep | None = None, on_validation: OnValidation | None = None, span: Span = nullcontext,
    ):  # fmt: skip
        self.config, self.world, self.wish, self.folder = config, processes, wish, folder
        self.on_step, self.on_validation, self.span = on_step, on_validation, span
        saved = checkpoint.find_saved(config, processes, folder)
        self.dataset, extra = processes.in_turn(lambda: setup.load_images(config, dataset))
        self.images = checkpoint.image_record(self.dataset, extra, processes)
        if saved is not None:
            with as_written(folder.path):
                checkpoint.compare_images(self.dataset, self.images, saved, folder)
        self.model, self.memory_format = setup.make_model(config, self.dataset, processes, init=saved is None)
        self.step = make_step(config, self.model, processes, span)
        if processes.rank:
            setup.seed_generators(config.seed + processes.rank)  # from here on for dropout and its like
        self.loader, self.held_out = setup.make_loader(config, self.dataset, extra, processes, self.memory_format)
        self.sizes = setup.batch_sizes(self.loader.order)
        self.train_sizes = parse_sizes(config.train_sizes)
        self.chosen_by = ("pgd", "clean") if config.objective.attacks else ("clean", "pgd")  # what makes a model the best
        self.progress = Progress()
        self.log: Log | None = None
        self.pending: tuple[Launched, int, int] | None = None  # the last step, its epoch and number: `settle` reads its loss
        self.best_weights: dict[str, Tensor] | None = None
        self.snapshot: dict | None = None  # of all that updates change, at the best validation: what a rollback goes back to
        if saved is not None:
            self.restore(saved)
        elif config.test and not config.skip_broken and isinstance(test := self.dataset.test, Folder):
            processes.on_main(lambda: check_readable(test))  # else a broken one would be found after all epochs
        self.saved_at = time.monotonic()

    # ---- the loop

    def all(self) -> Result:
        result = self.world.gather(self.folder.result())[0] if self.finished else None
        if self.finished and (result or not self.config.test):
            say(f"{self.folder.path} is finished: nothing is done again", self.world)
            return self.result(result and result["test"])
        self.world.on_main(self.open_log)
        complete = False
        try:
            while not self.finished:
                self.epoch()
            test = self.test() if self.config.test else None
            complete = True
        finally:
            if self.log:
                self.log.close(complete)
        return self.result(test)

    def epoch(self) -> None:
        config, progress = self.config, self.progress
        self.model.train()
        if self.log:
            self.log.show(epoch=f"{progress.epoch + 1}/{config.epochs}")
        for x, y in spanned(self.span, "loader", self.loader.epoch(progress.epoch, progress.step)):
            size = self.sizes[progress.step]
            if size >= setup.smallest_batch(config, self.world):
                self.train_on(x, y, size)
            progress.step += 1
            if self.log:
                self.log.advance(size)
            with self.span("between"):
                if progress.count >= config.log_every:
                    self.write_losses()
                late = time.monotonic() - self.saved_at > 60 * config.checkpoint_minutes
                self.save_or_stop(due=late and self.world.main)
        self.settle()
        self.write_losses()
        validated = None
        if len(self.held_out) and ((progress.epoch + 1) % config.val_every == 0 or progress.epoch + 1 == config.epochs):
            validated = self.validate()
        if self.log:
            self.log.line()
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.save()
        if validated and self.on_validation:
            self.on_validation(self, validated)

    def train_on(self, x: Tensor, y: Tensor, size: int) -> None:
        """A step on this process's part of a batch of `size` images."""
        epoch, step = self.progress.epoch, self.progress.step
        launched = self.step(
            resized(x, side_in(self.train_sizes, epoch)), y, epoch=epoch, part=(step + 1) / self.loader.order.steps,
            seed=derived_seed(self.config.seed, self.global_step, self.world.rank),
            weight=len(x) * self.world.size / size,  # gradients are averaged over processes, whose parts may differ in size
            length=1 / self.loader.order.steps,
        )  # fmt: skip
        self.settle()  # the loss of the step before: the device is busy with this one meanwhile
        self.pending = launched, epoch, step
        if self.on_step:
            self.on_step(self)

    @property
    def finished(self) -> bool:
        stopped = self.config.overfitting_alarm == "stop" and bool(self.progress.collapses)
        return stopped or self.progress.epoch >= self.config.epochs or self.progress.stale >= (self.config.patience or math.inf)

    @property
    def global_step(self) -> int:
        return self.progress.epoch * self.loader.order.steps + self.progress.step

    def between_batches(self) -> None:
        """Called between the batches of an evaluation."""
        self.save_or_stop()

    def save_or_stop(self, due: bool = False) -> None:
        """Save where it is due in any process; save and stop where a signal asks one of them to."""
        signal, due_anywhere = self.world.agree(self.wish.number, due)
        if (signal or due_anywhere) and not self.finished:  # else all is saved, and the model may have its best weights now
            self.save()
        if signal:
            where = "the final test" if self.finished else f"epoch {self.progress.epoch + 1}"
            place = f"{where}; {self.folder.kept()}, to go on with by --resume"
            raise Stopped(int(signal), f"stopped by signal {int(signal)} in {place}")

    # ---- losses and the log

    def open_log(self) -> None:
        """Open the log of the main process, from `progress` on, and the trackers. Writes config.json too."""
        c, progress, images = self.config, self.progress, sum(self.sizes)
        public = {name: value for name, value in published(c).to_dict().items() if name not in PRIVATE}
        trackers = Trackers(c.track, self.folder, public, self.global_step)
        try:
            self.folder.write("config.json", c.to_dict())
            self.log = Log(
                self.folder.path, total=c.epochs * images, done=progress.epoch * images + sum(self.sizes[: progress.step]),
                position=progress.log_bytes, crc=progress.log_crc, name=c.preset or c.label, trackers=trackers,
            )  # fmt: skip
            start = {"epoch": progress.epoch + 1, "step": self.global_step, "steps_per_epoch": len(self.sizes)}
            self.log.write("start", **start, **checkpoint.environment(self.world))
        except BaseException:
            trackers.close(complete=False)
            raise
        device, tail = checkpoint.arithmetic(self.world)["device"], f"; tail -f {self.log.path}" if self.folder.path else ""
        held_out = f", {len(self.held_out)} more held out" if len(self.held_out) else ""
        self.log.line(f"spat-train: on {self.world.size} x {device}, {c.epochs} epochs of {images} images{held_out}{tail}")
        if progress.best:
            self.show_best(self.log)

    def settle(self) -> None:
        """Read the loss of the last step, and stop where it is not finite; warn of unusable gradients in its attack."""
        if self.pending is None:
            return
        (launched, epoch, step), self.pending = self.pending, None
        with self.span("settle"):
            losses = launched.read()
        if not all(map(math.isfinite, losses.values())):
            where = ""
            if self.folder.path:
                path = self.folder.path / f"nonfinite-rank{self.world.rank}.pt"
                path.parent.mkdir(parents=True, exist_ok=True)  # other machines may have a disk of their own
                images = {name: getattr(launched, name).cpu() for name in ("x", "x_adv", "y")}
                write_torch(path, images | {"epoch": epoch, "step": step, "loss": losses})
                where = f" its batch is in {path};"
            place = f"epoch {epoch + 1}, step {step + 1}"
            raise TrainingError(f"the loss of {place} is not finite ({losses});{where} {self.folder.kept()}: start again {FINER}")
        sums = self.progress.sums
        self.progress.sums = {name: sums.get(name, 0.0) + number for name, number in losses.items()}
        self.progress.count += 1
        if self.log:
            self.log.show(**losses, lr=self.step.lr)

    def write_losses(self) -> None:
        """Their means since the last call, over all processes, to the log."""
        progress = self.progress
        totals = self.world.add(*progress.sums.values())
        if self.log and progress.count:
            means = {name: t / progress.count / self.world.size for name, t in zip(progress.sums, totals, strict=True)}
            lr = self.step.lr
            step = self.global_step - (self.pending is not None)  # whose loss is not read yet
            self.log.show(**means)
            self.log.write("train", epoch=progress.epoch + 1, step=step, lr=lr, **means, images_per_second=self.log.rate())
        progress.sums, progress.count = {}, 0

    # ---- validation and test

    def validate(self) -> dict:
        progress, action = self.progress, self.config.overfitting_alarm
        attacks = validation(self.config.val_steps) | ({} if action == "off" else {"fgsm": TEST["FGSM"]})
        percent = self.accuracies("validation", self.dataset.train, attacks, self.held_out)
        record = {"epoch": progress.epoch + 1, **percent}
        if progress.best is None or self.quality(record) > self.quality(progress.best):
            progress.best, progress.stale = record, 0
            self.best_weights = {name: t.detach().cpu().clone() for name, t in self.step.evaluated.state_dict().items()}
            self.snapshot = overfitting.on_host(self.step.state_dict()) if action == "rollback" else None
        else:
            progress.stale += 1
        if self.log:
            self.log.show(**{f"val_{name}": v for name, v in percent.items()})
            self.show_best(self.log)
            self.log.write("validation", step=self.global_step, **record)
            self.log.rate()  # the validation's time is not the training's
        if action != "off":
            self.answer_collapse(record, action)
        return record

    def answer_collapse(self, now: dict, action: str) -> None:
        """Where `now` raises the alarm: say so, and roll back if that is the `action` and there are better weights."""
        best, progress = self.progress.best, self.progress
        assert best
        images, classes, validations = len(self.held_out), self.dataset.num_classes, overfitting.validations(self.config)
        fall = overfitting.collapse(now, best, images, validations)
        p = overfitting.one_step_alone(now, images, classes, validations) if fall is None else fall
        if p is None:
            return
        to_best = fall is not None or beats_guessing(best["pgd"], images, classes)
        undone = action == "rollback" and to_best
        said = any((epoch in progress.left) != to_best for epoch in progress.collapses)  # the same
        if undone or action == "stop" or not said:
            again = any(epoch > best["epoch"] and epoch not in progress.left for epoch in progress.collapses)
            then = overfitting.consequence(self.config, best, to_best, again)
            say(overfitting.line(now, best, then, fell=fall is not None), self.world)
        progress.collapses.append(now["epoch"])
        if not to_best:
            progress.left.append(now["epoch"])
        if self.log:
            then_and_now = {f"best_{name}": best[name] for name in ("epoch", "pgd", "fgsm") if name in best} | now
            facts = {"action": action, "undone": undone, "p": p, "count": len(progress.collapses)}
            self.log.write("overfitting", step=self.global_step, **facts, **then_and_now)
        if undone and self.snapshot is not None:  # but for own states: perturbations go on
            self.step.load_state_dict(overfitting.on_host(self.snapshot))

    def quality(self, validation: dict) -> list[float]:
        return [validation[name] for name in self.chosen_by]

    def show_best(self, log: Log) -> None:
        assert self.progress.best
        name = self.chosen_by[0]
        log.show(**{f"best_{name}": self.progress.best[name]})

    def take_best(self) -> None:
        if self.best_weights is not None:
            self.step.evaluated.load_state_dict(self.best_weights)

    def test(self) -> dict[str, float]:
        self.take_best()
        percent = self.accuracies("test", self.dataset.test, TEST)
        if self.log:
            self.log.write("test", step=self.global_step, **percent)
            result = {
                "test": percent, "test_images": len(self.dataset.test), "best": self.progress.best,
                "checkpoint": self.folder.saved_id, "config": self.config.to_dict(), **checkpoint.environment(self.world),
            }  # fmt: skip
            self.folder.write("result.json", result)
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

    def result(self, test: dict[str, float] | None) -> Result:
        self.take_best()
        folder, best = self.folder.path, self.progress.best
        name, epoch = ("best.pt", best["epoch"]) if best else ("last.pt", self.progress.epoch)
        summary = f"{folder}: {name}, of epoch {epoch} of {self.progress.epoch}"
        if percent := test or best:
            kind, count = ("test", len(self.dataset.test)) if test else ("held-out", len(self.held_out))
            found = ", ".join(f"{k} {v:.2f} %" for k, v in percent.items() if k != "epoch")
            summary += f": {found} on {count} {kind} images"
            if not beats_guessing(percent["clean"], count, self.dataset.num_classes):
                summary += ". Clean accuracy is not beyond chance: train longer, or with another --lr"
        if best:
            alarms = self.progress.collapses, self.progress.left
            summary += overfitting.in_words(self.config.overfitting_alarm, *alarms, best["epoch"])
        summary = summary if folder and self.world.main else ""
        return Result(self.step.evaluated.eval(), best, test, folder, summary, len(self.held_out))

    # ---- checkpoints

    def save(self) -> None:
        self.saved_at = time.monotonic()
        if not self.folder.path:
            return
        self.settle()
        own = self.world.gather({"random": random_state(), "sums": self.progress.sums, "step": self.step.own_state()})
        trained = self.step.state_dict()
        if not self.world.main:
            return
        if not all(bool(trained["model"][name].isfinite().all()) for name, _ in self.model.named_parameters()):
            raise TrainingError(f"weights are not finite; {self.folder.kept()}: start again {FINER}")
        if self.log:
            self.progress.log_bytes, self.progress.log_crc = self.log.position(), self.log.crc
        state = {"config": self.config.to_dict(), "progress": asdict(self.progress), "best": self.best_weights, "processes": own}
        state |= {"snapshot": self.snapshot} if self.config.overfitting_alarm == "rollback" else {}
        state |= {"arithmetic": checkpoint.arithmetic(self.world), **self.images, **trained}
        state |= {"classes": list(self.dataset.classes), "image_shape": list(self.dataset.image_shape)}
        with self.span("save"):
            self.folder.save(state)

    def restore(self, saved: dict) -> None:
        own = saved["processes"][self.world.rank % len(saved["processes"])]
        with as_written(self.folder.path):
            self._load(saved)
            set_random_state(own["random"])
            self.step.load_own_state(own.get("step", {}))  # older checkpoints have none
        self.progress, self.best_weights = Progress(**saved["progress"]), saved["best"]
        self.progress.sums = own["sums"]
        self.snapshot = saved.get("snapshot")
        if self.world.main:
            self.folder.write_best(saved)
        if not self.finished:
            checkpoint.warn_of_rounding(saved, self.world)

    def _load(self, saved: dict) -> None:
        try:
            self.step.load_state_dict(saved)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            where = f"its weights differ from those in {self.folder.path}: restore its code, or choose another --out"
            raise InputError(f"--model {self.config.model}: {where}") from error
        check_loaded(self.step.model, self.step.optimizer, saved)

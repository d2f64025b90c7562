"""Where the time of a trainer's step goes: `python -m benchmarks.overhead --out benchmarks/results/cpu/overhead.json`.

Runs the trainer itself on an epoch of random images, stops it after some steps as a signal would, and takes their time apart:
the attack, the forward and backward of the objective, the optimiser, and all that is around them, which is batches, seeds,
learning rate, reading the loss, logs, the progress bar and signals. What comes once an epoch (its order, TensorBoard, a
checkpoint) is spread over its steps. The host of a GPU runs ahead, so there events tell when the device came to a part and when
it was through: a part has what the device worked and what it had to wait for launches.
"""

import signal
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
import tyro

from benchmarks import measure, training
from benchmarks.data import random_images
from benchmarks.judge import CLASSES
from benchmarks.tables import SETTINGS, Formula, environment, markdown
from benchmarks.training import METHODS
from spat_train.config import Config
from spat_train.data.images import Dataset, Images
from spat_train.runtime.distributed import World
from spat_train.runtime.run_folder import RunFolder
from spat_train.runtime.signals import GracefulStop, Stopped
from spat_train.training.run import Run
from spat_train.training.trainer import gpu_arithmetic


class Clock:
    """Seconds spent in calls, by name: the host's, or those that a GPU is between their first kernel and their last. Calls inside
    of others count in both."""

    def __init__(self, device: str):
        self.cuda, self.events = device.startswith("cuda"), []
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, name: str):
        start = self._now()
        try:
            yield
        finally:
            self.events.append((name, start, self._now()))

    def _now(self):
        return torch.cuda.current_stream().record_event(torch.cuda.Event(True)) if self.cuda else time.perf_counter()

    def read(self) -> dict[str, float]:
        """All so far. Waits for the GPU."""
        for name, start, end in self.events:
            if self.cuda:
                end.synchronize()
            self.seconds[name] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        self.events.clear()
        return dict(self.seconds)


def run_for(config: Config, images: Images, folder: Path, warm_up: int, updates: int) -> dict:
    """Train as `config` says into `folder`, stop after `warm_up` + `updates` steps, and take the time of those `updates` apart.

    Returns:
        dict: `step_seconds`, per step; `parts`, what of that went where; `epoch_parts`, what an epoch takes beside its steps;
        `epoch_seconds`; `head_seconds`, the loss without the model, forward and backward; `steps_per_epoch`.
    """
    wish, clock, begin_of_steps = GracefulStop(), Clock(config.device), []
    marks: list[tuple[float, dict[str, float]]] = []  # at the end of each step

    def span(name: str):
        if name == "attack" and not begin_of_steps:
            measure.synchronize(config.device)
            begin_of_steps.append(time.perf_counter())
        return clock.span(name)

    def on_step(run: Run) -> None:
        waits = len(marks) + 1 in (warm_up, warm_up + updates)
        if waits:
            measure.synchronize(config.device)
        marks.append((time.perf_counter(), clock.read() if waits else {}))
        wish.number = signal.SIGTERM if len(marks) == warm_up + updates else 0

    dataset = Dataset("images", images, images, tuple(map(str, range(CLASSES))))
    world = World(0, 1, torch.device(config.device))
    run = Run(config, dataset, world, wish, RunFolder(folder), on_step=on_step, span=span)
    start = time.perf_counter()
    with gpu_arithmetic(config.precision), suppress(Stopped):
        run.all()
    if not wish.number:
        raise ValueError(f"there are no {warm_up + updates} steps in {config.epochs} epochs: give more images")
    (begin, before), (end, after) = marks[warm_up - 1], marks[-1]
    parts = {name: (after[name] - before.get(name, 0.0)) / updates for name in after if name != "save"}
    total = (end - begin) / updates
    parts["forward, backward"] = parts.pop("update") - parts["optimizer"]
    parts["rest"] = total - sum(parts.values())
    once = {"start": begin_of_steps[0] - start, "save": clock.read()["save"]}
    steps = run.loader.order.steps
    by_time = once["save"] * steps * total / (60 * config.checkpoint_minutes)
    found = {"step_seconds": total, "parts": parts, "epoch_parts": once, "steps_per_epoch": steps}
    return found | {"epoch_seconds": steps * total + sum(once.values()) + by_time, "head_seconds": head_seconds(config)}


def head_seconds(config: Config) -> float:
    """The loss of `config.method` at logits [B, K] in fp32, forward and backward."""
    clean, adv = (torch.randn(config.batch_size, CLASSES, device=config.device, requires_grad=True) for _ in range(2))
    y = torch.randint(CLASSES, (config.batch_size,), device=config.device)
    method = config.objective
    inputs = [{"clean": clean, "adv": adv}[kind] for kind in method.reads]

    def call() -> None:
        torch.autograd.grad(sum(method.head(clean, adv, y, beta=config.kl_weight).values()), inputs)

    return measure.seconds_per_call(call, config.device)


@dataclass
class Options:
    """Run the trainer for some steps of an epoch and take its time apart."""

    model: str = "wrn-16-4"
    batch: int = 64
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    precisions: list[str] = field(default_factory=lambda: ["fp32"])
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    steps: int = 10
    """Gradient steps of the attack."""
    updates: int = 10
    """Steps of the trainer that are measured."""
    warm_up: int = 3
    """Steps before those, at least 1."""
    images: int = 50_000
    """Random images in an epoch."""
    out: Path | None = None
    """Write raw results here, after every run. Runs that it already has are not made again."""


def table(results: dict) -> str:
    """Shares of a step. `around` is all but the model's work and the optimiser; it has what comes once an epoch in it."""

    def step(r: dict) -> float:
        return r["epoch_seconds"] / r["steps_per_epoch"]

    def share(*parts: str) -> Formula:
        return lambda r: 100 * sum(r["parts"][part] for part in parts) / step(r)

    return markdown(
        results, results["loops"],
        "method | precision || s a step | attack | forward, backward | optimiser | around | of that batches | once an epoch | "
        "loss alone | epoch, s",
        "{method} | {precision} || {step:.3f} | {attack:.2g} % | {passes:.2g} % | {optimizer:.2g} % | {around:.2g} % | "
        "{loader:.2g} % | {once:.2g} % | {loss:.2g} % | {epoch_seconds:.0f}",
        f"{SETTINGS}, {{settings[images]:,}} images.", environment,
        step=step, attack=share("attack"), passes=share("forward, backward"), optimizer=share("optimizer"),
        around=lambda r: 100 - share("attack", "forward, backward", "optimizer")(r), loader=share("loader"),
        once=lambda r: 100 - 100 * r["step_seconds"] / step(r), loss=lambda r: 100 * r["head_seconds"] / step(r),
    )  # fmt: skip


def main(options: Options) -> None:
    settings = {key: getattr(options, key) for key in ("model", "batch", "steps", "updates", "images")}
    results = measure.continued(options.out, measure.begun("overhead", options.device, settings=settings, loops=[]))
    images = random_images(options.images)

    def run(cell: dict) -> dict:
        measure.free(options.device)
        with tempfile.TemporaryDirectory() as folder:
            logs = {"track": "tensorboard", "log_every": options.updates}
            config = training.settings(options.model, options.batch, device=options.device, steps=options.steps, **cell, **logs)
            return run_for(config, images, Path(folder), options.warm_up, options.updates)

    cells = [{"method": method, "precision": precision} for precision, method in product(options.precisions, options.methods)]
    measure.complete(options.out, results, "loops", cells, run)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

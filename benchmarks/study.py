"""What studies of many trainings share (`table61`, `figure61`): each is trained, attacked at test images, and kept as a row.

A study may be stopped at any time, and the same command continues it. It may also be started several times at once, say one
process for each core under OMP_NUM_THREADS=1: each takes what no other is at work on.
"""

import json
import statistics
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from benchmarks import measure
from spat_train.config import Config
from spat_train.data.images import Dataset
from spat_train.errors import InputError, InUseError, check_count
from spat_train.evaluation.evaluate import evaluate
from spat_train.models.checkpoints import load_model
from spat_train.papers.runs import Run, differences, find_runs
from spat_train.presets import PRESETS
from spat_train.runtime import atomic_write as files
from spat_train.runtime import logs
from spat_train.runtime.signals import Stopped, interruptible
from spat_train.training.trainer import train

CONTINUES = "the same command continues from there"
TESTED = "tested.json"  # in the folder of a run, what its test came to
Precisions = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(kw_only=True)
class Arguments:
    """Options of every study."""

    out: Path
    """JSON file to write."""
    runs: Path = Path("runs")
    """Where the folders of the runs go."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each training is repeated from each of these."""
    test_precision: Precisions = "fp32"
    """Precision of the attacks in the evaluation. Predictions are always fp32."""
    test_images: int | None = None
    """The first of the test images are attacked. Default: all."""
    batch_size: int = 500
    """Images attacked at once in the evaluation."""

    def count(self, data: Dataset) -> int:
        """How many test images are attacked.

        Raises:
            InputError: an option does not fit, or there are none.
        """
        for option, value in (
            ("--batch-size", self.batch_size),
            ("--test-images", self.test_images),
            ("--seeds", len(self.seeds)),
        ):
            check_count(option, value)
        if not len(data.test):
            raise InputError(f"--data {data.name}: it has no test images: give x_test and y_test")
        return min(len(data.test), self.test_images or len(data.test))


@dataclass(frozen=True)
class Test:
    """Attacks, by column a name of spat_train.evaluation.attack_specs, and how many test images they are made at."""

    attacks: dict[str, str]
    images: int


@dataclass(frozen=True)
class Study:
    """Trainings, and how each is tested.

    Attributes:
        benchmark: the module that has the table of its results. about: what these say besides the rows.
        data: its test images are attacked.
        more: what else is found out about a model, besides accuracies: values by name.
    """

    benchmark: str
    args: Arguments
    trainings: Sequence[Config]
    data: Dataset
    tests: tuple[Test, ...]
    more: Callable[[nn.Module, Config], dict] = lambda model, config: {}
    about: dict = field(default_factory=dict)

    def run(self, results: dict) -> list[str]:
        """Train and test what is not done yet, and write after each; the folders of those that are still left.

        A training that fails says why, and the others are still run.

        Raises:
            Stopped: a signal came; everything is saved.
        """
        before = results["rows"]

        def left() -> list[Config]:
            rows = results["rows"] = collected(self.args.runs, before)
            measure.write(self.args.out, results)
            return [config for config in self.trainings if not any(self.is_done(config, row) for row in rows)]

        for config in self.trainings:
            if config not in left():
                continue
            measure.free(device())
            try:
                train(config)
                self.test(config)
            except Stopped:
                left()
                raise
            except InUseError:
                print(f"{config.out}: another process is at work there")
            except Exception:  # the others are still of use
                traceback.print_exc()
        return [str(config.out) for config in left()]

    def test(self, config: Config) -> None:
        """Write TESTED into the folder of the run: accuracies, and `more`."""
        assert config.out is not None
        model, _ = load_model(config.out, self.data)
        model.to(device())
        precision, size = self.args.test_precision, self.args.batch_size
        found = {}
        for test in self.tests:
            kept = config.out / f"evaluation-{test.images}-{precision}-{size}"
            texts = CONTINUES, lambda: f"out of memory: give less than --batch-size {size}"
            with interruptible(*texts) as on_progress:
                result = evaluate(
                    model, self.data.test, ",".join(test.attacks.values()), eps=config.evaluation_eps_in_x,
                    rows=torch.arange(test.images), on_progress=on_progress, batch_size=size, folder=kept,
                    precision=precision, bar=config.out.name,
                )  # fmt: skip
            for column, attack in test.attacks.items():
                name = next(name for name, parsed in result.attacks.items() if attack in (name, parsed.spec))
                low, high = result.interval(name)
                right = np.packbits(result.correct(name).numpy()).tobytes().hex()
                found[column] = {
                    "accuracy": result.accuracy(name), "low": low, "high": high, "images": test.images,
                    "precision": precision, "right": right,
                }  # fmt: skip
        tested = {"evaluation": found} | self.more(model, config)
        files.write(config.out / TESTED, json.dumps(tested).encode())

    def is_done(self, config: Config, row: dict) -> bool:
        """Whether `row` was trained in just this way to its end, and measured on as many images."""
        images = {column: test.images for test in self.tests for column in test.attacks}
        measured = {column: e["images"] for column, e in row["evaluation"].items()}
        return images == measured and not config.differences(row["config"]) and row["trained"] >= row["config"]["epochs"]


def carry_out(prepare: Callable[[], Study], table: Callable[[dict], str]) -> None:
    """Run the study that `prepare` returns, and print the table of its results.

    Raises:
        SystemExit: an option or the data do not fit, a signal came, or something is not done yet.
    """
    try:
        study = prepare()
        study.args.runs.mkdir(parents=True, exist_ok=True)
        results = measure.continued(study.args.out, measure.begun(study.benchmark, device(), **study.about, rows=[]))
    except (InputError, OSError) as error:
        raise SystemExit(str(error)) from None
    try:
        left = study.run(results)
    except Stopped as stopped:
        print(f"stopped, {CONTINUES}")
        raise SystemExit(stopped.exit_code) from None
    print(table(results))
    if left:
        raise SystemExit(f"not done yet: {', '.join(left)}; what failed has said why, and {CONTINUES}")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def named(config: Config) -> str:
    """What a training's folder is called."""
    method = config.method + ("+spat" if config.alpha else "")
    model = config.model.replace("/", "-")
    return f"{model}-{method}-eps{config.eps:g}-alpha{config.alpha:g}-{config.precision}-seed{config.seed}"


def collected(folder: Path, before: list[dict]) -> list[dict]:
    """What the runs in `folder` have come to, and those of `before` that are not there."""
    ours = [row_of(run) for run in find_runs(folder) if run.folder.name == named(run.config)]
    rows = {_key(row): row for row in before + ours}
    return [rows[key] for key in sorted(rows)]


def _key(row: dict) -> tuple:
    return tuple(row["config"][name] for name in ("model", "eps", "method", "alpha", "precision", "seed"))


def row_of(run: Run) -> dict:
    rates = [event["images_per_second"] for event in logs.read(run.folder, "train")]
    tested = run.folder / TESTED
    return {
        "differs": differences(run, PRESETS[run.config.preset]) if run.config.preset else [],
        "trained": run.epochs, "images_per_second": max(rates, default=None),
        "validations": logs.read(run.folder, "validation"), "evaluation": {}, "config": run.config.to_dict(),
    } | (json.loads(tested.read_text()) if tested.exists() else {})  # fmt: skip


# --- what the rows say ---


def grouped(rows: Iterable[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows that differ in nothing but the seed, by the values of these options."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row["config"][name] for name in names), []).append(row)
    return groups


def mean(values: Sequence[float]) -> str:
    """The mean of several seeds and the standard deviation between them."""
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def signed(text: str) -> str:
    return text.replace("-", "−")


def right(row: dict, column: str) -> np.ndarray:
    """bool [N]: which test images it got right under the attack of `column`."""
    found = row["evaluation"][column]
    return np.unpackbits(np.frombuffer(bytes.fromhex(found["right"]), np.uint8))[: found["images"]].astype(bool)


@dataclass(frozen=True)
class Comparison:
    """A training against another, from the same seeds and at the same images.

    Attributes:
        differences: in accuracy, in points, by seed.
        won, lost: images that it got right from more seeds than the other, and from fewer.
    """

    differences: tuple[float, ...]
    won: int
    lost: int

    @property
    def difference(self) -> float:
        return statistics.mean(self.differences)

    @property
    def p(self) -> float:
        """Of the two-sided sign test: how often as clear a majority would come from a fair coin for each image."""
        from scipy.stats import binomtest  # its import takes a second

        return float(binomtest(self.won, self.won + self.lost).pvalue) if self.won + self.lost else 1.0

    @property
    def verdict(self) -> int:
        """1: higher; -1: lower; 0: undecided, since the test has p >= 0.05 or the seeds disagree."""
        signs = {np.sign(difference) for difference in self.differences}
        return int(signs.pop()) if len(signs) == 1 and self.p < 0.05 else 0

    def __str__(self) -> str:
        spread = f" ± {statistics.stdev(self.differences):.2f}" if len(self.differences) > 1 else ""
        return signed(f"{self.difference:+.2f}{spread}")


def compare(rows: Iterable[dict], others: Iterable[dict], column: str) -> Comparison:
    """`rows` against `others` in one column, over the seeds that both have.

    Raises:
        KeyError: there is none, or a row says nothing of single images.
    """
    measured = ([row for row in each if column in row["evaluation"]] for each in (rows, others))
    found, base = ({row["config"]["seed"]: right(row, column) for row in each} for each in measured)
    seeds = sorted(found.keys() & base.keys())
    if not seeds:
        raise KeyError(column)
    moved = sum(found[seed].astype(int) - base[seed] for seed in seeds)
    differences = tuple(100 * float(found[seed].mean() - base[seed].mean()) for seed in seeds)
    return Comparison(differences, int((moved > 0).sum()), int((moved < 0).sum()))

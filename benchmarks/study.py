"""What studies of many trainings share (`table61`, `figure61`, `methods`): each is trained, attacked at test images, and a row.

A study may be stopped at any time, and the same command of the same commit continues it. It may also be started several times at
once, say one process for each core under OMP_NUM_THREADS=1: each takes what no other is at work on, and ends when all is done.
"""

import fcntl
import hashlib
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from benchmarks import measure
from spat_train.config import FREE_ON_RESUME, Config
from spat_train.data.images import Dataset, fingerprint
from spat_train.errors import InputError, InUseError, check_count
from spat_train.evaluation.evaluate import evaluate
from spat_train.models.checkpoints import load_model
from spat_train.papers.runs import Run, differences
from spat_train.presets import PRESETS
from spat_train.runtime import atomic_write as files
from spat_train.runtime import logs
from spat_train.runtime.run_folder import RunFolder
from spat_train.runtime.signals import Stopped, interruptible
from spat_train.training.trainer import TrainingError, train

CONTINUES = "the same command continues from there"
TESTED = "tested.json"  # in the folder of a run, what its tests came to
WAIT = 10.0  # seconds between looks at what other processes are at work on
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

    def test_count(self, data: Dataset) -> int:
        """How many test images are attacked.

        Raises:
            InputError: an option does not fit, or there are none.
        """
        check_count("--batch-size", self.batch_size)
        check_count("--test-images", self.test_images)
        if not self.seeds:
            raise InputError("--seeds: give at least one")
        if self.test_precision == "tf32" and device() == "cpu":
            raise InputError("--test-precision tf32: TF32 is for GPUs: use fp32 or bf16")
        if not len(data.test):
            raise InputError(f"--data {data.name}: it has no test images: give x_test and y_test")
        return min(len(data.test), self.test_images or len(data.test))


@dataclass(frozen=True)
class Attacks:
    """At the first `images` test images; by column, a name of `spat_train.evaluation.attack_specs`."""

    by_column: dict[str, str]
    images: int


@dataclass(frozen=True)
class Study:
    """Trainings, each with `out`, and how they are tested.

    Attributes:
        benchmark: the module that has the table of the results.
        data: its test images are attacked.
        traits: what else is found out about a model: numbers by name. traits_of: what these depend on, besides the model.
        about: what the results say besides the rows.
        ready: called before each training, which may need something that it makes.
        finish: called with the results when nothing is left to do, and adds to them.
    """

    benchmark: str
    args: Arguments
    trainings: Sequence[Config]
    data: Dataset
    attacks: Sequence[Attacks]
    traits: Callable[[nn.Module, Config], dict] | None = None
    traits_of: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)
    ready: Callable[[Config], object] = lambda config: None
    finish: Callable[[dict], object] = lambda results: None

    def run(self, results: dict) -> list[str]:
        """Train and test what is not done yet, and save after each; the folders of what failed.

        A training that fails says why, and the others are still run. What another process is at work on is waited for.

        Raises:
            Stopped: a signal came; everything is saved.
        """
        self.save(results)
        failed: set[str] = set()
        elsewhere: set[str] = set()
        while self.go_through(results, failed, elsewhere):
            time.sleep(WAIT)
            self.save(results)
        self.finish(results)
        self.save(results)
        return sorted(failed)

    def go_through(self, results: dict, failed: set[str], elsewhere: set[str]) -> bool:
        """Train and test what is neither done nor `failed`; whether another process was at work on some, which is said once.

        `failed` and `elsewhere` grow by the folders of which that is found.
        """
        busy = False
        for number, config in enumerate(self.trainings, 1):
            folder = str(config.out)
            if self.is_done(config, results) or folder in failed:
                continue
            measure.free(device())
            if folder not in elsewhere:
                print(f"{number} of {len(self.trainings)}: {folder}", flush=True)
            try:
                self.ready(config)
                train(config)
                self.test(config, results["machine"].get("commit"))
            except InUseError:
                busy = True
                if folder not in elsewhere:
                    print("another process is at work there", flush=True)
                elsewhere.add(folder)
            except (InputError, TrainingError, files.SaveError) as error:
                failed.add(folder)
                print(f"{folder}: {error}")
            except Exception:  # reported, and the command fails at its end; the other trainings do not depend on it
                failed.add(folder)
                traceback.print_exc()
            finally:
                self.save(results)
        return busy

    def test(self, config: Config, commit: str | None) -> None:
        """Write TESTED into the folder of the run: accuracies with the images that were right, traits, and the commit."""
        assert config.out is not None
        folder = RunFolder(config.out)
        folder.claim()
        try:
            model, _ = load_model(config.out, self.data, config.model)
            model.to(device())
            tested = tested_by(commit, config.out) or {"evaluation": {}, "commit": commit}
            for attacks in self.attacks:
                tested["evaluation"] |= self.accuracies(model, config, attacks, commit)
            if self.traits:
                tested["traits"] = self.traits_of | self.traits(model, config)
            files.write(config.out / TESTED, json.dumps(tested).encode())
        finally:
            folder.release()

    def accuracies(self, model: nn.Module, config: Config, attacks: Attacks, commit: str | None) -> dict[str, dict]:
        assert config.out is not None
        size, precision = self.args.batch_size, self.args.test_precision
        with interruptible(CONTINUES, lambda: f"out of memory: give less than --batch-size {size}") as on_progress:
            result = evaluate(
                model, self.data.test, ",".join(attacks.by_column.values()), eps=config.evaluation_eps_in_x,
                rows=torch.arange(attacks.images), on_progress=on_progress, batch_size=size, precision=precision,
                folder=config.out / f"evaluation-{attacks.images}-{precision}-{size}-{commit}", bar=config.out.name,
            )  # fmt: skip
        found = {}
        for column, attack in attacks.by_column.items():
            low, high = result.interval(attack)
            right = np.packbits(result.correct(attack).numpy()).tobytes().hex()
            found[column] = {"accuracy": result.accuracy(attack), "low": low, "high": high, "right": right}
        return {column: self.expected()[column] | e for column, e in found.items()}

    @property
    def tests(self) -> dict:
        """What all accuracies depend on besides the model and the attack."""
        return {"precision": self.args.test_precision, "batch_size": self.args.batch_size, "data": fingerprint(self.data.test)}

    def expected(self) -> dict[str, dict]:
        """By column, what an accuracy depends on besides the model."""
        return {
            column: {"attack": attack, "images": attacks.images} | self.tests
            for attacks in self.attacks
            for column, attack in attacks.by_column.items()
        }

    def is_done(self, config: Config, results: dict) -> bool:
        """Whether the results have this training, tested in just this way."""
        row = next((row for row in results["rows"] if row["name"] == folder_name(config)), None)
        return bool(
            row
            and all(of.items() <= row["evaluation"].get(column, {}).items() for column, of in self.expected().items())
            and (not self.traits or self.traits_of.items() <= row.get("traits", {}).items())
        )

    def save(self, results: dict) -> None:
        """Fill in the rows: what the folders of the trainings have come to, and what `out` has besides. Write them there."""
        out = self.args.out
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.parent):
            before = json.loads(out.read_text())["rows"] if out.exists() else []
            rows = {row["name"]: row for row in before}
            for config in self.trainings:
                assert config.out is not None
                if (config.out / "log.jsonl").exists():
                    row = row_of(Run(config.out, config), results["machine"].get("commit"))
                    if row["evaluation"] or not rows.get(row["name"], {}).get("evaluation"):
                        rows[row["name"]] = row
            options = "model", "eps", "method", "alpha", "precision", "epochs", "seed"
            results["rows"] = sorted(rows.values(), key=lambda row: [row["config"][name] for name in options] + [row["name"]])
            if rows:
                measure.write(out, results)


def run_and_print(prepare: Callable[[], Study], table: Callable[[dict], str]) -> None:
    """Run the study that `prepare` returns, and print the table of its results.

    Raises:
        SystemExit: an option or the data do not fit, a signal came, or a training failed.
    """
    try:
        study = prepare()
        about = study.about | {f"test {name}": value for name, value in study.tests.items()}
        about["test images"] = study.attacks[0].images
        results = measure.continued(study.args.out, measure.begun(study.benchmark, device(), **about, rows=[]))
        failed = study.run(results)
    except (InputError, OSError, files.SaveError) as error:
        raise SystemExit(str(error)) from None
    except Stopped as stopped:
        print(f"stopped, {CONTINUES}")
        raise SystemExit(stopped.exit_code) from None
    except KeyboardInterrupt:  # between trainings, or while it waits for another process
        print(f"stopped, {CONTINUES}")
        raise SystemExit(130) from None
    if results["rows"]:
        print(table(results))
    if failed:
        raise SystemExit(f"failed, for the reasons above: {', '.join(failed)}")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def locked(folder: Path):
    """Within, other processes wait here for the same folder. On a file system without locks nothing is waited for."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def changed(config: Config, *but: str) -> dict:
    """The options that change the weights and are not as by default, and the names of the data."""
    default = Config().to_dict()
    found = {k: v for k, v in config.to_dict().items() if v != default[k] and k not in (*FREE_ON_RESUME, *but)}
    return found | {name: Path(path).stem for name in ("data", "extra") if (path := getattr(config, name))}


def folder_name(config: Config) -> str:
    """Names a training: what is often varied in words, and a hash of every option that changes the weights."""
    digest = hashlib.sha256(json.dumps(changed(config), sort_keys=True).encode()).hexdigest()[:8]
    method = config.method + ("+spat" if config.alpha else "")
    model = config.model.replace("/", "-").replace(":", "-")
    return f"{model}-{method}-eps{config.eps:g}-alpha{config.alpha:g}-seed{config.seed}-{digest}"


def tested_by(commit: str | None, folder: Path) -> dict:
    """TESTED of a run, or {} where there is none, or where another commit tested, whose numbers may mean something else."""
    path = folder / TESTED
    tested = json.loads(path.read_text()) if path.exists() else {}
    return tested if tested.get("commit") == commit else {}


def row_of(run: Run, commit: str | None) -> dict:
    rates = [event["images_per_second"] for event in logs.read(run.folder, "train")]
    return {
        "name": run.folder.name, "trained": run.epochs, "images_per_second": statistics.median(rates) if rates else None,
        "differs": differences(run, PRESETS[run.config.preset]) if run.config.preset else [],
        "validations": logs.read(run.folder, "validation"), "evaluation": {}, "config": run.config.to_dict(),
    } | tested_by(commit, run.folder)  # fmt: skip


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


def over_seeds(tests: Sequence[dict]) -> dict:
    """Accuracies of several seeds as a point of a curve: the mean, and as low and high the range; of one its own interval."""
    values = [test["accuracy"] for test in tests]
    return tests[0] if len(tests) == 1 else {"accuracy": statistics.mean(values), "low": min(values), "high": max(values)}


def right_images(row: dict, column: str) -> np.ndarray:
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
        """The p-value of the two-sided sign test on the images won and lost."""
        from scipy.stats import binomtest  # its import takes a second

        return float(binomtest(self.won, self.won + self.lost).pvalue) if self.won + self.lost else 1.0

    @property
    def verdict(self) -> int:
        """1: higher; -1: lower; 0: undecided, since the test has p >= 0.05, or it and all seeds do not agree."""
        signs = {int(np.sign(value)) for value in (*self.differences, self.won - self.lost)}
        return signs.pop() if len(signs) == 1 and self.p < 0.05 else 0

    def __str__(self) -> str:
        spread = f" ± {statistics.stdev(self.differences):.2f}" if len(self.differences) > 1 else ""
        return signed(f"{self.difference:+.2f}{spread}")


def compare(rows: Iterable[dict], others: Iterable[dict], column: str) -> Comparison | None:
    """`rows` against `others` in one column, over the seeds and images that both have; None where there are none."""
    measured = ([row for row in each if "right" in row["evaluation"].get(column, {})] for each in (rows, others))
    found, base = ({row["config"]["seed"]: right_images(row, column) for row in each} for each in measured)
    seeds = sorted(found.keys() & base.keys())
    if not seeds:
        return None
    count = min(len(flags) for each in (found, base) for flags in each.values())
    moved = [found[seed][:count].astype(int) - base[seed][:count] for seed in seeds]
    total = sum(moved)
    return Comparison(tuple(100 * float(each.mean()) for each in moved), int((total > 0).sum()), int((total < 0).sum()))

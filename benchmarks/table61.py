"""Table 6.1 at a scale of minutes: `python -m benchmarks.table61 --data cifar10.npz --out benchmarks/results/h200/table61.json`.

Trains the five rows of the thesis's Table 6.1 as its presets say, but with ResNet-18, a one-cycle schedule of few epochs and bf16
arithmetic, and evaluates each on all test images. After each row, also one that a signal stopped, --out gets what the folders in
--runs hold. The same command continues from there: a row that --out has in full is not run again, even where its folder is gone.
Other --rows and --model add to the same file:

    python -m benchmarks.table61 --data cifar10.npz --out table61.json --model wrn-34-10 --rows mart+spat --epochs 6
"""

import json
import traceback
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks import measure
from benchmarks.tables import columns, environment, markdown
from spat_train.config import Config
from spat_train.data.datasets import load_npz
from spat_train.errors import InputError, check_count
from spat_train.evaluation.evaluate import evaluate
from spat_train.models.checkpoints import load_model
from spat_train.papers.reported import TABLES
from spat_train.papers.runs import Run, differences, find_runs, title
from spat_train.presets import PRESETS
from spat_train.runtime import atomic_write as files
from spat_train.runtime import logs
from spat_train.runtime.signals import Stopped, interruptible
from spat_train.training.check import check
from spat_train.training.trainer import train

TABLE = TABLES["6.1"]
COLUMNS = {cell.attack: cell.column for cell in TABLE.cells}
CONTINUES = "the same command continues from there"


@dataclass
class Arguments:
    """Table 6.1 at a scale of minutes."""

    data: Path
    """CIFAR-10 as an .npz file."""
    out: Path
    """JSON file to write."""
    runs: Path = Path("runs")
    """Where the folders of the runs go, one for each row and model."""
    rows: list[str] = field(default_factory=lambda: list(TABLE.runs))
    """Any of madry, trades, mart, trades+spat, mart+spat."""
    model: str = "resnet-18"
    """A name of spat_train.models; the thesis's is wrn-34-10."""
    epochs: int = 20
    """Length of the one-cycle schedule."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    """Precision of updates and of the attacks in training."""
    test_precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of the attacks in the evaluation. Predictions are always fp32."""
    batch_size: int = 500
    """Images attacked at once in the evaluation."""
    limit: int | None = None
    """Maximum number of training and of test images, for rehearsals."""


def settings(args: Arguments, row: str) -> Config:
    preset = PRESETS[f"table6.1/{row}"]
    return replace(
        preset, preset="", model=args.model, epochs=args.epochs, schedule="one-cycle", lr=0.1,
        precision=args.precision, data=str(args.data), limit=args.limit, out=place(args.runs, args.model, row), resume=True,
        test=False, tensorboard=False,
    )  # fmt: skip


def place(runs: Path, model: str, row: str) -> Path:
    return runs / f"{model}-{row}"


def evaluate_run(args: Arguments, folder: Path) -> None:
    """Write evaluation.json into the folder of the run."""
    data = load_npz(args.data).limited(args.limit, seed=0)
    model, config = load_model(folder, data)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    count = len(data.test)
    kept = folder / f"evaluation-{count}-{args.test_precision}-{args.batch_size}"
    texts = CONTINUES, lambda: f"out of memory: give less than --batch-size {args.batch_size}"
    with interruptible(*texts) as on_progress:
        result = evaluate(
            model, data.test, ",".join(COLUMNS), eps=config.evaluation_eps / 255, rows=torch.arange(count),
            on_progress=on_progress, batch_size=args.batch_size, folder=kept, precision=args.test_precision, bar=folder.name,
        )  # fmt: skip
    found = {}
    for name in result.attacks:
        low, high = result.interval(name)
        accuracy = {"accuracy": result.accuracy(name), "low": low, "high": high}
        found[COLUMNS[name]] = accuracy | {"images": count, "precision": args.test_precision}
    files.write(folder / "evaluation.json", json.dumps(found, indent=1).encode())


def checked(args: Arguments) -> int:
    """How many test images there are.

    Raises:
        InputError: an option or the data do not fit.
    """
    if not args.rows or set(args.rows) - set(TABLE.runs):
        raise InputError(f"--rows {' '.join(args.rows)}: choose from {', '.join(TABLE.runs)}")
    check_count("--batch-size", args.batch_size)
    for row in args.rows:
        check(settings(args, row))
    count = len(load_npz(args.data).limited(args.limit, seed=0).test)
    if not count:
        raise InputError(f"--data {args.data}: it has no test images: give x_test and y_test")
    return count


def collected(folder: Path, before: list[dict]) -> list[dict]:
    """What the runs in `folder` have come to, and those of `before` that are not there, in the order of the thesis."""
    ours = [run for run in find_runs(folder) if run.folder == place(folder, run.config.model, name_of(run.config))]
    rows = {(row["model"], row["row"]): row for row in before + [row_of(run) for run in ours]}
    return sorted(rows.values(), key=lambda row: (row["model"], list(TABLE.runs).index(row["row"])))


def is_done(args: Arguments, row: str, rows: list[dict], images: int) -> bool:
    """Whether `rows` have it, trained in just this way to its end, and measured on as many images."""
    config = settings(args, row)
    return any(
        {column: e["images"] for column, e in found["evaluation"].items()} == dict.fromkeys(COLUMNS.values(), images)
        for found in rows
        if not config.differences(found["config"]) and found["trained"] >= found["epochs"]
    )


def name_of(config: Config) -> str:
    return config.method + ("+spat" if config.alpha else "")


def row_of(run: Run) -> dict:
    row = name_of(run.config)
    rates = [event["images_per_second"] for event in logs.read(run.folder, "train")]
    evaluation = run.folder / "evaluation.json"
    return {
        "row": row, "title": title(run.config), "model": run.config.model, "epochs": run.config.epochs, "trained": run.epochs,
        "images_per_second": max(rates, default=None), "validations": logs.read(run.folder, "validation"),
        "evaluation": json.loads(evaluation.read_text()) if evaluation.exists() else {},
        "thesis": {cell.column: cell.accuracy for cell in TABLE.cells if cell.target == row},
        "differs": differences(run, PRESETS[f"table6.1/{row}"]), "config": run.config.to_dict(),
    }  # fmt: skip


def table(results: dict) -> str:
    """Each training's accuracies above the thesis's, what it did otherwise, and how fast it went."""
    trainings, rows = results["thesis"], []
    for t in trainings:
        found = {name: e["accuracy"] for name, e in t["evaluation"].items()}
        rows.append(t | {"found": found, "done": f"{t['trained']:.2f} of " if t["trained"] < t["epochs"] else ""})
        rows.append({"title": "", "model": "thesis: WRN-34-10", "done": "", "epochs": 90, "found": t["thesis"]})
    names = dict.fromkeys(chain.from_iterable(row["found"] for row in rows))
    heads, cells = columns(names, "{}", "{{found[{}]:.2f}}")

    def otherwise(results: dict) -> str:
        alike: dict[str, list[str]] = {}
        for t in trainings:
            alike.setdefault(", ".join(t["differs"]), []).append(f"{t['title']} of {t['model']}")
        return " ".join(
            f"Otherwise than in the thesis (in brackets): {', '.join(who)}: {what}." for what, who in alike.items() if what
        )

    def tested(results: dict) -> str:
        parts = chain.from_iterable(t["evaluation"].items() for t in trainings)
        tests = {name: f"{name} {e['images']:,} in {e['precision']}" for name, e in parts}
        return f"Test images: {', '.join(tests.values()) or 'none yet'}; images/s of the training, attacks included."

    return markdown(
        results, rows,
        f"defence |  || epochs | {heads} | images/s", f"{{title}} | {{model}} || {{done}}{{epochs}} | {cells} | {{rate:,.0f}}",
        otherwise, tested, environment, rate=lambda r: r["images_per_second"] or 0,
    )  # fmt: skip


def main(args: Arguments) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        images = checked(args)
        args.runs.mkdir(parents=True, exist_ok=True)
        results = measure.continued(args.out, measure.begun("table61", device, thesis=[]))
    except (InputError, OSError) as error:
        raise SystemExit(str(error)) from None
    before = results["thesis"]

    def is_left(row: str) -> bool:
        results["thesis"] = collected(args.runs, before)
        measure.write(args.out, results)
        return not is_done(args, row, results["thesis"], images)

    for row in filter(is_left, args.rows):
        measure.free(device)
        try:
            config = settings(args, row)
            train(config)
            evaluate_run(args, config.out)
        except Stopped as stopped:
            is_left(row)
            print(f"{args.model} {row}: stopped, {CONTINUES}")
            raise SystemExit(stopped.exit_code) from None
        except Exception:  # the other rows are still of use
            traceback.print_exc()
    left = [row for row in args.rows if is_left(row)]
    print(table(results))
    if left:
        raise SystemExit(f"not done yet: {', '.join(left)}; what failed has said why, and {CONTINUES}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

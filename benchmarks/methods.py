"""Every method of training, small: `python -m benchmarks.methods --data mnist.npz --out benchmarks/results/cpu/methods.json`.

Trains each method of `spat_train.objectives.METHODS`, and some of them on SPAT's examples or with AWP, on 2,000 images with the
same network, optimiser and epochs (SETTINGS, EXCEPTIONS), and attacks each at the test images. The radius is 0.2, for MNIST: at
0.3 FGSM learns nothing from so few images. RST's pseudo-labelled images are 2,000 others, which the standard model of the same
seed has labelled.

When all are trained, a training step of each is timed in turns, in one process. What a method costs is a ratio of these times.

The same command of the same commit continues where it was stopped. It may be started once for each core (`study`), but times mean
something only where the machine has nothing else to do. Eleven rows take about 20 minutes on one thread of an EPYC.
"""

import io
import json
import statistics
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from benchmarks import measure, study
from benchmarks.study import Attacks, Study, device, folder_name, mean, over_seeds, run_and_print
from benchmarks.table61 import AUTOATTACK, COLUMNS
from benchmarks.tables import columns, environment, markdown
from benchmarks.training import Ours
from spat_train import plotting
from spat_train.config import Config
from spat_train.data.datasets import load_npz
from spat_train.data.images import Dataset, floats
from spat_train.errors import InputError, check_count
from spat_train.models.checkpoints import load_model
from spat_train.models.registry import create
from spat_train.objectives import METHODS
from spat_train.papers.loaded_run import logits_of
from spat_train.papers.runs import data_name, title
from spat_train.runtime import atomic_write as files
from spat_train.training.check import check

VARIANTS = {  # variants of methods by name, with what they change
    "madry+spat": {"alpha": 0.2}, "trades+spat": {"alpha": 0.1}, "mart+spat": {"alpha": 0.2},
    "trades+awp": {"awp": 0.005}, "mart+awp": {"awp": 0.005},
}  # fmt: skip
ROWS = (*METHODS, *VARIANTS)
SETTINGS = {"batch_size": 50, "optimizer": "adam", "lr": 2e-3, "schedule": "one-cycle", "weight_decay": 0.0}
VERSIONS = {"standard": "autoattack", "fast": "autoattack-fast"}
EXCEPTIONS = {"free": {"epochs": 2}}  # by method, what it takes instead: Free AT updates the weights 8 times with each batch


@dataclass(kw_only=True)
class Arguments(study.Arguments):
    """Every method at a small scale."""

    data: Path
    """An .npz file, such as MNIST's."""
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    """Methods, and any of madry+spat, trades+spat, mart+spat, trades+awp and mart+awp."""
    images: int = 2000
    """Number of training images, of which a tenth is held out, and of pseudo-labelled ones."""
    eps: float = 51.0
    """Radius, in 1/255."""
    model: str = "small-cnn"
    """A name of spat_train.models."""
    epochs: int = 15
    test_images: int | None = 1000
    """Number of test images that are attacked."""
    autoattack: int = 300
    """Number of them that AutoAttack attacks too."""
    version: Literal["standard", "fast"] = "fast"
    """The version of AutoAttack. The standard one takes longer than the training."""
    seconds: float = 3.0
    """Time to measure the steps of each method for."""


def settings(args: Arguments, row: str, seed: int) -> Config:
    method = row.partition("+")[0]
    options = SETTINGS | {"epochs": args.epochs} | EXCEPTIONS.get(method, {}) | VARIANTS.get(row, {})
    if METHODS[method].needs_extra:
        options["extra"] = args.runs / f"{args.data.stem}-{args.images}-{args.model}-{args.epochs}-pseudo-{seed}.npz"
    config = Config(
        method=method, model=args.model, eps=args.eps, seed=seed, data=str(args.data), limit=args.images,
        resume=True, test=False, track="none", **options,
    )  # fmt: skip
    return replace(config, out=args.runs / folder_name(config))


def prepared(args: Arguments) -> Study:
    """The trainings, seed by seed, and how they are tested.

    Raises:
        InputError: an option or the data do not fit.
    """
    if not args.rows or set(args.rows) - set(ROWS):
        raise InputError(f"--rows {' '.join(args.rows)}: choose from {', '.join(ROWS)}")
    for name in ("images", "autoattack"):
        check_count(f"--{name}", getattr(args, name))
    trainings = [settings(args, row, seed) for seed in args.seeds for row in args.rows]
    for config in trainings:
        check(config)
    data = load_npz(args.data)
    if len(data.train) < 2 * args.images:
        raise InputError(f"--images {args.images}: half of the {len(data.train)} training images are the most: give fewer")
    count = args.test_count(data)
    same = {name: getattr(args, name) for name in ("model", "eps", "epochs")}  # else the table would average them as seeds
    attacks = [Attacks(COLUMNS, count), Attacks({AUTOATTACK: VERSIONS[args.version]}, min(count, args.autoattack))]
    return Study(
        "methods", args, trainings, data, attacks, about={"training images": args.images, "steps": {}} | same,
        ready=lambda config: pseudo_label(args, data, config), finish=lambda results: time_steps(results, data, args.seconds),
    )  # fmt: skip


def pseudo_label(args: Arguments, data: Dataset, config: Config) -> None:
    """Write what `config.extra` names, if anything: as many other images as it trains on, labelled by the standard model.

    Raises:
        InUseError: another process trains that model.
    """
    if config.extra is None:
        return
    teacher = settings(args, "standard", config.seed)
    study.train(teacher)
    model, _ = load_model(teacher.folder, data)
    drawn = data.limited(2 * args.images, config.seed).train  # its first half is what is trained on
    rows = torch.arange(args.images, 2 * args.images)
    x, _ = floats(drawn, rows, "cpu", torch.contiguous_format)
    content = io.BytesIO()
    np.savez(content, image=drawn.batch(rows).numpy(), label=logits_of(model, x).argmax(1).numpy())
    files.write(config.extra, content.getbuffer())


def time_steps(results: dict, data: Dataset, seconds: float) -> None:
    """Put into `results`, by row, the seconds of a training step: of all rows in turns, where there is one that has none yet."""
    todo = {name: Config(**rows[0]["config"]) for name, rows in by_name(results).items()}
    if results["steps"].keys() >= todo.keys():
        return
    calls = {}
    for name, config in todo.items():
        model = create(config.model, data.num_classes, data.image_shape).to(device())
        x, y = floats(data.train, torch.arange(config.batch_size), device(), torch.contiguous_format)
        calls[name] = partial(Ours(model, config), x, y)
        calls[name]()
    times, errors = measure.race(calls, device(), seconds)
    if errors:
        raise SystemExit("\n".join(f"{name}: {error}" for name, error in errors.items()))
    results["steps"] = {name: {"median": statistics.median(taken), "seconds": taken} for name, taken in times.items()}


def steps_of_epoch(config: dict) -> int:
    """A tenth of the images, at most 1,000, is held out."""
    return -(-(config["limit"] - min(config["limit"] // 10, 1000)) // config["batch_size"])


# --- as Markdown, and the picture ---


def name_of(config: dict) -> str:
    """A name of `ROWS`."""
    return config["method"] + "+spat" * (config["alpha"] > 0) + "+awp" * (config["awp"] > 0)


def title_of(config: dict) -> str:
    return title(Config(method=config["method"], alpha=config["alpha"])) + "+AWP" * (config["awp"] > 0)


def by_name(results: dict) -> dict[str, list[dict]]:
    """The rows that were tested, by name of `ROWS` and in that order."""
    tested = [row for row in results["rows"] if row["evaluation"]]
    found = {name: [row for row in tested if name_of(row["config"]) == name] for name in ROWS}
    return {name: rows for name, rows in found.items() if rows}


def table(results: dict) -> str:
    """By method: accuracies with their 95 % intervals, and what an epoch costs."""
    heads, cells = columns((*COLUMNS, AUTOATTACK), "{}", "{{found[{}]}}")
    return markdown(
        results, [_line(results, rows) for rows in by_name(results).values()],
        f"method || seeds | {heads} | s/epoch | × Madry", f"{{title}} || {{seeds}} | {cells} | {{epoch}} | {{ratio}}",
        _about, environment,
    )  # fmt: skip


def _line(results: dict, rows: list[dict]) -> dict:
    config = rows[0]["config"]
    timed, madry = (results["steps"].get(name, {}) for name in (name_of(config), "madry"))
    return {
        "title": title_of(config), "seeds": len(rows),
        "found": {column: _cell([row["evaluation"][column] for row in rows]) for column in (*COLUMNS, AUTOATTACK)},
        "epoch": f"{timed['median'] * steps_of_epoch(config):.2f}" if timed else "",
        "ratio": f"{timed['median'] / madry['median']:.2f}" if timed and madry else "",
    }  # fmt: skip


def _cell(tests: list[dict]) -> str:
    """The accuracy and interval of one seed, or the mean and standard deviation of several."""
    values = [test["accuracy"] for test in tests]
    return f"{values[0]:.1f} ({tests[0]['low']:.1f} to {tests[0]['high']:.1f})" if len(tests) == 1 else mean(values)


def _about(results: dict) -> str:
    first, *others = [rows[0] for rows in by_name(results).values()]
    config, tests = first["config"], first["evaluation"]
    exceptions = [_exceptions(row["config"], config) for row in others]
    return (
        f"{config['model']} on {config['limit']:,} images of {data_name(config['data'])}, {config['epochs']} epochs, "
        f"ε = {config['eps'] / 255:.3g}. Test images: {tests['natural']['images']:,}, of {tests[AUTOATTACK]['attack']} "
        f"{tests[AUTOATTACK]['images']:,}. In brackets 95 % intervals; ± between seeds. Seconds of the steps of an epoch, "
        f"timed in turns. {' '.join(filter(None, exceptions))}".strip()
    )


def _exceptions(config: dict, first: dict) -> str:
    """What it sets otherwise than the first row, besides what makes it another row."""
    own = "method", "alpha", "awp", "extra", "seed", "out"
    changed = [f"{name} {value}" for name, value in config.items() if name not in own and value != first[name]]
    return f"{title_of(config)} alone: {', '.join(changed)}." if changed else ""


def draw(path: Path) -> None:
    """Write the picture of the results in the file `path` beside it, as .png: accuracies by method, the most robust on top."""
    results = json.loads(path.read_text())
    found = {title_of(rows[0]["config"]): rows for rows in by_name(results).values()}
    points = {
        name: {column: over_seeds([row["evaluation"][column] for row in rows]) for column in ("natural", "PGD-20", AUTOATTACK)}
        for name, rows in found.items()
    }
    named = sorted(points, key=lambda name: points[name][AUTOATTACK]["accuracy"])
    with plotting.style():
        figure = plotting.new_figure(plotting.PAGE, 0.8 + 0.22 * len(named))
        ax = figure.subplots()
        for look, column in zip(plotting.line_styles(), (AUTOATTACK, "PGD-20", "natural"), strict=False):
            x = [points[name][column] for name in named]
            errors = [[p["accuracy"] - p["low"] for p in x], [p["high"] - p["accuracy"] for p in x]]
            ax.errorbar([p["accuracy"] for p in x], range(len(named)), xerr=errors, label=column, **look | {"linestyle": "none"})
        ax.set_yticks(range(len(named)), named, parse_math=False)
        ax.set_xlabel("accuracy, %")
        ax.legend(loc="lower center")
        figure.suptitle(_about(results).partition(". ")[0], parse_math=False)
    plotting.save(figure, path.with_suffix(".png"))


def main(args: Arguments) -> None:
    run_and_print(lambda: prepared(args), table)
    draw(args.out)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

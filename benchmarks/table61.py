"""Table 6.1 at a small scale: `python -m benchmarks.table61 --data cifar10.npz --out benchmarks/results/cpu/table61.json`.

Trains the five rows of the thesis's Table 6.1 as its presets say, but with a smaller network, a one-cycle schedule of few epochs
and bf16 arithmetic, and attacks each at the test images. --seeds repeats that. What a training on SPAT's examples gains over the
plain one is counted on the same images and from the same seeds. The row trades-ce is a control: SPAT replaces the KL divergence
in TRADES's attack by a smoothed cross-entropy. TRADES on examples of plain cross-entropy shows what the smoothing does by itself.

The same command of the same commit continues where it was stopped, and may be started once for each core (`study`). Other --rows,
--seeds, --model and --precision add to the file, and a row that it has already is not run again, even where its folder is gone:

    python -m benchmarks.table61 --data cifar10.npz --out table61.json --model wrn-34-10 --rows mart+spat --epochs 6
"""

import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import tyro

from benchmarks import study
from benchmarks.study import Attacks, Precisions, Study, compare, folder_name, grouped, mean, run_and_print, signed
from benchmarks.tables import columns, environment, markdown
from spat_train.config import Config
from spat_train.data.datasets import load_npz
from spat_train.errors import InputError, check_count
from spat_train.papers.reported import TABLES
from spat_train.presets import PRESETS
from spat_train.training.check import check

TABLE = TABLES["6.1"]
COLUMNS = {cell.column: cell.attack for cell in TABLE.cells}
THESIS = {row: {cell.column: cell.accuracy for cell in TABLE.cells if cell.target == row} for row in TABLE.runs}
CONTROL = "trades-ce"
TITLES = {cell.target: cell.row for cell in TABLE.cells} | {CONTROL: "TRADES on CE examples"}
COMPARED = ("trades+spat", "trades"), ("trades+spat", CONTROL), ("mart+spat", "mart")
AUTOATTACK = "AutoAttack"


@dataclass(kw_only=True)
class Arguments(study.Arguments):
    """Table 6.1 at a small scale."""

    data: Path
    """CIFAR-10 as an .npz file."""
    rows: list[str] = field(default_factory=lambda: list(TABLE.runs))
    """Any of madry, trades, mart, trades+spat, mart+spat, and trades-ce."""
    model: str = "resnet-18"
    """A name of spat_train.models; the thesis's is wrn-34-10."""
    epochs: int = 20
    """Length of the one-cycle schedule."""
    limit: int | None = None
    """Number of training images, of which a tenth, at most 1,000, is held out. Default: all."""
    precision: Precisions = "bf16"
    """Precision of updates and of the attacks in training."""
    autoattack: int = 0
    """Number of test images, from the first, that AutoAttack attacks too."""


def settings(args: Arguments, row: str, seed: int) -> Config:
    preset = PRESETS["table6.1/" + row.removesuffix("-ce")]
    config = replace(
        preset, inner="ce" if row == CONTROL else None, model=args.model, epochs=args.epochs, schedule="one-cycle", lr=0.1,
        seed=seed, precision=args.precision, data=str(args.data), limit=args.limit, resume=True, test=False, track="none",
    )  # fmt: skip
    return replace(config, out=args.runs / folder_name(config))


def prepared(args: Arguments) -> Study:
    """The trainings, seed by seed, and how they are tested.

    Raises:
        InputError: an option or the data do not fit.
    """
    if not args.rows or set(args.rows) - set(TITLES):
        raise InputError(f"--rows {' '.join(args.rows)}: choose from {', '.join(TITLES)}")
    check_count("--autoattack", args.autoattack, least=0)
    trainings = [settings(args, row, seed) for seed in args.seeds for row in args.rows]
    for config in trainings:
        check(config)
    data = load_npz(args.data)
    count = args.test_count(data)
    attacks = [Attacks(COLUMNS, count)]
    if args.autoattack:
        attacks.append(Attacks({AUTOATTACK: "autoattack"}, min(count, args.autoattack)))
    return Study("table61", args, trainings, data, attacks, about={"limit": args.limit})


# --- as Markdown ---

OPTIONS = "model", "epochs", "precision"
VERDICTS = {1: "higher", 0: "undecided", -1: "lower"}
SAID = {"holds": "hold", "reversed": "are reversed", "undecided": "are undecided"}


def name_of(row: dict) -> str:
    """A key of `TITLES`."""
    config = row["config"]
    return config["method"] + ("+spat" if config["alpha"] else "-ce" if config["inner"] == "ce" else "")


def table(results: dict) -> str:
    """Each training's accuracies above the thesis's, and how fast it went; what SPAT and half precision change; the orderings."""
    lines, gains, orderings = [], [], []
    for (model, epochs, precision), rows in grouped(results["rows"], *OPTIONS).items():
        by_name = {name: [row for row in rows if name_of(row) == name] for name in TITLES}
        by_name = {name: found for name, found in by_name.items() if found}
        for name, found in by_name.items():
            lines += _lines(name, found, f"{model}, {precision}")
        for first, second in COMPARED:
            thesis = {column: THESIS[first][column] - accuracy for column, accuracy in THESIS.get(second, {}).items()}
            title = f"{TITLES[first]} − {TITLES[second]}"
            gains += _gains(title, by_name.get(first, []), by_name.get(second, []), thesis)
        orderings.append(_orderings(results, by_name, f"{model}, epochs: {epochs}, {precision}"))
    for rows in grouped(results["rows"], "model", "epochs", "method", "alpha", "inner").values():
        by_precision = {precision: found for (precision,), found in grouped(rows, "precision").items()}
        for precision in sorted(by_precision.keys() - {"fp32"}):
            title = f"{TITLES[name_of(rows[0])]}: {precision} − fp32"
            gains += _gains(title, by_precision[precision], by_precision.get("fp32", []), {})
    names = [column for column in (*COLUMNS, AUTOATTACK) if any(column in line["found"] for line in lines)]
    heads, cells = columns(names, "{}", "{{found[{}]}}")
    first = markdown(
        results, lines,
        f"defence |  || seeds | epochs | {heads} | images/s",
        f"{{title}} | {{model}} || {{seeds}} | {{epochs}} | {cells} | {{rate}}",
        otherwise, tested, environment,
    )  # fmt: skip
    if not gains:
        return first
    second = markdown(
        results, gains,
        "compared |  | these networks || seeds | difference | images won | lost | p | thesis",
        "{title} | {column} | {verdict} || {seeds} | {difference} | {won:,} | {lost:,} | {p:.2g} | {thesis}",
    )  # fmt: skip
    rule = (
        "Differences in points, ± their standard deviation between seeds. An image is won if the first gets it right from "
        "more seeds; p is of the two-sided sign test on these images, not corrected for the number of tests. Higher and lower: "
        f"p < 0.05, and the images and every seed have that sign. That is of these networks; others of the same methods differ. "
        f"{_between_seeds(results['rows'])}"
    )
    return "\n\n".join([first, second, rule, *filter(None, orderings)])


def _lines(name: str, rows: list[dict], model: str) -> list[dict]:
    """What `table` says of a training from its seeds: ours, the thesis's, and the difference."""
    config, thesis = rows[0]["config"], THESIS.get(name, {})
    done = [row for row in rows if row["evaluation"]] or rows
    trained = min(row["trained"] for row in done)
    columns_here = dict.fromkeys(column for row in done for column in row["evaluation"])
    values = {c: [row["evaluation"][c]["accuracy"] for row in done if c in row["evaluation"]] for c in columns_here}
    gaps = {c: signed(f"{statistics.mean(values[c]) - accuracy:+.2f}") for c, accuracy in thesis.items() if c in values}
    rates = [row["images_per_second"] for row in rows if row["images_per_second"]]
    ours = {
        "title": TITLES[name], "model": model, "seeds": len(done),
        "epochs": f"{trained:.2f} of {config['epochs']}" if trained < config["epochs"] else config["epochs"],
        "found": {c: mean(v) + f" (of {len(v)})" * (len(v) < len(done)) for c, v in values.items()},
        "rate": f"{statistics.median(rates):,.0f}" if rates else "",
    }  # fmt: skip
    if not thesis:
        return [ours]
    found = {column: f"{accuracy:.2f}" for column, accuracy in thesis.items()}
    source = {"title": "", "model": "thesis: WRN-34-10", "seeds": "", "epochs": 90, "found": found, "rate": ""}
    return [ours, source, source | {"model": "difference", "epochs": "", "found": gaps}] if gaps else [ours, source]


def _gains(title: str, rows: list[dict], base: list[dict], thesis: dict[str, float]) -> list[dict]:
    """What `table` says of trainings against others, column by column. `thesis`: the same differences there."""
    lines = []
    for column in (*COLUMNS, AUTOATTACK):
        if found := compare(rows, base, column):
            lines.append({
                "title": title, "column": column, "seeds": len(found.differences), "difference": str(found),
                "won": found.won, "lost": found.lost, "p": found.p,
                "thesis": signed(f"{thesis[column]:+.2f}") if column in thesis else "", "verdict": VERDICTS[found.verdict],
            })  # fmt: skip
    return lines


def _between_seeds(rows: list[dict]) -> str:
    """How far two networks of one row are apart: a difference between rows that is no larger says nothing of methods."""
    squares: dict[str, list[float]] = {}
    for found in grouped(rows, *OPTIONS, "method", "alpha", "inner").values():
        for one, other in combinations(found, 2):
            for column in one["evaluation"].keys() & other["evaluation"].keys():
                gap = one["evaluation"][column]["accuracy"] - other["evaluation"][column]["accuracy"]
                squares.setdefault(column, []).append(gap**2)
    if not squares:
        return "With one seed of each, how far such networks are apart is not known."
    apart = (f"{statistics.mean(squares[c]) ** 0.5:.2f} ({c})" for c in (*COLUMNS, AUTOATTACK) if c in squares)
    return f"Two seeds of one row are apart by {', '.join(apart)} (root mean square, in points)."


def _orderings(results: dict, by_name: dict[str, list[dict]], of: str) -> str:
    """The thesis's orderings of each two rows, column by column: whether they hold. "" where nothing says."""
    lines, counts = [], Counter[str]()
    for pair in combinations((name for name in by_name if name in THESIS), 2):
        line = {"pair": " and ".join(TITLES[name] for name in pair)}
        for column in COLUMNS:
            above, below = sorted(pair, key=lambda name: -THESIS[name][column])
            if found := compare(by_name[above], by_name[below], column):
                verdict = {1: "holds", 0: "undecided", -1: "reversed"}[found.verdict]
                counts[verdict] += 1
                line[column] = verdict
        lines.append(line)
    if not counts:
        return ""
    heads, cells = columns(COLUMNS, "{}", "{{{}}}")
    said = ", ".join(f"{counts[verdict]} {words}" for verdict, words in SAID.items())
    note = f"The thesis's orderings of two rows, by the same rule ({of}): of {counts.total()}, {said}."
    return markdown(results, lines, f"ordering as in the thesis || {heads}", f"{{pair}} || {cells}", note)


def otherwise(results: dict) -> str:
    alike: dict[str, dict[str, None]] = {}
    for row in (row for row in results["rows"] if row["evaluation"]):
        alike.setdefault(", ".join(row["differs"]), {})[f"{TITLES[name_of(row)]} of {row['config']['model']}"] = None
    return " ".join(f"Not as in the thesis (in brackets): {', '.join(who)}: {what}." for what, who in alike.items() if what)


def tested(results: dict) -> str:
    parts = (item for row in results["rows"] for item in row["evaluation"].items())
    # predictions are always made in fp32
    tests = {f"{c} {e['images']:,} in {'fp32' if e['attack'] == 'clean' else e['precision']}": None for c, e in parts}
    return f"Test images: {', '.join(tests) or 'none yet'}; images/s of the training, attacks included."


def main(args: Arguments) -> None:
    run_and_print(lambda: prepared(args), table)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

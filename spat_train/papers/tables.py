"""`spat-train table`: our numbers beside the source's, with what differs from the source's settings."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, lookup
from ..evaluation.report import markdown_table
from ..runtime import atomic_write
from .loaded_run import LoadedRun, TestImages, open_images, open_models
from .options import Options, check
from .reported import TABLES, Cell, Table
from .runs import Run, differences, find_runs, format_eps
from .selection import candidates, training_hint

MARK = "†"


@dataclass(frozen=True)
class Entry:
    """A cell of the source, and ours in percent: accuracy, low, high, half_width of its 95 % interval and difference from the
    source, or None where a run is missing."""

    cell: Cell
    ours: dict[str, float] | None

    @property
    def texts(self) -> tuple[str, str, str]:
        """Ours, the source's, and the difference."""
        source = f"{self.cell.accuracy:.2f}"
        if self.ours is None:
            return "missing", source, ""
        ours = f"{self.ours['accuracy']:.2f} ± {self.ours['half_width']:.2f}"
        return ours, source, f"{self.ours['difference']:+.2f}".replace("-", "−")


@dataclass(frozen=True)
class Filled:
    """A table with our numbers."""

    name: str
    table: Table
    entries: tuple[Entry, ...]
    eps: float  # of the attacks, in 1/255
    data: str
    runs: dict[str, Run | None]  # by key, None where missing
    changes: dict[str, list[str]]  # by key, how the run differs from the source's
    candidates: dict[str, int]  # by key, the number of runs that fit
    images: int  # the number of test images used
    total: int  # of how many

    def marked(self, entry: Entry) -> bool:
        """Whether it is measured, but its runs or its test images differ from the source's."""
        keys = [key for key in (entry.cell.target, entry.cell.source) if key]
        return entry.ours is not None and (self.images < self.total or any(self.changes[key] for key in keys))


def read_given(texts: Iterable[str]) -> dict[str, Path]:
    """KEY=FOLDER of each."""
    given = {}
    for text in texts:
        key, equals, folder = text.partition("=")
        if not (equals and key and folder):
            raise InputError(f"--run {text}: write KEY=FOLDER, such as mart=runs/mine")
        given[key] = Path(folder)
    return given


def fill(name: str, options: Options, given: dict[str, Path], out: Path) -> Filled:
    """Find the runs of table `name`, and measure them.

    Args:
        given: folders of runs by key, instead of searching.
        out: the folder that it will be written to.

    Raises:
        InputError: no such table, or no run of it, or an option, a run or the data do not fit.
    """
    table = lookup("table", name, TABLES)
    check(options, out)
    if unknown := next((key for key in given if key not in table.runs), None):
        raise InputError(f"--run {unknown}={given[unknown]}: table {name} has no run {unknown}: it has {', '.join(table.runs)}")
    known = find_runs(options.runs)
    fitting = candidates(table.runs, known, options, given)
    runs = {key: found[0] for key, found in fitting.items() if found}
    if not any(cell.target in runs for cell in table.cells):
        presets = ", ".join(dict.fromkeys(spec.preset for spec in table.runs.values()))
        there = ", but " + ", ".join(f"{run} on {run.config.data}" for run in known[:8]) if known else ""
        key, spec = next(iter(table.runs.items()))
        raise InputError(
            f"table {name}: it needs runs with --preset {presets}: "
            + (f"--runs {options.runs} has none{there}" if options.runs else "give --runs")
            + f": say which run it is by --run {key}=FOLDER, or {training_hint(spec, options.runs, options.data)}"
        )
    images = open_images(runs.values(), options)
    loaded = dict(zip(runs, open_models(list(runs.values()), images, options), strict=True))
    own = images.dataset.name == next(iter(table.runs.values())).config.data
    eps = options.eps or (table.eps if own else max(run.config.evaluation_eps for run in runs.values()))
    return Filled(
        name, table, tuple(_entries(table, loaded, images, options, eps / 255)), eps, images.dataset.name,
        runs={key: runs.get(key) for key in table.runs},
        changes={key: differences(run, table.runs[key].config) for key, run in runs.items()},
        candidates={key: len(found) for key, found in fitting.items()},
        images=len(images), total=images.total,
    )  # fmt: skip


def _entries(table: Table, loaded: dict[str, LoadedRun], images: TestImages, options: Options, eps: float) -> Iterable[Entry]:
    found = {}
    for target, source in dict.fromkeys((cell.target, cell.source) for cell in table.cells):
        if target in loaded and (not source or source in loaded):
            attacks = [cell.attack for cell in table.cells if (cell.target, cell.source) == (target, source)]
            found[target, source] = loaded[target].measure(
                images, attacks, options, eps=eps,
                source=loaded[source].model if source else None,
                attack_wrong=any(attack.startswith("pgd-ls") for attack in attacks),  # they may raise accuracy
            )  # fmt: skip
    for cell in table.cells:
        ours = found.get((cell.target, cell.source), {}).get(cell.attack)
        if ours is not None:
            more = {"half_width": (ours["high"] - ours["low"]) / 2, "difference": ours["accuracy"] - cell.accuracy}
        yield Entry(cell, ours and ours | more)


# ---- as Markdown


def markdown(filled: Filled) -> str:
    """A heading, the table, and notes: which runs, what was smaller, what is missing."""
    columns = list(dict.fromkeys(entry.cell.column for entry in filled.entries))
    rows = []
    for i in range(0, len(filled.entries), len(columns)):
        of_row = filled.entries[i : i + len(columns)]
        first = of_row[0].cell.row + MARK * filled.marked(of_row[0])
        ours, source, difference = zip(*(entry.texts for entry in of_row), strict=True)
        if len(columns) == 1:
            rows.append((first, *ours, *source, *difference))
        else:  # below each other
            rows += [(first, "ours", *ours), ("", "source", *source)]
            rows += [("", "difference", *difference)] if any(difference) else []
    header = ("ours", "source", "difference") if len(columns) == 1 else ("", *columns)
    head = (
        f"Accuracy in %, ± half of the 95 % interval, on {filled.images:,} of {filled.total:,} test images of {filled.data}, "
        f"eps {format_eps(filled.eps)}."
    )
    if any(cell.attack.startswith("pgd-ls") for cell in filled.table.cells):
        head += " Images that the model gets wrong are attacked too, and some end up right."
    body = markdown_table((filled.table.corner, *header), rows, numbers=3 if len(columns) == 1 else len(columns))
    return "\n".join([f"**{filled.table.title}**", "", head, "", body, "", *_notes(filled)]) + "\n"


def _notes(filled: Filled) -> list[str]:
    notes = []
    if any(map(filled.marked, filled.entries)):
        notes.append(f"{MARK} Run otherwise than in the source, whose setting is in brackets:")
        if filled.images < filled.total:
            notes.append(f"test images {filled.images:,} ({filled.total:,});")
        alike: dict[str, list[str]] = {}
        for key, changes in filled.changes.items():
            if changes:
                alike.setdefault(", ".join(changes), []).append(key)
        notes += [f"{', '.join(keys)}: {changes};" for changes, keys in alike.items()]
        notes = [" ".join(notes).rstrip(";") + ".", ""]
    counts = {key: f", the first of {count} that fit" if count > 1 else "" for key, count in filled.candidates.items()}
    notes.append("Runs: " + ", ".join(f"{key}: {run}{counts[key]}" for key, run in filled.runs.items() if run) + ".")
    data = next(run.config.data for run in filled.runs.values() if run)
    specs = filled.table.runs
    if missing := [f"{key} (`{specs[key].command(None, data)}`)" for key, run in filled.runs.items() if run is None]:
        notes += ["", f"Missing: {', '.join(missing)}."]
    return notes


# ---- as files


def as_json(filled: Filled) -> dict:
    def cell(entry: Entry) -> dict:
        c = entry.cell
        what = {"row": c.row, "column": c.column, "attack": c.attack, "target": c.target, "made_on": c.source or c.target}
        return what | {"source": c.accuracy, "ours": entry.ours, "smaller": filled.marked(entry)}

    runs = {
        key: run and {"folder": str(run.folder), "differs": filled.changes[key], "config": run.config.to_dict()}
        for key, run in filled.runs.items()
    }
    what = {"table": filled.name, "title": filled.table.title, "data": filled.data, "eps": filled.eps / 255}
    return what | {"test_images": filled.images, "of": filled.total, "cells": [*map(cell, filled.entries)], "runs": runs}


def write(filled: Filled, out: Path) -> list[Path]:
    """table-NAME.md and .json in the folder `out`."""
    atomic_write.make_folder(out)
    contents = {".md": markdown(filled), ".json": json.dumps(as_json(filled), indent=1) + "\n"}
    files = {out / f"table-{filled.name}{ending}": content for ending, content in contents.items()}
    for path, content in files.items():
        atomic_write.write(path, content.encode())
    return list(files)


def listing() -> str:
    """Every table with the keys of its runs."""
    return "\n".join(f"{name:14} {table.title}; runs: {', '.join(table.runs)}" for name, table in TABLES.items())

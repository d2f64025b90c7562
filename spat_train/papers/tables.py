"""`spat-train table`: ours beside the source's figure, and what was run otherwise than there."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..runtime import atomic_write as files
from .measure import Subject, TestImages, measured, open_images, open_models
from .reported import TABLES, Cell, Table
from .runs import Options, Run, check, choose, data_name, differences, find_runs, fits, named, title, told

MARK = "†"


@dataclass(frozen=True)
class Entry:
    """A cell of the source and what ours is: percent and its 95 % interval, None where a run is missing."""

    cell: Cell
    ours: dict[str, float] | None

    @property
    def half_width(self) -> float:
        assert self.ours is not None
        return (self.ours["high"] - self.ours["low"]) / 2

    @property
    def difference(self) -> float:
        assert self.ours is not None
        return self.ours["accuracy"] - self.cell.accuracy


@dataclass(frozen=True)
class Filled:
    """A table with our numbers.

    Attributes:
        eps: of the attacks, in 1/255.
        runs: by key, None where missing. changes: by key, how the run differs from the source's.
        candidates: by key, how many runs fitted.
        images, total: how many test images were used, of how many there are.
    """

    name: str
    table: Table
    entries: tuple[Entry, ...]
    eps: float
    data: str
    runs: dict[str, Run | None]
    changes: dict[str, list[str]]
    candidates: dict[str, int]
    images: int
    total: int

    def keys(self, cell: Cell) -> list[str]:
        return [key for key in (cell.target, cell.source) if key]

    def marked(self, cell: Cell) -> bool:
        return self.images < self.total or any(self.changes[key] for key in self.keys(cell))


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
    """Find (or train) the runs of table `name`, and measure them.

    Args:
        given: runs by key, instead of searching.
        out: the folder that it will be written to.

    Raises:
        InputError: no such table, or no run of it; an option, a run or the data do not fit.
    """
    table = find(name)
    check(options, out)
    if unknown := next((key for key in given if key not in table.runs), None):
        raise InputError(f"--run {unknown}={given[unknown]}: table {name} has no run {unknown}: it has {', '.join(table.runs)}")
    there = find_runs(options.runs)
    runs = choose(table.runs, options, given, there)
    if all(runs[cell.target] is None for cell in table.cells):
        where = f"in --runs {options.runs}" if options.runs else "without --runs"
        looked = "; ".join(f"{key}: {want.words(options)}" for key, want in table.runs.items())
        if data := sorted({data_name(run.config.data) for run in there}):
            looked += f"; there are runs on {', '.join(data)}, for --data"
        raise InputError(f"table {name}: no run fits {where} (looked for {looked}): give --runs, --run KEY=FOLDER, or --train")
    here = {key: run for key, run in runs.items() if run}
    images = open_images(here.values(), options)
    subjects = dict(zip(here, open_models(list(here.values()), images, options), strict=True))
    own = images.dataset.name == next(iter(table.runs.values())).config.data
    eps = options.eps or (table.eps if own else max(run.config.evaluation_eps for run in here.values()))
    entries = tuple(_entries(table, subjects, images, options, eps / 255))
    changes = {key: differences(run, table.runs[key].config) for key, run in here.items()}
    candidates = {key: sum(fits(run, table.runs[key], options) for run in there) for key in here if key not in given}
    return Filled(name, table, entries, eps, images.dataset.name, runs, changes, candidates, len(images), images.total)


def _entries(table: Table, subjects: dict[str, Subject], images: TestImages, options: Options, eps: float) -> Iterable[Entry]:
    found = {}
    for target, source in dict.fromkeys((cell.target, cell.source) for cell in table.cells):
        if target in subjects and (not source or source in subjects):
            attacks = [cell.attack for cell in table.cells if (cell.target, cell.source) == (target, source)]
            found[target, source] = measured(
                subjects[target], images, attacks, options, eps=eps,
                source=subjects[source].model if source else None,
                attack_wrong=any(attack.startswith("pgd-ls") for attack in attacks),  # they may raise accuracy
            )  # fmt: skip
    return (Entry(cell, found.get((cell.target, cell.source), {}).get(cell.attack)) for cell in table.cells)


def find(name: str) -> Table:
    return named("table", name, TABLES)


# ---- as Markdown


def markdown(filled: Filled) -> str:
    """A heading, the table, and notes: which runs, what was smaller, what is missing."""
    columns = list(dict.fromkeys(entry.cell.column for entry in filled.entries))
    lines = _lines(filled) if len(columns) == 1 else _blocks(filled, columns)
    head = (
        f"Accuracy in %, ± half of the 95 % interval, on {filled.images:,} of {filled.total:,} test images of {filled.data}, "
        f"eps {told(filled.eps)}."
    )
    if any(cell.attack.startswith("pgd-ls") for cell in filled.table.cells):
        head += " Images that the model gets wrong are attacked too, and some end up right."
    return "\n".join([f"**{filled.table.title}**", "", head, "", *lines, "", *_notes(filled)]) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ours(entry: Entry) -> str:
    return f"{entry.ours['accuracy']:.2f} ± {entry.half_width:.2f}" if entry.ours else "missing"


def _difference(entry: Entry) -> str:
    return f"{entry.difference:+.2f}".replace("-", "−") if entry.ours else ""


def _lines(filled: Filled) -> list[str]:
    """One number a row: ours, the source's and the difference beside each other."""
    lines = [_row(filled.table.corner, "ours", "source", "difference"), "|---|---:|---:|---:|"]
    for entry in filled.entries:
        mark = MARK if entry.ours and filled.marked(entry.cell) else ""
        lines.append(_row(entry.cell.row + mark, _ours(entry), f"{entry.cell.accuracy:.2f}", _difference(entry)))
    return lines


def _blocks(filled: Filled, columns: list[str]) -> list[str]:
    """Many numbers a row: ours, the source's and the difference below each other."""
    lines = [_row(filled.table.corner, "", *columns), f"|---|---|{'---:|' * len(columns)}"]
    for row in dict.fromkeys(entry.cell.row for entry in filled.entries):
        entries = [entry for entry in filled.entries if entry.cell.row == row]
        mark = MARK if entries[0].ours and filled.marked(entries[0].cell) else ""
        lines.append(_row(row + mark, "ours", *map(_ours, entries)))
        lines.append(_row("", "source", *(f"{entry.cell.accuracy:.2f}" for entry in entries)))
        if entries[0].ours:
            lines.append(_row("", "difference", *map(_difference, entries)))
    return lines


def _notes(filled: Filled) -> list[str]:
    notes = []
    if any(entry.ours and filled.marked(entry.cell) for entry in filled.entries):
        notes.append(f"{MARK} Run otherwise than in the source, whose setting is in brackets:")
        if filled.images < filled.total:
            notes.append(f"test images {filled.images:,} ({filled.total:,});")
        alike: dict[str, list[str]] = {}
        for key, changes in filled.changes.items():
            if changes:
                alike.setdefault(", ".join(changes), []).append(key)
        notes += [f"{', '.join(keys)}: {changes};" for changes, keys in alike.items()]
        notes = [" ".join(notes).rstrip(";") + ".", ""]
    notes.append("Runs: " + ", ".join(_chosen(filled, key, run) for key, run in filled.runs.items() if run) + ".")
    if missing := [key for key, run in filled.runs.items() if run is None]:
        notes += ["", f"Missing: {', '.join(missing)}."]
    return notes


def _chosen(filled: Filled, key: str, run: Run) -> str:
    count = filled.candidates.get(key, 1)
    several = f", the closest of {count}" if count > 1 and not filled.table.runs[key].copy_of else ""
    return f"{key}: {run.folder} ({title(run.config)}, {run.config.model}{several})"


# ---- as files


def as_json(filled: Filled) -> dict:
    def cell(entry: Entry) -> dict:
        c = entry.cell
        numbers = entry.ours and entry.ours | {"half_width": entry.half_width, "difference": entry.difference}
        what = {"row": c.row, "column": c.column, "attack": c.attack, "target": c.target, "made_on": c.source or c.target}
        return what | {"source": c.accuracy, "ours": numbers, "smaller": bool(entry.ours and filled.marked(c))}

    runs = {
        key: run and {"folder": str(run.folder), "differs": filled.changes[key], "config": run.config.to_dict()}
        for key, run in filled.runs.items()
    }
    what = {"table": filled.name, "title": filled.table.title, "data": filled.data, "eps": filled.eps / 255}
    return what | {"test_images": filled.images, "of": filled.total, "cells": [*map(cell, filled.entries)], "runs": runs}


def write(filled: Filled, out: Path) -> list[Path]:
    """table-NAME.md and .json in the folder `out`."""
    files.make_folder(out)
    contents = {".md": markdown(filled), ".json": json.dumps(as_json(filled), indent=1) + "\n"}
    paths = [out / f"table-{filled.name}{ending}" for ending in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        files.write(path, content.encode())
    return paths


def listing(names: Iterable[str] = TABLES) -> str:
    """Every table with the keys of its runs."""
    return "\n".join(f"{name:14} {TABLES[name].title}; runs: {', '.join(TABLES[name].runs)}" for name in names)

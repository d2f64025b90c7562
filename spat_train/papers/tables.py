"""`spat-train table`: our numbers beside the source's, with what differs from the source's settings."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, lookup
from ..runtime import atomic_write
from .differences import differences
from .loaded_run import LoadedRun, TestImages, open_images, open_models
from .options import Options, check
from .reported import TABLES, Cell, Table
from .runs import Run, find_runs, format_eps
from .selection import candidates, training_hint

MARK = "†"


@dataclass(frozen=True)
class Entry:
    """A cell of the source, and ours: percent and its 95 % interval, or None where a run is missing."""

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
        runs: by key, None where missing.
        changes: by key, how the run differs from the source's.
        candidates: by key, the number of runs that fit.
        images, total: how many test images were used, and how many there are.
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

    def marked(self, cell: Cell) -> bool:
        """Whether its runs or its test images differ from the source's."""
        return self.images < self.total or any(self.changes[key] for key in (cell.target, cell.source) if key)


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
    fitting = candidates(table.runs, options, given)
    runs = {key: found[0] for key, found in fitting.items() if found}
    if not any(cell.target in runs for cell in table.cells):
        raise InputError(_no_run(name, table, options))
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


def _no_run(name: str, table: Table, options: Options) -> str:
    """The error message where there is no run at all: what was looked for, what there is, how to go on."""
    presets = ", ".join(dict.fromkeys(spec.preset for spec in table.runs.values()))
    there = [f"{run} on {run.config.data}" for run in find_runs(options.runs)][:8]
    looked = f"--runs {options.runs} has none" + (f", but {', '.join(there)}" if there else "") if options.runs else "give --runs"
    key, spec = next(iter(table.runs.items()))
    return (
        f"table {name}: it needs runs with --preset {presets}: {looked}: "
        f"say which run it is by --run {key}=FOLDER, or {training_hint(spec, [], options)}"
    )


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
    return (Entry(cell, found.get((cell.target, cell.source), {}).get(cell.attack)) for cell in table.cells)


# ---- as Markdown


def markdown(filled: Filled) -> str:
    """A heading, the table, and notes: which runs, what was smaller, what is missing."""
    columns = list(dict.fromkeys(entry.cell.column for entry in filled.entries))
    lines = _lines(filled) if len(columns) == 1 else _blocks(filled, columns)
    head = (
        f"Accuracy in %, ± half of the 95 % interval, on {filled.images:,} of {filled.total:,} test images of {filled.data}, "
        f"eps {format_eps(filled.eps)}."
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
    """One number in each row: ours, the source's and the difference beside each other."""
    lines = [_row(filled.table.corner, "ours", "source", "difference"), "|---|---:|---:|---:|"]
    for entry in filled.entries:
        mark = MARK if entry.ours and filled.marked(entry.cell) else ""
        lines.append(_row(entry.cell.row + mark, _ours(entry), f"{entry.cell.accuracy:.2f}", _difference(entry)))
    return lines


def _blocks(filled: Filled, columns: list[str]) -> list[str]:
    """Several numbers in each row: ours, the source's and the difference below each other."""
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
    data = next(run.config.data for run in filled.runs.values() if run)
    specs = filled.table.runs
    if missing := [f"{key} (`{specs[key].command(None, data)}`)" for key, run in filled.runs.items() if run is None]:
        notes += ["", f"Missing: {', '.join(missing)}."]
    return notes


def _chosen(filled: Filled, key: str, run: Run) -> str:
    count = filled.candidates[key]
    return f"{key}: {run}" + (f", the first of {count} that fit" if count > 1 else "")


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
    atomic_write.make_folder(out)
    contents = {".md": markdown(filled), ".json": json.dumps(as_json(filled), indent=1) + "\n"}
    paths = [out / f"table-{filled.name}{ending}" for ending in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        atomic_write.write(path, content.encode())
    return paths


def listing() -> str:
    """Every table with the keys of its runs."""
    return "\n".join(f"{name:14} {table.title}; runs: {', '.join(table.runs)}" for name, table in TABLES.items())

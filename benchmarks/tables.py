"""Markdown tables of results: what every benchmark's `table(results)` is made of.

A file of results may have been cut short. A cell of whose values one is missing is empty.
"""

from collections.abc import Callable, Iterable

Formula = Callable[[dict], object]
SETTINGS = "{settings[model]}, batch {settings[batch]}, PGD-{settings[steps]}"


class Row(dict):
    """A record, and what formulas make of it."""

    def __init__(self, record: dict, formulas: dict[str, Formula]):
        super().__init__(record)
        self.formulas = formulas

    def __missing__(self, key: str) -> object:
        return self.formulas[key](self)


def filled(text: str | Formula, values: dict) -> str:
    """`text`, a format string or a function, of `values`. Empty where these lack what it needs."""
    try:
        return text.format_map(values) if isinstance(text, str) else text(values)
    except LookupError:
        return ""


def markdown(results: dict, records: Iterable[dict], heads: str, cells: str, *notes: str | Formula, **formulas: Formula) -> str:
    """A table with a row for each record.

    Args:
        heads: names of the columns, with | between them, and || between those aligned left and those aligned right.
        cells: the same of format strings, which are given the record and the `formulas`.
        notes: below the table, given the results.
    """
    left, right = (len(part.split("|")) for part in heads.split("||"))
    heads, cells = ([part.strip() for part in texts.replace("||", "|").split("|")] for texts in (heads, cells))
    rows = [[filled(cell, Row(record, formulas)).replace("|", r"\|") for cell in cells] for record in records]
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    lines.insert(1, f"|{'---|' * left}{'---:|' * right}")
    return "\n".join([*lines, "", sentences(results, *notes)]).strip()


def sentences(results: dict, *notes: str | Formula) -> str:
    """The notes that `results` have the values of, in one line."""
    return " ".join(filter(None, (filled(note, results) for note in notes)))


def environment(results: dict) -> str:
    """Device, threads, version and date, in a sentence; of a CPU also its matrix units."""
    machine = results.get("machine", results)
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in machine["cpu"]["flags"]]
    missing = [flag for flag in ("avx512_bf16", "amx_bf16") if flag not in flags]
    cpu = "" if machine["cuda"] else f" ({', '.join(flags + [f'no {flag}' for flag in missing])})"
    return f"{machine['device']}{cpu}, {machine['threads']} threads, torch {machine['torch']}, {machine['date'][:10]}."


def literal(text: str) -> Formula:
    """A note that may have braces in it."""
    return lambda _: text


def columns(names: Iterable[str], head: str, cell: str) -> tuple[str, str]:
    """Heads and cells of `markdown`, one of each for every name."""
    names = list(names)
    return " | ".join(head.format(name) for name in names), " | ".join(cell.format(name) for name in names)


def ratio(above: str, below: str) -> Formula:
    """The ratio of the medians of two records, each under its key; "" is the row's own."""
    return lambda r: (r[above] if above else r)["median"] / (r[below] if below else r)["median"]


def fastest(records: list[dict], ours: bool, precision: str | None = None) -> dict:
    """The record with the least median, of ours or of the rivals. Empty if none of them was timed."""
    found = [r for r in records if "median" in r and r.get("ours") == ours and precision in (None, r.get("precision"))]
    return min(found, key=lambda r: r["median"], default={})

"""Tables as text: in columns for the terminal, and as Markdown."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells in columns, the first aligned to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = (f"{row[0]:<{first}}" + "".join(f"  {cell:>{n}}" for cell, n in zip(row[1:], others, strict=True)) for row in rows)
    return "\n".join(map(str.rstrip, lines))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)

"""The results as Markdown tables, from the JSON alone: `python -m benchmarks.report [FILE.json ...] [--write PAGE.md ...]`.

Prints the tables of the files in full, or writes them, in short, between the markers of the pages, which for CARD/NAME.json are
`<!-- benchmarks:CARD:NAME -->` and `<!-- /benchmarks:CARD:NAME -->`. Without files: all of benchmarks/results/CARD/*.json, the
predictions, the pictures (plots), and "Not measured yet." between all other markers:

    python -m benchmarks.report --write README.md benchmarks/NOTES.md

A table is made by the benchmark that measured it, by its function `table` (in full `full_table`, if it has one): the module that
the file names under "benchmark", or the one that is called like the file.

What can be written is written. The command fails if a result has no marker on any of the pages, if a page has no markers, if a
file is not a benchmark's, or if its card is not its folder's. Files may have been cut short: what they lack is an empty cell.
"""

import argparse
import importlib
import json
import re
from pathlib import Path

from benchmarks import plots, predictions

RESULTS = Path(__file__).parent / "results"


def table_of(results: dict, name: str, full: bool) -> str:
    """The table of the results in the file `name`.json.

    Raises:
        ValueError: no benchmark makes tables of it, or it was cut before what the table is about.
    """
    module = results.get("benchmark", name)
    try:
        benchmark = importlib.import_module(f"benchmarks.{module}")
        return getattr(benchmark, "full_table" if full and hasattr(benchmark, "full_table") else "table")(results)
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(f"not a benchmark's: there is no table in benchmarks/{module}.py") from None
    except LookupError as error:
        raise ValueError(f"not a whole result of benchmarks/{module}.py: it lacks {error}") from None


def load(path: Path, card: str | None = None) -> dict:
    """Raises ValueError if the file was cut in the middle, or does not come from `card`, if that is given."""
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"it was cut while it was written ({error}): remove it, or measure it again") from None
    machine = results.get("machine") or results.get("machine_info") or results
    device = machine.get("gpu") or (machine.get("device", "nowhere") if machine.get("cuda") else "CPU")
    if card and f"-{card}-" not in re.sub(r"\W+", "-", f" {device} ").lower():
        raise ValueError(f"its device is {device}, not the {card} that the folder is for: move it")
    return results


def contents(files: list[Path], pages: list[Path]) -> tuple[dict[str, str], list[str]]:
    """Marker (CARD:NAME) to text, and what is wrong with files."""
    texts, wrong, loaded = {}, [], {}
    for path in files or sorted(RESULTS.glob("*/*.json")):
        card, name = path.parent.name, path.stem
        try:
            loaded[card, name] = load(path, None if files and not pages else card)
            full = not pages or name == "memory"  # the memory is a column of the full table
            texts[f"{card}:{name}"] = table_of(loaded[card, name], name, full)
        except (OSError, ValueError) as error:
            wrong.append(f"{path}: {error}")
    if not files:
        for card in predictions.PREDICTED:
            measured = (loaded.get((card, name), {}) for name in ("attack", "training"))
            texts[f"{card}:predictions"] = predictions.table(card, *measured)
        for folder in {path.parent for path in RESULTS.glob("*/throughput.png")}:
            texts[f"{folder.name}:plots"] = plots.links(folder)
    return texts, wrong


def write(page: Path, texts: dict[str, str], otherwise: str | None = None) -> set[str]:
    """Put `texts` between their markers on `page`, and `otherwise`, unless it is None, between all others; the markers found."""
    markers = set()

    def between(match: re.Match) -> str:
        name, old = match[1], match[2].strip()
        markers.add(name)
        text = texts.get(name, old if otherwise is None else otherwise)
        return f"<!-- benchmarks:{name} -->\n{text}\n<!-- /benchmarks:{name} -->"

    marker = r"(?s)<!-- benchmarks:([\w:.+-]+) -->(.*?)<!-- /benchmarks:\1 -->"
    page.write_text(re.sub(marker, between, page.read_text()))
    return markers


def main(files: list[Path], pages: list[Path]) -> None:
    texts, wrong = contents(files, pages)
    if not pages:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in texts.items()))
    on = {page: write(page, texts, None if files else "Not measured yet.") for page in pages}
    example = "<!-- benchmarks:cpu:attack --> ... <!-- /benchmarks:cpu:attack -->"
    wrong += [f"{page} has no markers, such as {example}" for page, markers in on.items() if not markers]
    if on and (homeless := [name for name in texts if not any(name in markers for markers in on.values())]):
        wrong.append(f"there is no marker on {', '.join(map(str, pages))} for {', '.join(homeless)}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="*", type=Path, help="default: all committed results")
    parser.add_argument("--write", nargs="+", type=Path, default=[], help="put the tables between the markers of these pages")
    args = parser.parse_args()
    main(args.json, args.write)

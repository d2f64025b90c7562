"""The results as Markdown tables, from the JSON alone: `python -m benchmarks.report [FILE.json ...]` prints them in full.

Without files: those of all benchmarks/results/CARD/*.json, the predictions and the pictures (plots). --write puts them, in short,
between the markers of pages, which for CARD/NAME.json are `<!-- benchmarks:CARD:NAME -->` and `<!-- /benchmarks:CARD:NAME -->`,
and "Not measured yet." between all other markers:

    python -m benchmarks.report --write README.md benchmarks/NOTES.md

A table is made by the benchmark that measured it, by its function `table` (in full `full_table`, if it has one): the module that
the file names under "benchmark", or the one that is called like the file.

What can be written is written. The command fails if a result has no marker on any of the pages, if a page has no markers, if a
file is not a benchmark's, or if its card is not its folder's.
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


def write(page: Path, texts: dict[str, str]) -> set[str]:
    """Put `texts` between their markers on `page`, and "Not measured yet." between all others; the markers found."""
    markers = set()

    def between(match: re.Match) -> str:
        markers.add(match[1])
        text = texts.get(match[1], "Not measured yet.")
        return f"<!-- benchmarks:{match[1]} -->\n{text}\n<!-- /benchmarks:{match[1]} -->"

    marker = r"(?s)<!-- benchmarks:([\w:.+-]+) -->.*?<!-- /benchmarks:\1 -->"
    page.write_text(re.sub(marker, between, page.read_text()))
    return markers


def main(files: list[Path], pages: list[Path]) -> None:
    texts, wrong, loaded = {}, [], {}
    for path in files or sorted(RESULTS.glob("*/*.json")):
        card, name = path.parent.name, path.stem
        try:
            loaded[card, name] = load(path, None if files else card)
            full = not pages or name == "memory"  # the memory is a column of the full table
            texts[f"{card}:{name}"] = table_of(loaded[card, name], name, full)
        except (OSError, ValueError) as error:
            wrong.append(f"{path}: {error}")
    if not files:
        for card in predictions.PREDICTED:
            smoke, attack, training = (loaded.get((card, name), {}) for name in ("smoke", "attack", "training"))
            attack = smoke | attack | {"cells": attack.get("cells", []) + smoke.get("cells", [])}  # where the race was cut
            texts[f"{card}:predictions"] = predictions.table(card, attack, training)
        texts |= {f"{path.parent.name}:plots": plots.links(path.parent) for path in RESULTS.glob("*/throughput.png")}
    if not pages:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in texts.items()))
    on = {page: write(page, texts) for page in pages}
    example = "<!-- benchmarks:cpu:attack --> ... <!-- /benchmarks:cpu:attack -->"
    wrong += [f"{page} has no markers, such as {example}" for page, markers in on.items() if not markers]
    if on and (homeless := texts.keys() - set().union(*on.values())):
        wrong.append(f"there is no marker on {', '.join(map(str, pages))} for {', '.join(sorted(homeless))}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="*", type=Path, help="default: all committed results")
    parser.add_argument("--write", nargs="+", type=Path, default=[], help="put the tables between the markers of these pages")
    args = parser.parse_args()
    if args.json and args.write:
        parser.error("--write takes all committed results: leave the files out")
    main(args.json, args.write)

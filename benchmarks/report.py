"""The results as a Markdown table, from the JSON alone: `python -m benchmarks.report [json] [--write README.md]`.

A time is the median of a pass's rounds, in the provider's best pass. GB/s counts the bytes that ours must move; `of
copy` divides that by what `copy_` of a working set of the same size moves in the same run (in the same cache, so it can
be far above the speed of memory).
"""

import argparse
import json
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "cpu" / "kernels.json"
BEGIN, END = "<!-- benchmarks:cpu -->", "<!-- /benchmarks:cpu -->"


def times(results: dict) -> dict[str, dict[str, dict]]:
    """Case to provider to its extra_info and `us`."""
    table: dict[str, dict[str, dict]] = {}
    for run in results["benchmarks"]:
        info, us = run["extra_info"], run["stats"]["median"] * 1e6
        entry = table.setdefault(run["group"], {}).setdefault(info["provider"], info | {"us": us})
        entry["us"] = min(entry["us"], us)
    return table


def render(results: dict) -> str:
    machine = results["machine_info"]
    lines = ["| case | ours, µs | against | µs | ratio | GB/s | of copy |", "|---|---:|---|---:|---:|---:|---:|"]
    notes = [f"{machine['cpu']['model']}, {machine['threads']} threads, torch {machine['torch']}."]
    for case, providers in times(results).items():
        (yardstick,) = (p for p in providers.values() if p["role"] == "yardstick")
        speed = yardstick["bytes_held"] / yardstick["us"] / 1e3
        ours = providers.get("spat")
        if not ours:
            notes.append(f"`copy_` of {yardstick['bytes_held'] >> 21} MiB: {speed:.1f} GB/s.")
            continue
        moved = ours["bytes_moved"]
        bandwidth = moved / ours["us"] / 1e3
        last = [f"{bandwidth:.1f}", f"{bandwidth / speed:.0%}"] if moved else ["", ""]
        for name, other in providers.items():
            if other["role"] == "rival" or (other is yardstick and not moved):
                cells = f"{ours['us']:.1f}", name, f"{other['us']:.1f}", f"{other['us'] / ours['us']:.1f}x"
                lines.append(f"| {' | '.join([case, *cells, *last])} |")
    return "\n".join(lines) + "\n\n" + " ".join(notes)


def write(path: Path, text: str) -> None:
    page, found = re.subn(f"(?s){BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{text}\n{END}", path.read_text())
    if not found:
        raise SystemExit(f"{path} has no {BEGIN} ... {END}")
    path.write_text(page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help="put the table between the benchmark markers of this file")
    args = parser.parse_args()
    text = render(json.loads(args.json.read_text()))
    write(args.write, text) if args.write else print(text)

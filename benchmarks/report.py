"""The results as Markdown tables, from the JSON alone: `python -m benchmarks.report [json ...] [--write README.md]`.

Without files, all of benchmarks/results/<device>/*.json. Printed in full, or written, in short, wherever the page has markers:
`<!-- benchmarks:<device> -->` for kernels.json, `<!-- benchmarks:<device>:NAME -->` for other files.

Kernels: a time is the median of a pass's rounds, in the provider's best pass. GB/s counts the bytes that ours must move; `of
copy` divides that by what `copy_` of a working set of the same size moves in the same run (in the same cache, so it can
be far above the speed of memory).

Attacks: times are medians over turns, of what agreed with the judge. `of limit` is the time that the convolutions alone would
take at the measured matrix ceiling of the precision, over the time taken; `of roofline` the same of the roofline
(benchmarks/workmodel.py).
"""

import argparse
import json
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def header(left: list[str], right: list[str]) -> list[str]:
    """Two lines: columns aligned left, then columns aligned right."""
    return [row(*left, *right), f"|{'---|' * len(left)}{'---:|' * len(right)}"]


# --- kernels ---


def times(results: dict) -> dict[str, dict[str, dict]]:
    """Case to provider to its extra_info and `us`."""
    table: dict[str, dict[str, dict]] = {}
    for run in results["benchmarks"]:
        info, us = run["extra_info"], run["stats"]["median"] * 1e6 / run["extra_info"].get("calls", 1)
        entry = table.setdefault(run["group"], {}).setdefault(info["provider"], info | {"us": us})
        entry["us"] = min(entry["us"], us)
    return table


def kernels(results: dict) -> str:
    machine = results["machine_info"]
    lines = ["| case | ours, µs | against | µs | ratio | GB/s | of copy |", "|---|---:|---|---:|---:|---:|---:|"]
    notes = [f"{machine.get('gpu') or machine['cpu']['model']}, {machine['threads']} threads, torch {machine['torch']}."]
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
                lines.append(row(case, *cells, *last))
    return "\n".join(lines) + "\n\n" + " ".join(notes)


# --- attacks ---


def races(results: dict) -> dict[tuple[str, int], list[dict]]:
    """(model, batch) to its records."""
    found: dict[tuple[str, int], list[dict]] = {}
    for record in results["cells"]:
        found.setdefault((record["model"], record["batch"]), []).append(record)
    return found


def fastest(records: list[dict], ours: bool, precision: str | None = None) -> dict | None:
    timed = [r for r in records if r["status"] == "timed" and r["ours"] == ours and precision in (None, r["precision"])]
    return min(timed, key=lambda r: r["median"], default=None)


def speed(record: dict, steps: int) -> list[str]:
    seconds = record["median"]
    shares = [f"{steps * record['limit'][kind] / seconds:.0%}" for kind in ("conv", "roofline")]
    return [f"{record['batch'] / seconds:.0f}", f"{1e3 * seconds / steps:.2f}", *shares]


def attack_table(results: dict) -> str:
    """Every record; for a rival, how many times faster the fastest of ours is, in its precision and in any."""
    steps = results["settings"]["steps"]
    columns = ["batch", "images/s", "ms a step", "of limit", "of roofline", "peak MiB", "ours, same precision", "ours, any"]
    lines = header(["model", "precision", "provider"], columns)
    for (model, batch), records in races(results).items():
        for record in records:
            head = [model, record["precision"], record["provider"], str(batch)]
            if record["status"] != "timed":
                lines.append(row(*head, f"{record['status']}: {record['note']}"))
                continue
            memory = f"{record['peak_mib']:.0f}" if "peak_mib" in record else ""
            ratios = ["", ""]
            if not record["ours"]:
                best = fastest(records, True, record["precision"]), fastest(records, True)
                ratios = [f"{record['median'] / b['median']:.2f}x" if b else "" for b in best]
            lines.append(row(*head, *speed(record, steps), memory, *ratios))
    return "\n".join(lines)


def attack(results: dict) -> str:
    """A row for each model, batch and precision: the fastest of ours, and how many times faster it is than what it replaces."""
    steps, machine, ceilings = results["settings"]["steps"], results["machine"], results["ceilings"]
    columns = [
        "batch",
        "images/s",
        "ms a step",
        "of limit",
        "of roofline",
        "fastest rival in that precision",
        "torchattacks, fp32",
    ]
    lines = header(["model", "spat_kernels"], columns)
    for (model, batch), records in races(results).items():
        shipped = fastest([r for r in records if r["provider"] == "torchattacks"], False)
        for precision in dict.fromkeys(r["precision"] for r in records):
            ours, rival = (fastest(records, mine, precision) for mine in (True, False))
            if not ours:
                continue
            against = [f"{rival['median'] / ours['median']:.2f}x ({rival['provider']})" if rival else ""]
            against.append(f"{shipped['median'] / ours['median']:.2f}x" if shipped else "")
            lines.append(row(model, f"{ours['provider']}, {precision}", str(batch), *speed(ours, steps), *against))
    rates = ", ".join(f"{precision} {rate:.3g}" for precision, rate in ceilings["tflops"].items())
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date'][:10]}"
    return "\n".join(lines) + f"\n\nPGD-{steps}. {where}. Ceilings: copy {ceilings['copy_gbps']:.0f} GB/s; TFLOP/s {rates}."


# --- precision ---


def precision(results: dict) -> str:
    lines = header(
        ["model", "path", "precision"], ["images", "PGD-20 accuracy, %", "loss there", "zero pixels, %", "zero samples, %"]
    )
    for r in results["rows"]:
        values = f"{r['accuracy']:.2f}", f"{r['loss']:.4f}", f"{r['zero pixels']:.4f}", f"{r['zero samples']:.2f}"
        lines.append(row(r["model"], r["path"], r["precision"], str(r["images"]), *values))
    return "\n".join(lines) + f"\n\n{results['model']}, {results['device']}, torch {results['torch']}, {results['date'][:10]}."


# --- pages ---


def marker(path: Path) -> str:
    """results/h200/attack.json -> benchmarks:h200:attack; kernels go without a suffix."""
    return f"benchmarks:{path.parent.name}" + ("" if path.stem == "kernels" else f":{path.stem}")


def write(page: Path, name: str, text: str) -> bool:
    """Put `text` between the markers `name` of `page`; whether it has any."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    new, found = re.subn(f"(?s){begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page.read_text())
    page.write_text(new)
    return bool(found)


def main(files: list[Path], page: Path | None) -> None:
    written = False
    for path in files or sorted(RESULTS.glob("*/*.json")):
        results = json.loads(path.read_text())
        results = results.get("results", results)  # a stage of the GPU suite, or the results themselves
        kind = "attack" if "cells" in results else "precision" if "rows" in results else "kernels"
        if page:
            text = {"kernels": kernels, "attack": attack, "precision": precision}[kind](results)
            written |= write(page, marker(path), text)
        else:
            print({"kernels": kernels, "attack": attack_table, "precision": precision}[kind](results))
    if page and not written:
        raise SystemExit(
            f"{page} has no markers like <!-- benchmarks:cpu:attack --> ... <!-- /benchmarks:cpu:attack --> for these"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="*", type=Path, help="default: all committed results")
    parser.add_argument("--write", type=Path, help="put the tables between the benchmark markers of this page")
    args = parser.parse_args()
    main(args.json, args.write)

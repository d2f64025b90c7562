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
from collections.abc import Callable
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
        yardstick = next((p for p in providers.values() if p["role"] == "yardstick"), None)
        if yardstick is None:  # it failed, or the run ended before it
            notes.append(f"{case} has no yardstick.")
            continue
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


# --- training ---


def where(machine: dict) -> str:
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in machine["cpu"]["flags"]]
    missing = [flag for flag in ("avx512_bf16", "amx_bf16") if flag not in flags]
    cpu = "" if machine["cuda"] else f" ({', '.join(flags + [f'no {flag}' for flag in missing])})"
    return f"{machine['device']}{cpu}, {machine['threads']} threads, torch {machine['torch']}, {machine['date'][:10]}"


def updates(results: dict) -> str:
    return f"{results['settings']['model']}, batch {results['settings']['batch']}, PGD-{results['settings']['steps']}"


def by_method(records: list[dict]) -> dict[str, list[dict]]:
    return {method: [r for r in records if r["method"] == method] for method in dict.fromkeys(r["method"] for r in records)}


def published(records: list[dict]) -> dict | None:
    return fastest([r for r in records if r["provider"] == "authors"], False, "fp32")


def training_table(results: dict) -> str:
    """Every record, and how many times faster than the authors' loop in fp32 it is."""
    lines = header(["method", "precision", "provider"], ["s an update", "images/s", "authors', fp32"])
    for method, records in by_method(results["steps"]).items():
        base = published(records)
        for r in records:
            head = [method, r["precision"], r["provider"]]
            if r["status"] != "timed":
                lines.append(row(*head, f"{r['status']}: {r['note']}"))
                continue
            ratio = f"{base['median'] / r['median']:.2f}x" if base else ""
            lines.append(row(*head, f"{r['median']:.3f}", f"{results['settings']['batch'] / r['median']:.1f}", ratio))
    return "\n".join(lines) + f"\n\n{updates(results)}. {where(results['machine'])}."


def training(results: dict) -> str:
    """A row for each method and precision: the trainer's step, and how many times faster it is than what it replaces."""
    lines = header(
        ["method", "spat_train"], ["s an update", "images/s", "fastest rival in that precision", "authors' loop, fp32"]
    )
    for method, records in by_method(results["steps"]).items():
        base = published(records)
        for precision in dict.fromkeys(r["precision"] for r in records):
            ours = fastest([r for r in records if r["provider"] == "spat_train"], True, precision)
            if not ours:
                continue
            rival, seconds = fastest(records, False, precision), ours["median"]
            against = [f"{rival['median'] / seconds:.2f}x ({rival['provider']})" if rival else ""]
            against.append(f"{base['median'] / seconds:.2f}x" if base else "")
            lines.append(row(method, precision, f"{seconds:.3f}", f"{results['settings']['batch'] / seconds:.1f}", *against))
    return "\n".join(lines) + f"\n\n{updates(results)}. {where(results['machine'])}."


def overhead(results: dict) -> str:
    """Shares of a step. `around` is all but the model's work and the optimiser; it has what comes once an epoch in it."""
    columns = ["s a step", "attack", "forward, backward", "optimiser", "around", "of that batches", "once an epoch", "loss alone"]
    lines = header(["method", "precision"], [*columns, "epoch, s"])
    for r in results["loops"]:
        step, parts = r["epoch_seconds"] / r["steps_per_epoch"], r["parts"]
        work = [parts[name] for name in ("attack", "forward, backward", "optimizer")]
        seconds = [*work, step - sum(work), parts["loader"], step - r["step_seconds"], r["head_seconds"]]
        shares = [f"{100 * part / step:.2g} %" for part in seconds]
        lines.append(row(r["method"], r["precision"], f"{step:.3f}", *shares, f"{r['epoch_seconds']:.0f}"))
    images = f"{results['settings']['images']:,} images"
    return "\n".join(lines) + f"\n\n{updates(results)}, {images}. {where(results['machine'])}."


def data(results: dict) -> str:
    base = next(p for p in results["paths"] if p["provider"] == "spat_train")
    lines = header(["data path"], ["images/s", "spat_train is faster by"])
    for path in results["paths"]:
        ratio = "" if path is base else f"{base['images_per_second'] / path['images_per_second']:.1f}x"
        lines.append(row(path["provider"], f"{path['images_per_second']:,.0f}", ratio))
    s = results["settings"]
    images = f"{s['images']:,} {'CIFAR-10' if s['real'] else 'random'} images, batch {s['batch']}, pad {s['pad']}, flips"
    return "\n".join(lines) + f"\n\n{images}. {where(results['machine'])}."


def evidence(results: dict) -> str:
    """Accuracy of each training on test images."""
    trainings = results["trainings"]
    lines = header([results["experiment"]], list(trainings[0]["test"]))
    for t in trainings:
        lines.append(row(t["name"], *(f"{value:.1f}" for value in t["test"].values())))
    c = trainings[0]["config"]
    how = f"{c['model']}, {c['limit']:,} training images, eps {c['eps'] / 255:.4g}, PGD-{c['steps'] or 10}, {c['epochs']} epochs"
    return "\n".join(lines) + f"\n\n{how}; accuracy in % on {results['test_images']:,} test images. {where(results)}."


def judges(results: dict) -> str:
    """Ours beside each judge's: accuracies, and in how many images a pixel differs by more than 1e-6."""
    columns = ["accuracy, %: ours", "theirs", "samples that agree, %", "images equal to 1e-6, %"]
    lines = header(["model", "judge", "attack", "dtype"], columns)
    for r in results["judges"]:
        numbers = [*r["accuracy"], r["samples_agree"], r["images_equal"]]
        lines.append(row(r["run"], r["judge"], r["attack"], r["dtype"], *(f"{value:.1f}" for value in numbers)))
    return "\n".join(lines) + f"\n\n{results['judges'][0]['images']:,} test images each. {where(results['machine'])}."


def autoattack(results: dict) -> str:
    """Ours beside torchattacks': what they find robust, and the seconds of each stage."""
    found, s = results["autoattack"], results["settings"]
    stages = list(found["spat_kernels"]["seconds"])[1:]
    columns = ["accuracy, %", "same as torchattacks, %", *(f"{stage}, s" for stage in stages), "all, s", "faster"]
    lines = header(["AutoAttack"], columns)
    for name, r in found.items():
        seconds = [f"{r['seconds'].get(stage, 0):.1f}" for stage in stages]
        lines.append(row(name, f"{r['accuracy']:.1f}", f"{r['agreement']:.1f}", *seconds, f"{r['total_seconds']:.1f}",
                         f"{r['faster']:.2f}x"))  # fmt: skip
    how = f"{s['model']} ({s['network']}), {s['norm']}, eps {s['eps']:.4g}, {s['images']:,} images, {s['clean']:.1f} % correct"
    return "\n".join(lines) + f"\n\n{how}; batches of {s['batch_size']}, {s['queries']:,} queries. {where(results)}."


# --- where the milliseconds go ---


def breakdown(results: dict) -> str:
    """ms of each kind of kernel, the largest kinds first."""
    found = results["breakdown"]
    total = {kind: sum(part["kinds"].get(kind, 0.0) for part in found) for part in found for kind in part["kinds"]}
    kinds = sorted(total, key=total.get, reverse=True)
    lines = header(["model", "ms of"], ["batch", "in all", *kinds, "launches"])
    for part in found:
        times = (f"{part['kinds'].get(kind, 0.0):.2f}" for kind in kinds)
        lines.append(
            row(part["model"], part["what"], str(part["batch"]), f"{part['step_ms']:.2f}", *times, f"{part['launches']:.0f}")
        )
    how = "In all: without the profiler; the kinds, by kernels, with it, and on a CPU slowed by it."
    return "\n".join(lines) + f"\n\n{results['precision']}. {how} {where(results['machine'])}."


# --- the GPU suite ---


def suite(results: dict) -> str:
    lines = header(["stage", "status"], ["s"])
    lines += [
        row(s["stage"], f"{s['status']}{': ' * ('reason' in s)}{s.get('reason', '')}", f"{s['seconds']:.0f}")
        for s in results["stages"]
    ]
    return "\n".join(lines) + f"\n\n{where(results['machine'])}."


def ran(results: dict) -> str:
    """Commands that have no numbers, and the last that each said."""
    if "reason" in results:
        return f"{results['status']}: {results['reason']}"
    lines = header(["command", "status", "last line"], [])
    for command in results["commands"]:
        last = (command["tail"].strip().splitlines() or [""])[-1]
        lines.append(row(f"`{command['command']}`", command["status"], last[:200].replace("|", "/")))
    return "\n".join(lines) + f"\n\n{where(results['machine'])}."


# --- first questions ---


def ceilings(results: dict) -> str:
    """The machine's two ceilings, and the limits of an attack step that follow for each model."""
    found, precisions = results["ceilings"], list(results["ceilings"]["tflops"])
    lines = header(["model"], ["GFLOP forward, an image", *(f"{p}: limit, ms a step" for p in precisions)])
    for name, model in results["models"].items():
        limits = (f"{1e3 * model['step_limits_s'][p]['roofline']:.2f}" for p in precisions)
        lines.append(row(name, f"{model['gflop_forward_per_image']:.2f}", *limits))
    rates = ", ".join(f"{p} {found['matmul'][p]:.3g} ({found['conv'][p]:.3g})" for p in precisions)
    how = f"Batch {results['batch']}. Copy {found['copy_gbps']:,.0f} GB/s; TFLOP/s of a matrix product (a convolution) {rates}."
    return "\n".join(lines) + f"\n\n{how} {where(results['machine'])}."


def questions(results: dict) -> str:
    """TFLOP/s of the ways to compute each convolution, with cuDNN's first 10 engines and with all; then what launches cost."""
    every = {limit: results.get(f"convolutions, limit {limit}") for limit in (10, 0)}
    limits = {limit: found for limit, found in every.items() if isinstance(found, list)}
    ways = list(dict.fromkeys(way for found in limits.values() for conv in found for way in conv["tflops"]))
    lines = header(["convolution"], [f"{way}{', all engines' * (limit == 0)}" for limit in limits for way in ways])
    for same in zip(*limits.values(), strict=True):
        c = same[0]
        rates = (conv["tflops"].get(way, "") for conv in same for way in ways)
        name = f"{c['kernel']}x{c['kernel']} {c['ins']}->{c['outs']} /{c['stride']} @{c['size']}"
        lines.append(row(name, *(f"{rate:.3g}" if isinstance(rate, float) else "-" * bool(rate) for rate in rates)))
    launches = [f"{name} {us if isinstance(us, str) else f'{us:.2f}'}" for name, us in results["host_us"].items()]
    notes = [f"TFLOP/s, {results['precision']}, batch {results['batch']}. µs of the host a call: {', '.join(launches)}."]
    if nodes := {k: v for k, v in results.get("graph_nodes", {}).items() if isinstance(v, dict)}:
        told = (f"{size} {v['node_us']:.2f} (alone {v['eager_us']:.2f})" for size, v in nodes.items())
        notes.append(f"µs a node of a CUDA graph: {', '.join(told)}.")
    return "\n".join(lines) + f"\n\n{' '.join(notes)} {where(results['machine'])}."


# --- predictions ---


def step_ms(model: str, precision: str, provider: str) -> Callable[[list[dict]], float | None]:
    """Of an attack on a batch of 256."""

    def find(results: list[dict]) -> float | None:
        wanted = {"model": model, "batch": 256, "precision": precision, "provider": provider, "status": "timed"}
        for part in results:
            for cell in part.get("cells", []):
                if wanted.items() <= cell.items():
                    return 1e3 * cell["median"] / part["settings"]["steps"]
        return None

    return find


def faster(model: str, than: str) -> Callable[[list[dict]], float | None]:
    """How many times as fast as `than` the plan under a graph is, in bf16."""

    def find(results: list[dict]) -> float | None:
        ours, theirs = (step_ms(model, "bf16", provider)(results) for provider in ("spat plan+graph", than))
        return theirs / ours if ours and theirs else None

    return find


def of_loop(method: str, value: Callable[[dict], float]) -> Callable[[list[dict]], float | None]:
    """Of the trainer on WRN-34-10 in bf16."""

    def find(results: list[dict]) -> float | None:
        parts = [part for part in results if "loops" in part and part["settings"]["model"] == "wrn-34-10"]
        loops = [loop for part in parts for loop in part["loops"]]
        return next((value(r) for r in loops if (r["method"], r["precision"]) == (method, "bf16")), None)

    return find


def convolution_rate(results: list[dict]) -> float | None:
    """Of WRN-34-10's convolutions in an attack step on 256 images, in percent of the matrix ceiling."""
    cells = [
        c
        for part in results
        for c in part.get("cells", [])
        if (c["model"], c["batch"], c["precision"]) == ("wrn-34-10", 256, "bf16")
    ]
    steps = [p for part in results for p in part.get("breakdown", []) if (p["model"], p["batch"]) == ("wrn-34-10", 256)]
    taken = steps[0]["kinds"].get("convolution") if steps else None  # none of them, where no kernel has such a name
    return 1e5 * cells[0]["limit"]["conv"] / taken if cells and taken else None


PREDICTIONS = {  # made before there was a GPU: what, predicted, where it is measured
    "WRN-34-10, batch 256, ms a step: plain loop, fp32": (134, step_ms("wrn-34-10", "fp32", "loop")),
    "the same in TF32": (45, step_ms("wrn-34-10", "tf32", "loop")),
    "the same in bf16: autocast, channels_last": (18.7, step_ms("wrn-34-10", "bf16", "autocast loop")),
    "... and torch.compile with CUDA graphs": (16.1, step_ms("wrn-34-10", "bf16", "compiled autocast loop")),
    "... this plan under a CUDA graph": (15.3, step_ms("wrn-34-10", "bf16", "spat plan+graph")),
    "... its convolutions, % of a matrix product's speed": (70, convolution_rate),
    "ResNet-18, batch 256, bf16: times as fast as torch.compile with CUDA graphs":
        (1.4, faster("resnet-18", "compiled autocast loop")),
    "WRN-34-10, batch 128, bf16: s an epoch of Madry": (35, of_loop("madry", lambda r: r["epoch_seconds"])),
    "... of MART": (41, of_loop("mart", lambda r: r["epoch_seconds"])),
    "... of TRADES": (42, of_loop("trades", lambda r: r["epoch_seconds"])),
    "... % of an epoch that a checkpoint takes":
        (4, of_loop("madry", lambda r: 100 * r["epoch_parts"]["save"] / r["epoch_seconds"])),
    "... % of a step that MART's loss takes": (0.3, of_loop("mart", lambda r: 100 * r["head_seconds"] / r["step_seconds"])),
}  # fmt: skip


def predictions(folder: Path) -> str:
    """Each prediction beside what the results in `folder` say."""
    found = [results_of(path) for path in sorted(folder.glob("*.json"))]
    flat = [part for results in found for part in (results if isinstance(results, list) else [results]) if part]
    lines = header(["prediction"], ["predicted", "measured", "measured / predicted"])
    for what, (predicted, measure) in PREDICTIONS.items():
        value = measure(flat)
        measured = ["not yet", ""] if value is None else [f"{value:.3g}", f"{value / predicted:.2f}"]
        lines.append(row(what, f"{predicted:g}", *measured))
    return "\n".join(lines)


# --- the thesis ---


def thesis(results: dict) -> str:
    """Each training's accuracies above the thesis's, what it did otherwise, and how fast it went."""
    trainings = results["thesis"]
    columns = list(dict.fromkeys(name for t in trainings for name in (*t["thesis"], *t["evaluation"])))
    lines = header(["defence", ""], ["epochs", *columns, "images/s"])
    for t in trainings:
        epochs = f"{t['epochs']}" if t["trained"] >= t["epochs"] else f"{t['trained']:.2f} of {t['epochs']}"
        found = (f"{t['evaluation'][name]['accuracy']:.2f}" if name in t["evaluation"] else "" for name in columns)
        lines.append(row(t["title"], t["model"], epochs, *found, f"{t['images_per_second'] or 0:,.0f}"))
        published = (f"{t['thesis'][name]:.2f}" if name in t["thesis"] else "" for name in columns)
        lines.append(row("", "thesis: WRN-34-10", "90", *published, ""))
    alike: dict[str, list[str]] = {}
    for t in trainings:
        if t["differs"]:
            alike.setdefault(", ".join(t["differs"]), []).append(f"{t['title']} of {t['model']}")
    otherwise = [f"Otherwise than in the thesis (in brackets): {', '.join(who)}: {how}." for how, who in alike.items()]
    tests = {name: f"{e['images']:,} in {e['precision']}" for t in trainings for name, e in t["evaluation"].items()}
    tested = ", ".join(f"{name} {how}" for name, how in tests.items())
    how = f"Test images: {tested or 'none yet'}; images/s of the training, attacks included. {where(results['machine'])}."
    return "\n".join([*lines, "", *otherwise, how])


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


# A key of the results to their tables: on a page, and in full.
KINDS = {
    "cells": (attack, attack_table),
    "rows": (precision, precision),
    "steps": (training, training_table),
    "loops": (overhead, overhead),
    "paths": (data, data),
    "trainings": (evidence, evidence),
    "thesis": (thesis, thesis),
    "breakdown": (breakdown, breakdown),
    "host_us": (questions, questions),
    "models": (ceilings, ceilings),
    "stages": (suite, suite),
    "commands": (ran, ran),
    "judges": (judges, judges),
    "autoattack": (autoattack, autoattack),
    "benchmarks": (kernels, kernels),
}


def tables(results: dict | list, full: bool) -> str:
    """Of one result, or of a list of them, as a stage of the GPU suite has it."""
    if isinstance(results, list):
        return "\n\n".join(tables(part, full) for part in results if part)
    return next(KINDS[key][full](results) for key in KINDS if key in results)


def results_of(path: Path) -> dict | list:
    """Of a stage of the GPU suite, or of a file that is results itself."""
    results = json.loads(path.read_text())
    return results.get("results", results) if isinstance(results, dict) else results


def main(files: list[Path], page: Path | None) -> None:
    written = page and write(page, "benchmarks:h200:predictions", predictions(RESULTS / "h200"))
    if missing := [str(path) for path in files if not path.is_file()]:
        raise SystemExit(f"{', '.join(missing)}: there is no such file")
    for path in files or sorted(RESULTS.glob("*/*.json")):
        results = results_of(path)
        if page:
            written |= write(page, marker(path), tables(results, full=False))
        else:
            print(tables(results, full=True))
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

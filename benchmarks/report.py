"""The results as Markdown tables, from the JSON alone: `python -m benchmarks.report [FILE.json ...] [--write PAGE.md ...]`.

Prints the tables of the files in full, or writes them, in short, between the markers of the pages, which for CARD/NAME.json are
`<!-- benchmarks:CARD:NAME -->` and `<!-- /benchmarks:CARD:NAME -->` (without :NAME for kernels.json). Without files: all of
benchmarks/results/CARD/*.json, the predictions, the pictures (plots), and "Not measured yet." between all other markers:

    python -m benchmarks.report --write README.md benchmarks/NOTES.md

What can be written is written. The command fails if a result has no marker on any of the pages, if a page has no markers, if a
file is not a benchmark's, or if its card is not its folder's. Files may have been cut short: what they lack is an empty cell.

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
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
Formula = Callable[[dict], object]


class Row(dict):
    """A record, and what formulas make of it."""

    def __init__(self, record: dict, formulas: dict[str, Formula]):
        super().__init__(record)
        self.formulas = formulas

    def __missing__(self, key: str) -> object:
        return self.formulas[key](self)


def filled(text: str | Formula, values: dict) -> str:
    """`text`, a format string or a function, of `values`. Empty where these were cut before what it needs."""
    try:
        return text.format_map(values) if isinstance(text, str) else text(values)
    except LookupError:
        return ""


def table(results: dict, records: Iterable[dict], heads: str, cells: str, *notes: str | Formula, **formulas: Formula) -> str:
    """A row for each record.

    Args:
        heads: of the columns, with | between them, and || between those aligned left and those aligned right.
        cells: the same of format strings, of the record and the `formulas`.
        notes: below the table, of the results.
    """
    left, right = (len(part.split("|")) for part in heads.split("||"))
    heads, cells = ([part.strip() for part in texts.replace("||", "|").split("|")] for texts in (heads, cells))
    rows = [[filled(cell, Row(record, formulas)).replace("|", r"\|") for cell in cells] for record in records]
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    lines.insert(1, f"|{'---|' * left}{'---:|' * right}")
    return "\n".join([*lines, "", " ".join(filter(None, (filled(note, results) for note in notes)))]).strip()


def where(results: dict) -> str:
    machine = results.get("machine", results)
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in machine["cpu"]["flags"]]
    missing = [flag for flag in ("avx512_bf16", "amx_bf16") if flag not in flags]
    cpu = "" if machine["cuda"] else f" ({', '.join(flags + [f'no {flag}' for flag in missing])})"
    return f"{machine['device']}{cpu}, {machine['threads']} threads, torch {machine['torch']}, {machine['date'][:10]}."


def literal(text: str) -> Formula:
    return lambda _: text


def columns(names: Iterable[str], head: str, cell: str) -> tuple[str, str]:
    """Heads and cells, made of each name, of `table`."""
    names = list(names)
    return " | ".join(head.format(name) for name in names), " | ".join(cell.format(name) for name in names)


def ratio(above: str, below: str) -> Formula:
    """The ratio of the medians of two records, each under its key; "" is the row's own."""
    return lambda r: (r[above] if above else r)["median"] / (r[below] if below else r)["median"]


def fastest(records: list[dict], ours: bool, precision: str | None = None) -> dict:
    """Empty if none of them was timed."""
    found = [r for r in records if "median" in r and r.get("ours") == ours and precision in (None, r.get("precision"))]
    return min(found, key=lambda r: r["median"], default={})


# --- kernels ---


def providers(results: dict) -> dict[str, dict[str, dict]]:
    """Case to provider to its extra_info and `us`."""
    cases: dict[str, dict[str, dict]] = {}
    for run in results["benchmarks"]:
        with suppress(LookupError):  # it was cut
            info, us = run["extra_info"], run["stats"]["median"] * 1e6 / run["extra_info"].get("calls", 1)
            entry = cases.setdefault(run["group"], {}).setdefault(info["provider"], info | {"us": us})
            entry["us"] = min(entry["us"], us)
    return cases


def kernels(results: dict) -> str:
    rows, notes = [], []
    for case, found in providers(results).items():
        copy = next((p for p in found.values() if p.get("role") == "yardstick"), None)
        if copy is None:  # it failed, or the run ended before it
            notes.append(literal(f"{case} has no yardstick."))
        elif ours := found.get("spat"):
            moved = ours.get("bytes_moved")
            speeds = {"gbps": moved / ours["us"] / 1e3, "copy": copy} if moved else {}
            others = [p for p in found.values() if p.get("role") == "rival" or (p is copy and not moved)]
            rows += [ours | {"case": case, "other": p, "ratio": p["us"] / ours["us"]} | speeds for p in others]
        elif held := copy.get("bytes_held"):
            notes.append(literal(f"`copy_` of {held >> 21} MiB: {held / copy['us'] / 1e3:.1f} GB/s."))
    device = "{machine_info[gpu]}" if "gpu" in results.get("machine_info", {}) else "{machine_info[cpu][model]}"
    return table(
        results, rows,
        "case | against || ours, µs | theirs, µs | ratio | GB/s | of copy",
        "{case} | {other[provider]} || {us:.1f} | {other[us]:.1f} | {ratio:.1f}x | {gbps:.1f} | {of_copy:.0%}",
        f"{device}, {{machine_info[threads]}} threads, torch {{machine_info[torch]}}.", *notes,
        of_copy=lambda r: 1e3 * r["gbps"] * r["copy"]["us"] / r["copy"]["bytes_held"],
    )  # fmt: skip


# --- attacks ---


def races(results: dict) -> dict[tuple[str, int], list[dict]]:
    """(model, batch) to its records."""
    found: dict[tuple[str, int], list[dict]] = {}
    for record in results["cells"]:
        found.setdefault((record.get("model", ""), record.get("batch", 0)), []).append(record)
    return found


SPEED = "batch | images/s | ms a step | of limit | of roofline", "{batch} | {rate} | {ms:.2f} | {conv:.0%} | {roofline:.0%}"


def speed(results: dict) -> dict[str, Formula]:
    """The formulas of SPEED; of what was not timed, the reason stands for the images a second."""

    def step(r: dict) -> float:
        return r["median"] / results["settings"]["steps"]

    return {
        "rate": lambda r: f"{r['batch'] / r['median']:.0f}" if "median" in r else f"{r['status']}: {r['note']}",
        "ms": lambda r: 1e3 * step(r),
        "conv": lambda r: r["limit"]["conv"] / step(r),
        "roofline": lambda r: r["limit"]["roofline"] / step(r),
    }


def attack_table(results: dict) -> str:
    """Every record; for a rival, how many times faster the fastest of ours is, in its precision and in any."""
    rows = []
    for records in races(results).values():
        best = {"any": fastest(records, True)}
        rows += [r if r.get("ours") else r | best | {"same": fastest(records, True, r.get("precision"))} for r in records]
    return table(
        results, rows,
        f"model | precision | provider || {SPEED[0]} | peak MiB | ours, same precision | ours, any",
        f"{{model}} | {{precision}} | {{provider}} || {SPEED[1]} | {{peak_mib:.0f}} | {{in_same:.2f}}x | {{in_any:.2f}}x",
        in_same=ratio("", "same"), in_any=ratio("", "any"), **speed(results),
    )  # fmt: skip


def attack(results: dict) -> str:
    """A row for each model, batch and precision: the fastest of ours, and how many times faster it is than what it replaces."""
    rows = []
    for records in races(results).values():
        shipped = fastest([r for r in records if r.get("provider") == "torchattacks"], False)
        for precision in dict.fromkeys(r.get("precision") for r in records):
            ours, rival = (fastest(records, mine, precision) for mine in (True, False))
            rows += [ours | {"rival": rival, "shipped": shipped}] if ours else []

    def ceilings(results: dict) -> str:
        rates = ", ".join(f"{precision} {rate:.3g}" for precision, rate in results["ceilings"]["tflops"].items())
        return f"Ceilings: copy {results['ceilings']['copy_gbps']:.0f} GB/s; TFLOP/s {rates}."

    return table(
        results, rows,
        f"model | spat_kernels || {SPEED[0]} | fastest rival in that precision | torchattacks, fp32",
        f"{{model}} | {{provider}}, {{precision}} || {SPEED[1]} | {{faster:.2f}}x ({{rival[provider]}}) | {{than_shipped:.2f}}x",
        "PGD-{settings[steps]}.", where, ceilings,
        faster=ratio("rival", ""), than_shipped=ratio("shipped", ""), **speed(results),
    )  # fmt: skip


def precision(results: dict) -> str:
    return table(
        results, results["rows"],
        "model | path | precision || images | PGD-20 accuracy, % | loss there | zero pixels, % | zero samples, %",
        "{model} | {path} | {precision} || {images} | {accuracy:.2f} | {loss:.4f} | {zero pixels:.4f} | {zero samples:.2f}",
        "{model}.", where,
    )  # fmt: skip


# --- training ---

UPDATES = "{settings[model]}, batch {settings[batch]}, PGD-{settings[steps]}"


def training_table(results: dict, full: bool = True) -> str:
    """Every record, and how many times faster than the authors' loop in fp32 it is."""
    rows = []
    for method in dict.fromkeys(r.get("method") for r in results["steps"]):
        records = [r for r in results["steps"] if r.get("method") == method]
        base = fastest([r for r in records if r.get("provider") == "authors"], False, "fp32")
        rows += [r | {"base": base, "rival": fastest(records, False, r.get("precision"))} for r in records]
    heads = "method | precision | provider || s an update | images/s"
    cells = "{method} | {precision} | {provider} || {seconds_or_why} | {rate:.1f}"
    if not full:
        rows = [r for r in rows if r.get("provider") == "spat_train" and "median" in r]
        heads = "method | spat_train || s an update | images/s | fastest rival in that precision"
        cells = "{method} | {precision} || {median:.3f} | {rate:.1f} | {faster:.2f}x ({rival[provider]})"
    return table(
        results, rows, f"{heads} | authors' loop, fp32", f"{cells} | {{than_base:.2f}}x", f"{UPDATES}.", where,
        seconds_or_why=lambda r: f"{r['median']:.3f}" if "median" in r else f"{r['status']}: {r['note']}",
        rate=lambda r: results["settings"]["batch"] / r["median"], faster=ratio("rival", ""), than_base=ratio("base", ""),
    )  # fmt: skip


def training(results: dict) -> str:
    """A row for each method and precision: the trainer's step, and how many times faster it is than what it replaces."""
    return training_table(results, full=False)


def overhead(results: dict) -> str:
    """Shares of a step. `around` is all but the model's work and the optimiser; it has what comes once an epoch in it."""

    def step(r: dict) -> float:
        return r["epoch_seconds"] / r["steps_per_epoch"]

    def share(*parts: str) -> Formula:
        return lambda r: 100 * sum(r["parts"][part] for part in parts) / step(r)

    return table(
        results, results["loops"],
        "method | precision || s a step | attack | forward, backward | optimiser | around | of that batches | once an epoch | "
        "loss alone | epoch, s",
        "{method} | {precision} || {step:.3f} | {attack:.2g} % | {passes:.2g} % | {optimizer:.2g} % | {around:.2g} % | "
        "{loader:.2g} % | {once:.2g} % | {loss:.2g} % | {epoch_seconds:.0f}",
        f"{UPDATES}, {{settings[images]:,}} images.", where,
        step=step, attack=share("attack"), passes=share("forward, backward"), optimizer=share("optimizer"),
        around=lambda r: 100 - share("attack", "forward, backward", "optimizer")(r), loader=share("loader"),
        once=lambda r: 100 - 100 * r["step_seconds"] / step(r), loss=lambda r: 100 * r["head_seconds"] / step(r),
    )  # fmt: skip


def data(results: dict) -> str:
    base = next((p for p in results["paths"] if p.get("provider") == "spat_train"), {})
    others = [p | ({} if p is base else {"base": base}) for p in results["paths"]]
    kind = "CIFAR-10" if results.get("settings", {}).get("real") else "random"
    return table(
        results, others,
        "data path || images/s | spat_train is faster by", "{provider} || {images_per_second:,.0f} | {faster:.1f}x",
        f"{{settings[images]:,}} {kind} images, batch {{settings[batch]}}, pad {{settings[pad]}}, flips.", where,
        faster=lambda r: r["base"]["images_per_second"] / r["images_per_second"],
    )  # fmt: skip


def evidence(results: dict) -> str:
    """Accuracy of each training on test images."""
    tests = dict.fromkeys(chain.from_iterable(t.get("test", {}) for t in results["trainings"]))
    heads, cells = columns(tests, "{}", "{{test[{}]:.1f}}")

    def settings(results: dict) -> str:
        c = results["trainings"][0]["config"]
        how = f"eps {c['eps'] / 255:.4g}, PGD-{c['steps'] or 10}, {c['epochs']} epochs"
        return f"{c['model']}, {c['limit']:,} training images, {how}; accuracy in % on {results['test_images']:,} test images."

    name = results.get("experiment", "training")
    return table(results, results["trainings"], f"{name} || {heads}", f"{{name}} || {cells}", settings, where)


# --- evaluation ---


def judges(results: dict) -> str:
    """Ours beside each judge's: accuracies, and in how many images a pixel differs by more than 1e-6."""
    return table(
        results, results["judges"],
        "model | judge | attack | dtype || accuracy, %: ours | theirs | samples that agree, % | images equal to 1e-6, %",
        "{run} | {judge} | {attack} | {dtype} || "
        "{accuracy[0]:.1f} | {accuracy[1]:.1f} | {samples_agree:.1f} | {images_equal:.1f}",
        "{judges[0][images]:,} test images each.", where,
    )  # fmt: skip


def autoattack(results: dict) -> str:
    """Ours beside torchattacks': what they find robust, and the seconds of each stage."""
    found = results["autoattack"]
    stages = list(found.get("spat_kernels", {}).get("seconds", {}))[1:]
    heads, cells = columns(stages, "{}, s", "{{seconds[{}]:.1f}}")
    return table(
        results, [r | {"name": name} for name, r in found.items()],
        f"AutoAttack || accuracy, % | same as torchattacks, % | {heads} | all, s | faster",
        f"{{name}} || {{accuracy:.1f}} | {{agreement:.1f}} | {cells} | {{total_seconds:.1f}} | {{faster:.2f}}x",
        "{settings[model]} ({settings[network]}), {settings[norm]}, eps {settings[eps]:.4g}, {settings[images]:,} images, "
        "{settings[clean]:.1f} % correct; batches of {settings[batch_size]}, {settings[queries]:,} queries.", where,
    )  # fmt: skip


def thesis(results: dict) -> str:
    """Each training's accuracies above the thesis's, what it did otherwise, and how fast it went."""
    trainings, rows = results["thesis"], []
    for t in trainings:
        found = {name: e["accuracy"] for name, e in t.get("evaluation", {}).items() if "accuracy" in e}
        unfinished = t.get("trained", 0) < t.get("epochs", 0)
        rows.append(t | {"found": found, "done": f"{t.get('trained', 0):.2f} of " if unfinished else ""})
        rows.append({"title": "", "model": "thesis: WRN-34-10", "done": "", "epochs": 90, "found": t.get("thesis", {})})
    names = dict.fromkeys(chain.from_iterable(row["found"] for row in rows))
    heads, cells = columns(names, "{}", "{{found[{}]:.2f}}")

    def differences(results: dict) -> str:
        alike: dict[str, list[str]] = {}
        for t in trainings:
            if t.get("differs"):
                alike.setdefault(", ".join(t["differs"]), []).append(filled("{title} of {model}", t))
        return " ".join(f"Otherwise than in the thesis (in brackets): {', '.join(who)}: {how}." for how, who in alike.items())

    def tested(results: dict) -> str:
        parts = chain.from_iterable(t.get("evaluation", {}).items() for t in trainings)
        tests = {name: filled(f"{name} {{images:,}} in {{precision}}", e) for name, e in parts}
        return f"Test images: {', '.join(tests.values()) or 'none yet'}; images/s of the training, attacks included."

    return table(
        results, rows,
        f"defence |  || epochs | {heads} | images/s", f"{{title}} | {{model}} || {{done}}{{epochs}} | {cells} | {{rate:,.0f}}",
        differences, tested, where, rate=lambda r: r["images_per_second"] or 0,
    )  # fmt: skip


def calls(results: dict) -> str:
    """What a step launches and what a call costs the host, by commit."""
    launches, host = ((r | {"commit": r.get("commit", "")[:7]} for r in results.get(key, ())) for key in ("calls", "host"))
    return "\n\n".join([
        table(results, launches, "model | precision | path | commit || launches a step | launches a call, besides",
              "{model} | {precision} | {path} | {commit} || {step:.0f} | {once:.0f}"),
        table(results, host, "host, in bf16 | commit || µs a call | µs a launch",
              "{model} | {commit} || {call:.0f} | {launch:.0f}", where),
    ])  # fmt: skip


# --- on a GPU ---


def gpu(results: dict) -> str:
    """How each step ended; of tests and of what failed, the last line."""

    def last(r: dict) -> str:
        lines = r["tail"].strip().splitlines() if "pytest" in r["command"] or r["status"] != "ok" else []
        return lines[-1][:200]

    rows = [r | {"name": name, "reason": f": {r['reason']}" if "reason" in r else ""} for name, r in results["steps"].items()]
    return table(
        results, rows, "step | status | last line || s", "{name} | {status}{reason} | {last} || {seconds:.0f}", where, last=last
    )


def breakdown(results: dict) -> str:
    """ms of each kind of kernel, the largest kinds first."""
    total: dict[str, float] = {}
    for kind, ms in chain.from_iterable(part.get("kinds", {}).items() for part in results["breakdown"]):
        total[kind] = total.get(kind, 0.0) + ms
    heads, cells = columns(sorted(total, key=total.get, reverse=True), "{}", "{{kinds[{}]:.2f}}")
    return table(
        results, results["breakdown"],
        f"model | ms of || batch | in all | {heads} | launches",
        f"{{model}} | {{what}} || {{batch}} | {{step_ms:.2f}} | {cells} | {{launches:.0f}}",
        "{precision}.", "In all: without the profiler; the kinds, by kernels, with it, and on a CPU slowed by it.", where,
    )  # fmt: skip


def questions(results: dict) -> str:
    """TFLOP/s of the ways to compute each convolution, with cuDNN's first 10 engines and with all; then what launches cost."""

    def launches(results: dict) -> str:
        costs = ", ".join(f"{name} {us if isinstance(us, str) else f'{us:.2f}'}" for name, us in results["host_us"].items())
        return f"µs of the host a call: {costs}." if costs else ""

    def nodes(results: dict) -> str:
        sizes = {size: v for size, v in results["graph_nodes"].items() if isinstance(v, dict)}
        costs = ", ".join(f"{size} {v['node_us']:.2f} (alone {v['eager_us']:.2f})" for size, v in sizes.items())
        return f"µs a node of a CUDA graph: {costs}." if costs else ""

    tables = [convolutions(results, precision, found) for precision, found in results.get("precisions", {}).items()]
    return "\n\n".join([*tables, " ".join(filter(None, (filled(note, results) for note in (launches, nodes, where))))])


def convolutions(results: dict, precision: str, found: dict) -> str:
    rows: dict[str, dict] = {}
    for limit, engines in ((10, ""), (0, ", all engines")):
        answer = found.get(f"convolutions, limit {limit}", [])
        for c in answer if isinstance(answer, list) else []:
            name = filled("{kernel}x{kernel} {ins}->{outs} /{stride} @{size}", c)
            rates = {f"{way}{engines}": f"{v:.3g}" if isinstance(v, float) else "-" for way, v in c.get("tflops", {}).items()}
            rows.setdefault(name, {"name": name, "rates": {}})["rates"] |= rates
    ways = dict.fromkeys(chain.from_iterable(row["rates"] for row in rows.values()))
    heads, cells = columns(ways, "{}", "{{rates[{}]}}")
    failed = [literal(f"{key} failed: {v['failed']}.") for key, v in {precision: found, **found}.items() if "failed" in v]
    how = f"TFLOP/s, {precision}, batch {{batch}}."
    return table(results, rows.values(), f"convolution || {heads}", f"{{name}} || {cells}", how, *failed)


def fused(results: dict) -> str:
    """The fastest of cuDNN's fused plans of each graph against torch's convolution and our pass after it."""

    def engine(r: dict) -> str:
        if "best" in r:
            return r["best"]["plan"].split("_")[0]
        return f"none of {len(r['tried'])}: {r['tried'][0]['failed']}" if r["tried"] else "none was built"

    return table(
        results, results["fused"],
        "graph | channels@size | engine || batch | convolution, ms | TFLOP/s | and our pass, ms | fused, ms | TFLOP/s | gain",
        "{graph} | {shape} | {engine} || "
        "{batch} | {conv_ms:.3f} | {now:.0f} | {now_ms:.3f} | {best[ms]:.3f} | {then:.0f} | {gain:.2f}x",
        "bf16.", where, engine=engine, gain=lambda r: r["now_ms"] / r["best"]["ms"],
        now=lambda r: 1e-9 * r["flops"] / r["conv_ms"], then=lambda r: 1e-9 * r["flops"] / r["best"]["ms"],
    )  # fmt: skip


# --- predictions ---

OURS, COMPILED, EPILOGUES = "spat plan+graph", "compiled autocast loop", "plan with all pointwise work in epilogues (not built)"
PREDICTED = {  # ms a step in bf16 at batch 128 and 256, made before there was a GPU
    "h100": {
        "wrn-34-10": {OURS: (9.0, 16.6), COMPILED: (9.4, 17.2), EPILOGUES: (7.5, 13.6)},
        "resnet-18": {OURS: (1.03, 1.82), COMPILED: (1.16, 1.99), EPILOGUES: (0.73, 1.25)},
        "resnet-50": {OURS: (3.4, 6.4), COMPILED: (3.8, 7.0), EPILOGUES: (1.9, 3.4)},
    },
    "h200": {
        "wrn-34-10": {OURS: (8.5, 15.6), COMPILED: (8.8, 16.1), EPILOGUES: (7.4, 13.5)},
        "resnet-18": {OURS: (0.94, 1.63), COMPILED: (1.06, 1.78), EPILOGUES: (0.72, 1.23)},
    },
}
# An update: attack steps, then forwards and backwards, each as long as 1.5 steps of the compiled loop because weights have
# gradients too. The half step of TRADES is a forward of the clean images.
UPDATE_PARTS = {"madry": (10, 1), "mart": (10, 2), "trades": (10.5, 2)}


def predictions(card: str, attacks: dict, trainings: dict) -> str:
    """Each prediction beside what `attacks` and `trainings` (attack.json, training.json) say."""

    def median(records: list[dict], **wanted: object) -> float:
        return [1e3 * r["median"] for r in records if wanted.items() <= r.items() and "median" in r][0]

    def step(r: dict) -> float:
        which = {"model": r["model"], "provider": r["way"], "batch": r["batch"], "precision": "bf16"}
        return median(attacks["cells"], **which) / attacks["settings"]["steps"]

    def update(r: dict) -> float:
        here = {"model": r["model"], "batch": r["batch"], "steps": 10}.items() <= trainings["settings"].items()
        return median(trainings["steps"] if here else [], provider="spat_train", method=r["method"], precision="bf16")

    rows = [
        {"model": model, "way": way, "batch": batch, "ms": ms, "measure": step}
        for model, ways in PREDICTED[card].items()
        for way, both in ways.items()
        for batch, ms in zip((128, 256), both, strict=True)
    ]
    ours, compiled = (PREDICTED[card]["wrn-34-10"][way][0] for way in (OURS, COMPILED))
    for method, (steps, passes) in UPDATE_PARTS.items():
        way = f"an update of {method}: {steps} x {ours} + {passes} x 1.5 x {compiled}"
        ms = steps * ours + passes * 1.5 * compiled
        rows.append({"model": "wrn-34-10", "way": way, "method": method, "batch": 128, "ms": ms, "measure": update})
    return table(
        {}, rows, "model | in bf16 || batch | predicted, ms | measured, ms | measured / predicted",
        "{model} | {way} || {batch} | {ms:.3g} | {measured} | {ratio:.2f}", ratio=lambda r: r["measure"](r) / r["ms"],
        measured=lambda r: filled(lambda r: f"{r['measure'](r):.3g}", r) or "not yet",
    )  # fmt: skip


# --- pages ---

# A key of the results to their table.
KINDS = {
    "cells": attack, "rows": precision, "steps": training, "loops": overhead, "paths": data, "trainings": evidence,
    "thesis": thesis, "breakdown": breakdown, "host_us": questions, "precisions": questions, "fused": fused, "judges": judges,
    "calls": calls, "autoattack": autoattack, "benchmarks": kernels,
}  # fmt: skip
FULL = {attack: attack_table, training: training_table}


def tables(results: dict, full: bool) -> str:
    found = [KINDS[key] for key in KINDS if key in results]
    if not found:
        raise ValueError(f"not a benchmark's: it has none of {', '.join(KINDS)}")
    kind = gpu if isinstance(results.get("steps"), dict) else found[0]
    return (FULL.get(kind, kind) if full else kind)(results)


def marker(path: Path) -> str:
    """results/h200/attack.json -> benchmarks:h200:attack; kernels go without a suffix."""
    return f"benchmarks:{path.parent.name}" + ("" if path.stem == "kernels" else f":{path.stem}")


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
    """Marker to text, and what is wrong with files."""
    texts, wrong, loaded = {}, [], {}
    for path in files or sorted(RESULTS.glob("*/*.json")):
        try:
            loaded[path] = load(path, None if files and not pages else path.parent.name)
            texts[marker(path)] = tables(loaded[path], full=not pages or path.stem == "memory")  # in full it has the memory
        except (OSError, ValueError) as error:
            wrong.append(f"{path}: {error}")
    if not files:
        for card in PREDICTED:
            found = (loaded.get(RESULTS / card / name, {}) for name in ("attack.json", "training.json"))
            texts[f"benchmarks:{card}:predictions"] = predictions(card, *found)
        for folder in {path.parent for path in RESULTS.glob("*/throughput.png")}:
            pictures = (f"![{name}](results/{folder.name}/{name}.png)" for name in ("throughput", "roofline"))
            texts[f"benchmarks:{folder.name}:plots"] = "\n".join(pictures)
    return texts, wrong


def write(page: Path, texts: dict[str, str], otherwise: str | None = None) -> set[str]:
    """Put `texts` between their markers on `page`, and `otherwise`, unless it is None, between all others; the markers found."""
    markers = set()

    def between(match: re.Match) -> str:
        name, old = match[1], match[2].strip()
        markers.add(name)
        return f"<!-- {name} -->\n{texts.get(name, old if otherwise is None else otherwise)}\n<!-- /{name} -->"

    page.write_text(re.sub(r"(?s)<!-- (benchmarks:[\w:.+-]+) -->(.*?)<!-- /\1 -->", between, page.read_text()))
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

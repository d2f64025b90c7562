"""Whole attacks against each other: L-infinity PGD (eps 8/255, step 2/255, random start, eval mode) on model x batch x precision.

    python -m benchmarks.attack --models wrn-16-4 preactresnet-18 --batches 64 --precisions fp32 bf16 --out attack.json

Models are initialised at random, their BatchNorm statistics calibrated; images are crops of scikit-learn's two photographs;
labels are what the model says of them. Before anything is timed, every provider attacks the same images and must agree with
the plain fp32 loop (`Judge`). One that does not, or raises, or is not installed, is recorded as such and never timed. All that
agree on a model and a batch then take turns in one process, over all precisions (`measure.race`).

Memory is what a call needs beyond model and images. On the GPU: growth of the memory reserved (which a CUDA graph's pool is part
of) from before the provider was built to the peak of its second call, and the same of the memory allocated. On the CPU: growth of
the resident memory during the second call, in a process of its own.
"""

import ctypes
import gc
import itertools
import multiprocessing
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import tyro
from torch import Tensor

import spat_kernels
from benchmarks import measure, workmodel
from benchmarks.judge import CHECKED, CLASSES, Judge, calibrated, photographs
from benchmarks.measure import numerics
from benchmarks.rivals import EPS, STEP, Provider, providers
from benchmarks.tables import Formula, environment, fastest, markdown, ratio
from spat_train.models.registry import create


def compete(chosen: list[Provider], judge: Judge, x: Tensor, y: Tensor, device: str, seconds: float) -> list[dict]:
    """Check every provider, then time those that agree against each other: one record each.

    A record has `provider`, `precision`, `ours` and `status`: "timed" (with `seconds`, a list; `median`, `min` and, on the GPU,
    the memory), "disagrees", "failed" or "absent", explained in `note`.
    """
    records, calls = [], {}
    for provider in chosen:
        record, call = admit(provider, judge, x, y, device)
        records.append(record)
        if call:
            calls[len(records) - 1] = call
        measure.free(device)
    measure.race_records(records, calls, device, seconds)
    return records


def admit(provider: Provider, judge: Judge, x: Tensor, y: Tensor, device: str) -> tuple[dict, Callable[[], Tensor] | None]:
    """The record of a provider before the race, and what to time if it agrees with the judge."""
    record = {"provider": provider.name, "precision": provider.precision, "ours": provider.ours, "note": provider.note}
    try:
        before = reserved(device)
        with numerics(provider.precision), warnings.catch_warnings():
            if provider.ours:  # such as that nothing could be captured, so that what is timed would not be what is named
                warnings.simplefilter("error", RuntimeWarning)
            attack = provider.build(judge.model)
            x_adv = attack(x, y)
        call = measure.in_precision(provider.precision, attack, x, y)
        record |= judge.verdict(x_adv, provider.precision)
        if record["note"].startswith("disagrees"):
            return record | {"status": "disagrees"}, None
        return record | {"status": "agrees"} | peak(before, call, device), call
    except ImportError as error:
        return record | {"status": "absent", "note": measure.one_line(error)}, None
    except Exception as error:  # whatever a rival raises is a result of the benchmark
        return record | {"status": "failed", "note": measure.one_line(error)}, None


def reserved(device: str) -> tuple[int, int] | None:
    """Bytes (reserved, allocated) on the GPU, all caches emptied."""
    measure.free(device)
    return (torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)) if device.startswith("cuda") else None


def peak(before: tuple[int, int] | None, call: Callable[[], object], device: str) -> dict:
    """Growth of the GPU's memory from `before` to the peak of `call`, in MiB."""
    if before is None:
        return {}
    measure.free(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    after = torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
    return dict(zip(("peak_mib", "allocated_mib"), ((b - a) / 2**20 for a, b in zip(before, after, strict=True)), strict=True))


def resident_growth(model: str, size: int, batch: int, provider: str, precision: str, steps: int, threads: int) -> float:
    """MiB by which the second call's peak exceeds the resident memory before it. For a fresh process, on Linux."""
    torch.set_num_threads(threads)
    network = create(model, CLASSES).eval()
    x, y = torch.rand(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    build = next(p.build for p in providers("cpu", steps) if (p.name, p.precision) == (provider, precision))
    attack = build(network)
    attack(x, y)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, and is counted again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    attack(x, y)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    return int(re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])


def add_resident_growth(records: list[dict], model: str, size: int, steps: int) -> None:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for record in [record for record in records if record["status"] == "timed"]:
            cell = model, size, record["batch"], record["provider"], record["precision"], steps, torch.get_num_threads()
            record["peak_mib"] = pool.apply(resident_growth, cell)


@dataclass
class Options:
    """Race PGD implementations on models, batches and precisions. Prints a table, and writes raw results if asked."""

    models: list[str] = field(default_factory=lambda: ["wrn-16-4", "preactresnet-18"])
    """Names of spat_train.models, with "@SIZE" for images that are not 32x32 (resnet-18@96)."""
    batches: list[int] = field(default_factory=lambda: [64])
    """Batch sizes, the outer loop: put first what matters most."""
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    """Any of fp32, tf32 (GPU), bf16, fp16."""
    providers: list[str] = field(default_factory=list)
    """Names, all by default."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    steps: int = 10
    """Gradient steps of an attack."""
    seconds: float = 2.0
    """Time to measure each provider of a cell for."""
    memory: bool = True
    """Measure memory. On the CPU this takes a process for each provider."""
    small_ceilings: bool = False
    """Measure the ceilings on small matrices: for rehearsals."""
    out: Path | None = None
    """Write raw results here, after every cell. Cells that it already has are not measured again."""


def run(options: Options) -> dict:
    """The results. Each cell is printed and written when it is there."""
    chosen, cuda = choose(options), options.device.startswith("cuda")
    if cuda:
        torch.backends.cudnn.benchmark = True  # for all alike
    settings = {"eps": EPS, "step_size": STEP, "steps": options.steps, "seconds": options.seconds, "memory": options.memory}
    settings["providers"] = [f"{p.name}, {p.precision}" for p in chosen]  # a race has all of them
    fresh = measure.begun("attack", options.device, settings=settings, ceilings={}, cells=[])
    results = measure.continued(options.out, fresh)
    wrong = {cell_of(r) for r in results["cells"] if r["ours"] and r["status"] != "timed"}  # ours are raced again
    done = {cell_of(r) for r in results["cells"]} - wrong
    precisions = list(dict.fromkeys(p.precision for p in chosen))
    # On a noisy CPU all take turns; on a GPU each precision is written when it is there.
    races = [[precision] for precision in precisions] if cuda else [precisions]
    if not results["ceilings"]:
        results["ceilings"] = measure.ceilings(options.device, options.precisions, small=options.small_ceilings)
    prepare_once = cache(lambda model: prepare(model, options))
    for batch, model, race in itertools.product(options.batches, options.models, races):
        cells = {(model, batch, precision) for precision in race}
        if cells <= done:
            continue
        racing = [p for p in chosen if p.precision in race]
        records = race_cell(racing, prepare_once(model), model, batch, results["ceilings"], options)
        results["cells"] = [r for r in results["cells"] if cell_of(r) not in cells] + records
        measure.write(options.out, results)
        print(full_table(results | {"cells": records}), flush=True)
    return results


def choose(options: Options) -> list[Provider]:
    """Those that the options name.

    Raises:
        SystemExit: there is none of that name and precision.
    """
    every = providers(options.device, options.steps)
    chosen = [p for p in every if p.precision in options.precisions]
    unknown = set(options.providers) - {p.name for p in chosen}
    if unknown or not chosen:
        wrong = f"--providers {' '.join(unknown)} --precisions {' '.join(options.precisions)}"
        raise SystemExit(f"{wrong}: choose from {', '.join(sorted({p.name for p in every}))}")
    return [p for p in chosen if not options.providers or p.name in options.providers]


def cell_of(record: dict) -> tuple[str, int, str]:
    return record["model"], record["batch"], record["precision"]


def prepare(model: str, options: Options) -> tuple[Judge, list[workmodel.Layer], Tensor, Tensor]:
    """Its judge, its work, images and labels."""
    name, size = measure.name_and_size(model)
    x = photographs(max(*options.batches, 128), size).to(options.device)
    network = calibrated(name, x[:128])
    with torch.no_grad():
        y = torch.cat([network(part).argmax(1) for part in x.split(CHECKED)])
    judge = Judge(network, x[: max(options.batches)], y, options.steps)
    return judge, workmodel.layers(network, tuple(x.shape[1:])), x, y


def race_cell(racing: list[Provider], prepared: tuple, model: str, batch: int, ceilings: dict, options: Options) -> list[dict]:
    """The records of `compete`, with the cell that they are of, its work and limits, and memory on the CPU."""
    judge, layers, x, y = prepared
    records = compete(racing, judge, x[:batch].clone(), y[:batch].clone(), options.device, options.seconds)
    measure.synchronize(options.device)  # where ours broke the device, its rivals' failures are no results
    for record in records:
        work = workmodel.Work(layers, batch, record["precision"])
        record |= {"model": model, "batch": batch, "flops": work.flops, "bytes": work.bytes, "limit": work.limits(ceilings)}
    if options.memory and options.device == "cpu":
        add_resident_growth(records, *measure.name_and_size(model), options.steps)
    torch._dynamo.reset()
    if options.device.startswith("cuda"):
        spat_kernels.graphs.free(judge.model)  # the next batch is to find the GPU's memory empty
    measure.free(options.device)
    return records


def races(results: dict) -> dict[tuple[str, int], list[dict]]:
    """(model, batch) to its records."""
    found: dict[tuple[str, int], list[dict]] = {}
    for record in results["cells"]:
        found.setdefault((record["model"], record["batch"]), []).append(record)
    return found


SPEED = "batch | images/s | ms a step | of limit | of roofline", "{batch} | {rate} | {ms:.2f} | {conv} | {roofline}"


def speed(results: dict) -> dict[str, Formula]:
    """The formulas of SPEED; of what was not timed, the reason stands for the images a second."""

    def step(r: dict) -> float:
        return r["median"] / results["settings"]["steps"]

    def share(r: dict, limit: str) -> str:
        part = r["limit"][limit] / step(r)
        return f"{part:.0%}" if part < 1.2 else ""  # a ceiling that is passed so far was measured too low: on small matrices

    return {
        "rate": lambda r: f"{r['batch'] / r['median']:.0f}" if "median" in r else f"{r['status']}: {r['note']}",
        "ms": lambda r: 1e3 * step(r),
        "conv": lambda r: share(r, "conv"),
        "roofline": lambda r: share(r, "roofline"),
    }


def full_table(results: dict) -> str:
    """Every record; for a rival, how many times faster the fastest of ours is, in its precision and in any."""
    rows = []
    for records in races(results).values():
        best = {"any": fastest(records, True)}
        rows += [r if r["ours"] else r | best | {"same": fastest(records, True, r["precision"])} for r in records]
    return markdown(
        results, rows,
        f"model | precision | provider || {SPEED[0]} | peak MiB | ours, same precision | ours, any",
        f"{{model}} | {{precision}} | {{provider}} || {SPEED[1]} | {{peak_mib:.0f}} | {{in_same:.2f}}x | {{in_any:.2f}}x",
        in_same=ratio("", "same"), in_any=ratio("", "any"), **speed(results),
    )  # fmt: skip


def table(results: dict) -> str:
    """A row for each model, batch and precision: the fastest of ours, and how many times faster it is than what it replaces."""
    rows = []
    for records in races(results).values():
        shipped = fastest([r for r in records if r["provider"] == "torchattacks"], False)
        for precision in dict.fromkeys(r["precision"] for r in records):
            ours, rival = (fastest(records, mine, precision) for mine in (True, False))
            rows += [ours | {"rival": rival, "shipped": shipped}] if ours else []

    def ceilings(results: dict) -> str:
        rates = ", ".join(f"{precision} {rate:.3g}" for precision, rate in results["ceilings"]["tflops"].items())
        return f"Ceilings: copy {results['ceilings']['copy_gbps']:.0f} GB/s; TFLOP/s {rates}."

    return markdown(
        results, rows,
        f"model | spat_kernels || {SPEED[0]} | fastest rival in that precision | torchattacks, fp32",
        f"{{model}} | {{provider}}, {{precision}} || {SPEED[1]} | {{faster:.2f}}x ({{rival[provider]}}) | {{than_shipped:.2f}}x",
        "PGD-{settings[steps]}.", environment, ceilings,
        faster=ratio("rival", ""), than_shipped=ratio("shipped", ""), **speed(results),
    )  # fmt: skip


def main(options: Options) -> None:
    measure.require_ours(run(options)["cells"])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

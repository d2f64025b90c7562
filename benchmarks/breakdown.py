"""Where the milliseconds of an attack step, and of a training update, go: `python -m benchmarks.breakdown --out breakdown.json`.

Runs whole attacks by the plan (on the GPU in a CUDA graph) and whole updates of the trainer under torch.profiler, and sorts the
time of every kernel (on the CPU: of every operator, less what it calls) by what it does. `idle` is the time in which the GPU ran
nothing: gaps between launches or graph nodes. The profiler slows the host, not the kernels, so `step_ms` is measured without it.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.judge import CLASSES, calibrated, photographs
from benchmarks.measure import numerics
from benchmarks.tables import columns, environment, markdown
from benchmarks.training import Ours, settings
from spat_kernels import PGD, graphs
from spat_train.models.registry import create

# By the first pattern that a kernel's or an operator's name has; cuDNN's kernels are named after their engines.
KINDS = {
    "convolution and pass": r"spat::.*conv_kernel",
    "spat": r"\bspat::|(linf|l2)_step_k|linf_random|(lsce|kl|margin|pma|dlr)_grad_k|scale_shift_relu|pool_linear|split_image"
    "|crop_flip|keep_best|adt_(sample|step)_k",
    "batch norm": r"batch_norm|bn_fw|bn_bw|batchnorm",
    "layout": r"nchwToNhwc|nhwcToNchw|transpose|Transform|contiguous",
    "convolution": r"conv|cudnn|implicit|winograd|fprop|dgrad|wgrad",
    "matrix product": r"gemm|gemv|addmm|linear|\bmm\b|matmul|nvjet|cutlass|xmma",
    "copy": r"Memcpy|Memset|copy_|fill_|to_copy",
    "optimiser": r"multi_tensor|foreach|fused_sgd",
    "reduction": r"reduce|softmax|pool|sum|mean|norm",
    "pointwise": r"elementwise|vectorized|unrolled|add|mul|relu|threshold|clamp|sign|where|triton",
}
TOP = 8  # kernels that are listed
METHOD = "mart"  # whose update is taken apart


@dataclass
class Options:
    """Where the milliseconds go."""

    models: list[str] = field(default_factory=lambda: ["wrn-34-10", "resnet-18"])
    batches: list[int] = field(default_factory=lambda: [256, 128])
    """Batch sizes of the attack; the update has the last of them."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    steps: int = 10
    seconds: float = 0.3
    """To measure each step without the profiler for."""
    out: Path | None = None
    """Write the results here, after every part. Parts that it already has are not measured again."""


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def spans(call: Callable[[], object], device: str) -> list[tuple[str, float, float]]:
    """Name, start and time of each kernel of a call, in ms; on the CPU of each operator, whose times do not overlap."""
    cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        call()
        measure.synchronize(device)
    events = [e for e in profiler.events() if e.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)]
    if cuda:  # annotations, such as an optimiser's step, are there beside the kernels in them
        kernels = [e for e in events if not e.is_user_annotation]
        return [(e.name, e.time_range.start / 1e3, e.time_range.elapsed_us() / 1e3) for e in kernels]
    return [(e.name, e.time_range.start / 1e3, e.self_cpu_time_total / 1e3) for e in events]


def busy(found: list[tuple[str, float, float]]) -> float:
    """ms in which at least one kernel ran."""
    total, end = 0.0, float("-inf")
    for _, start, taken in sorted(found, key=lambda span: span[1]):
        total += max(0.0, start + taken - max(start, end))
        end = max(end, start + taken)
    return total


def taken_apart(call: Callable[[], object], device: str, steps: int, seconds: float) -> dict:
    """ms a step of `call`, which takes `steps`: as measured, by kind of kernel, and of the longest kernels."""
    for _ in range(3):  # the second attack of a kind is captured as a graph
        call()
    step = 1e3 * measure.seconds_per_call(call, device, seconds) / steps
    found = spans(call, device)
    kinds, kernels, calls = Counter(), Counter(), Counter()
    for name, _, taken in found:
        kinds[kind_of(name)] += taken / steps
        kernels[name[:120]] += taken / steps
        calls[name[:120]] += 1
    if device.startswith("cuda"):
        kinds["idle"] = max(0.0, step - busy(found) / steps)
    return {
        "step_ms": step,
        "launches": len(found) / steps,
        "kinds": dict(kinds.most_common()),
        "longest": [
            {"name": name, "kind": kind_of(name), "calls": calls[name] / steps, "ms": ms} for name, ms in kernels.most_common(TOP)
        ],
    }


def attack_parts(name: str, batch: int, options: Options) -> dict:
    x = photographs(batch, 32).to(options.device)
    model = calibrated(name, x[:128])
    with torch.no_grad():
        y = model(x).argmax(1)
    cuda = options.device.startswith("cuda")
    attack = PGD(8 / 255, steps=options.steps, precision=options.precision, input_gradient="plan", graph=cuda)
    try:
        return taken_apart(lambda: attack(model, x, y), options.device, options.steps, options.seconds)
    finally:
        graphs.free(model)


def update_parts(name: str, batch: int, options: Options) -> dict:
    torch.manual_seed(0)
    model = create(name, CLASSES).to(options.device)
    config = settings(name, batch, METHOD, options.precision, options.device, options.steps)
    x, y = photographs(batch, 32).to(options.device), torch.randint(CLASSES, (batch,), device=options.device)
    update = Ours(model, config)
    return taken_apart(lambda: update(x, y), options.device, 1, options.seconds)


def table(results: dict) -> str:
    """ms of each kind of kernel, the largest kinds first."""
    total: Counter[str] = Counter()
    for part in results["breakdown"]:
        total.update(part["kinds"])
    heads, cells = columns([kind for kind, _ in total.most_common()], "{}", "{{kinds[{}]:.2f}}")
    return markdown(
        results, results["breakdown"],
        f"model | ms of || batch | in all | {heads} | launches",
        f"{{model}} | {{what}} || {{batch}} | {{step_ms:.2f}} | {cells} | {{launches:.0f}}",
        "{precision}.", "In all: without the profiler; the kinds, by kernels, with it, and on a CPU slowed by it.", environment,
    )  # fmt: skip


def main(options: Options) -> None:
    torch.backends.cudnn.benchmark = True
    # The profiler starts before graphs are captured, so that CUPTI knows their kernels; its second start has crashed.
    os.environ["TEARDOWN_CUPTI"] = "0"
    spans(lambda: torch.ones(1, device=options.device).add_(1), options.device)
    settings = {"steps": options.steps, "seconds": options.seconds}
    fresh = measure.begun("breakdown", options.device, precision=options.precision, settings=settings, breakdown=[])
    results = measure.continued(options.out, fresh)
    update, cells = f"an update, {METHOD}, PGD-{options.steps}", []
    for name in options.models:
        cells += [{"model": name, "batch": batch, "what": "an attack step"} for batch in options.batches]
        cells.append({"model": name, "batch": options.batches[-1], "what": update})

    def run(cell: dict) -> dict:
        parts_of = update_parts if cell["what"] == update else attack_parts
        measure.free(options.device)
        with numerics(options.precision):
            return parts_of(cell["model"], cell["batch"], options)

    measure.complete(options.out, results, "breakdown", cells, run)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

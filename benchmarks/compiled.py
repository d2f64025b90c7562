"""Today's networks by torch.compile: ours with input_gradient="compile", and what "auto" takes, against loops of one's own.

    python -m benchmarks.compiled --models vit_tiny_patch16_224 swin_tiny_patch4_window7_224 convnext_tiny --out compiled.json

L-infinity PGD (eps 4/255, step 1/255) on timm's models with random weights and layer scales, at random images:

spat compile    PGD(input_gradient="compile")
spat auto       PGD(input_gradient="auto"): the plan, where the model has one
loop            plain PyTorch; in half precision under autocast, in channels_last, whose weights it casts once an attack
compiled loop   the same loop, its step (forward, loss, backward to the image, update) given to torch.compile, weights frozen

Before the race each takes one step from the images themselves. It may go against the signs of the fp32 gradient, in `against`
(a share in L1) of it by no more than TOLERANCE. A row is written when it is there. Rows that the file has are not run again.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import spat_kernels
from benchmarks import measure
from benchmarks.measure import DTYPES
from benchmarks.tables import environment, markdown, ratio

EPS, STEP, CLASSES = 4 / 255, 1 / 255, 1000
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 0.1, "fp16": 0.02}
OURS = "spat compile", "spat auto"
Attack = Callable[[Tensor, Tensor, int], Tensor]  # x [B, 3, H, W], y [B], steps -> x_adv


def network(name: str, size: int, depth: int | None) -> nn.Module:
    """timm's model `name` in eval mode for images of that size, with `depth` blocks in each stage, if one is given."""
    import timm

    torch.manual_seed(0)
    options = {} if name.startswith("convnext") else {"img_size": size}
    if depth:
        options |= {"depth": depth} if name.startswith(("vit", "deit")) else {"depths": (depth,) * 4}
    model = timm.create_model(name, num_classes=CLASSES, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:  # layer scales of 1e-6 would hide all behind them
                parameter += 0.5 * torch.rand_like(parameter)
    return model.requires_grad_(False)


def spat(model: nn.Module, precision: str, path: str) -> Attack:
    def attack(x: Tensor, y: Tensor, steps: int) -> Tensor:
        settings = {"precision": precision, "input_gradient": path, "random_start": False}
        return spat_kernels.PGD(EPS, steps=steps, step_size=STEP, **settings)(model, x, y)

    return attack


def loop(model: nn.Module, precision: str, compiled: bool) -> Attack:
    """A loop in plain PyTorch, whose step is compiled if asked for."""

    def step(x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(x_adv), y, reduction="sum")
        x_adv = x_adv.detach() + STEP * torch.autograd.grad(loss, x_adv)[0].sign()
        return torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)

    take = torch.compile(step, dynamic=False) if compiled else step
    half = precision in ("bf16", "fp16")

    def attack(x: Tensor, y: Tensor, steps: int) -> Tensor:
        x_adv = x.contiguous(memory_format=torch.channels_last) if half else x
        with torch.autocast(x.device.type, DTYPES[precision], enabled=half):
            for _ in range(steps):
                x_adv = take(x_adv, x, y)
        return x_adv

    return attack


def providers(model: nn.Module, precision: str) -> dict[str, Attack]:
    return {
        "spat compile": spat(model, precision, "compile"),
        "spat auto": spat(model, precision, "auto"),
        "loop": loop(model, precision, compiled=False),
        "compiled loop": loop(model, precision, compiled=True),
    }


def against(x_adv: Tensor, x: Tensor, gradient: Tensor) -> float:
    """Share of `gradient`, in L1, in pixels that one step of an attack has moved the other way, or not at all."""
    inside = (x + STEP * gradient.sign()).clamp(0, 1) != x
    wrong = inside & ((x_adv - x).sign() != gradient.sign())
    return (gradient.abs() * wrong).sum().item() / gradient.abs().sum().item()


def race(cell: dict, options: "Options") -> dict:
    """What the providers take for the attack of a cell, each checked before."""
    model = network(cell["model"], cell["size"], options.depth).to(options.device)
    x = torch.rand(cell["batch"], 3, cell["size"], cell["size"], device=options.device)
    y = torch.randint(CLASSES, (cell["batch"],), device=options.device)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    records, calls = [], {}
    for name, attack in providers(model, cell["precision"]).items():
        record = admit(attack, x, y, gradient, cell["precision"]) | {"provider": name, "ours": name in OURS}
        if record["status"] == "agrees":
            calls[len(records)] = measure.in_precision(cell["precision"], attack, x, y, options.steps)
        records.append(record)
    for call in calls.values():
        call()
    measure.race_records(records, calls, options.device, options.seconds)
    paths = {
        path: spat_kernels.explain(model, x, precision=cell["precision"], input_gradient=path).path
        for path in ("compile", "auto")
    }
    torch._dynamo.reset()
    measure.free(options.device)
    return {"records": records, **paths}


def admit(attack: Attack, x: Tensor, y: Tensor, gradient: Tensor, precision: str) -> dict:
    """Whether one step of `attack` goes where it has to, and how long the first call takes, in seconds: with the compilation."""
    start = time.perf_counter()
    try:
        with measure.numerics(precision), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            x_adv = attack(x, y, 1)
    except Exception as error:  # whatever a rival raises is a result of the benchmark
        return {"status": "failed", "note": measure.one_line(error)}
    share = against(x_adv.float(), x, gradient)
    notes = [str(w.message) for w in caught if "attacks on this" in str(w.message)]
    record = {"first": time.perf_counter() - start, "against": share, "note": "; ".join(notes)}
    return record | {"status": "agrees" if share <= TOLERANCE[precision] else "disagrees"}


@dataclass
class Options:
    """Race compiled attacks on timm's models."""

    models: list[str] = field(default_factory=lambda: ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny"])
    sizes: list[int] = field(default_factory=lambda: [96])
    """Sides of the images."""
    batches: list[int] = field(default_factory=lambda: [16, 64])
    precisions: list[str] = field(default_factory=lambda: ["bf16", "fp32"])
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    steps: int = 3
    """Gradient steps of an attack."""
    depth: int | None = None
    """Blocks in each stage, for trials; by default as many as the model has."""
    seconds: float = 5.0
    """Time to measure each provider of a row for; three rounds at least."""
    out: Path | None = None
    """Write raw results here, after every row."""


def table(results: dict) -> str:
    """A row for each race: all providers in ms a step, and by how much ours is faster than the best rival."""
    steps = results["settings"]["steps"]
    rows = []
    for cell in results["cells"]:
        timed = {r["provider"]: r for r in cell["records"] if "median" in r}
        rivals = [r for r in timed.values() if not r["ours"]]
        rows.append(cell | timed | ({"rival": min(rivals, key=lambda r: r["median"])} if rivals else {}))

    def ms(provider: str) -> Callable[[dict], str]:
        return lambda r: f"{1e3 * r[provider]['median'] / steps:.0f}" if provider in r else failure(r, provider)

    def failure(row: dict, provider: str) -> str:
        return next(r["status"] for r in row["records"] if r["provider"] == provider)

    return markdown(
        results, rows,
        "model | size | batch | precision | compile is | auto is | best rival || spat compile | spat auto | loop | "
        "compiled loop | compile, faster | auto, faster",
        "{model} | {size} | {batch} | {precision} | {compile} | {auto} | {rival[provider]} || {compile_ms} | {auto_ms} | "
        "{loop_ms} | {compiled_ms} | {compile_faster:.2f}x | {auto_faster:.2f}x",
        "ms a step, PGD-{settings[steps]}; faster than the best rival; 'compile is' and 'auto is': the path really taken.",
        environment,
        compile_ms=ms("spat compile"), auto_ms=ms("spat auto"), loop_ms=ms("loop"), compiled_ms=ms("compiled loop"),
        compile_faster=ratio("rival", "spat compile"), auto_faster=ratio("rival", "spat auto"),
    )  # fmt: skip


def main(options: Options) -> None:
    settings = {key: getattr(options, key) for key in ("steps", "depth", "seconds")}
    results = measure.continued(options.out, measure.begun("compiled", options.device, settings=settings, cells=[]))
    names = "size", "batch", "model", "precision"
    cells = [
        dict(zip(names, values, strict=True))
        for values in product(options.sizes, options.batches, options.models, options.precisions)
    ]
    measure.complete(options.out, results, "cells", cells, partial(race, options=options))
    print(table(results))
    measure.require_ours([r | {"precision": c["precision"]} for c in results["cells"] for r in c["records"]])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

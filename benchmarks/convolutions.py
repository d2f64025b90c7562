"""Each convolution of a plan with the pass next to it: by PyTorch and ops one after the other, and by the kernels that do both.

    python -m benchmarks.convolutions --models wrn-34-10 resnet-18 --batches 128 256 --out convolutions.json    (needs a Hopper)

The times are those by which an attack chooses (fused_conv/choose.py). Every variant is first held to the exact result, then a
CUDA graph of ten calls is replayed. TFLOP/s count the convolution's multiplications alone, also where a pass is done with it.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks import measure
from benchmarks.judge import calibrated, photographs
from benchmarks.measure import numerics
from benchmarks.tables import environment, markdown
from spat_kernels.fused_conv import choose
from spat_kernels.fused_conv.choose import APART, Chooser
from spat_kernels.fused_conv.recipe import Recipe
from spat_kernels.input_gradient.choose import input_gradient
from spat_kernels.model_state.borrow import borrowed


@dataclass
class Options:
    """Time every convolution of some networks with the pass next to it."""

    models: list[str] = field(default_factory=lambda: ["wrn-34-10", "resnet-18", "resnet-50"])
    batches: list[int] = field(default_factory=lambda: [128, 256])
    precision: Literal["bf16", "fp16"] = "bf16"
    device: str = "cuda"
    out: Path | None = None
    """Write the results here, after every network and batch. Those that it already has are not measured again."""


def flops(recipe: Recipe) -> float:
    channels, pixels = recipe.input[0] // recipe.groups, prod(recipe.output)
    return 2.0 * recipe.batch * channels * pixels * prod(recipe.kernel)


def timed(name: str, batch: int, options: Options) -> dict:
    """The recipes of one network: how often each occurs in a step, seconds of all that was timed, and what was chosen."""
    images = photographs(batch, 32).to(options.device)
    model = calibrated(name, images[:128])
    chooser = choose.chooser = Chooser(budget=float("inf"))
    with torch.no_grad(), borrowed(model, "eval"):
        gradient = input_gradient(model, images, "plan", options.precision)
        with gradient.arithmetic(images.device.type):
            gradient.prepare()
            logits = gradient.forward(images)
            gradient.backward(torch.linspace(-1, 1, logits.numel(), device=logits.device, dtype=logits.dtype).view_as(logits))
    counts = Counter(recipe for recipes in gradient.engines.used.values() for recipe in recipes)
    rows = []
    for recipe, count in counts.items():
        decision = chooser.decision(recipe, images.device)
        choice = str(decision.choice) if decision.choice else ""
        found = {"choice": choice, "reason": decision.reason, "seconds": decision.seconds, "problems": decision.problems}
        rows.append(
            {"recipe": str(recipe), "passes": recipe.epilogue is not None, "count": count, "flops": flops(recipe)} | found
        )
    return {"recipes": rows, "choosing_s": chooser.spent}


def table(results: dict) -> str:
    """The recipes with a pass whose convolution an engine can do: what they take apart, and by the fastest engine."""
    rows = [
        row | {"model": cell["model"], "batch": cell["batch"]}
        for cell in results["convolutions"]
        for row in cell["recipes"]
        if row["passes"] and len(row["seconds"]) > 1
    ]

    def fastest(row: dict) -> tuple[float, str]:
        return min((seconds, name) for name, seconds in row["seconds"].items() if name != APART)

    return markdown(
        results, rows, "network | convolution and pass | fastest kernel || in a step | apart, us | fused, us | TFLOP/s | gain",
        "{model} | {recipe} | {kernel} || {count} | {apart:.1f} | {fused:.1f} | {speed:.0f} | {gain:.2f}x", environment,
        kernel=lambda r: fastest(r)[1], apart=lambda r: 1e6 * r["seconds"][APART], fused=lambda r: 1e6 * fastest(r)[0],
        speed=lambda r: 1e-12 * r["flops"] / fastest(r)[0], gain=lambda r: r["seconds"][APART] / fastest(r)[0],
    )  # fmt: skip


def main(options: Options) -> None:
    if not choose.chooser.applies(torch.device(options.device)):
        raise SystemExit(f"--device {options.device}: no kernel for fused convolutions runs there (they are for Hopper)")
    torch.backends.cudnn.benchmark = True
    results = measure.begun("convolutions", options.device, precision=options.precision, convolutions=[])
    results = measure.continued(options.out, results)
    cells = [{"model": model, "batch": batch} for model in options.models for batch in options.batches]

    def run(cell: dict) -> dict:
        measure.free(options.device)
        with numerics(options.precision):
            return timed(cell["model"], cell["batch"], options)

    measure.complete(options.out, results, "convolutions", cells, run)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

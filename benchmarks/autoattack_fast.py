"""AutoAttack(version="fast") beside version="standard": what they find robust, and what it costs.

    python -m benchmarks.autoattack_fast runs/mnist-madry-w4 --data mnist.npz --out results/cpu/autoattack_fast-mnist.json

At the published 100 steps and 5,000 queries, batch by batch, in turns. Passes are forwards and backwards for each image.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.agreement import BATCH, given
from benchmarks.tables import environment, markdown
from spat_kernels import AutoAttack
from spat_kernels.settings import Precision, Version

VERSIONS: tuple[Version, ...] = ("standard", "fast")


@dataclass
class Arguments:
    """AutoAttack(version="fast") beside version="standard"."""

    model: tyro.conf.Positional[Path]
    """The folder of a run, or a checkpoint."""
    data: Path
    """The data set as an .npz file."""
    out: Path
    """JSON file to write, after every batch."""
    images: int = 1000
    """Maximum number of test images, the first ones."""
    network: str | None = None
    """The architecture of a checkpoint, which is attacked at eps 8/255."""
    precision: Literal["fp32", "bf16"] = "fp32"


def compare(model: nn.Module, x: Tensor, y: Tensor, eps: float, precision: Precision) -> Iterator[dict[str, dict]]:
    """By version, after every batch: seconds, and of each image so far forwards, backwards and what broke it."""
    found: dict[str, dict] = {v: {"seconds": 0.0, "forwards": [], "backwards": [], "broken_by": []} for v in VERSIONS}
    draw = random.Random(0)
    for rows in torch.arange(len(x)).split(BATCH):
        for version in draw.sample(VERSIONS, len(VERSIONS)):
            begin = time.perf_counter()
            result = AutoAttack(eps, version=version, precision=precision).run(model, x[rows], y[rows])
            entry = found[version]
            entry["seconds"] += time.perf_counter() - begin
            for name in ("forwards", "backwards"):
                entry[name] += getattr(result, name).tolist()
            entry["broken_by"] += [result.names[i] if i >= 0 else None for i in result.broken_by.tolist()]
        print(f"{int(rows[-1]) + 1} of {len(x)} images", {v: f"{f['seconds']:.0f} s" for v, f in found.items()}, flush=True)
        yield found


def judged(found: dict[str, dict]) -> dict[str, dict]:
    """`found` with accuracies in percent, and how fast compares with standard."""
    standard = found["standard"]
    for entry in found.values():
        robust, theirs = ([by is None for by in e["broken_by"]] for e in (entry, standard))
        entry["accuracy"] = 100 * sum(robust) / len(robust)
        entry["agreement"] = 100 * sum(a == b for a, b in zip(robust, theirs, strict=True)) / len(robust)
        entry["mean_forwards"], entry["mean_backwards"] = (sum(entry[n]) / len(robust) for n in ("forwards", "backwards"))
        entry["share"] = 100 * passes(entry) / passes(standard)
        entry["faster"] = standard["seconds"] / entry["seconds"]
    return found


def passes(entry: dict) -> int:
    return sum(entry["forwards"]) + sum(entry["backwards"])


def table(results: dict) -> str:
    found = results["autoattack_fast"]
    return markdown(
        results, [entry | {"name": name} for name, entry in found.items()],
        "AutoAttack || accuracy, % | same as standard, % | forwards | backwards | of standard's passes | s | faster",
        "{name} || {accuracy:.1f} | {agreement:.1f} | {mean_forwards:.0f} | {mean_backwards:.0f} | {share:.1f}% | "
        "{seconds:.0f} | {faster:.1f}x",
        "{settings[model]} ({settings[network]}), eps {settings[eps]:.4g}, {settings[images]:,} images, {settings[clean]:.1f} % "
        "correct; batches of {settings[batch_size]}, {settings[precision]}. Passes are the mean of an image.", environment,
    )  # fmt: skip


@torch.no_grad()
def main(args: Arguments) -> None:
    torch.set_num_threads(2)
    name, network, model, eps, x, y = given(args.model, args.data, args.images, args.network)
    right = model(x).argmax(1) == y
    settings = {"model": name, "network": network, "eps": eps, "batch_size": BATCH, "precision": args.precision}
    results = measure.begun("autoattack_fast", "cpu", settings=settings)
    for found in compare(model, x, y, eps, args.precision):
        done = len(found["fast"]["broken_by"])
        settings |= {"images": done, "clean": 100 * right[:done].double().mean().item()}
        results["autoattack_fast"] = judged(found)
        measure.write(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Arguments))

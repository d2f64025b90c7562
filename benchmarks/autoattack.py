"""Our AutoAttack against torchattacks', on the same model and images: `python -m benchmarks.autoattack --help`.

    python -m benchmarks.autoattack runs/mnist-madry --data mnist.npz --out results/cpu/autoattack.json

At torchattacks' settings (10 steps of APGD and FAB, 5,000 queries of Square) and, ours alone, at the published ones (100 steps).
Batch by batch, in turns, so that whatever else the machine does hits all alike. Random numbers differ, so a sample may be broken
by the one and not by the other; what counts is how many are.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

import spat_kernels
from benchmarks import measure
from benchmarks.agreement import BATCH, given
from benchmarks.tables import columns, environment, markdown

STEPS, PUBLISHED = 10, 100  # of APGD and FAB in torchattacks, and in the paper


@dataclass
class Arguments:
    """Our AutoAttack against torchattacks', on the same model and images."""

    model: tyro.conf.Positional[Path]
    """The folder of a run, or a checkpoint."""
    data: Path
    """The data set as an .npz file, of which test images are attacked."""
    out: Path
    """JSON file to write."""
    norm: Literal["linf", "l2"] = "linf"
    images: int = 1000
    """Maximum number of test images, the first ones."""
    queries: int = 5000
    """Queries of Square; fewer for a rehearsal."""
    published: bool = True
    """Whether ours also runs at the published steps."""
    network: str | None = None
    """The architecture of a checkpoint, which is attacked at eps 8/255."""


# (model, x, y) -> (stage, seconds, samples still robust [B]) after each attack
Provider = Callable[[nn.Module, Tensor, Tensor], Iterator[tuple[str, float, Tensor]]]


def ours(eps: float, norm: str, steps: int, queries: int) -> Provider:
    def attack(model, x, y):
        stages = spat_kernels.AutoAttack(eps, norm=norm, steps=steps, queries=queries).stages(model, x, y)
        last = time.perf_counter()
        for name, found in zip(("clean", *spat_kernels.AutoAttack(eps).attacks), stages, strict=True):
            now = time.perf_counter()
            yield name, now - last, found.robust
            last = now

    return attack


def torchattacks(eps: float, norm: str, queries: int) -> Provider:
    import torchattacks

    def attack(model, x, y):
        judge = torchattacks.AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps)
        judge._autoattack.attacks[3].n_queries = queries
        seconds, begin = [], time.perf_counter()

        def timed(stage: Callable, *args):
            start = time.perf_counter()
            x_adv = stage(*args)
            seconds.append(time.perf_counter() - start)
            return x_adv

        judge._autoattack.attacks = [partial(timed, stage) for stage in judge._autoattack.attacks]
        x_adv = judge(x, y)
        rest = time.perf_counter() - begin - sum(seconds)
        with torch.no_grad():
            robust = model(x_adv).argmax(1) == y
        # to "clean" belongs the choice of what goes to the next stage
        for name, taken in zip(("clean", *spat_kernels.AutoAttack(eps).attacks), (rest, *seconds), strict=False):
            yield name, taken, robust

    return attack


def compare(model: nn.Module, x: Tensor, y: Tensor, providers: dict[str, Provider], batch_size: int) -> dict[str, dict]:
    """Provider -> `robust`, what each sample is after all attacks; `seconds` by stage; `left`, samples robust after each stage
    (of torchattacks after the last)."""
    found = {name: {"robust": [], "seconds": {}, "left": {}} for name in providers}
    order, draw, last = list(providers), random.Random(0), None
    for rows in torch.arange(len(x)).split(batch_size):
        draw.shuffle(order)
        for name in order:
            for stage, seconds, robust in providers[name](model, x[rows], y[rows]):
                for key, value in (("seconds", seconds), ("left", int(robust.sum()))):
                    found[name][key][stage] = found[name][key].get(stage, 0) + value
                last = robust.tolist()
            found[name]["robust"] += last
        done = {name: f"{sum(entry['seconds'].values()):.0f} s" for name, entry in found.items()}
        print(f"{int(rows[-1]) + 1} of {len(x)} images", done, flush=True)
    return found


def judged(found: dict[str, dict], y: Tensor) -> dict[str, dict]:
    """`found` with accuracies in percent, and how ours compares: agreement in percent, points of accuracy, times faster."""
    judge = found["torchattacks"]
    for entry in (judge, *found.values()):
        entry["accuracy"] = 100 * sum(entry["robust"]) / len(y)
        entry["total_seconds"] = sum(entry["seconds"].values())
        same = sum(a == b for a, b in zip(entry["robust"], judge["robust"], strict=True))
        entry["agreement"] = 100 * same / len(y)
        entry["points"] = entry["accuracy"] - judge["accuracy"]
        entry["faster"] = judge["total_seconds"] / entry["total_seconds"]
    return found


def table(results: dict) -> str:
    """Ours beside torchattacks': what they find robust, and the seconds of each stage."""
    found = results["autoattack"]
    heads, cells = columns(list(found["spat_kernels"]["seconds"])[1:], "{}, s", "{{seconds[{}]:.1f}}")
    return markdown(
        results, [r | {"name": name} for name, r in found.items()],
        f"AutoAttack || accuracy, % | same as torchattacks, % | {heads} | all, s | faster",
        f"{{name}} || {{accuracy:.1f}} | {{agreement:.1f}} | {cells} | {{total_seconds:.1f}} | {{faster:.2f}}x",
        "{settings[model]} ({settings[network]}), {settings[norm]}, eps {settings[eps]:.4g}, {settings[images]:,} images, "
        "{settings[clean]:.1f} % correct; batches of {settings[batch_size]}, {settings[queries]:,} queries.", environment,
    )  # fmt: skip


def main(args: Arguments) -> None:
    torch.set_num_threads(2)
    name, network, model, eps, x, y = given(args.model, args.data, args.images, args.network)
    how = eps, args.norm
    providers = {"torchattacks": torchattacks(*how, args.queries), "spat_kernels": ours(*how, STEPS, args.queries)}
    if args.published:
        providers |= {"spat_kernels, 100 steps": ours(*how, PUBLISHED, args.queries)}
    with torch.no_grad():
        clean = 100 * (model(x).argmax(1) == y).double().mean().item()
    found = judged(compare(model, x, y, providers, BATCH), y)
    settings = {"model": name, "network": network, "eps": eps, "norm": args.norm, "images": len(x)}
    settings |= {"batch_size": BATCH, "queries": args.queries, "published": args.published, "clean": clean}
    results = measure.begun("autoattack", "cpu", settings=settings, autoattack=found)
    measure.write(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Arguments))

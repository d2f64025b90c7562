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
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

import spat_kernels
from benchmarks import measure
from benchmarks.tables import columns, environment, markdown
from spat_train.data.datasets import load_npz
from spat_train.data.images import floats
from spat_train.models.checkpoints import load_model

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
    network: str | None = None
    """Name of the network, as for spat-train. Default: that of the run. A checkpoint needs it."""
    eps: float | None = None
    """Radius for images in [0, 1]. Default: that of the run's training."""
    norm: Literal["linf", "l2"] = "linf"
    images: int = 1000
    """Maximum number of test images, the first ones."""
    batch_size: int = 250
    queries: int = 5000
    """Queries of Square; fewer for a rehearsal."""
    published: bool = True
    """Whether ours also runs at the published steps."""
    another_seed: bool = False
    """Whether torchattacks also runs with another seed: how far it agrees with itself."""
    threads: int = 2


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


def torchattacks(eps: float, norm: str, queries: int, seed: int = 0) -> Provider:
    import torchattacks

    def attack(model, x, y):
        judge = torchattacks.AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=seed)
        judge._autoattack.attacks[3].n_queries = queries
        seconds, begin = [], time.perf_counter()
        for i, stage in enumerate(judge._autoattack.attacks):
            judge._autoattack.attacks[i] = _timed(stage, seconds)
        x_adv = judge(x, y)
        rest = time.perf_counter() - begin - sum(seconds)
        with torch.no_grad():
            robust = model(x_adv).argmax(1) == y
        yield "clean", rest, robust  # and the choice of what goes to the next stage
        for name, taken in zip(spat_kernels.AutoAttack(eps).attacks, seconds, strict=False):
            yield name, taken, robust

    return attack


def _timed(attack, seconds: list[float]) -> Callable:
    def call(*args):
        begin = time.perf_counter()
        x_adv = attack(*args)
        seconds.append(time.perf_counter() - begin)
        return x_adv

    return call


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
    for entry in found.values():
        entry["accuracy"] = 100 * sum(entry["robust"]) / len(y)
        entry["total_seconds"] = sum(entry["seconds"].values())
    for entry in found.values():
        same = sum(a == b for a, b in zip(entry["robust"], judge["robust"], strict=True))
        entry["agreement"] = 100 * same / len(y)
        entry["points"] = entry["accuracy"] - judge["accuracy"]
        entry["faster"] = judge["total_seconds"] / entry["total_seconds"]
    return found


def load(args: Arguments) -> tuple[nn.Module, Tensor, Tensor, float, str]:
    """The model in eval mode, images, labels, radius, and the name of the network."""
    data = load_npz(args.data)
    model, config = load_model(args.model, data, args.network, option="--network")
    if not args.eps and config is None:
        raise SystemExit(f"{args.model} is a checkpoint and no folder of a run: give --eps")
    x, y = floats(data.test, torch.arange(min(args.images, len(data.test))), "cpu", torch.contiguous_format)
    return model.requires_grad_(False), x, y, args.eps or config.eps / 255, args.network or config.model


def table(results: dict) -> str:
    """Ours beside torchattacks': what they find robust, and the seconds of each stage."""
    found = results["autoattack"]
    stages = list(found.get("spat_kernels", {}).get("seconds", {}))[1:]
    heads, cells = columns(stages, "{}, s", "{{seconds[{}]:.1f}}")
    return markdown(
        results, [r | {"name": name} for name, r in found.items()],
        f"AutoAttack || accuracy, % | same as torchattacks, % | {heads} | all, s | faster",
        f"{{name}} || {{accuracy:.1f}} | {{agreement:.1f}} | {cells} | {{total_seconds:.1f}} | {{faster:.2f}}x",
        "{settings[model]} ({settings[network]}), {settings[norm]}, eps {settings[eps]:.4g}, {settings[images]:,} images, "
        "{settings[clean]:.1f} % correct; batches of {settings[batch_size]}, {settings[queries]:,} queries.", environment,
    )  # fmt: skip


def main(args: Arguments) -> None:
    torch.set_num_threads(args.threads)
    model, x, y, eps, network = load(args)
    providers = {
        "torchattacks": torchattacks(eps, args.norm, args.queries),
        "spat_kernels": ours(eps, args.norm, STEPS, args.queries),
    }
    if args.another_seed:
        providers |= {"torchattacks, another seed": torchattacks(eps, args.norm, args.queries, seed=1)}
    if args.published:
        providers |= {"spat_kernels, 100 steps": ours(eps, args.norm, PUBLISHED, args.queries)}
    with torch.no_grad():
        clean = 100 * (model(x).argmax(1) == y).double().mean().item()
    found = judged(compare(model, x, y, providers, args.batch_size), y)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "data")}
    settings |= {"model": args.model.name, "network": network, "eps": eps, "images": len(x), "clean": clean}
    results = measure.begun("autoattack", "cpu", settings=settings, autoattack=found)
    measure.write(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Arguments))

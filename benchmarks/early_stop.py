"""PGD of many steps with an early stop against the whole run: `python -m benchmarks.early_stop --help`.

    python -m benchmarks.early_stop tests/assets/wrn-10-2-madry.pt --network wrn-10-2 --data cifar10.npz --out early_stop.json
    python -m benchmarks.early_stop runs/mnist-madry-w4 --data mnist.npz --images 1000 --torchattacks --out early_stop-mnist.json

On images that the model gets right, in fp32; ours from the same random starts. Batch by batch, in turns, so that whatever else
the machine does hits all alike; seconds are also given as those of the process on its cores. With stop="cycle" the images must be
those of the whole run to the bit.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from benchmarks import measure
from benchmarks.agreement import given
from benchmarks.tables import environment, markdown
from spat_kernels import PGD
from spat_kernels.attacks._common import Result
from spat_kernels.predictions import predictions
from spat_kernels.settings import Precision, Stop

JUDGE = "torchattacks"
STOPS = {"whole run": None, 'stop="cycle"': "cycle", 'stop="exact"': "exact", 'stop="success"': "success"}


@dataclass
class Arguments:
    """PGD of many steps with an early stop against the whole run."""

    model: tyro.conf.Positional[Path]
    """The folder of a run, or a checkpoint."""
    data: Path
    """The data set as an .npz file."""
    out: Path
    """JSON file to write, after every batch."""
    images: int = 300
    """How many images that the model gets right, the first ones."""
    steps: int = 1000
    batch_size: int = 100
    torchattacks: bool = False
    """Whether torchattacks' PGD runs beside ours."""
    success: bool = True
    """Whether stop="success" runs too, which saves little."""
    network: str | None = None
    """The architecture of a checkpoint, which is attacked at eps 8/255."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"


def ours(stop: Stop | None, eps: float, steps: int, seed: int, precision: Precision) -> Callable[..., Result]:
    return PGD(eps, steps=steps, stop=stop, generator=torch.Generator().manual_seed(seed), precision=precision).run


def theirs(eps: float, steps: int, seed: int) -> Callable[..., Result]:
    import torchattacks

    def run(model, x, y):
        torch.manual_seed(seed)
        with torch.enable_grad():
            x_adv = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=steps)(x, y)
        passes = torch.full_like(y, steps)
        return Result(x_adv, passes, passes)

    return run


def compare(model, x: Tensor, y: Tensor, eps: float, args: Arguments) -> Iterator[dict[str, dict]]:
    """By way of stopping, after every batch: seconds and CPU seconds; of each image so far its passes, whether it is broken at
    the end, and whether it is the whole run's to the bit."""
    ways = [*STOPS, *[JUDGE] * args.torchattacks]
    if not args.success:
        ways.remove('stop="success"')
    found = {name: {"seconds": 0.0, "cpu_seconds": 0.0, "passes": [], "broken": [], "same": []} for name in ways}
    draw = random.Random(0)
    for number, rows in enumerate(torch.arange(len(x)).split(args.batch_size)):
        images, names = {}, draw.sample(ways, len(ways))
        for name in names:
            stop = STOPS.get(name)
            run = theirs(eps, args.steps, number) if name == JUDGE else ours(stop, eps, args.steps, number, args.precision)
            begin = time.perf_counter(), time.process_time()
            images[name], forwards, backwards = run(model, x[rows], y[rows])
            measure.synchronize(args.device)
            found[name]["seconds"] += time.perf_counter() - begin[0]
            found[name]["cpu_seconds"] += time.process_time() - begin[1]
            found[name]["passes"] += (forwards + backwards).tolist()
            found[name]["broken"] += (predictions(model(images[name])) != y[rows]).tolist()
        for name in names:
            found[name]["same"] += (images[name] == images["whole run"]).flatten(1).all(1).tolist()
        print(f"{int(rows[-1]) + 1} of {len(x)} images", {n: f"{f['seconds']:.0f} s" for n, f in found.items()}, flush=True)
        yield found


def judged(found: dict[str, dict]) -> dict[str, dict]:
    """`found` with accuracies in percent, and how the ways compare with the whole run."""
    whole = found["whole run"]
    for entry in found.values():
        entry["accuracy"] = 100 - 100 * sum(entry["broken"]) / len(entry["broken"])
        entry["identical"] = 100 * sum(entry["same"]) / len(entry["same"])
        entry["saved"] = 100 - 100 * sum(entry["passes"]) / sum(whole["passes"])
        entry["faster"], entry["cpu_faster"] = (whole[key] / entry[key] for key in ("seconds", "cpu_seconds"))
    return found


def table(results: dict) -> str:
    found = results["early_stop"]
    return markdown(
        results,
        [e | {"name": name, "identical": "" if name == JUDGE else f"{e['identical']:.1f}"} for name, e in found.items()],
        "PGD || accuracy of these images, % | images as in the whole run, % | passes saved, % | s | faster | CPU s | faster",
        "{name} || {accuracy:.1f} | {identical} | {saved:.1f} | "
        "{seconds:.0f} | {faster:.2f}x | {cpu_seconds:.0f} | {cpu_faster:.2f}x",
        "{settings[model]} ({settings[network]}), eps {settings[eps]:.4g}, {settings[images]:,} images that it gets right, "
        "{settings[steps]:,} steps of eps / 4, batches of {settings[batch_size]}, {settings[precision]}.", environment,
    )  # fmt: skip


@torch.no_grad()
def main(args: Arguments) -> None:
    torch.set_num_threads(2)
    name, network, model, eps, x, y = given(args.model, args.data, 10 * args.images, args.network, args.device)
    right = (predictions(model(x)) == y).nonzero()[: args.images, 0]
    settings = {"model": name, "network": network, "eps": eps, "steps": args.steps}
    settings |= {"batch_size": args.batch_size, "precision": args.precision}
    results = measure.begun("early_stop", args.device, settings=settings)
    for found in compare(model, x[right], y[right], eps, args):
        settings["images"] = len(found["whole run"]["passes"])
        results["early_stop"] = judged(found)
        measure.write(args.out, results)
    print(table(results))
    if args.device == "cpu" and not all(found['stop="cycle"']["same"]):
        raise SystemExit('stop="cycle" gave other images than the whole run')


if __name__ == "__main__":
    main(tyro.cli(Arguments))

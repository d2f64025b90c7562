"""What a call costs the host: `python -m benchmarks.calls --out benchmarks/results/cpu/calls.json`.

Counted, on any machine: what a gradient step launches, and what the rest of a call does (ATen calls and ops of ours, less views
and allocations), by the plan and through autograd. Measured: microseconds of a call and of a `launch` whose replay costs nothing:
on a GPU that lies between two attacks. --out keeps the results of other commits, so that a change has its before and after.
"""

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import tyro
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure
from benchmarks.tables import environment, markdown
from spat_kernels import PGD
from spat_kernels.attacks import pgd as attacks
from spat_kernels.cuda_graphs.cache import Graphs
from spat_train.models.registry import create

EPS, ROUNDS, CALLS = 8 / 255, 30, 20
NO_KERNELS = {
    "alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "select", "slice", "split", "split_with_sizes", "squeeze",
    "t", "transpose", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


@dataclass
class Options:
    """What a call costs the host."""

    models: list[str] = field(default_factory=lambda: ["resnet-18", "wrn-34-10"])
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    out: Path | None = None
    """Put the results here, beside those of other commits."""


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in NO_KERNELS and not name.startswith(("empty", "new_empty")):
            self.counted[name] += 1
        return function(*args, **(kwargs or {}))


def launches(model: nn.Module, x: Tensor, y: Tensor, **settings) -> dict:
    """Launches of a step, by name, and those of a call besides its steps."""
    one, three = Counter(), Counter()
    for steps, counted in ((1, one), (3, three)):
        attack = PGD(EPS, steps=steps, graph=False, **settings)
        attack(model, x, y)  # traces the model
        with Launches() as found:
            attack(model, x, y)
        counted.update(found.counted)
    step = {name: (count - one[name]) / 2 for name, count in three.most_common() if count != one[name]}
    return {"step": sum(step.values()), "once": one.total() - sum(step.values()), "kinds": step}


class NoReplay:
    """Stands in for a CUDA graph, on the CPU: what it captured is not run again."""

    device_type = "cpu"

    def __init__(self, device: torch.device):
        self.here = nullcontext

    def capture(self, function) -> None:
        function()

    def replay(self) -> None:
        pass


def host_us(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The best of some rounds, in turns."""
    with mock.patch.object(attacks, "graphs", Graphs(graph=NoReplay)):
        attack = PGD(EPS, steps=1, precision="bf16", graph=True)
        attack(model, x, y)
        ways = {"call": lambda: attack(model, x, y), "launch": lambda: attack.launch(model, x, y)}
        rounds = [{name: measure.timed(way, "cpu", CALLS) for name, way in ways.items()} for _ in range(ROUNDS)]
    return {name: 1e6 * min(times[name] for times in rounds) for name in ways}


def table(results: dict) -> str:
    """What a step launches and what a call costs the host, by commit."""
    launches, host = ((r | {"commit": r["commit"][:7]} for r in results[key]) for key in ("calls", "host"))
    return "\n\n".join([
        markdown(results, launches, "model | precision | path | commit || launches a step | launches a call, besides",
              "{model} | {precision} | {path} | {commit} || {step:.0f} | {once:.0f}"),
        markdown(results, host, "host, in bf16 | commit || µs a call | µs a launch",
              "{model} | {commit} || {call:.0f} | {launch:.0f}", environment),
    ])  # fmt: skip


def main(options: Options) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results = measure.begun("calls", "cpu", calls=[], host=[])
    commit = results["machine"]["commit"]
    x, y = torch.rand(2, 3, 32, 32), torch.randint(10, (2,))
    for name in options.models:
        model, row = create(name, 10).eval(), {"commit": commit, "model": name}
        for precision in options.precisions:
            for path in ("plan", "autograd"):
                counted = launches(model, x, y, precision=precision, input_gradient=path)
                results["calls"].append(row | {"precision": precision, "path": path} | counted)
        results["host"].append(row | host_us(model, x, y))
    if options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        for key in ("calls", "host"):
            rows = [r for r in before[key] if r["commit"] != commit] + results[key]
            results[key] = sorted(rows, key=lambda r: [r.get(k, "") for k in ("model", "precision", "path")])
    measure.write(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

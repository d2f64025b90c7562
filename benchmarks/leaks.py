"""Whether memory stays flat: `python -m benchmarks.leaks --out benchmarks/results/cpu/leaks.json`.

Each cell does something again and again, in a process of its own. The first tenth is to fill the caches. What is in use then is
compared with what is at the end: bytes on the heap of C and C++ (`mallinfo2`, exact), resident memory, which fragments, and
objects that Python's garbage collector knows.
"""

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from torch import nn

import spat_kernels as sk
from benchmarks import measure
from benchmarks.tables import environment, markdown

EPS = 8 / 255
Call = Callable[[int], object]  # what is repeated, given how often it was done before


class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


def heap_bytes() -> int:
    """Bytes that were asked of malloc and not given back."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        raise SystemExit(f"{sys.platform}: there is no mallinfo2: run it with glibc 2.33 or later") from None
    mallinfo2.restype = Mallinfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def in_use() -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"heap": heap_bytes(), "resident": pages * os.sysconf("SC_PAGE_SIZE"), "objects": len(gc.get_objects())}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()  # fmt: skip


def images(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 3, 8, 8), torch.arange(count) % 5


def attacks(attack: Callable, **settings) -> Call:
    """On one model."""
    model, (x, y) = network(), images()
    return lambda i: attack(model, x, y, EPS, **settings)


def between_updates() -> Call:
    """As in a training, which changes the weights and the mode between attacks."""
    model, (x, y) = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def call(i: int) -> None:
        loss = nn.functional.cross_entropy(model.train()(sk.pgd(model, x, y, EPS, steps=1)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


@contextmanager
def refused():
    """The error that is asked for must come."""
    try:
        yield
    except (ValueError, RuntimeError):
        return
    raise AssertionError("there was no error")


class Broken(nn.Module):
    """Fails in the second forward of an attack."""

    def __init__(self):
        super().__init__()
        self.net, self.count = network(), 0

    def forward(self, x):
        self.count += 1
        if self.count % 2 == 0:
            raise RuntimeError("broken")
        return self.net(x)


def errors() -> Call:
    """An argument that is refused, a tensor that an op refuses, and a model that raises."""
    model, broken, (x, y) = network(), Broken(), images()

    def call(i: int) -> None:
        with refused():
            sk.pgd(model, x, y, -1.0)
        with refused():
            torch.ops.spat.lsce_grad(x, y, x, None, 0.2, False, 1.0, False)
        with refused():
            sk.pgd(broken, x, y, EPS, steps=2, input_gradient="autograd")

    return call


def models(**settings) -> Call:
    """A new one each time, which is attacked and given up."""
    x, y = images()
    return lambda i: sk.pgd(network(), x, y, EPS, steps=2, **settings)


def batch_sizes() -> Call:
    """A new one each time, on one model, and then one image. oneDNN keeps a kernel for every shape of a convolution or a product:
    this model has neither."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    def call(i: int) -> None:
        for count in (i + 2, 1):
            x, y = images(count)
            sk.pgd(model, x, y % 3, EPS, steps=1)

    return call


CALLS = {
    "pgd, plan": lambda: attacks(sk.pgd, steps=1, input_gradient="plan"),
    "pgd, autograd": lambda: attacks(sk.pgd, steps=1, input_gradient="autograd"),
    "pgd, L2, bf16": lambda: attacks(sk.pgd, steps=1, norm="l2", step_size=0.1, precision="bf16"),
    "pgd, stops early": lambda: attacks(sk.pgd, steps=3, restarts=2, stop="exact"),
    "APGD": lambda: attacks(lambda model, x, y, eps: sk.APGD(eps, steps=2)(model, x, y)),
    "Square": lambda: attacks(lambda model, x, y, eps: sk.Square(eps, queries=3)(model, x, y)),
    "pgd, updates between": between_updates,
    "errors": errors,
}
MODELS = {
    "models, plan": lambda: models(input_gradient="plan"),
    "models, autograd": lambda: models(input_gradient="autograd"),
    "batch sizes": batch_sizes,
}


def grown(what: str, count: int) -> dict:
    """What is in use more after `count` times than after a tenth of them."""
    call, warm_up, start = (CALLS | MODELS)[what](), max(1, count // 10), time.perf_counter()
    for i in range(warm_up):
        call(i)
    in_use()  # its own caches
    before = in_use()
    for i in range(warm_up, count):
        call(i)
    after = in_use()
    return {name: after[name] - before[name] for name in before} | {"seconds": time.perf_counter() - start}


@dataclass
class Options:
    """Whether memory stays flat over many calls and many models."""

    calls: int = 10_000
    """Calls of each kind."""
    models: int = 200
    """Models, and batch sizes of one model."""
    out: Path | None = None
    """Write raw results here, after every cell. Cells that it already has are not measured again."""


def table(results: dict) -> str:
    return markdown(
        results, results["cells"],
        "what | times || heap, KiB | bytes each time | objects of Python | resident, MiB",
        "{what} | {count:,} || {kib:+.1f} | {each:+.2f} | {objects:+,} | {mib:+.2f}",
        "In use at the end, less what was after the first tenth.", environment,
        kib=lambda r: r["heap"] / 2**10, each=lambda r: r["heap"] / (0.9 * r["count"]), mib=lambda r: r["resident"] / 2**20,
    )  # fmt: skip


def main(options: Options) -> None:
    settings = {"calls": options.calls, "models": options.models}
    results = measure.continued(options.out, measure.begun("leaks", "cpu", settings=settings, cells=[]))
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=0"  # of processes to come: they keep no freed pieces
    counts = dict.fromkeys(CALLS, options.calls) | dict.fromkeys(MODELS, options.models)

    def run(cell: dict) -> dict:
        with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as process:
            return process.submit(grown, cell["what"], cell["count"]).result()

    measure.complete(options.out, results, "cells", [{"what": what, "count": count} for what, count in counts.items()], run)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

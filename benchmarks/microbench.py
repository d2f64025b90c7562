"""The cost of convolutions, of nodes in a CUDA graph and of launches: `python -m benchmarks.microbench --out FILE.json`.

- TFLOP/s of every distinct convolution of the models, forward and gradient at the input, with cuDNN choosing among its 10 first
  engines and among all (`benchmark_limit` 10 and 0, each in a process of its own: a choice is kept for good);
- the stride-1 gradient as a convolution with the rotated, transposed weights, against cuDNN's own;
- contiguous tensors against channels_last ones: full precision has Winograd engines for the former alone;
- `cudnn_convolution_add_relu` (half precision, bias in the same dtype) against the plain convolution;
- the gap between the nodes of a CUDA graph, and a node's time;
- the host's cost of an eager op, of ours through the C++ binding, and of ours launched by Triton.

Times are the best of some rounds between events. On the CPU (a rehearsal) what needs a GPU is left out, with the reason.
"""

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks import measure, workmodel
from benchmarks.measure import DTYPES, seconds_per_call
from benchmarks.tables import columns, environment, literal, markdown, sentences
from spat_kernels.ops import linf
from spat_train.models.registry import create

ROTATED = "dgrad as rotated forward"
PATIENCE = 60.0  # seconds for a convolution, whose process may have died


@dataclass
class Options:
    """Measure convolutions, graph nodes and launches on this device."""

    models: list[str] = field(default_factory=lambda: ["wrn-34-10", "resnet-18", "resnet-50", "resnet-18@96"])
    """Whose convolutions: names of spat_train.models, with "@SIZE" for images that are not 32x32."""
    batch: int = 256
    precisions: list[str] = field(default_factory=lambda: ["bf16"])
    """Any of fp32, tf32 (GPU), bf16, fp16."""
    limits: list[int] = field(default_factory=lambda: [10, 0])
    """Values of `benchmark_limit`."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: float = 0.05
    """To measure each number for."""
    out: Path | None = None
    """Write the answers here, after every one. What it already has is not measured again."""


def shapes(models: list[str]) -> list[workmodel.Conv]:
    found: dict[workmodel.Conv, None] = {}
    for name, side in map(measure.name_and_size, models):
        found |= dict.fromkeys(layer.conv for layer in workmodel.layers(create(name), (3, side, side)) if layer.conv)
    return list(found)


def ways_of(conv: workmodel.Conv, batch: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Tensor]]:
    """Ways to compute `conv` and its gradient at the input on random data, channels_last if nothing else is said."""

    def random(*shape):
        return torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)

    x = random(batch, conv.ins, conv.size, conv.size)
    w = random(conv.outs, conv.ins // conv.groups, conv.kernel, conv.kernel)
    geometry = [conv.stride] * 2, [conv.padding] * 2, [1, 1]

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, *geometry, conv.groups)

    def dgrad(out: Tensor, x: Tensor, w: Tensor) -> Tensor:
        wanted = [True, False, False]
        return torch.ops.aten.convolution_backward(out, x, w, None, *geometry, False, [0, 0], conv.groups, wanted)[0]

    out = forward(x, w)
    dense = [t.contiguous() for t in (out, x, w)]
    ways = {
        "forward": lambda: forward(x, w),
        "dgrad": lambda: dgrad(out, x, w),
        "forward, contiguous": lambda: forward(*dense[1:]),
        "dgrad, contiguous": lambda: dgrad(*dense),
    }
    if conv.stride == 1 and conv.groups == 1:
        rotated = w.flip(2, 3).transpose(0, 1).contiguous().to(memory_format=torch.channels_last)
        ways[ROTATED] = lambda: F.conv2d(out, rotated, None, 1, conv.kernel - 1 - conv.padding)
    if device.startswith("cuda"):
        bias = torch.randn(conv.outs, device=device, dtype=dtype)
        fused, with_addition = torch.cudnn_convolution_relu, torch.cudnn_convolution_add_relu
        ways["forward + bias, relu"] = lambda: fused(x, w, bias, *geometry, conv.groups)
        ways["forward + add, bias, relu"] = lambda: with_addition(x, w, out, 1.0, bias, *geometry, conv.groups)
    return ways


def convolution(conv: workmodel.Conv, precision: str, options: Options) -> dict:
    """TFLOP/s of `ways_of` the convolution; an error's text where one fails or is wrong."""
    ways, rates = ways_of(conv, options.batch, DTYPES[precision], options.device), {}
    flops = 2 * ways["forward"]().numel() * conv.ins // conv.groups * conv.kernel**2
    for name, way in ways.items():
        try:
            rates[name] = 1e-12 * flops / seconds_per_call(way, options.device, options.seconds)
        except RuntimeError as error:  # cuDNN has no engine for some
            rates[name] = measure.one_line(error)
    if ROTATED in ways:
        expected = ways["dgrad"]()
        error = (ways[ROTATED]() - expected).float().norm() / expected.float().norm()
        if not error < 0.01:  # twice bf16's rounding of the result
            rates[ROTATED] = f"differs by {error:.3f} of its norm"
    return dataclasses.asdict(conv) | {"tflops": rates}


def with_engines(limit: int, options: Options, precision: str, conv: workmodel.Conv) -> dict:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, limit
    with measure.numerics(precision), torch.no_grad():
        return convolution(conv, precision, options)


def convolutions(options: Options, results: dict, limit: int, precision: str) -> None:
    """Add those that the results lack, and write after each. By a process of its own: if it breaks the device, others work on."""
    found, name = results["precisions"].setdefault(precision, {}), f"convolutions, limit {limit}"
    known = found.setdefault(name, [])
    found.pop(f"{name}, rest", None)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            for conv in shapes(options.models):
                if not any(dataclasses.asdict(conv).items() <= record.items() for record in known):
                    known.append(pool.apply_async(with_engines, (limit, options, precision, conv)).get(PATIENCE))
                    measure.write(options.out, results)
    except Exception as error:
        found[f"{name}, rest"] = {"failed": measure.one_line(error)}
        measure.write(options.out, results)


NODES = 1, 2**20, 2**24  # elements of the tensor of a CUDA graph's nodes


def graph_nodes(options: Options) -> dict:
    """Microseconds a node of CUDA graphs of 1,000 dependent additions, by the size of the tensor."""
    result = {}
    for numel in NODES:
        x, graph = torch.zeros(numel, device=options.device), torch.cuda.CUDAGraph()
        x.add_(1)
        with torch.cuda.graph(graph):
            for _ in range(1000):
                x.add_(1)
        node = seconds_per_call(graph.replay, options.device, options.seconds) / 1000
        alone = seconds_per_call(lambda: x.add_(1), options.device, options.seconds)  # noqa: B023  called at once
        result[f"{numel} elements"] = {"node_us": 1e6 * node, "eager_us": 1e6 * alone}
    return result


def host_cost(options: Options) -> dict:
    """Microseconds of the host a call, on one element: the queue never fills, the GPU is not waited for."""
    device = options.device
    x, x_adv, grad = (torch.rand(1, 1, device=device) for _ in range(3))
    eps, step = (torch.full((1,), v, device=device) for v in (0.03, 0.01))
    arguments = x_adv, x, grad, eps, step, 0.0, 1.0, None
    ways = {"add_": lambda: x.add_(1), "linf_step_, dispatched": lambda: torch.ops.spat.linf_step_.default(*arguments)}
    if device.startswith("cuda"):
        ways["linf_step_, Triton"] = lambda: linf.linf_step_triton(*arguments)

    def cost(call) -> float:
        call()
        measure.synchronize(device)
        start = time.perf_counter()
        for _ in range(500):
            call()
        taken = time.perf_counter() - start
        measure.synchronize(device)
        return 1e6 * taken / 500

    return {name: min(cost(call) for _ in range(10)) for name, call in ways.items()}


def table(results: dict) -> str:
    """TFLOP/s of the ways to compute each convolution, with cuDNN's first 10 engines and with all; then what launches cost."""

    def launches(results: dict) -> str:
        costs = [f"{name} {us if isinstance(us, str) else f'{us:.2f}'}" for name, us in results["host_us"].items()]
        return f"µs of the host a call: {', '.join(costs)}." if costs else ""

    def nodes(results: dict) -> str:
        sizes = {size: us for size, us in results["graph_nodes"].items() if isinstance(us, dict)}
        costs = [f"{size} {us['node_us']:.2f} (alone {us['eager_us']:.2f})" for size, us in sizes.items()]
        return f"µs a node of a CUDA graph: {', '.join(costs)}." if costs else ""

    tables = [convolutions_table(results, precision, found) for precision, found in results["precisions"].items()]
    return "\n\n".join([*tables, sentences(results, launches, nodes, environment)])


def convolutions_table(results: dict, precision: str, found: dict) -> str:
    rows: dict[str, dict] = {}
    for limit, engines in ((10, ""), (0, ", all engines")):
        for c in found.get(f"convolutions, limit {limit}", []):
            name = "{kernel}x{kernel} {ins}->{outs} /{stride} @{size}".format_map(c)
            rates = {f"{way}{engines}": f"{v:.3g}" if isinstance(v, float) else "-" for way, v in c["tflops"].items()}
            rows.setdefault(name, {"name": name, "rates": {}})["rates"] |= rates
    heads, cells = columns(dict.fromkeys(chain.from_iterable(row["rates"] for row in rows.values())), "{}", "{{rates[{}]}}")
    note = f"TFLOP/s, {precision}, batch {{batch}}."
    failed = [literal(f"{name} failed: {answer['failed']}.") for name, answer in found.items() if "failed" in answer]
    return markdown(results, rows.values(), f"convolution || {heads}", f"{{name}} || {cells}", note, *failed)


def main(options: Options) -> None:
    cuda = options.device.startswith("cuda")
    settings = {"batch": options.batch, "settings": {"seconds": options.seconds}}
    fresh = measure.begun("microbench", options.device, **settings, host_us={}, graph_nodes={}, precisions={})
    results = measure.continued(options.out, fresh)
    for name, measured in {"host_us": host_cost, "graph_nodes": graph_nodes if cuda else lambda _: {"skipped": "no GPU"}}.items():
        if results[name] and "failed" not in results[name]:
            continue
        try:
            results[name] = measured(options)
        except Exception as error:  # one question's failure must not take the others' answers along
            results[name] = {"failed": measure.one_line(error)}
        measure.write(options.out, results)
    for limit in options.limits if cuda else options.limits[:1]:  # CPUs have no cuDNN
        for precision in options.precisions:
            convolutions(options, results, limit, precision)
    print(json.dumps({key: value for key, value in results.items() if key != "machine"}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Convolutions with the pointwise work in their epilogue, as cuDNN's graph API builds them, against what the plan runs now.

    python -m benchmarks.fused both --out fused.json    (needs nvidia-cudnn-frontend==1.15.0, and the cuDNN that torch has)

`build` compiles plans of each graph and shape into --plans: all tiles of cuDNN's runtime engine for Hopper ("eng2": wgmma and
TMA, never proposed by the heuristics), or what the heuristics propose first, where a precompiled engine fits ("eng41"). It needs
no GPU; where there is no driver either, a C compiler. Plans that are there are not built again. `both` also checks each plan
against fp32 and times it beside torch's convolution with the plan's pass after it, while the next ones are built. --out is
written after every row. Rows that it has already, from this device and commit, are not measured again.
"""

import ctypes
import json
import multiprocessing
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks import measure
from benchmarks.tables import environment, markdown
from spat_kernels import ops

# What a graph computes, in this order; and its engine, if the heuristics do not choose it.
GRAPHS = {
    "conv": None,
    "dgrad": None,
    "conv, bias, relu": None,
    "conv, residual, bias, relu": None,
    "conv, residual, total, scale, shift, relu": 2,  # pre-activation: the total is a result, too
    "dgrad, act": 2,  # act: zero where the activation is not positive
    "dgrad, act, scale, residual": 2,  # pre-activation
    "dgrad, residual, act": 2,  # post-activation
}
UIDS = {name: uid for uid, name in enumerate(("x", "dy", "w", "residual", "act", "bias", "scale", "shift", "out", "total"), 1)}
# CHANNELS@SIZE of WRN-34-10's and ResNet-18's convolutions: 3x3, stride 1, as many channels out as in
SHAPES, BATCH = ["160@32", "320@16", "640@8", "64@32", "128@16", "256@8", "512@4"], 256
PROPOSED, TILES = range(8), (*range(17), 41, 42, 43, 44)  # plans of the heuristics; kernel configurations of engine 2
TOLERANCE = 0.02  # of a result's norm
DEVICE = {
    "deviceVer": 900, "driverVer": 13000, "cudaDeviceId": 0, "multiProcessorCount": 132, "smClockRateKHz": 1980000,
    "maxGridSize": [2**31 - 1, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "maxThreadsPerBlock": 1024, "warpSize": 32,
    "maxThreadsPerSM": 2048, "maxCtasPerSM": 32, "regsPerBlock": 65536, "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024,
    "isTccDriver": 0, "supportCoopLaunch": 1,
}  # fmt: skip
CARDS = {
    "h100": {"deviceName": "NVIDIA H100 80GB HBM3", "pciDeviceId": 0x2330, "totalGlobalMem": 85520809984,
             "memClockRateKHz": 2619000, "l2CacheSize": 52428800},
    "h200": {"deviceName": "NVIDIA H200", "pciDeviceId": 0x2335, "totalGlobalMem": 150754820096,
             "memClockRateKHz": 3201000, "l2CacheSize": 62914560},
}  # fmt: skip


@dataclass
class Options:
    """Build and time cuDNN's fused convolutions."""

    what: tyro.conf.Positional[Literal["build", "both"]]
    out: Path = Path("fused.json")
    """JSON file of the times."""
    plans: Path = Path(tempfile.gettempdir(), "fused_plans")
    """Folder of what was built."""


def cudnn():
    try:
        import cudnn
    except ImportError as error:
        raise SystemExit(f"no cudnn ({error}): pip install --no-deps nvidia-cudnn-frontend==1.15.0") from None
    return cudnn


def sizes(shape: str) -> tuple[int, int]:
    channels, size = shape.split("@")
    return int(channels), int(size)


# --- graphs ---


def graph(name: str, batch: int, shape: str, card: str):
    """The graph `name` in bf16, channels_last, computed in fp32."""
    channels, size = sizes(shape)
    bf16, fp32 = cudnn().data_type.BFLOAT16, cudnn().data_type.FLOAT
    device = cudnn().create_device_properties(json.dumps(DEVICE | CARDS[card]))
    g = cudnn().pygraph(io_data_type=bf16, intermediate_data_type=fp32, compute_data_type=fp32, device_property=device)

    def tensor(what: str, n: int, side: int, dtype=bf16):
        strides = [channels * side * side, 1, channels * side, channels]
        return g.tensor(name=what, data_type=dtype, dim=[n, channels, side, side], stride=strides, uid=UIDS[what])

    def result(value, what: str):
        return value.set_output(True).set_data_type(bf16).set_uid(UIDS[what])

    steps = {
        "residual": lambda v: g.add(v, tensor("residual", batch, size)),
        "bias": lambda v: g.add(v, tensor("bias", 1, 1)),  # in bf16, as the precompiled engine wants it
        "scale": lambda v: g.mul(v, tensor("scale", 1, 1, fp32)),
        "shift": lambda v: g.add(v, tensor("shift", 1, 1, fp32)),
        "relu": g.relu,
        "act": lambda v: g.relu_backward(v, tensor("act", batch, size)),
        "total": lambda v: result(v, "total"),
    }
    first, *rest = name.split(", ")
    convolution, start = (g.conv_fprop, "x") if first == "conv" else (g.conv_dgrad, "dy")
    value = convolution(tensor(start, batch, size), tensor("w", channels, 3), padding=[1, 1], stride=[1, 1], dilation=[1, 1])
    if first == "dgrad":
        value.set_dim([batch, channels, size, size]).set_stride([channels * size * size, 1, channels * size, channels])
    for step in rest:
        value = steps[step](value)
    result(value, "out")
    g.validate()
    g.build_operation_graph()
    return g


def inputs(name: str, batch: int, shape: str, device: str) -> dict[str, Tensor]:
    """Random values of what the graph `name` reads."""
    channels, size = sizes(shape)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def image(n: int, side: int) -> Tensor:
        return random(n, channels, side, side).bfloat16().contiguous(memory_format=torch.channels_last)

    steps = name.split(", ")
    read = ["x" if steps[0] == "conv" else "dy", "w", *steps[1:]]
    every = {key: image(batch, size) for key in ("x", "dy", "residual")} | {"act": image(batch, size).relu()}
    every |= {"w": image(channels, 3) / (3 * channels**0.5), "bias": random(channels).bfloat16()}
    every |= {"scale": random(channels), "shift": random(channels)}
    return {key: value for key, value in every.items() if key in read}


def reference(name: str, v: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results in fp32."""
    v = {key: value.float() if value.ndim == 4 else value.float().view(-1, 1, 1) for key, value in v.items()}
    results = {}
    steps = {
        "conv": lambda _: F.conv2d(v["x"], v["w"], padding=1),
        "dgrad": lambda _: F.conv_transpose2d(v["dy"], v["w"], padding=1),
        "residual": lambda y: y + v["residual"],
        "bias": lambda y: y + v["bias"],
        "scale": lambda y: y * v["scale"],
        "shift": lambda y: y + v["shift"],
        "relu": torch.relu,
        "act": lambda y: y * (v["act"] > 0),
        "total": lambda y: results.setdefault("total", y),
    }
    y = None
    with measure.numerics("fp32"):
        for step in name.split(", "):
            y = steps[step](y)
    return results | {"out": y}


def planned(name: str, v: dict[str, Tensor]) -> tuple[Callable[[], Tensor], Callable[[], dict[str, Tensor]]]:
    """What the plan runs now: the convolution, and the convolution with its pass after it, if it has one."""
    first, *steps = name.split(", ")
    start, residual, scale = v["x" if first == "conv" else "dy"], v.get("residual"), v.get("scale")
    shift = v["bias"].float() if "bias" in v else v.get("shift")
    total = {"total": torch.empty_like(start)} if "total" in steps else {}
    mask = torch.empty(start.numel() // start.shape[1], -(-start.shape[1] // 8), dtype=torch.uint8, device=start.device)
    if "act" in v:
        ops.scale_shift_relu(v["act"], torch.empty_like(start), mask=mask)

    def convolution() -> Tensor:
        if first == "conv":
            return torch.conv2d(start, v["w"], None, 1, 1)
        geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        return torch.ops.aten.convolution_backward(start, start, v["w"], None, *geometry, [True, False, False])[0]

    def both() -> dict[str, Tensor]:
        y = convolution()
        if first == "conv" and steps:
            ops.scale_shift_relu(y, y, b=residual, scale=scale, shift=shift, mask=mask, **total)
        elif steps:
            added = {"grad2" if steps[0] == "residual" else "residual": residual}
            ops.scale_shift_relu_grad(y, y, mask=mask, scale=scale, **added)
        return {"out": y} | total

    return convolution, both


def agree(found: dict[str, float]) -> bool:
    return all(error < TOLERANCE for error in found.values())


def errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative to the norms."""
    return {key: ((results[key].float() - e).norm() / e.norm()).item() for key, e in expected.items()}


# --- building ---


def stand_in(folder: Path) -> str:
    """The driver, or a library in its place where there is none: cuDNN loads what it has compiled."""
    try:
        return ctypes.CDLL("libcuda.so.1")._name
    except OSError:
        library, source = folder / "no_driver.so", Path(__file__).with_name("no_driver.c")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"there is no driver (libcuda.so.1), and {source.name} cannot be compiled: {error}") from None
    return str(library)


def build(name: str, batch: int, shape: str, card: str, variant: int, path: Path) -> str:
    """Save one plan, after a line with its name; returns "built", or why not."""
    if path.exists():
        return "there"
    try:
        g, engine = graph(name, batch, shape, card), GRAPHS[name]
        if engine is None:
            g.create_execution_plans([cudnn().heur_mode.A])
        else:
            g.create_execution_plan(engine, {cudnn().knob_type.KERNEL_CFG: variant})
        index = variant if engine is None else 0
        g.build_plan_at_index(index)
        plan = g.get_plan_name_at_index(index).encode() + b"\n" + bytes(g.serialize())
    except Exception as error:  # cuDNN has no such plan
        return measure.one_line(error)[-100:]
    path.with_suffix(".part").write_bytes(plan)
    path.with_suffix(".part").rename(path)
    return "built"


# --- timing ---


def ms(call: Callable[[], object]) -> float:
    """Milliseconds a call, in the best of 3 rounds of 20. The GPU sleeps first, so that it never waits for a launch."""
    best = float("inf")
    for _ in range(3):
        call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(5_000_000)  # cycles: about 3 ms
        begin.record()
        for _ in range(20):
            call()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 20)
    return best


def timed(handle, path: Path, v: dict[str, Tensor], expected: dict[str, Tensor]) -> dict:
    """`plan`, its name; `ms` and `errors`, or why it `failed`."""
    name, plan = path.read_bytes().split(b"\n", 1)
    found = {"plan": name.decode()}
    try:
        g = cudnn().pygraph(handle=handle)
        g.deserialize(handle, list(plan))
        image = v["x" if "x" in v else "dy"]
        work = torch.empty(max(g.get_workspace_size(), 1), dtype=torch.uint8, device=image.device)
        results = {key: torch.full_like(image, torch.nan) for key in expected}
        pointers = {UIDS[key]: value.data_ptr() for key, value in (v | results).items()}

        def call() -> None:
            g.execute(pointers, work.data_ptr(), handle=handle)

        call()
        found["errors"] = errors(results, expected)
        return found | ({"ms": ms(call)} if agree(found["errors"]) else {"failed": "differs from the reference"})
    except Exception as error:  # what cuDNN does not run is a result
        return found | {"failed": measure.one_line(error)[-160:]}


def measured(handle, name: str, batch: int, shape: str, plans: dict[int, Path]) -> dict:
    v, (channels, size) = inputs(name, batch, shape, "cuda"), sizes(shape)
    (convolution, both), expected = planned(name, v), reference(name, v)
    wrong = errors(both(), expected)
    assert agree(wrong), f"{name}, {shape}: what the plan runs differs from the reference: {wrong}"
    found = {"flops": 2 * batch * 9 * (channels * size) ** 2, "conv_ms": ms(convolution), "now_ms": ms(both)}
    found["tried"] = [timed(handle, path, v, expected) for path in plans.values() if path.exists()]
    best = min((t for t in found["tried"] if "ms" in t), key=lambda t: t["ms"], default=None)
    return found | ({"best": best} if best else {})


# --- the table ---


def table(results: dict) -> str:
    """The fastest of cuDNN's fused plans of each graph against torch's convolution and our pass after it."""

    def engine(r: dict) -> str:
        if "best" in r:
            return r["best"]["plan"].split("_")[0]
        return f"none of {len(r['tried'])}: {r['tried'][0]['failed']}" if r["tried"] else "none was built"

    return markdown(
        results, results["fused"],
        "graph | channels@size | engine || batch | convolution, ms | TFLOP/s | and our pass, ms | fused, ms | TFLOP/s | gain",
        "{graph} | {shape} | {engine} || "
        "{batch} | {conv_ms:.3f} | {now:.0f} | {now_ms:.3f} | {best[ms]:.3f} | {then:.0f} | {gain:.2f}x",
        "bf16.", environment, engine=engine, gain=lambda r: r["now_ms"] / r["best"]["ms"],
        now=lambda r: 1e-9 * r["flops"] / r["conv_ms"], then=lambda r: 1e-9 * r["flops"] / r["best"]["ms"],
    )  # fmt: skip


def main(o: Options) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    card = next((card for card in CARDS if card.upper() in device.split()), None)
    if not card:
        raise SystemExit(f"there is a {device} here: these plans are for an H100 or an H200")
    times = o.what == "both"
    if times and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: without one there is only `build`")
    cudnn()
    folder, results, building = o.plans / card, {"fused": []}, {}
    folder.mkdir(parents=True, exist_ok=True)
    if times:
        results = measure.continued(o.out, measure.begun("fused", "cuda", fused=[]))
        results["fused"] = [r for r in results["fused"] if r["tried"]]  # the others had no plan yet
        torch.backends.cudnn.benchmark = True
        handle = cudnn().create_handle()
        cudnn().set_stream(handle, torch.cuda.current_stream().cuda_stream)

    def run(cell: dict) -> dict:
        name, shape, _ = cell.values()
        plans, jobs = building[name, shape]
        outcomes = Counter(job.result() for job in jobs)
        print(f"{shape} {name}: {', '.join(f'{count} {what}' for what, count in outcomes.items())}", flush=True)
        return measured(handle, name, BATCH, shape, plans) if times else {}

    cells = [{"graph": name, "shape": shape, "batch": BATCH} for shape in SHAPES for name in GRAPHS]
    spawn, processes = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) - 2)
    # cuDNN finds the driver by its soname where it is loaded already
    pool = ProcessPoolExecutor(processes, spawn, partial(ctypes.CDLL, mode=ctypes.RTLD_GLOBAL), [stand_in(o.plans)])
    try:
        for name, shape, _ in map(dict.values, measure.missing(results["fused"], cells)):
            variants = TILES if GRAPHS[name] else PROPOSED
            plans = {variant: folder / f"{BATCH} {shape} {name} {variant}.plan" for variant in variants}
            jobs = [pool.submit(build, name, BATCH, shape, card, variant, path) for variant, path in plans.items()]
            building[name, shape] = plans, jobs
        measure.complete(o.out if times else None, results, "fused", cells, run)
    finally:
        pool.shutdown(cancel_futures=True)
    if times:
        print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

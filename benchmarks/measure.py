"""What the benchmarks share: the clock, turns, precisions, the machine's two ceilings, and the files that results are kept in."""

import datetime
import gc
import hashlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F

import spat_kernels
from spat_kernels.precision import tf32_switches
from spat_train.runtime import atomic_write as files

K, T = TypeVar("K"), TypeVar("T")
ROOT = Path(__file__).parent.parent
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")
ROUNDS = 3, 100  # least and most of a race

# --- the machine ---


def describe(device: str) -> dict:
    """Where a result comes from: device, CPU and its matrix units, versions, threads, commit, date, command."""
    if spat_kernels._library.compiled is None:
        raise SystemExit(f"{spat_kernels.__path__[0]} is not compiled: run pip install -e '.[bench]' in the checkout")
    cuda = device.startswith("cuda")
    info = Path("/proc/cpuinfo").read_text()
    flags = set(re.search(r"^flags\s*: (.*)$", info, re.M)[1].split())
    model = re.search(r"^model name\s*: (.*)$", info, re.M)[1]
    return {
        "device": torch.cuda.get_device_name(device) if cuda else model,
        "driver": driver() if cuda else None,
        "cpu": {"model": model, "cores": os.cpu_count(), "flags": [flag for flag in CPU_FLAGS if flag in flags]},
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "spat_kernels": spat_kernels.config(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # without folders, which say nothing elsewhere
        "command": " ".join(Path(word).name if word.startswith("/") else word for word in [sys.executable, *sys.orig_argv[1:]]),
    }


def driver() -> str | None:
    """The version of NVIDIA's driver, where nvidia-smi says it."""
    failed, version = subprocess.getstatusoutput("timeout 20 nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    return version.split()[0] if version and not failed else None


def commit() -> str | None:
    """The commit, with "+" and a hash of the changes where the tree has some; SPAT_COMMIT names it where a copy has no .git."""
    if named := os.environ.get("SPAT_COMMIT"):
        return named
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL).strip()
        changes = subprocess.check_output([*git, "diff", "HEAD"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+{hashlib.sha1(changes).hexdigest()[:8]}" if changes else head


# --- files of results ---

SAME = "device", "torch", "cuda", "cudnn", "threads", "commit"  # of machines whose results may share a file


def begun(benchmark: str, device: str, **fresh: object) -> dict:
    """What the results of a run begin with: the benchmark that has their table, this machine, and `fresh`."""
    return {"benchmark": benchmark, "machine": describe(device), **fresh}


def continued(out: Path | None, fresh: dict) -> dict:
    """The results that a benchmark goes on from: those that `out` holds from a run that was cut, or `fresh`.

    Args:
        fresh: what a run begins with (`begun`): `machine`, settings, and empty lists and dicts for what it will measure.

    Raises:
        SystemExit: what `out` holds is from another machine or commit, or made with other settings.
    """
    if out is None or not out.exists():
        return fresh
    settings = {key: value for key, value in json.loads(json.dumps(fresh)).items() if key != "machine" and value not in ([], {})}
    settings |= settings.pop("settings", {}) | {key: fresh["machine"].get(key) for key in SAME}
    try:
        before = json.loads(out.read_text())
        found = before | before.get("settings", {}) | before["machine"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"{out}: these are no such results: move the file away, or give another --out") from None
    if wrong := [f"{key}: {found.get(key)}, now {now}" for key, now in settings.items() if found.get(key) != now]:
        raise SystemExit(f"{out}: it holds other results ({', '.join(wrong)}): move the file away, or give another --out")
    return fresh | before


def write(out: Path | None, results: dict) -> None:
    """Replace the file `out`, if one is asked for, in one step: it is whole whenever the benchmark ends."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write(out, (json.dumps(results, indent=1) + "\n").encode())


def missing(records: list[dict], cells: list[dict]) -> list[dict]:
    return [cell for cell in cells if not any(cell.items() <= record.items() for record in records)]


def complete(out: Path | None, results: dict, key: str, cells: list[dict], run: Callable[[dict], dict]) -> None:
    """Add to the list `results[key]` each of the cells that it lacks, with what `run` measures of it, and write after each."""
    for cell in missing(results[key], cells):
        results[key].append(cell | run(cell))
        write(out, results)


def require_ours(records: list[dict]) -> None:
    """End with an error if one of ours, unlike a rival, disagreed or failed."""
    if wrong := [r for r in records if r["ours"] and r["status"] != "timed"]:
        raise SystemExit("\n".join(f"{r['provider']}, {r['precision']}: {r['status']}: {r['note']}" for r in wrong))


# --- precisions and memory ---


def numerics(precision: str) -> AbstractContextManager[None]:
    """TF32 in convolutions and matrix products where `precision` is "tf32", else not. (cuDNN's default is TF32.)"""
    return tf32_switches("tf32" if precision == "tf32" else "fp32", "cuda")


def in_precision(precision: str, call: Callable[..., T], *args: object) -> Callable[[], T]:
    """`call(*args)` with the `numerics` of a precision."""

    def within() -> T:
        with numerics(precision):
            return call(*args)

    return within


def free(device: str) -> None:
    """Collect garbage, and give the memory that PyTorch caches back to the GPU."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def name_and_size(model: str) -> tuple[str, int]:
    """The name of a model and the side of its images: "resnet-18@96" is resnet-18 on 96x96, without "@" they are 32x32."""
    name, _, size = model.partition("@")
    return name, int(size or 32)


# --- the clock ---


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: str, calls: int = 1) -> float:
    """Seconds a call: on the GPU between two events around `calls` of them, on the CPU by the wall clock."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def race(calls: dict[K, Callable[[], object]], device: str, seconds: float) -> tuple[dict[K, list[float]], dict[K, str]]:
    """Time `calls` against each other, in turns, so that whatever else the machine does hits all alike.

    Every round calls each once, in a random order. Ends after `seconds` times the number of calls, but not before
    ROUNDS[0] rounds and not after ROUNDS[1]. Warm up before.

    Returns:
        Name to seconds of each call, and name to the error of those that raised, which are timed no further.
    """
    times: dict[K, list[float]] = {name: [] for name in calls}
    errors: dict[K, str] = {}
    order, draw, start = list(calls), random.Random(0), time.perf_counter()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() - start > seconds * len(calls):
            break
        draw.shuffle(order)
        for name in [name for name in order if name not in errors]:
            try:
                times[name].append(timed(calls[name], device))
            except Exception as error:
                errors[name] = one_line(error)
    return {name: t for name, t in times.items() if name not in errors}, errors


def race_records(records: list[dict], calls: dict[int, Callable[[], object]], device: str, seconds: float) -> None:
    """`race` the calls, each of the record with its index, and note there how it ended: "timed" or "failed".

    A record that was timed gets `seconds`, a list, their `median` and `min`; one that failed the error as its `note`.
    """
    times, errors = race(calls, device, seconds)
    for index, error in errors.items():
        records[index] |= {"status": "failed", "note": error}
    for index, taken in times.items():
        records[index] |= {"status": "timed", "seconds": taken, "median": statistics.median(taken), "min": min(taken)}


def seconds_per_call(call: Callable[[], object], device: str, seconds: float = 0.2, rounds: int = 5) -> float:
    """The best of `rounds` rounds that together take about `seconds`, after two warm-up calls: what a ceiling is."""
    call()
    calls = max(1, int(seconds / rounds / max(timed(call, device), 1e-7)))
    return min(timed(call, device, calls) for _ in range(rounds))


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# --- ceilings ---


def ceilings(device: str, precisions: list[str], *, small: bool = False) -> dict:
    """The two ceilings of the roofline, on random data (zeros run faster).

    Returns:
        dict: `copy_gbps`, bytes read and written by `copy_` between buffers far beyond every cache; `tflops`, per precision the
        larger of a square matrix product and a 3x3 convolution in channels_last, two operations a multiply-add.
    """
    torch.backends.cudnn.benchmark = True  # a ceiling is the best engine's
    cuda, seconds = device.startswith("cuda"), 0.02 if small else 1.0
    mib, n, batch, channels = (4, 256, 2, 64) if small else (4096, 8192, 256, 640) if cuda else (256, 2048, 32, 320)
    buffers = torch.randn(2, mib * 2**18, device=device)
    copy = seconds_per_call(lambda: buffers[0].copy_(buffers[1]), device, seconds)
    tflops = {}
    for precision in precisions:
        a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
        x = torch.randn(batch, channels, 16, 16, device=device, dtype=DTYPES[precision]).to(memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3, device=device, dtype=DTYPES[precision]).to(memory_format=torch.channels_last)
        with numerics(precision), torch.no_grad():
            matmul = 2 * n**3 / seconds_per_call(lambda: a @ b, device, seconds)  # noqa: B023  called before the next round
            conv = seconds_per_call(lambda: F.conv2d(x, w, padding=1), device, seconds)  # noqa: B023
        tflops[precision] = 1e-12 * max(matmul, 2 * x.numel() * w[0].numel() / conv)
    return {"copy_gbps": 1e-9 * buffers.nbytes / copy, "tflops": tflops}

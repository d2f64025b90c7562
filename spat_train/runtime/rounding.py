"""What rounding depends on beside the settings: kept with results, and compared where another computer goes on with them."""

import platform
import sys
from importlib.metadata import version

import torch

from spat_kernels import config


def hardware(device: torch.device) -> str:
    """The GPU, or the processor and the widest instructions that PyTorch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or no x86
        name = f"{platform.machine()} CPU"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def arithmetic(device: torch.device) -> dict:
    """Versions, device, kernels, and on CPUs the number of threads."""
    on_gpu = device.type == "cuda"
    return {
        "spat_kernels": version("spat_kernels"),
        "torch": str(torch.__version__),
        "device": hardware(device),
        "kernels": "compiled" if config()["compiled"] else config()["backend"],
        "threads": None if on_gpu else torch.get_num_threads(),
    }


def say_changes(was: dict, now: dict, what: str) -> None:
    """A line on stderr where `was`, an earlier `arithmetic`, is another than `now`. Older ones have fewer entries."""
    if changed := [f"{name} {value}, now {now.get(name)}" for name, value in was.items() if value != now.get(name)]:
        print(f"spat-train: begun with {'; '.join(changed)}: {what}", file=sys.stderr)

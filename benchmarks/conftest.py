"""Device, threads, and what the JSON says about the machine: enough to read the numbers by, nothing that names it."""

import os
import platform

import torch

import spat_kernels
from benchmarks import cases

torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the cases run")


def pytest_configure(config):
    cases.DEVICE = config.getoption("--device")


def pytest_benchmark_update_machine_info(machine_info):
    kept = {
        "cpu": {"model": machine_info["cpu"].get("brand_raw", platform.processor()), "cores": os.cpu_count()},
        "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "spat_kernels": spat_kernels.config(),
    }  # fmt: skip
    machine_info.clear()
    machine_info |= kept | ({"gpu": torch.cuda.get_device_name()} if cases.DEVICE == "cuda" else {})


def pytest_benchmark_update_commit_info(commit_info):
    for key in ("project", "branch"):
        commit_info.pop(key, None)


def pytest_benchmark_update_json(output_json):
    output_json["benchmark"] = "kernels"
    keep = ("min", "max", "mean", "stddev", "median", "q1", "q3", "rounds", "iterations")
    for benchmark in output_json["benchmarks"]:
        # the times of every round would be megabytes
        benchmark["stats"] = {key: benchmark["stats"][key] for key in keep}
        for key in ("fullname", "options", "params", "param"):
            benchmark.pop(key, None)

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
    cpu = machine_info["cpu"]
    machine_info.clear()
    machine_info["cpu"] = {"model": cpu.get("brand_raw", platform.processor()), "cores": os.cpu_count()}
    machine_info["capability"] = torch.backends.cpu.get_cpu_capability()
    if cases.DEVICE == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["python"] = platform.python_version()
    machine_info["torch"] = torch.__version__
    machine_info["spat_kernels"] = spat_kernels.config()


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

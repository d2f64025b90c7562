"""Runs commands of spat-train with faults: `python -m tests.faults.server`, preloaded with the shim.

It has imported everything before the first command, so that a command is a fork of it, and takes a second instead of ten. It
reads a job a line from stdin, as JSON, and answers each with a line.
"""

import atexit
import ctypes
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

FAULTS = ("nothing", "killed", "torn", "full", "broken")  # as shim.c numbers them


def main() -> None:
    preload()
    for line in sys.stdin:
        job = json.loads(line)
        begun, children = time.monotonic(), []
        for rank in range(job["processes"]):
            if not (child := os.fork()):
                end_as(command, job, rank)
            children.append(child)
        codes = wait(children, job)
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - begun}), flush=True)


def end_as(function: Callable, *arguments: object) -> NoReturn:
    """Call it and exit as Python would, but for the destructors of C++, which wait seconds for threads that a fork lacks."""
    code: object = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else bool(code))


def preload() -> None:
    """Import what commands import, also when they need it first."""
    for module in (
        "PIL.Image",
        "safetensors.torch",
        "sklearn.datasets",
        "sklearn.model_selection",
        "spat_train.cli",
        "typeguard",
    ):
        importlib.import_module(module)
    import torch

    import tests.training.helpers  # noqa: F401  (the model)

    torch.set_num_threads(1)


def wait(children: list[int], job: dict) -> list[int | None]:
    """The exit codes of the children, -n for signal n, None for those that hang and are killed.

    The victim is killed in time. As torchrun does, though later, the others get SIGTERM when one has failed: so that they show
    whether they end by themselves.
    """
    codes: dict[int, int | None] = {}
    handles = {os.pidfd_open(child): child for child in children}
    now = time.monotonic()
    due = {name: now + job[name] for name in ("seconds", "timeout") if job[name] is not None}
    while handles:
        for handle in select.select(list(handles), [], [], max(0, min(due.values()) - time.monotonic()))[0]:
            child = handles.pop(handle)
            codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.close(handle)
            if codes[child]:
                due.setdefault("grace", time.monotonic() + job["grace"])
        for name in [name for name, moment in due.items() if time.monotonic() >= moment]:
            due[name] = float("inf")
            doomed = [children[job["victim"]]] if name == "seconds" else list(handles.values())
            for child in {*doomed} - codes.keys():
                os.kill(child, signal.SIGTERM if name == "grace" else signal.SIGKILL)
            if name == "timeout":
                return [codes.get(child) for child in children]
    return [codes[child] for child in children]


def command(job: dict, rank: int) -> None:
    """Be `spat-train` with the arguments of the job."""
    for number, name in ((0, os.devnull), (1, f"{job['output']}.{rank}.out"), (2, f"{job['output']}.{rank}.err")):
        os.dup2(os.open(name, os.O_RDONLY if not number else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if job["processes"] > 1:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"])}
        os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    if job["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    if job["prepare"]:
        function, *arguments = job["prepare"]
        pkgutil.resolve_name(function)(*arguments)
    if job["folder"]:
        fault, number = job["fault"]
        plan = ctypes.CDLL(None).plan_fault
        plan(job["folder"].encode(), f"{job['output']}.{rank}.calls".encode(), FAULTS.index(fault), number)
    from spat_train.__main__ import main as spat_train

    sys.argv = ["spat-train", *job["arguments"]]
    spat_train()


def inject_nan(where: str, step: int) -> None:
    """A NaN at that step of a training: in a pixel, in a weight or in a gradient."""
    import torch

    from spat_train.training.run import Run

    train_on, count = Run.train_on, iter(range(1, 10**6))

    def injected(run, x, y, size):
        hook = None
        if next(count) == step:
            weight = next(run.model.parameters())
            if where == "image":
                x = x.clone()
                x[0, 0, 0, 0] = torch.nan
            elif where == "weight":
                with torch.no_grad():
                    weight.view(-1)[0] = torch.nan
            else:
                hook = weight.register_hook(lambda gradient: gradient * torch.nan)
        train_on(run, x, y, size)
        if hook:
            hook.remove()

    Run.train_on = injected


if __name__ == "__main__":
    main()

"""Runs a target on generated inputs in a child process, so that an input which ends the interpreter is a find like any other.

A target is a hypothesis strategy of inputs and a `trial(input)` that returns "held" or "refused", and raises where a property
does not hold. What a child has seen comes back as counts by outcome, and the shortest input that led to each kind of error.
"""

import json
import mmap
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy

SECONDS = 60  # that a trial may take: a longer one hangs
MEMORY = 6 << 30  # bytes that a child may add to its address space: an input that needs more is a find
ROOM = 1 << 16  # for the input that is being tried


class Target(NamedTuple):
    """Attributes:
    inputs: what is tried. Inputs have a repr that names them.
    trial: returns an outcome, a word; raises where a property does not hold.
    """

    inputs: SearchStrategy
    trial: Callable[[object], str]


class Batch(NamedTuple):
    """Attributes:
    outcomes: how many inputs ended how.
    finds: for each kind of error, the shortest input that led to it.
    """

    outcomes: dict[str, int]
    finds: dict[str, str]


def run(target: Target, examples: int, start: int | None) -> Batch:
    """The outcomes of `examples` inputs in a child process, and the finds. `start`: a seed; None gives the same each time."""
    _warm()
    batch = _in_child(target, examples, start, apart=False)
    if "killed" in batch.outcomes:  # once more, one process an input
        batch = _in_child(target, examples, start, apart=True)
    return batch


@cache
def _warm() -> None:
    """What hypothesis does at its first use takes a second, which children then need not."""
    _settings(3, None)(given(st.text() | st.floats())(lambda value: None))()


def _settings(examples: int, start: int | None) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=start is None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def _in_child(target: Target, examples: int, start: int | None, apart: bool) -> Batch:
    """Fork, and read what the child leaves: its last input in shared memory, its results in a pipe."""
    last, (read, write) = mmap.mmap(-1, ROOM), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            _limit()
            batch = _batch(target, examples, start, last, apart)
            with open(write, "w") as pipe:
                json.dump(batch, pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with open(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text and os.waitstatus_to_exitcode(status) == 0:
        return Batch(*json.loads(text))
    return Batch({"killed": 1}, {_end(status): _noted(last)})


def _limit() -> None:
    with open("/proc/self/statm") as pages:
        size = int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)


def _end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return f"killed: it took more than {SECONDS} s"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"killed: the interpreter ended with {code}"


def _note(last: mmap.mmap, value) -> None:
    text = repr(value).encode(errors="backslashreplace")[: ROOM - 1]
    last[: len(text) + 1] = text + b"\0"


def _noted(last: mmap.mmap) -> str:
    return last[:].split(b"\0")[0].decode(errors="replace")


def _batch(target: Target, examples: int, start: int | None, last: mmap.mmap, apart: bool) -> Batch:
    outcomes: Counter[str] = Counter()
    finds: dict[str, str] = {}

    def one(value):
        _note(last, value)
        signal.setitimer(signal.ITIMER_REAL, 0 if apart else SECONDS)
        try:
            outcomes[_apart(target, value) if apart else target.trial(value)] += 1
        except UnsatisfiedAssumption:
            raise
        except BaseException as error:
            outcomes["found"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = str(error).partition("\n")[0][:300]
            text = f"{type(error).__name__}: {said} ({os.path.basename(where.filename)}, {where.name})"
            kind = re.sub(r"0x[0-9a-f]+|\d+", "#", text)
            finds[kind] = min(finds.get(kind, _noted(last)), _noted(last), key=len)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    test = _settings(examples, start)(given(target.inputs)(one))
    (test if start is None else seed(start)(test))()
    return Batch(dict(outcomes), finds)


def _apart(target: Target, value) -> str:
    """The trial of one input in a process of its own."""
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            target.trial(value)
        finally:
            os._exit(0)  # what it raises, `_batch` finds in other processes
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(_end(status))
    return target.trial(value)


def main() -> None:
    """python -m tests.fuzz.campaign TARGET SECONDS [SEED]: try a target for a while, and print what is found."""
    from tests.fuzz.targets import TARGETS

    name, seconds, start = sys.argv[1], float(sys.argv[2]), int((*sys.argv[3:], 0)[0])
    total: Counter[str] = Counter()
    finds: dict[str, str] = {}
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        batch = run(TARGETS[name], 300, start)
        total.update(batch.outcomes)
        for error, value in batch.finds.items():
            if len(value) < len(finds.get(error, value + " ")):
                finds[error] = value
        start += 1
    for error, value in finds.items():
        print(f"{error}\n    {value}")
    print(name, dict(total), "next seed", start)


if __name__ == "__main__":
    main()

"""Times every provider of every case, after checking that all compute the same.

The providers of a case take turns in PASSES passes of ROUNDS rounds, so that a busy spell of the machine hits all of
them; the report takes each one's best pass.

On the GPU (`--device cuda`) a call is a CUDA graph of many: what is timed is the work on the device and the gap between graph
nodes, not the launches. "warm L2" repeats one working set; "cold L2" takes up to COPIES of them in turn, so that each has left
the cache before its turn comes again. A case's reset is inside its graph, for all providers alike. `host` cases, and rivals
that wait for the GPU, run as plain calls, and so with their launches.
"""

import math
import time
from functools import cache, lru_cache

import pytest
import torch

from benchmarks import cases
from benchmarks.cases import CASES, Case

PASSES, ROUNDS, ROUND_SECONDS = 4, 40, 5e-4
CALLS, COPIES = 32, 256  # least calls in a graph, most working sets


@cache
def copies(case: Case) -> int:
    """Working sets of twice the L2 cache, so that it holds none when its turn comes."""
    return math.ceil(2 * torch.cuda.get_device_properties(0).L2_cache_size / max(case.bytes_held, 1))


def caches(case: Case) -> list[str]:
    if cases.DEVICE == "cpu" or "host" in case.variant:
        return [""]
    return ["warm L2", "cold L2"] if copies(case) <= COPIES else ["warm L2"]


RUNS = [(case, l2, provider, i) for case in CASES for l2 in caches(case) for i in range(PASSES) for provider in case.roles()]

IDS = ["-".join(f"{case.name} {l2} {provider} {i}".split()) for case, l2, provider, i in RUNS]


@cache
def verified(case: Case) -> None:
    case.verify()


def iterations(call, seconds: float) -> int:
    """Calls that fill a round; the clock's own cost must not show in the shortest."""
    for _ in range(3):
        start = clock()
        call()
        elapsed = clock() - start
    return max(1, int(seconds / elapsed))


def clock() -> float:
    """Seconds, when the GPU has done what it was given."""
    if cases.DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@lru_cache(8)  # the passes over one case come one after another
def graphed(case: Case, provider: str, sets: int):
    """A CUDA graph of the provider's calls, in turns on `sets` working sets of its own, and how many calls it holds."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd runs a node on the stream that its leaf was made on
        works = [case.provider(provider) for _ in range(sets)]
        calls = [f for call, reset in works for f in (reset, call) if f] * math.ceil(CALLS / sets)
        for call in calls:
            call()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def replay(works=works):  # nothing else would keep the tensors whose addresses the graph holds
        graph.replay()

    return replay, sets * math.ceil(CALLS / sets)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("case", "l2", "provider", "turn"), RUNS, ids=IDS)
def test_kernel(benchmark, case, l2, provider, turn):
    verified(case)  # a wrong result is not timed
    reset, calls = None, 1
    if l2 and not (case.build and provider in case.work(case.small).synchronise):
        call, calls = graphed(case, provider, copies(case) if l2 == "cold L2" else 1)
        benchmark.extra_info["calls"] = calls
    else:
        call, reset = case.provider(provider)
    benchmark.group = f"{case.name} {l2}".strip()
    benchmark.extra_info |= {"provider": provider, "role": case.roles()[provider], "pass": turn}
    benchmark.extra_info |= {"bytes_moved": case.bytes_moved, "bytes_held": case.bytes_held}

    def setup():  # must return None
        reset()

    # pytest-benchmark allows one call a round where there is a setup
    count = 1 if reset else iterations(call, ROUND_SECONDS)
    benchmark.pedantic(call, setup=reset and setup, rounds=ROUNDS, iterations=count, warmup_rounds=3)

"""Times every provider of every case, after checking that all compute the same.

The providers of a case take turns in PASSES passes of ROUNDS rounds, so that a busy spell of the machine hits all of
them; the report takes each one's best pass.
"""

import time
from functools import cache

import pytest

from benchmarks.cases import CASES, Case

PASSES, ROUNDS, ROUND_SECONDS = 4, 40, 5e-4
RUNS = [(case, provider, i) for case in CASES for i in range(PASSES) for provider in case.roles()]


@cache
def verified(case: Case) -> None:
    case.verify()


def iterations(call, seconds: float) -> int:
    """Calls that fill a round; the clock's own cost must not show in the shortest."""
    for _ in range(3):
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
    return max(1, int(seconds / elapsed))


def run_id(case: Case, provider: str, turn: int) -> str:
    return "-".join(f"{case.name} {provider} {turn}".split())


@pytest.mark.parametrize(("case", "provider", "turn"), RUNS, ids=[run_id(*run) for run in RUNS])
def test_kernel(benchmark, case, provider, turn):
    verified(case)  # a wrong result is not timed
    call, reset = case.provider(provider)
    benchmark.group = case.name
    benchmark.extra_info |= {"provider": provider, "role": case.roles()[provider], "pass": turn}
    benchmark.extra_info |= {"bytes_moved": case.bytes_moved, "bytes_held": case.bytes_held}

    def setup():  # must return None
        reset()

    # pytest-benchmark allows one call a round where there is a setup
    count = 1 if reset else iterations(call, ROUND_SECONDS)
    benchmark.pedantic(call, setup=reset and setup, rounds=ROUNDS, iterations=count, warmup_rounds=3)

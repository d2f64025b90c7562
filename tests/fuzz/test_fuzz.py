"""A small share of the inputs that `python -m benchmarks.fuzz` tries, the same each time."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
from hypothesis import strategies as st

from tests.fuzz import campaign
from tests.fuzz.targets import TARGETS

EXAMPLES = {"ops": 250, "attacks": 80, "attack names": 200, "commands": 4, "options": 300, "sizes": 200, "files": 150}


@pytest.fixture(scope="module")
def fresh():
    """A process in which autograd has not run: PyTorch refuses it in forks of others."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def tried(target: str) -> campaign.Batch:
    return campaign.run(TARGETS[target], EXAMPLES[target], None)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found(fresh, target):
    batch = fresh.submit(tried, target).result()
    assert not batch.finds
    assert {"held", "refused"} & batch.outcomes.keys()


def endless(_):
    while True:
        pass


def aborts(number):
    if number > 40:
        os.abort()
    assert number % 7
    return "held"


def test_finds_what_ends_the_interpreter():
    """And goes on after it, with every input in a process of its own."""
    batch = campaign.run(campaign.Target(st.integers(0, 50), aborts), 40, 0)
    assert {error.partition(":")[0] for error in batch.finds} == {"RuntimeError", "AssertionError"}
    assert any("SIGABRT" in error for error in batch.finds)
    assert batch.outcomes["held"] > 10


def test_finds_what_hangs(monkeypatch):
    monkeypatch.setattr(campaign, "SECONDS", 0.2)
    batch = campaign.run(campaign.Target(st.just(0), endless), 1, 0)
    assert all("it took more than" in error for error in batch.finds)
    assert batch.finds

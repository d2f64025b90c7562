"""Memory stays flat: calls, errors and models leave nothing behind. `python -m benchmarks.leaks` repeats them 10,000 times."""

import pytest
import torch

from benchmarks import leaks

KIB = 2**10
COUNT = 30  # of which 27 are measured
LIMIT = 8 * KIB  # some lists and dicts grow in steps


# malloc keeps freed pieces of every new size: batch sizes are for the command, which can switch that off.
@pytest.mark.parametrize("what", [what for what in (*leaks.CALLS, *leaks.MODELS) if what != "batch sizes"])
def test_nothing_is_left_behind(what, one_thread):
    found = leaks.grown(what, COUNT)
    assert found["heap"] <= LIMIT, found
    assert found["objects"] <= COUNT // 5, found


@pytest.mark.parametrize("leak", [lambda: torch.zeros(200), lambda: [[]]], ids=["memory", "objects"])
def test_a_leak_is_found(leak, monkeypatch):
    kept = []
    monkeypatch.setitem(leaks.CALLS, "leak", lambda: lambda i: kept.append(leak()))
    found = leaks.grown("leak", COUNT)
    assert found["heap"] > LIMIT or found["objects"] > COUNT // 5, found

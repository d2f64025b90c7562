"""The providers of a kernel's case compute the same."""

import pytest
import torch

from benchmarks import cases
from benchmarks.cases import CASES, Case, Work


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_providers_agree(case, device, monkeypatch):
    monkeypatch.setattr(cases, "DEVICE", device)
    case.verify(case.small)


def test_a_wrong_rival_is_caught():
    right = Case("op", (3,), "", lambda shape: Work(lambda: torch.ones(shape), {"rival": lambda: torch.ones(shape)}))
    wrong = Case("op", (3,), "", lambda shape: Work(lambda: torch.ones(shape), {"rival": lambda: torch.zeros(shape)}))
    right.verify()
    with pytest.raises(AssertionError, match="against rival"):
        wrong.verify()


def test_case_names_differ():
    assert len({case.name for case in CASES}) == len(CASES)

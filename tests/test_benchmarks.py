"""The benchmarks race providers that compute the same, and the committed results make a table."""

import json

import pytest
import torch

from benchmarks import report
from benchmarks.cases import CASES, Case, Work


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_providers_agree(case):
    case.verify(case.small)


def test_a_wrong_rival_is_caught():
    right = Case("op", (3,), "", lambda shape: Work(lambda: torch.ones(shape), {"rival": lambda: torch.ones(shape)}))
    wrong = Case("op", (3,), "", lambda shape: Work(lambda: torch.ones(shape), {"rival": lambda: torch.zeros(shape)}))
    right.verify()
    with pytest.raises(AssertionError, match="against rival"):
        wrong.verify()


def test_case_names_differ():
    assert len({case.name for case in CASES}) == len(CASES)


def test_report_renders_the_committed_results():
    results = json.loads(report.RESULTS.read_text())
    table = report.render(results)
    for case in CASES:
        if case.build:
            assert f"| {case.name} |" in table


def test_report_writes_between_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(page, "new")
    assert page.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="has no"):
        report.write(page, "new")

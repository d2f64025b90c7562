"""Results become tables and pages by card. The committed pages pin most tables; here is what they do not show."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import attack, fused, gpu, kernels, microbench, predictions, report, training
from benchmarks.cases import CASES
from tests.benchmarks.results import ATTACK, FUSED, H100, TRAINING

ROOT = report.RESULTS.parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "NOTES.md"]

# --- tables ---

CONV = {"ins": 160, "outs": 160, "size": 32, "kernel": 3, "stride": 1, "padding": 1, "groups": 1}
BF16 = {
    "convolutions, limit 10": [CONV | {"tflops": {"forward": 500.0, "dgrad": "RuntimeError: no"}},
                               CONV | {"stride": 2, "tflops": {"forward": 400.0}}],
    "convolutions, limit 0": [CONV | {"tflops": {"forward": 550.0, "dgrad": 450.0}}],
    "convolutions, limit 0, rest": {"failed": "OutOfMemoryError: {no}"},
}  # fmt: skip
FAILED = {"failed": "RuntimeError: {0} no"}
MICROBENCH = {"machine": H100, "batch": 256, "host_us": FAILED, "graph_nodes": FAILED, "precisions": {"bf16": BF16}}


@pytest.mark.parametrize(
    ("table", "results", "rows"),
    [
        (attack.full_table, ATTACK, ["| wrn-34-10 | bf16 | loop | 256 | 256 | 100.00 | 5% | 10% | 10 | 6.02x | 6.02x |",
                                     "| wrn-34-10 | bf16 | ART | 256 | absent: no module |"]),
        (training.full_table, TRAINING, ["| mart | bf16 | autocast | 0.300 | 426.7 | 3.33x |"]),
        (microbench.table, MICROBENCH, ["| convolution | forward | dgrad | forward, all engines | dgrad, all engines |",
                                        "| 3x3 160->160 /1 @32 | 500 | - | 550 | 450 |", "| 3x3 160->160 /2 @32 | 400 |  |  |  |",
                                        "convolutions, limit 0, rest failed: OutOfMemoryError: {no}.", "RuntimeError: {0} no"]),
        (fused.table, FUSED, ["| dgrad, act | 160@32 | eng2 | 256 | 0.200 | 500 | 0.250 | 0.100 | 1000 | 2.50x |",
                              "| conv | 160@32 | none of 1: no | 256 | 0.200 | 500 | 0.250 |  |  |  |",
                              "| conv | 160@32 | none was built | 256 |"]),
    ],
    ids=lambda value: getattr(value, "__module__", ""),
)  # fmt: skip
def test_tables(table, results, rows):
    text = table(results)
    assert not [row for row in rows if row not in text], text


def test_every_case_is_in_a_committed_table():
    files = [
        json.loads((report.RESULTS / "cpu" / name).read_text())
        for name in ("kernels.json", "head.json", "pma.json", "adt_step.json", "tokens.json")
    ]
    table = "".join(map(kernels.table, files))
    assert not [case.name for case in CASES if case.build and f"| {case.name} |" not in table]


# --- pages ---


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """benchmarks/results with an attack and training on an H100."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    save(tmp_path / "h100" / "attack.json", ATTACK)
    save(tmp_path / "h100" / "training.json", TRAINING)
    save(tmp_path / "h100" / "memory.json", ATTACK | {"benchmark": "attack"})
    return tmp_path


def save(path: Path, results: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results))
    return path


def page(path: Path, *names: str) -> Path:
    path.write_text("".join(f"{name}:\n<!-- benchmarks:{name} -->\nold\n<!-- /benchmarks:{name} -->\n" for name in names))
    return path


def between(path: Path, name: str) -> str:
    return re.search(rf"(?s)<!-- benchmarks:{name} -->\n(.*)\n<!-- /benchmarks:{name} -->", path.read_text())[1]


ALL = "h100:attack", "h100:training", "h100:memory", "h100:predictions", "h200:predictions"


def test_all_results_go_to_pages_that_share_their_markers(results):
    readme = page(results / "README.md", "h100:attack")
    notes = page(results / "NOTES.md", *ALL[1:], "h200:attack")
    report.main([], [readme, notes])
    assert "| wrn-34-10 | spat plan+graph, bf16 | 256 |" in between(readme, "h100:attack")
    assert "| peak MiB |" in between(notes, "h100:memory")
    assert "| 16.6 | 16.6 | 1.00 |" in between(notes, "h100:predictions")
    assert between(notes, "h200:attack") == "Not measured yet."
    assert readme.read_text().startswith("h100:attack:\n<!-- benchmarks:h100:attack -->\n| model |")
    (results / "h100" / "throughput.png").touch()
    with pytest.raises(SystemExit, match="NOTES.md for h100:plots"):
        report.main([], [readme, notes])
    report.main([], [readme, page(results / "NOTES.md", *ALL[1:], "h100:plots")])
    assert between(notes, "h100:plots").startswith("![throughput](results/h100/throughput.png)")


def test_a_result_without_a_marker_is_an_error_and_the_rest_is_written(results):
    notes = page(results / "NOTES.md", *ALL[1:])
    with pytest.raises(SystemExit, match="^there is no marker on .*NOTES.md for h100:attack$"):
        report.main([], [notes])
    assert between(notes, "h100:training").startswith("| method |")
    (results / "empty.md").write_text("<!-- benchmarks:h100:attack --> is never closed")
    with pytest.raises(SystemExit, match="empty.md has no markers"):
        report.main([], [page(results / "NOTES.md", *ALL), results / "empty.md"])
    save(results / "h200" / "attack.json", ATTACK)
    with pytest.raises(SystemExit, match="h200/attack.json: its device is NVIDIA H100 80GB HBM3, not the h200"):
        report.main([], [page(notes, *ALL, "h200:attack")])
    assert between(notes, "h200:attack") == "Not measured yet."


def test_cards(tmp_path):
    machines = [
        ({"machine": H100 | {"device": "NVIDIA H200"}}, "h200"),
        ({"machine": H100 | {"device": "NVIDIA GH200 480GB"}}, "gh200"),
        ({"machine": H100 | {"device": "NVIDIA GeForce RTX 4090"}}, "rtx-4090"),
        ({"machine": H100 | {"device": "Xeon", "cuda": None}}, "cpu"),
        ({"machine_info": {"gpu": H100["device"]}}, "h100"),
    ]
    for results, card in machines:
        path = save(tmp_path / "attack.json", results)
        assert report.load(path, card) == results
        for other in {card for _, card in machines} - {card}:
            with pytest.raises(ValueError, match=f"not the {other} that the folder is for"):
                report.load(path, other)


def test_what_is_no_result_is_named_and_the_rest_printed(results, capsys):
    (results / "h100" / "smoke.json").write_text('{"cells": [')
    save(results / "h100" / "other.json", {"machine": H100})
    with pytest.raises(SystemExit, match="(?s)other.json: not a benchmark's.*smoke.json: it was cut while it was written"):
        report.main([], [])
    assert "h100:attack\n\n| model |" in capsys.readouterr().out
    report.main([save(results / "anywhere" / "attack.json", ATTACK)], [])  # printed whatever its folder
    assert "| wrn-34-10 | bf16 | loop |" in capsys.readouterr().out


def test_the_committed_pages_have_the_committed_results(tmp_path):
    copies = [Path(shutil.copy(path, tmp_path)) for path in PAGES]
    report.main([], copies)
    for path, copy in zip(PAGES, copies, strict=True):
        assert copy.read_text() == path.read_text(), "python -m benchmarks.report --write README.md benchmarks/NOTES.md"


def test_every_card_has_every_marker():
    names = re.findall(r"<!-- benchmarks:(h\d00):(\w+) -->", PAGES[-1].read_text())
    markers = {card: sorted(name for other, name in names if other == card) for card in predictions.PREDICTED}
    tests = {"tests", "triton", "sanitizer"}  # which have no results but their last lines
    steps = {step.name for step in gpu.STEPS} - tests | {"predictions", "plots", "gpu"}
    assert markers["h100"] == markers["h200"] == sorted(steps)

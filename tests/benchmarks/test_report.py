"""Results become tables and pages by card, wherever a file was cut."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import attack, fused, gpu, kernels, microbench, overhead, predictions, report, table61, training
from benchmarks.cases import CASES
from tests.benchmarks.results import ATTACK, COMMITTED, FUSED, H100, TRAINING, committed, cuts

ROOT = report.RESULTS.parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "NOTES.md"]

# --- tables ---


@pytest.mark.parametrize("name", [*COMMITTED, "fused", "training"])
def test_a_cut_file_makes_a_table(name):
    """Or it is said what it lacks: the records themselves."""
    whole = {"fused": FUSED, "training": TRAINING}.get(name) or committed(name)
    made = 0
    for cut in cuts(whole):
        for full in (False, True):
            try:
                assert report.table_of(cut, name.split("/")[-1], full).strip()
                made += 1
            except ValueError as error:
                missing = re.search(r"lacks '(\w+)'$|no table in", str(error))
                assert missing, error
                assert missing[1] not in cut
    assert made > 40


CONV = {"ins": 160, "outs": 160, "size": 32, "kernel": 3, "stride": 1, "padding": 1, "groups": 1}
BF16 = {
    "convolutions, limit 10": [CONV | {"tflops": {"forward": 500.0, "dgrad": "RuntimeError: no"}},
                               CONV | {"stride": 2, "tflops": {"forward": 400.0}}],
    "convolutions, limit 0": [CONV | {"tflops": {"forward": 550.0, "dgrad": 450.0}}],
}  # fmt: skip
MICROBENCH = {
    "machine": H100,
    "batch": 256,
    "host_us": {"add_": 4.0},
    "graph_nodes": {"1 elements": {"node_us": 1, "eager_us": 2}},
}
MICROBENCH |= {"precisions": {"bf16": BF16, "fp32": {"convolutions, limit 10": {"failed": "OutOfMemoryError: {no}"}}}}
STEP = {"seconds": 9.0, "command": "python -m pytest", "tail": "...\n| a |\n"}
GPU = {"machine": H100, "steps": {"tests": STEP | {"status": "cut", "reason": "after 9 s"}}}
ROW = {"title": "MART", "model": "resnet-18", "epochs": 10, "trained": 2.5, "images_per_second": None, "evaluation": {}}
TABLE61 = {"machine": H100, "thesis": [ROW | {"thesis": {"natural": 83.62}, "differs": []}]}

PARTS = {"attack": 0.8, "forward, backward": 0.15, "settle": 0.005, "between": 0.005, "loader": 0.01}
LOOP = {
    "method": "mart",
    "precision": "fp32",
    "step_seconds": 0.99,
    "head_seconds": 0.002,
    "epoch_seconds": 10,
    "steps_per_epoch": 10,
}
OVERHEAD = {"machine": H100, "settings": {"model": "m", "batch": 64, "steps": 10, "images": 640}}
OVERHEAD |= {"loops": [LOOP | {"parts": PARTS | {"optimizer": 0.01, "rest": 0.01}}]}


@pytest.mark.parametrize(
    ("table", "results", "rows"),
    [
        (attack.table, ATTACK, ["| wrn-34-10 | spat plan+graph, bf16 | 256 | 1542 | 16.60 | 30% | 60% | 6.02x (loop) |  |"]),
        (attack.full_table, ATTACK, ["| wrn-34-10 | bf16 | loop | 256 | 256 | 100.00 | 5% | 10% | 10 | 6.02x | 6.02x |",
                                     "| wrn-34-10 | bf16 | ART | 256 | absent: no module |"]),
        (training.table, TRAINING, ["| mart | bf16 | 0.236 | 542.4 | 1.27x (autocast) | 4.24x |",
                                    "wrn-34-10, batch 128, PGD-10. NVIDIA H100 80GB HBM3, 4 threads"]),
        (training.full_table, TRAINING, ["| mart | bf16 | autocast | 0.300 | 426.7 | 3.33x |"]),
        (microbench.table, MICROBENCH, ["| convolution | forward | dgrad | forward, all engines | dgrad, all engines |",
                                        "| 3x3 160->160 /1 @32 | 500 | - | 550 | 450 |", "| 3x3 160->160 /2 @32 | 400 |  |  |  |",
                                        "convolutions, limit 10 failed: OutOfMemoryError: {no}.",
                                        "add_ 4.00. µs a node of a CUDA graph: 1 elements 1.00 (alone 2.00). NVIDIA H100"]),
        (overhead.table, OVERHEAD, ["| mart | fp32 | 1.000 | 80 % | 15 % | 1 % | 4 % | 1 % | 1 % | 0.2 % | 10 |",
                                    "m, batch 64, PGD-10, 640 images"]),
        (gpu.table, GPU, [r"| tests | cut: after 9 s | \| a \| | 9 |"]),
        (table61.table, TABLE61, ["| MART | resnet-18 | 2.50 of 10 |  | 0 |", "|  | thesis: WRN-34-10 | 90 | 83.62 |  |"]),
        (fused.table, FUSED, ["| dgrad, act | 160@32 | eng2 | 256 | 0.200 | 500 | 0.250 | 0.100 | 1000 | 2.50x |",
                              "| conv | 160@32 | none of 1: no | 256 | 0.200 | 500 | 0.250 |  |  |  |",
                              "| conv | 160@32 | none was built | 256 |"]),
    ],
    ids=lambda value: getattr(value, "__module__", ""),
)  # fmt: skip
def test_tables(table, results, rows):
    """What the committed results do not show: see below."""
    text = table(results)
    assert not [row for row in rows if row not in text], text


@pytest.mark.parametrize("key", ["host_us", "graph_nodes", "bf16", "convolutions, limit 10", "convolutions, limit 0"])
def test_a_part_of_microbench_that_failed(key):
    failed = {"failed": "RuntimeError: {0} no"}
    bf16 = failed if key == "bf16" else BF16 | {key: failed}
    results = MICROBENCH | ({key: failed} if key in MICROBENCH else {"precisions": {"bf16": bf16}})
    assert ("RuntimeError: {0} no" in microbench.table(results)) == (key != "graph_nodes")


def test_kernels_table():
    files = [json.loads((report.RESULTS / "cpu" / name).read_text()) for name in ("kernels.json", "head.json")]
    table = "".join(map(kernels.table, files))
    assert not [case.name for case in CASES if case.build and f"| {case.name} |" not in table]
    runs = [run for run in files[0]["benchmarks"] if run["extra_info"]["role"] != "yardstick"]
    assert "has no yardstick" in kernels.table(files[0] | {"benchmarks": runs})


def test_predictions_beside_measurements():
    nothing, table = predictions.table("h100", {}, {}), predictions.table("h100", ATTACK, TRAINING)
    rows = sum(2 * len(ways) for ways in predictions.PREDICTED["h100"].values()) + len(predictions.UPDATE_PARTS)
    assert nothing.count("not yet") == rows == table.count("not yet") + 2
    assert "| wrn-34-10 | spat plan+graph | 256 | 16.6 | 16.6 | 1.00 |" in table
    assert "| wrn-34-10 | an update of mart: 10 x 9.0 + 2 x 1.5 x 9.4 | 128 | 118 | 236 | 2.00 |" in table
    assert "| wrn-34-10 | an update of madry: 10 x 9.0 + 1 x 1.5 x 9.4 | 128 | 104 | not yet |  |" in table
    assert "| wrn-34-10 | an update of trades: 10.5 x 8.5 + 2 x 1.5 x 8.8 | 128 | 116 |" in predictions.table("h200", {}, {})
    for cut in cuts(ATTACK | {"steps": TRAINING["steps"]}):
        assert predictions.table("h200", cut, cut).count("\n") == 2 + 12 + 3 - 1
    other = TRAINING | {"settings": TRAINING["settings"] | {"batch": 64}}
    assert predictions.table("h100", {}, other) == nothing


# --- pages ---


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """benchmarks/results with an attack and training on an H100."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    save(tmp_path / "h100" / "attack.json", ATTACK)
    save(tmp_path / "h100" / "training.json", TRAINING)
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


ALL = "h100:attack", "h100:training", "h100:predictions", "h200:predictions"


def test_all_results_go_to_pages_that_share_their_markers(results):
    readme = page(results / "README.md", "h100:attack")
    notes = page(results / "NOTES.md", *ALL[1:], "h200:attack")
    report.main([], [readme, notes])
    assert "| wrn-34-10 | spat plan+graph, bf16 | 256 |" in between(readme, "h100:attack")
    assert "| 16.6 | 16.6 | 1.00 |" in between(notes, "h100:predictions")
    assert between(notes, "h200:predictions").count("not yet") == 15
    assert between(notes, "h200:attack") == "Not measured yet."
    assert readme.read_text().startswith("h100:attack:\n<!-- benchmarks:h100:attack -->\n| model |")
    (results / "h100" / "throughput.png").touch()
    with pytest.raises(SystemExit, match="NOTES.md for h100:plots"):
        report.main([], [readme, notes])
    report.main([], [readme, page(results / "NOTES.md", *ALL[1:], "h100:plots")])
    assert between(notes, "h100:plots").startswith("![throughput](results/h100/throughput.png)")


def test_a_file_may_name_its_benchmark(results):
    """And the memory of large batches is on the page."""
    save(results / "h100" / "memory.json", ATTACK | {"benchmark": "attack"})
    report.main([], [page(results / "NOTES.md", *ALL, "h100:memory")])
    assert "| peak MiB |" in between(results / "NOTES.md", "h100:memory")


def test_a_result_without_a_marker_is_an_error_and_the_rest_is_written(results):
    notes = page(results / "NOTES.md", *ALL[1:])
    for files in ([], [results / "h100" / "attack.json"]):
        with pytest.raises(SystemExit, match="^there is no marker on .*NOTES.md for h100:attack$"):
            report.main(files, [notes])
    assert between(notes, "h100:training").startswith("| method |")
    (results / "empty.md").write_text("<!-- benchmarks:h100:attack --> is never closed")
    with pytest.raises(SystemExit, match="empty.md has no markers"):
        report.main([], [page(results / "NOTES.md", *ALL), results / "empty.md"])


def test_named_files_leave_other_tables_alone(results):
    notes = page(results / "NOTES.md", "h100:attack", "h100:training", "h200:attack")
    report.main([results / "h100" / "attack.json"], [notes])
    assert between(notes, "h100:attack") != between(notes, "h100:training") == between(notes, "h200:attack") == "old"


@pytest.mark.parametrize("name", ["attack", "kernels"])
def test_results_of_another_card_are_refused(results, name):
    kernels = {"machine_info": {"gpu": H100["device"], "cpu": {"model": "Xeon"}, "threads": 2, "torch": "2.11"}, "benchmarks": []}
    strange = save(results / "h200" / f"{name}.json", kernels if name == "kernels" else ATTACK)
    notes = page(results / "NOTES.md", *ALL, f"h200:{name}")
    for files in ([], [strange]):
        with pytest.raises(SystemExit, match=f"h200/{name}.json: its device is NVIDIA H100 80GB HBM3, not the h200"):
            report.main(files, [notes])
        assert "H100" not in between(notes, f"h200:{name}")
    assert "not yet" in between(notes, "h200:predictions")
    assert "16.6 | 1.00" not in between(notes, "h200:predictions")


@pytest.mark.parametrize(
    ("card", "machine", "fits"),
    [
        ("h200", H100 | {"device": "NVIDIA H200"}, True),
        ("h200", H100 | {"device": "NVIDIA GH200 480GB"}, False),
        ("rtx-4090", H100 | {"device": "NVIDIA GeForce RTX 4090"}, True),
        ("cpu", H100 | {"device": "Xeon", "cuda": None}, True),
        ("cpu", H100, False),
        ("h100", {}, False),
    ],
)
def test_cards(tmp_path, card, machine, fits):
    path = save(tmp_path / "attack.json", ATTACK | {"machine": machine})
    if fits:
        assert report.load(path, card)["cells"] == ATTACK["cells"]
    else:
        with pytest.raises(ValueError, match=f"not the {card} that the folder is for"):
            report.load(path, card)


def test_what_is_no_result_is_named_and_the_rest_printed(results, capsys):
    (results / "h100" / "smoke.json").write_text('{"cells": [')
    save(results / "h100" / "other.json", {"machine": H100})
    with pytest.raises(SystemExit, match="(?s)other.json: not a benchmark's.*smoke.json: it was cut while it was written"):
        report.main([], [])
    assert "h100:attack\n\n| model |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="missing.json: .*No such file"):
        report.main([results / "missing.json"], [])
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

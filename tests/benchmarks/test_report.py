"""Results become tables and pages by card, wherever a file was cut; cuDNN's fused graphs are built, and compared rightly."""

import ctypes
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import fused, report
from benchmarks.cases import CASES

ROOT = report.RESULTS.parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "NOTES.md"]
CPU = {"model": "Xeon", "cores": 16, "flags": ["avx512f"]}
H100 = {"device": "NVIDIA H100 80GB HBM3", "cpu": CPU, "threads": 4, "torch": "2.11", "cuda": "13.0"}
H100 |= {"date": "2026-11-26T00:00:00+00:00", "commit": "c0ffee"}


def cell(model: str, batch: int, provider: str, seconds: float, ours: bool = False, precision: str = "bf16") -> dict:
    record = {"provider": provider, "precision": precision, "ours": ours, "note": "", "status": "timed", "median": seconds}
    return record | {"model": model, "batch": batch, "limit": {"conv": 0.005, "roofline": 0.01}, "peak_mib": 10.0}


ABSENT = {"provider": "ART", "precision": "fp32", "ours": False, "status": "absent", "note": "no module", "model": "m"}
ATTACK = {
    "machine": H100, "settings": {"steps": 10}, "ceilings": {"copy_gbps": 3000.0, "tflops": {"bf16": 800.0}},
    "cells": [cell("wrn-34-10", 256, "spat plan+graph", 0.166, True), cell("wrn-34-10", 256, "loop", 1.0), ABSENT | {"batch": 1}],
}  # fmt: skip
UPDATE = {"precision": "bf16", "note": "", "status": "timed"}
TRAINING = {
    "machine": H100, "settings": {"model": "wrn-34-10", "batch": 128, "steps": 10}, "steps": [
        UPDATE | {"method": "mart", "provider": "spat_train", "ours": True, "median": 0.236},
        UPDATE | {"method": "mart", "provider": "autocast", "ours": False, "median": 0.3},
        UPDATE | {"method": "mart", "provider": "authors", "precision": "fp32", "ours": False, "median": 1.0},
        {"method": "mart", "provider": "compiled", "precision": "bf16", "ours": False, "status": "failed", "note": "no"},
    ],
}  # fmt: skip
BREAKDOWN = {"machine": H100, "precision": "bf16", "breakdown": [
    {"model": "wrn-34-10", "batch": 256, "what": "an attack step", "step_ms": 16.6, "launches": 145.0,
     "kinds": {"convolution": 14.0, "spat": 2.0}, "longest": [{"name": "k", "kind": "spat", "calls": 1.0, "ms": 1.0}]},
    {"model": "resnet-18", "batch": 256, "what": "an update", "step_ms": 1.8, "launches": 89.0, "kinds": {"spat": 3.0}},
]}  # fmt: skip
CONV = {"ins": 160, "outs": 160, "size": 32, "kernel": 3, "stride": 1, "padding": 1, "groups": 1}
QUESTIONS = {
    "machine": H100, "batch": 256, "host_us": {"add_": 4.0}, "graph_nodes": {"1 elements": {"node_us": 1.0, "eager_us": 2.0}},
    "precisions": {
        "bf16": {
            "convolutions, limit 10": [CONV | {"tflops": {"forward": 500.0, "dgrad": "RuntimeError: no"}},
                                       CONV | {"stride": 2, "tflops": {"forward": 400.0}}],
            "convolutions, limit 0": [CONV | {"tflops": {"forward": 550.0, "dgrad": 450.0}}],
        },
        "fp32": {"convolutions, limit 10": {"failed": "OutOfMemoryError: {no}"}},
    },
}  # fmt: skip
TABLE61 = {"machine": H100, "settings": {"jobs": 1}, "thesis": [
    {"row": "mart", "title": "MART", "model": "resnet-18", "epochs": 10, "trained": 10, "images_per_second": 9000.0,
     "evaluation": {"natural": {"accuracy": 80.0, "low": 79.0, "high": 81.0, "images": 10000, "precision": "tf32"}},
     "thesis": {"natural": 83.62}, "differs": ["epochs 10 (90)"], "config": {"model": "resnet-18"}},
    {"row": "mart+spat", "title": "MART+SPAT(.3)", "model": "resnet-18", "epochs": 10, "trained": 2.5, "images_per_second": None,
     "evaluation": {}, "thesis": {"natural": 81.93}, "differs": ["epochs 10 (90)"], "config": {}},
]}  # fmt: skip
GPU = {"machine": H100, "steps": {
    "tests": {"status": "ok", "seconds": 60.2, "command": "python -m pytest tests -m gpu", "tail": "...\n300 passed in 60 s\n"},
    "attack": {"status": "cut", "reason": "after 9 s", "seconds": 9.0, "command": "python -m benchmarks.attack", "tail": "| a |"},
    "fused": {"status": "skipped", "reason": "no cudnn", "seconds": 0.0, "command": "python -m benchmarks.fused", "tail": ""},
}}  # fmt: skip
BEST = {"plan": "eng2_k24=3", "ms": 0.1, "errors": {"out": 0.003}}
FUSED = {"machine": H100, "fused": [
    {"graph": "dgrad, act", "shape": "160@32", "batch": 256, "flops": 10**11, "conv_ms": 0.2, "now_ms": 0.25, "best": BEST,
     "tried": [BEST, {"plan": "eng2_k24=4", "failed": "no"}]},
    {"graph": "conv", "shape": "160@32", "batch": 256, "flops": 10**11, "conv_ms": 0.2, "now_ms": 0.2,
     "tried": [{"plan": "eng41", "failed": "no"}]},
    {"graph": "dgrad", "shape": "160@32", "batch": 256, "flops": 10**11, "conv_ms": 0.2, "now_ms": 0.2, "tried": []},
]}  # fmt: skip
SYNTHETIC = {"attack": ATTACK, "training": TRAINING, "breakdown": BREAKDOWN, "questions": QUESTIONS, "table61": TABLE61}
SYNTHETIC |= {"gpu": GPU, "fused": FUSED}


# --- tables ---


def shortened(value, most: int = 6):
    """The first items of every list."""
    if isinstance(value, dict):
        return {key: shortened(item, most) for key, item in value.items()}
    return [shortened(item, most) for item in value[:most]] if isinstance(value, list) else value


def committed(name: str) -> dict:
    results = json.loads((report.RESULTS / "cpu" / f"{name}.json").read_text())
    if name == "kernels":  # all of a case, and the yardstick in memory
        cases = {"lsce_grad 512x10 alpha=0", next(case.name for case in CASES if "copy" in case.name)}
        results["benchmarks"] = [r for r in results["benchmarks"] if r["group"] in cases and r["extra_info"]["pass"] == 0]
        return results
    return shortened(results)


def cuts(value) -> Iterator:
    """`value`, cut after each part of each of its lists and dicts, and without each key."""
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield value[:n]
            yield from ([*value[:n], cut, *value[n + 1 :]] for cut in cuts(item))
    elif isinstance(value, dict):
        for n, (key, item) in enumerate(value.items()):
            yield dict(list(value.items())[:n])
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: cut} for cut in cuts(item))


COMMITTED = sorted(path.stem for path in (report.RESULTS / "cpu").glob("*.json"))


@pytest.mark.parametrize("name", [*SYNTHETIC, *(f"cpu/{name}" for name in COMMITTED)])
def test_a_cut_file_makes_a_table(name):
    whole = SYNTHETIC[name] if name in SYNTHETIC else committed(name.removeprefix("cpu/"))
    count = 0
    for cut in cuts(whole):
        if cut.keys() & report.KINDS.keys():
            assert all(report.tables(cut, full).strip() for full in (False, True))
            count += 1
        else:
            with pytest.raises(ValueError, match="not a benchmark's"):
                report.tables(cut, False)
    assert count > 20


@pytest.mark.parametrize("key", ["host_us", "graph_nodes", "bf16", "convolutions, limit 10", "convolutions, limit 0"])
def test_questions_that_failed(key):
    failed = {"failed": "RuntimeError: {0} no"}
    bf16 = QUESTIONS["precisions"]["bf16"]
    results = QUESTIONS | {key: failed} if key in QUESTIONS else QUESTIONS | {"precisions": {"bf16": bf16 | {key: failed}}}
    if key == "bf16":
        results = QUESTIONS | {"precisions": {"bf16": failed}}
    assert ("RuntimeError: {0} no" in report.questions(results)) == (key != "graph_nodes")


def test_kernels_table():
    files = [json.loads(path.read_text()) for path in (report.RESULTS / "cpu").glob("*.json")]
    table = "".join(report.kernels(results) for results in files if "benchmarks" in results)
    for case in CASES:
        if case.build:
            assert f"| {case.name} |" in table
    results = committed("kernels")
    results["benchmarks"] = [run for run in results["benchmarks"] if run["extra_info"]["role"] != "yardstick"]
    assert "has no yardstick" in report.kernels(results)


def test_gpu_tables():
    table = report.questions(QUESTIONS)
    assert "| convolution | forward | dgrad | forward, all engines | dgrad, all engines |" in table
    assert "| 3x3 160->160 /1 @32 | 500 | - | 550 | 450 |" in table
    assert "| 3x3 160->160 /2 @32 | 400 |  |  |  |" in table
    assert "convolutions, limit 10 failed: OutOfMemoryError: {no}." in table
    assert "call: add_ 4.00. µs a node of a CUDA graph: 1 elements 1.00 (alone 2.00). NVIDIA H100 80GB HBM3, 4 threads" in table
    table = report.tables(GPU, full=False)
    assert "| tests | ok | 300 passed in 60 s | 60 |" in table
    assert r"| attack | cut: after 9 s | \| a \| | 9 |" in table
    assert "| fused | skipped: no cudnn |  | 0 |" in table
    table = report.fused(FUSED)
    assert "| dgrad, act | 160@32 | eng2 | 256 | 0.200 | 500 | 0.250 | 0.100 | 1000 | 2.50x |" in table
    assert "| conv | 160@32 | none of 1: no | 256 | 0.200 | 500 | 0.200 |  |  |  |" in table
    assert "| dgrad | 160@32 | none was built | 256 |" in table
    table = report.breakdown(BREAKDOWN)
    assert "| batch | in all | convolution | spat | launches |" in table
    assert "| 256 | 1.80 |  | 3.00 | 89 |" in table
    table = report.thesis(TABLE61)
    assert "| MART | resnet-18 | 10 | 80.00 | 9,000 |" in table
    assert "| MART+SPAT(.3) | resnet-18 | 2.50 of 10 |  | 0 |" in table
    assert "|  | thesis: WRN-34-10 | 90 | 81.93 |  |" in table
    assert "MART of resnet-18, MART+SPAT(.3) of resnet-18" in table


def test_predictions_beside_measurements():
    nothing, table = report.predictions("h100", {}, {}), report.predictions("h100", ATTACK, TRAINING)
    rows = sum(2 * len(ways) for ways in report.PREDICTED["h100"].values()) + len(report.UPDATE_PARTS)
    assert nothing.count("not yet") == rows == table.count("not yet") + 2
    assert "| wrn-34-10 | spat plan+graph | 256 | 16.6 | 16.6 | 1.00 |" in table
    assert "| wrn-34-10 | an update of mart: 10 x 9.0 + 2 x 1.5 x 9.4 | 128 | 118 | 236 | 2.00 |" in table
    assert "| wrn-34-10 | an update of madry: 10 x 9.0 + 1 x 1.5 x 9.4 | 128 | 104 | not yet |  |" in table
    assert "| wrn-34-10 | an update of trades: 10.5 x 8.5 + 2 x 1.5 x 8.8 | 128 | 116 |" in report.predictions("h200", {}, {})
    for cut in cuts(ATTACK | {"steps": TRAINING["steps"]}):
        assert report.predictions("h200", cut, cut).count("\n") == 2 + 12 + 3 - 1
    other = TRAINING | {"settings": TRAINING["settings"] | {"batch": 64}}
    assert report.predictions("h100", {}, other) == nothing


# --- pages ---


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """benchmarks/results with an attack and training on an H100."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name in ("attack", "training"):
        save(tmp_path / "h100" / f"{name}.json", SYNTHETIC[name])
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
    with pytest.raises(SystemExit, match="NOTES.md for benchmarks:h100:plots"):
        report.main([], [readme, notes])
    report.main([], [readme, page(results / "NOTES.md", *ALL[1:], "h100:plots")])
    assert between(notes, "h100:plots").startswith("![throughput](results/h100/throughput.png)")


def test_the_memory_of_large_batches_is_on_the_page(results):
    save(results / "h100" / "memory.json", ATTACK)
    report.main([], [page(results / "NOTES.md", *ALL, "h100:memory")])
    assert "| peak MiB |" in between(results / "NOTES.md", "h100:memory")


def test_a_result_without_a_marker_is_an_error_and_the_rest_is_written(results):
    notes = page(results / "NOTES.md", *ALL[1:])
    with pytest.raises(SystemExit, match="^there is no marker on .*NOTES.md for benchmarks:h100:attack$"):
        report.main([], [notes])
    assert between(notes, "h100:training").startswith("| method |")
    with pytest.raises(SystemExit, match="no marker on .*NOTES.md for benchmarks:h100:attack"):
        report.main([results / "h100" / "attack.json"], [notes])
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
    notes = page(results / "NOTES.md", *ALL, "h200", "h200:attack")
    for files in ([], [strange]):
        with pytest.raises(SystemExit, match=f"h200/{name}.json: its device is NVIDIA H100 80GB HBM3, not the h200"):
            report.main(files, [notes])
        assert "H100" not in between(notes, report.marker(strange).removeprefix("benchmarks:"))
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
    assert "benchmarks:h100:attack\n\n| model |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="missing.json: .*No such file"):
        report.main([results / "missing.json"], [])
    report.main([save(results / "anywhere" / "x.json", ATTACK)], [])  # printed whatever its folder
    assert "| wrn-34-10 | bf16 | loop |" in capsys.readouterr().out


def test_the_committed_pages_have_the_committed_results(tmp_path):
    copies = [tmp_path / path.name for path in PAGES]
    for path, copy in zip(PAGES, copies, strict=True):
        copy.write_text(path.read_text())
    report.main([], copies)
    for path, copy in zip(PAGES, copies, strict=True):
        assert copy.read_text() == path.read_text(), "python -m benchmarks.report --write README.md benchmarks/NOTES.md"


def test_every_card_has_every_marker():
    names = re.findall(r"<!-- benchmarks:(h\d00)(:\w+)? -->", PAGES[-1].read_text())
    markers = {card: [name for other, name in names if other == card] for card in report.PREDICTED}
    assert sorted(markers["h100"]) == sorted(markers["h200"])
    steps = {"smoke", "attack", "memory", "breakdown", "training", "overhead", "questions", "fused", "table61", "agreement"}
    assert set(markers["h100"]) == {""} | {f":{name}" for name in steps | {"predictions", "plots", "gpu"}}


# --- cuDNN's fused graphs ---


@pytest.mark.parametrize("name", fused.GRAPHS)
def test_the_plans_own_way_computes_the_graph(name):
    v = fused.inputs(name, 2, "24@8", "cpu")
    expected = fused.reference(name, v)
    convolution, both = fused.planned(name, v)
    assert convolution().shape == v["x" if "x" in v else "dy"].shape
    assert expected.keys() == ({"out", "total"} if "total" in name else {"out"})
    assert fused.agree(fused.errors(both(), expected))
    for key in v.keys() - {"x", "dy"}:  # each input matters
        wrong = fused.reference(name, v | {key: torch.zeros_like(v[key])})
        assert not fused.agree(fused.errors(wrong, expected))


@pytest.mark.slow
def test_fused_plans_are_built(tmp_path, monkeypatch, capsys):
    pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend", exc_type=ImportError)
    if torch.cuda.is_available() and not any(card in torch.cuda.get_device_name().lower() for card in fused.CARDS):
        pytest.skip("the GPU is neither an H100 nor an H200")
    monkeypatch.setattr(fused, "TILES", (3,))
    monkeypatch.setattr(fused, "PROPOSED", range(1))
    graphs = ["conv, bias, relu", "dgrad, residual, act"]
    fused.main(fused.Options("build", plans=tmp_path, shapes=["64@32"], graphs=graphs, batch=128, jobs=1))
    assert capsys.readouterr().out == "".join(f"64@32 {name}: 1 built\n" for name in graphs)
    plans = {path: path.read_bytes().split(b"\n")[0].split(b"_")[0] for path in tmp_path.rglob("*.plan")}
    assert sorted(plans.values()) == [b"eng2", b"eng41"]
    assert {fused.build(graphs[0], 128, "64@32", "h100", 0, path) for path in plans} == {"there"}


def test_fused_options(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--graphs 'pool': choose from 'conv'"):
        fused.main(fused.Options("build", graphs=["pool"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU here"):
        fused.main(fused.Options("both"))
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(SystemExit, match="pip install --no-deps nvidia-cudnn-frontend==1.15.0"):
        fused.main(fused.Options("build", plans=tmp_path))


def test_plans_that_are_wrong_or_fail_are_not_timed(tmp_path, monkeypatch):
    name = "conv, residual, total, scale, shift, relu"
    v = fused.inputs(name, 2, "24@8", "cpu")
    expected = fused.reference(name, v)

    class Graph:
        def __init__(self, handle):
            assert handle == "handle"

        def deserialize(self, handle, plan):
            self.plan = bytes(plan)

        def get_workspace_size(self):
            return 0

        def execute(self, pointers, work, handle):
            if self.plan == b"fails":
                raise RuntimeError("no such engine")
            assert {key: pointers[fused.UIDS[key]] for key in v} == {key: value.data_ptr() for key, value in v.items()}
            for key in ("out",) if self.plan == b"half" else ("out", "total"):
                result = expected[key].bfloat16()
                ctypes.memmove(pointers[fused.UIDS[key]], result.data_ptr(), 2 * result.numel())

    monkeypatch.setattr(fused, "cudnn", lambda: SimpleNamespace(pygraph=Graph))
    monkeypatch.setattr(fused, "ms", lambda call: 0.5)
    found = {}
    for plan in (b"right", b"half", b"fails"):
        (tmp_path / "a.plan").write_bytes(b"eng2_k24=3\n" + plan)
        found[plan] = fused.timed("handle", tmp_path / "a.plan", v, expected)
    assert found[b"right"]["ms"] == 0.5
    assert found[b"right"]["errors"].keys() == {"out", "total"}
    assert found[b"half"]["failed"] == "differs from the reference"
    assert "ms" not in found[b"half"]
    assert found[b"fails"] == {"plan": "eng2_k24=3", "failed": "RuntimeError: no such engine"}


def test_rows_are_written_one_by_one_and_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def measured(o, handle, name, shape):
        asked.append((name, shape))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return FUSED["fused"][0] | {"graph": name, "shape": shape}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(fused, "cudnn", lambda: SimpleNamespace(create_handle=lambda: "handle", set_stream=lambda *_: None))
    monkeypatch.setattr(fused.measure, "describe", lambda device: H100 | {"device": "NVIDIA H200"})
    monkeypatch.setattr(fused, "measured", measured)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    options = fused.Options("time", tmp_path / "fused.json", tmp_path, shapes=["160@32"], graphs=["conv", "dgrad", "dgrad, act"])
    unplanned = FUSED["fused"][0] | {"graph": "dgrad", "shape": "160@32", "tried": []}
    save(options.out, {"machine": H100 | {"device": "NVIDIA H200"}, "fused": [unplanned]})
    with pytest.raises(KeyboardInterrupt):
        fused.main(options)
    assert options.card == "h200"
    assert [row["graph"] for row in json.loads(options.out.read_text())["fused"]] == ["conv"]
    fused.main(options)
    assert [name for name, _ in asked] == ["conv", "dgrad", "dgrad", "dgrad, act"]
    assert [row["graph"] for row in json.loads(options.out.read_text())["fused"]] == options.graphs

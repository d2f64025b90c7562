"""The benchmarks race providers that compute the same, what breaks is recorded, and the results make tables and pictures."""

import json
import multiprocessing
import subprocess
import sys

import pytest
import torch

from benchmarks import attack, gpu_suite, measure, plots, report, workmodel
from benchmarks.attack import Judge, Provider, calibrated, photographs, plain_loop
from benchmarks.cases import CASES, Case, Work
from spat_train.models import create


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
    results = json.loads((report.RESULTS / "cpu" / "kernels.json").read_text())
    table = report.kernels(results)
    for case in CASES:
        if case.build:
            assert f"| {case.name} |" in table


def test_report_writes_between_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- name -->\nold\n<!-- /name -->\nafter\n")
    assert report.write(page, "name", "new") and not report.write(page, "other", "new")
    assert page.read_text() == "before\n<!-- name -->\nnew\n<!-- /name -->\nafter\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="has no markers"):
        report.main([], page)


def test_committed_results_are_on_a_page_as_they_are(tmp_path):
    root = report.RESULTS.parent.parent
    pages = {path: path.read_text() for path in (root / "README.md", root / "benchmarks" / "NOTES.md")}
    for results in report.RESULTS.glob("*/*.json"):
        assert any(f"<!-- {report.marker(results)} -->" in text for text in pages.values())
    for path, text in pages.items():
        copy = tmp_path / path.name
        copy.write_text(text)
        report.main([], copy)
        assert copy.read_text() == text, f"python -m benchmarks.report --write {path.name}"


# --- attacks ---


@pytest.fixture(scope="module")
def judge() -> Judge:
    x = photographs(24, 32)
    model = calibrated("wrn-10-1", x)
    return Judge(model, x, model(x).argmax(1).detach(), steps=4)


def provider(build, name="provider", ours=False) -> Provider:
    return Provider(name, "fp32", build, ours)


BROKEN = {
    "does nothing": lambda model: lambda x, y: x.clone(),
    "only starts at random": lambda model: plain_loop(model, 0),
    "stops halfway": lambda model: plain_loop(model, 2),
    "helps the model": lambda model: lambda x, y: plain_loop(model, 4)(x, (y + 1) % 10),
    "leaves the ball": lambda model: lambda x, y: (plain_loop(model, 4)(x, y) + 0.01).clamp(0, 1),
    "leaves the box": lambda model: lambda x, y: plain_loop(model, 4)(x, y) * 1.0 + 1e-3,
    "is not finite": lambda model: lambda x, y: x * torch.nan,
    "loses images": lambda model: lambda x, y: x[:-1],
}


@pytest.mark.parametrize("build", BROKEN.values(), ids=BROKEN)
def test_a_broken_attack_is_never_timed(judge, build):
    (record,) = attack.compete([provider(build)], judge, judge.x, judge.y, "cpu", 0.0)
    assert record["status"] == "disagrees" and "median" not in record and "disagrees" in record["note"]


def test_what_raises_or_is_missing_is_recorded_and_the_rest_timed(judge):
    def missing(model):
        raise ImportError("no such package")

    def fails(model):
        return lambda x, y: model(x[:, :1])

    chosen = [provider(missing), provider(fails), provider(lambda model: plain_loop(model, 4))]
    records = attack.compete(chosen, judge, judge.x, judge.y, "cpu", 0.0)
    assert [record["status"] for record in records] == ["absent", "failed", "timed"]
    assert len(records[2]["seconds"]) >= measure.ROUNDS[0] and records[2]["min"] <= records[2]["median"]


def test_one_that_fails_during_the_race_is_timed_no_further():
    calls = {"good": lambda: None, "bad": lambda: 1 / 0}
    times, errors = measure.race(calls, "cpu", 0.0)
    assert list(times) == ["good"] and "ZeroDivisionError" in errors["bad"]


@pytest.fixture(scope="module")
def results() -> dict:
    """A small matrix, of whatever is installed; compiled models are for the machines that race them."""
    names = ["spat eager", "spat plan", "loop", "torchattacks", "foolbox", "ART", "autocast loop"]
    options = attack.Options(["wrn-10-1"], [16], ["fp32", "bf16"], names, "cpu", 3, 0.0, memory=False, small_ceilings=True)
    (result,) = attack.run(options)
    return json.loads(json.dumps(result))


def test_matrix(results):
    status = {(r["provider"], r["precision"]): r["status"] for r in results["cells"]}
    assert status["loop", "fp32"] == status["autocast loop", "bf16"] == "timed"
    assert "disagrees" not in status.values(), [r["note"] for r in results["cells"]]
    assert {"spat eager", "spat plan", "torchattacks", "foolbox", "ART"} <= {name for name, _ in status}
    assert results["machine"]["torch"] == torch.__version__


def test_attack_tables(results, tmp_path):
    ours = {"provider": "spat plan", "precision": "bf16", "ours": True, "status": "timed", "median": 0.25, "limit": {}}
    slower = {"provider": "loop", "precision": "bf16", "ours": False, "status": "timed", "median": 0.5, "limit": {}}
    absent = {"provider": "ART", "precision": "fp32", "ours": False, "status": "absent", "note": "no module"}
    cells = [r | {"model": "m", "batch": 100} for r in (ours, slower, absent)]
    for record in cells:
        record["limit"] = {"conv": 0.005, "roofline": 0.01}
    made_up = results | {"cells": cells, "settings": results["settings"] | {"steps": 10}}
    assert "| m | bf16 | loop | 100 | 200 | 50.00 | 10% | 20% |  | 2.00x | 2.00x |" in report.attack_table(made_up)
    assert "| m | fp32 | ART | 100 | absent: no module |" in report.attack_table(made_up)
    file = tmp_path / "cpu" / "attack.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"stage": "attack", "results": made_up}))
    page = tmp_path / "README.md"
    page.write_text("<!-- benchmarks:cpu:attack -->\n<!-- /benchmarks:cpu:attack -->")
    report.main([file], page)
    assert "| m | spat plan, bf16 | 100 | 400 | 25.00 | 20% | 40% | 2.00x (loop) |  |" in page.read_text()


def test_plots(results, tmp_path):
    plots.throughput(results, tmp_path / "throughput.png")
    plots.roofline(results, tmp_path / "roofline.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("throughput.png", "roofline.png"))


def test_resident_growth_counts_what_a_call_holds():
    cell = "wrn-10-1", 32, 64, "loop", "fp32", 1, 1
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        growth = pool.apply(attack.resident_growth, cell)
    # autograd keeps every convolution's and BatchNorm's input: for the first group alone 9 of [64, 16, 32, 32] in fp32
    assert 9 * 4 < growth < 200


# --- the work model ---


@pytest.mark.parametrize(
    ("name", "size", "gflop"),
    [("wrn-34-10", 32, 13.3), ("wrn-28-10", 32, 10.5), ("resnet-18", 32, 1.11), ("resnet-50", 32, 2.6), ("resnet-18", 96, 10.0)],
)
def test_work_model_counts_the_operations_of_public_models(name, size, gflop):
    if name.startswith("resnet"):
        pytest.importorskip("torchvision", reason="needs torchvision", exc_type=Exception)
    with torch.device("meta"):
        layers = workmodel.layers(create(name), (3, size, size))
    for direction in ("forward", "backward"):
        flops = sum(getattr(layer, direction).flops for layer in layers)
        assert 1e-9 * flops == pytest.approx(gflop, rel=0.006)


def test_work_model_bytes():
    """conv, BatchNorm, ReLU, conv with a residual: by hand, for 2 channels of 8x8 = 128 values."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = (torch.nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(3))
            self.bn = torch.nn.BatchNorm2d(2)

        def forward(self, x):
            x = self.conv1(x)
            return self.conv3(torch.relu(x + self.conv2(torch.relu(self.bn(x))))).mean((2, 3))

    layers = {layer.name: layer for layer in workmodel.layers(Block(), (2, 8, 8))}
    conv, *pointwise = (layer for layer in layers.values())
    assert conv.forward == workmodel.Pass(flops=2 * 128 * 18, values=256, weights=36)
    # x is read by BatchNorm and addition, so BatchNorm is not folded and x's gradient comes in two parts
    kernels = {name: layer for name, layer in layers.items() if layer.kind == "pointwise"}
    first, second = kernels["pointwise native_batch_norm+relu"], kernels["pointwise add+relu"]
    assert first.forward == first.backward == workmodel.Pass(values=256, bits=128)
    assert second.forward == workmodel.Pass(values=3 * 128, bits=128)
    assert second.backward == workmodel.Pass(values=2 * 128, bits=128)
    assert layers["step"].backward.bytes(3, 2) == 3 * 128 * 16


def test_limits():
    work = workmodel.Work([workmodel.Layer("a", "conv", workmodel.Pass(10, 1, 0, 5), workmodel.Pass(2, 4))], 100, "bf16")
    limits = work.limits({"tflops": {"bf16": 1e-12}, "copy_gbps": 1e-9})
    assert limits == {"conv": 1200, "roofline": 1000 + 800}
    assert (work.flops, work.bytes) == (1200, 210 + 800)


# --- the GPU suite ---


def test_suite_records_failures_and_timeouts(tmp_path):
    python = [sys.executable, "-c"]
    script = "import sys, time; open(sys.argv[1], 'w').write('{\"a\": 1}'); print('so far'); sys.stdout.flush(); time.sleep(60)"
    slow = gpu_suite.run(gpu_suite.Stage("slow", 1, [[*python, script, "RESULT"]]), tmp_path, 5)
    assert (slow["status"], slow["results"]) == ("timed out", {"a": 1}) and slow["seconds"] < 30
    failing = [[*python, "print('why'); raise SystemExit(3)"], [*python, "print('the next still runs')"]]
    failed = gpu_suite.run(gpu_suite.Stage("failed", 1, failing), tmp_path, 30)
    assert failed["status"] == "failed" and [c["exit"] for c in failed["commands"]] == [3, 0]
    assert "why" in failed["commands"][0]["tail"] and "so far" in slow["commands"][0]["tail"]
    absent = gpu_suite.run(gpu_suite.Stage("absent", 1, [], needs="no-such-program"), tmp_path, 30)
    assert absent["status"] == "skipped" and "no-such-program" in absent["reason"]


@pytest.mark.slow
def test_suite_rehearsal(tmp_path):
    suite = [sys.executable, "-m", "benchmarks.gpu_suite", "--rehearse", "--minutes", "20", "--out", str(tmp_path)]
    subprocess.run(suite, check=True, cwd=measure.ROOT)
    stages = {stage["stage"]: stage for stage in json.loads((tmp_path / "suite.json").read_text())["stages"]}
    for name in ("ceilings", "kernels", "questions", "attack", "memory"):
        assert stages[name]["status"] == "ok" and json.loads((tmp_path / f"{name}.json").read_text())["results"]
    if not torch.cuda.is_available():
        assert stages["tests"] | {"seconds": 0} == {"stage": "tests", "status": "skipped", "reason": "no GPU", "seconds": 0}
    assert len(list(tmp_path.iterdir())) <= 8  # as many as come back from a lent machine

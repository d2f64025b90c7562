"""The benchmarks race providers that compute the same, what breaks is recorded, and the results make tables and pictures."""

import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import attack, breakdown, cases, data, gpu_suite, measure, overhead, plots, report, table61, training, workmodel
from benchmarks.attack import Judge, Provider, calibrated, photographs, plain_loop
from benchmarks.cases import CASES, Case, Work
from benchmarks.training import Authors
from spat_train.images import Images
from spat_train.models import create


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


def test_report_renders_the_committed_results():
    files = (json.loads(path.read_text()) for path in (report.RESULTS / "cpu").glob("*.json"))
    table = "".join(report.kernels(results) for results in files if "benchmarks" in results)
    for case in CASES:
        if case.build:
            assert f"| {case.name} |" in table


def test_report_of_a_run_that_ended_before_its_end():
    results = json.loads((report.RESULTS / "cpu" / "kernels.json").read_text())
    results["benchmarks"] = [run for run in results["benchmarks"] if run["extra_info"]["role"] != "yardstick"]
    assert "has no yardstick" in report.kernels(results)
    machine = measure.describe("cpu")
    failed = {"machine": machine, "batch": 2, "precision": "bf16", "host_us": {"failed": "RuntimeError: no"}}
    assert "failed RuntimeError: no" in report.questions(failed)


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


# --- training ---


@pytest.mark.parametrize("method", training.METHODS)
def test_the_trainers_step_is_the_authors(method):
    training.verify(method, "cpu", count=8)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("outer_loss", lambda outer: lambda *args: 1.001 * outer(*args)),
        ("inner_loss", lambda inner: lambda *args: -inner(*args)),
        ("ascend", lambda ascend: lambda x, start, steps, gradient: ascend(x, start, steps - 1, gradient)),
    ],
)
def test_a_wrong_training_loop_is_caught(monkeypatch, name, wrong):
    monkeypatch.setattr(training, name, wrong(getattr(training, name)))
    with pytest.raises(AssertionError, match="mart differs"):
        training.verify("mart", "cpu", count=8)


class Impatient(Authors):
    """Trains on clean images."""

    def examples(self, x, y, start):
        return x


@pytest.fixture(scope="module")
def updates() -> dict:
    options = training.Options("wrn-10-1", 32, ["trades"], ["fp32", "bf16"], ["spat_train", "authors", "autocast"], "cpu", 2, 0.0)
    (results,) = options.run()
    return json.loads(json.dumps(results))


def test_training_race(updates):
    status = {(r["provider"], r["precision"]): (r["status"], r["note"]) for r in updates["steps"]}
    expected = {("spat_train", "fp32"), ("spat_train", "bf16"), ("authors", "fp32"), ("autocast", "bf16")}
    assert status.keys() == expected and {s for s, _ in status.values()} == {"timed"}, status
    assert updates["settings"] == {"model": "wrn-10-1", "batch": 32, "steps": 2}
    table = report.training_table(updates)
    assert table.count("| trades |") == 4 and ("no amx_bf16" in table) == ("amx_bf16" not in updates["machine"]["cpu"]["flags"])


def test_what_trains_otherwise_is_not_timed(monkeypatch):
    def missing(model, method):
        raise RuntimeError("no such engine")

    wrong = [("lazy", lambda model, method: Impatient(model, method, 4)), ("missing", missing)]
    monkeypatch.setattr(training, "providers", lambda options: [training.Provider(name, "fp32", build) for name, build in wrong])
    monkeypatch.setattr(training, "verify", lambda *args: None)
    lazy, broken = training.Options("wrn-10-1", 32, device="cpu", steps=4, seconds=0.0).race("madry")
    assert (lazy["status"], broken["status"]) == ("disagrees", "failed") and "no such engine" in broken["note"]


def test_training_tables(updates):
    times = {("spat_train", "fp32"): 4.0, ("spat_train", "bf16"): 1.0, ("authors", "fp32"): 6.0, ("autocast", "bf16"): 1.5}
    steps = [r | {"median": times[r["provider"], r["precision"]]} for r in updates["steps"]]
    page, full = report.training(updates | {"steps": steps}), report.training_table(updates | {"steps": steps})
    assert "| trades | fp32 | 4.000 | 8.0 | 1.50x (authors) | 1.50x |" in page
    assert "| trades | bf16 | 1.000 | 32.0 | 1.50x (autocast) | 6.00x |" in page and "wrn-10-1, batch 32, PGD-2" in page
    assert "| trades | bf16 | autocast | 1.500 | 21.3 | 4.00x |" in full


def random_images(count: int) -> Images:
    return Images(torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8), torch.arange(count) % 10)


def test_overhead_accounts_for_all_of_a_step(tmp_path):
    config = training.settings("wrn-10-1", 8, "mart", "fp32", "cpu", 1, log_every=2)
    found = overhead.run_for(config, random_images(64), tmp_path, warm_up=1, updates=4)
    parts = found["parts"]
    assert parts.keys() == {"attack", "forward, backward", "optimizer", "loader", "settle", "between", "rest"}
    assert sum(parts.values()) == pytest.approx(found["step_seconds"]) and min(parts.values()) > 0
    assert found["steps_per_epoch"] == 8 and (tmp_path / "last.pt").exists()
    assert found["epoch_seconds"] > 8 * found["step_seconds"] + found["epoch_parts"]["save"]
    assert 0 < found["head_seconds"] < found["step_seconds"]
    with pytest.raises(ValueError, match="no 2001 steps"):
        overhead.run_for(
            training.settings("wrn-10-1", 8, "mart", "fp32", "cpu", 1, epochs=1), random_images(8), tmp_path / "b", 1, 1999
        )


def test_overhead_table():
    parts = {
        "attack": 0.8,
        "forward, backward": 0.15,
        "optimizer": 0.01,
        "loader": 0.01,
        "settle": 0.005,
        "between": 0.005,
        "rest": 0.01,
    }
    loop = {"method": "mart", "precision": "fp32", "step_seconds": 0.99, "parts": parts, "head_seconds": 0.002}
    settings = {"model": "m", "batch": 64, "steps": 10, "images": 640}
    results = {
        "machine": measure.describe("cpu"),
        "settings": settings,
        "loops": [loop | {"epoch_seconds": 10, "steps_per_epoch": 10}],
    }
    row = "| mart | fp32 | 1.000 | 80 % | 15 % | 1 % | 4 % | 1 % | 1 % | 0.2 % | 10 |"
    assert row in report.overhead(results) and "m, batch 64, PGD-10, 640 images" in report.overhead(results)


def test_breakdown_accounts_for_a_call():
    torch.manual_seed(0)
    a, b = torch.randn(2, 300, 300), torch.randn(300, 300)
    found = breakdown.taken_apart(lambda: [(a @ b).relu_() for _ in range(4)], "cpu", steps=4, seconds=0.01)
    kernels = {k["name"]: (k["kind"], k["calls"]) for k in found["longest"]}
    assert kernels["aten::mm"] == ("matrix product", 1) and kernels["aten::clamp_min_"] == ("pointwise", 1)
    assert min(found["kinds"]["matrix product"], found["kinds"]["pointwise"], found["step_ms"]) > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void spat::(anonymous namespace)::linf_step_kernel<float, float, 4>(spat::Step)", "spat"),
        ("void at::native::(anonymous namespace)::dispatched_kernel<float>", "other"),
        ("void at::native::batch_norm_backward_elemt_channels_last_kernel<4, c10::BFloat16>", "batch norm"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>", "batch norm"),
        ("scale_shift_relu_grad_kernel", "spat"),
        ("pool_linear_grad_kernel", "spat"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>", "layout"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("sm80_xmma_dgrad_implicit_gemm_indexed_tf32f32", "convolution"),
        ("nvjet_hsh_64x8_64x16_1x2_h_bz_TNT", "matrix product"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "pointwise"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimiser"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert breakdown.kind_of(name) == kind


def test_annotations_are_no_kernels(monkeypatch):
    """CUPTI tells of an optimiser's step, on the device too, beside the kernels in it."""
    span = SimpleNamespace(start=3000.0, elapsed_us=lambda: 500.0)

    def event(name: str, device: DeviceType, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=span)

    cuda, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [event("kernel", cuda), event("Optimizer.step#SGD.step", cuda, True), event("cudaGraphLaunch", cpu)]
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(breakdown, "profile", lambda activities: nullcontext(profiler))
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    assert breakdown.spans(lambda: None, "cuda") == [("kernel", 3.0, 0.5)]


def test_busy_time_counts_overlaps_once():
    assert breakdown.busy([("a", 0.0, 2.0), ("b", 1.0, 2.0), ("c", 10.0, 1.0), ("d", 10.2, 0.5)]) == 4.0


def test_data_paths(tmp_path, capsys):
    pytest.importorskip("torchvision", reason="needs torchvision", exc_type=Exception)
    out = tmp_path / "data.json"
    data.main(data.Options(images=200, batch=64, workers=1, device="cpu", seconds=0.0, out=out))
    results = json.loads(out.read_text())
    assert [path["provider"] for path in results["paths"]][::2] == ["spat_train", "torchvision, 1 workers"]
    assert "200 random images, batch 64, pad 4" in capsys.readouterr().out


def test_wrong_crops_are_caught():
    images = Images(random_images(64).pixels, torch.arange(64))
    x = images.pixels.movedim(3, 1) / 255
    with pytest.raises(AssertionError, match="hardly differ"):
        data.verify(lambda: iter([(x, images.labels)]), images)
    with pytest.raises(AssertionError, match="no crops"):
        data.verify(lambda: iter([(x.roll(3, 2), images.labels)]), images)


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


def python(script: str, *arguments: str) -> str:
    return shlex.join(["PYTHON", "-c", script, *arguments])


def test_suite_records_failures_and_timeouts(tmp_path):
    script = "import sys, time; open(sys.argv[1], 'w').write('{\"a\": 1}'); print('so far'); sys.stdout.flush(); time.sleep(60)"
    slow = gpu_suite.run(gpu_suite.Stage("slow", 1, [python(script, "RESULT")]), tmp_path, 5)
    assert (slow["status"], slow["results"]) == ("timed out", {"a": 1}) and slow["seconds"] < 30
    failing = [python("print('why'); raise SystemExit(3)"), python("print('the next still runs')")]
    failed = gpu_suite.run(gpu_suite.Stage("failed", 1, failing), tmp_path, 30)
    assert failed["status"] == "failed" and [c["exit"] for c in failed["commands"]] == [3, 0]
    assert "the next still runs" in report.tables(failed, full=False)
    script = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    two = gpu_suite.run(gpu_suite.Stage("two", 1, [python(script, "RESULT", text) for text in ("1", "[2]")]), tmp_path, 30)
    assert (two["status"], two["results"]) == ("ok", [1, [2]])
    assert "why" in failed["commands"][0]["tail"] and "so far" in slow["commands"][0]["tail"]
    test = tmp_path / "test_slow.py"
    test.write_text("import time\ndef test_bad(): assert 0, 'it failed'\ndef test_slow(): time.sleep(60)")
    cut = gpu_suite.run(gpu_suite.Stage("cut", 1, [f"{gpu_suite.PYTEST} {test}"]), tmp_path, 10)
    assert cut["status"] == "timed out" and "it failed" in cut["commands"][0]["tail"] and cut["seconds"] < 30
    absent = gpu_suite.run(gpu_suite.Stage("absent", 1, [], needs="no-such-program"), tmp_path, 30)
    assert absent["status"] == "skipped" and "no-such-program" in absent["reason"]
    lacking = gpu_suite.run(gpu_suite.Stage("lacking", 1, [python(script, "DATA")]), tmp_path, 30)
    assert (lacking["status"], lacking["reason"]) == ("skipped", "no --data")


@pytest.fixture
def tiny_npz(tmp_path) -> Path:
    path = tmp_path / "tiny.npz"
    images = random_images(120)
    np.savez(path, x_train=images.pixels, y_train=images.labels, x_test=images.pixels[:20], y_test=images.labels[:20])
    return path


@pytest.mark.slow
def test_suite_rehearsal(tmp_path, tiny_npz):
    """All stages, in two commands into one folder; every result has a table."""
    out = tmp_path / "out"
    suite = [sys.executable, "-m", "benchmarks.gpu_suite", "--rehearse", "--minutes", "20", "--out", str(out)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not this run's -n
    names = [stage.name for stage in gpu_suite.stages(rehearse=True)]
    for part in (["--data", str(tiny_npz), "--stages", *names[:3]], ["--stages", *names[3:]]):
        subprocess.run([*suite, *part], check=True, cwd=measure.ROOT, env=own)
    summary = json.loads((out / "suite.json").read_text())
    status = {stage["stage"]: stage["status"] for stage in summary["stages"]}
    assert list(status) == names and "| attack | ok |" in report.tables(summary, full=False)
    for name, count in (("agreement", 0), ("kernels", 0), ("training", 3), ("questions", 2), ("attack", 0), ("memory", 0)):
        results = json.loads((out / f"{name}.json").read_text())["results"]
        assert status[name] == "ok" and (len(results) == count if count else isinstance(results, dict))
        assert report.tables(results, full=True) and report.tables(results, full=False)
    if not torch.cuda.is_available():
        assert status["tests"] == status["sanitizer"] == "skipped"
    assert "WRN-34-10, batch 256" in report.predictions(out)


def test_predictions_beside_measurements(tmp_path):
    assert report.predictions(tmp_path).count("not yet") == len(report.PREDICTIONS)
    cell = {"model": "wrn-34-10", "batch": 256, "precision": "bf16", "provider": "spat plan+graph", "status": "timed"}
    attack = {"cells": [cell | {"median": 0.306}], "settings": {"steps": 20}}
    (tmp_path / "attack.json").write_text(json.dumps({"stage": "attack", "results": attack}))
    loop = {"method": "madry", "precision": "bf16", "epoch_seconds": 70, "epoch_parts": {"save": 1.4}, "head_seconds": 0}
    (tmp_path / "training.json").write_text(
        json.dumps({"results": [{"loops": [loop], "settings": {"model": "wrn-34-10"}}, None]})
    )
    table = report.predictions(tmp_path)
    assert "| ... this plan under a CUDA graph | 15.3 | 15.3 | 1.00 |" in table
    assert "s an epoch of Madry | 35 | 70 | 2.00 |" in table and "checkpoint takes | 4 | 2 | 0.50 |" in table


# --- Table 6.1 ---


@pytest.mark.slow
def test_table61(tmp_path, tiny_npz, monkeypatch):
    """A row is trained and tested, another is cut short; a later command adds to the file, and repeats nothing."""
    out = tmp_path / "table61.json"

    def run(*rows: str, **options) -> list[dict]:
        small = {"model": "small-cnn", "epochs": 1, "precision": "fp32", "autoattack_images": 4, "queries": 5, "jobs": 2}
        table61.main(table61.Arguments(tiny_npz, out, tmp_path / "runs", list(rows), **small | options))
        return json.loads(out.read_text())["thesis"]

    (row,) = run("mart+spat")
    assert row["title"] == "MART+SPAT(.3)" and "epochs 1 (90)" in row["differs"] and len(row["validations"]) == 1
    assert {name: e["images"] for name, e in row["evaluation"].items()} == dict.fromkeys(row["thesis"], 20) | {"AutoAttack": 4}
    assert row["evaluation"]["PGD-20"]["accuracy"] <= row["evaluation"]["natural"]["accuracy"]
    assert row["thesis"]["natural"] == 81.93
    (tmp_path / "runs" / "small-cnn-mart+spat").rename(tmp_path / "runs" / "of others")
    config = tmp_path / "runs" / "of others" / "config.json"
    config.write_text(config.read_text().replace('"mart"', '"standard"'))
    assert run("mart+spat") == [row] and len(list((tmp_path / "runs").iterdir())) == 1
    shutil.rmtree(tmp_path / "runs")
    saved = tmp_path / "runs" / "small-cnn-trades" / "last.pt"  # time is over when there is something to save
    monkeypatch.setattr(table61, "time", SimpleNamespace(sleep=time.sleep, monotonic=lambda: 100.0 * saved.exists()))
    with pytest.raises(SystemExit, match="not done yet: trades"):
        run("trades", epochs=1000, minutes=1)
    rows = json.loads(out.read_text())["thesis"]
    assert [r["row"] for r in rows] == ["trades", "mart+spat"] and rows[1] == row
    assert not rows[0]["evaluation"] and rows[0]["trained"] < 1000
    table = report.thesis(json.loads(out.read_text()))
    assert "| MART+SPAT(.3) | small-cnn | 1 |" in table and " of 1000 |" in table
    assert "| thesis: WRN-34-10 | 90 | 81.93 | 61.87 | 59.59 | 51.57 |" in table
    for wrong, options in (("--rows spat: choose from madry", {}), ("--jobs 0", {"jobs": 0}), ("--epochs 0", {"epochs": 0})):
        with pytest.raises(SystemExit, match=wrong):
            run("spat" if not options else "madry", **options)
    out.write_text("{}")
    with pytest.raises(SystemExit, match="it is no such table"):
        run("madry")

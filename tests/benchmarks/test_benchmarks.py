"""The benchmarks race providers that compute the same, what breaks is recorded, and the results make tables and pictures."""

import dataclasses
import importlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from torch.autograd import DeviceType

from benchmarks import attack, breakdown, cases, data, gpu, measure, overhead, plots, report, table61, training, workmodel
from benchmarks import microbench as questions
from benchmarks.attack import Judge, Provider, calibrated, photographs, plain_loop
from benchmarks.cases import CASES, Case, Work
from benchmarks.training import Authors
from spat_train.data.images import Images
from spat_train.models.registry import create


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
    assert record["status"] == "disagrees"
    assert "median" not in record
    assert "disagrees" in record["note"]


def test_what_raises_or_is_missing_is_recorded_and_the_rest_timed(judge):
    def missing(model):
        raise ImportError("no such package")

    def fails(model):
        return lambda x, y: model(x[:, :1])

    chosen = [provider(missing), provider(fails), provider(lambda model: plain_loop(model, 4))]
    records = attack.compete(chosen, judge, judge.x, judge.y, "cpu", 0.0)
    assert [record["status"] for record in records] == ["absent", "failed", "timed"]
    assert len(records[2]["seconds"]) >= measure.ROUNDS[0]
    assert records[2]["min"] <= records[2]["median"]


def test_one_that_fails_during_the_race_is_timed_no_further():
    calls = {"good": lambda: None, "bad": lambda: 1 / 0}
    times, errors = measure.race(calls, "cpu", 0.0)
    assert list(times) == ["good"]
    assert "ZeroDivisionError" in errors["bad"]


@pytest.fixture(scope="module")
def results() -> dict:
    """A small matrix, of whatever is installed; compiled models are for the machines that race them."""
    names = ["spat eager", "spat plan", "loop", "torchattacks", "foolbox", "ART", "autocast loop"]
    options = attack.Options(["wrn-10-1"], [16], ["fp32", "bf16"], names, "cpu", 3, 0.0, memory=False, small_ceilings=True)
    *_, result = attack.run(options)
    return json.loads(json.dumps(result))


def test_matrix(results):
    status = {(r["provider"], r["precision"]): r["status"] for r in results["cells"]}
    assert status["loop", "fp32"] == status["autocast loop", "bf16"] == "timed"
    assert "disagrees" not in status.values(), [r["note"] for r in results["cells"]]
    assert {"spat eager", "spat plan", "torchattacks", "foolbox", "ART"} <= {name for name, _ in status}
    assert results["machine"]["torch"] == torch.__version__


def test_attack_tables(results):
    ours = {"provider": "spat plan", "precision": "bf16", "ours": True, "status": "timed", "median": 0.25, "limit": {}}
    slower = {"provider": "loop", "precision": "bf16", "ours": False, "status": "timed", "median": 0.5, "limit": {}}
    absent = {"provider": "ART", "precision": "fp32", "ours": False, "status": "absent", "note": "no module"}
    cells = [r | {"model": "m", "batch": 100} for r in (ours, slower, absent)]
    for record in cells:
        record["limit"] = {"conv": 0.005, "roofline": 0.01}
    made_up = results | {"cells": cells, "settings": results["settings"] | {"steps": 10}}
    assert "| m | bf16 | loop | 100 | 200 | 50.00 | 10% | 20% |  | 2.00x | 2.00x |" in report.attack_table(made_up)
    assert "| m | fp32 | ART | 100 | absent: no module |" in report.attack_table(made_up)
    assert "| m | spat plan, bf16 | 100 | 400 | 25.00 | 20% | 40% | 2.00x (loop) |  |" in report.attack(made_up)


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
    *_, results = options.run()
    return json.loads(json.dumps(results))


def test_training_race(updates):
    status = {(r["provider"], r["precision"]): (r["status"], r["note"]) for r in updates["steps"]}
    expected = {("spat_train", "fp32"), ("spat_train", "bf16"), ("authors", "fp32"), ("autocast", "bf16")}
    assert status.keys() == expected
    assert {s for s, _ in status.values()} == {"timed"}, status
    assert updates["settings"].items() >= {"model": "wrn-10-1", "batch": 32, "steps": 2}.items()
    table = report.training_table(updates)
    assert table.count("| trades |") == 4
    assert ("no amx_bf16" in table) == ("amx_bf16" not in updates["machine"]["cpu"]["flags"])


def test_what_trains_otherwise_is_not_timed(monkeypatch):
    def missing(model, method):
        raise RuntimeError("no such engine")

    wrong = [("lazy", lambda model, method: Impatient(model, method, 4)), ("missing", missing)]
    monkeypatch.setattr(training, "providers", lambda options: [training.Provider(name, "fp32", build) for name, build in wrong])
    monkeypatch.setattr(training, "verify", lambda *args: None)
    lazy, broken = training.Options("wrn-10-1", 32, device="cpu", steps=4, seconds=0.0).race("madry")
    assert (lazy["status"], broken["status"]) == ("disagrees", "failed")
    assert "no such engine" in broken["note"]


def test_training_tables(updates):
    times = {("spat_train", "fp32"): 4.0, ("spat_train", "bf16"): 1.0, ("authors", "fp32"): 6.0, ("autocast", "bf16"): 1.5}
    steps = [r | {"median": times[r["provider"], r["precision"]]} for r in updates["steps"]]
    page, full = report.training(updates | {"steps": steps}), report.training_table(updates | {"steps": steps})
    assert "| trades | fp32 | 4.000 | 8.0 | 1.50x (authors) | 1.50x |" in page
    assert "| trades | bf16 | 1.000 | 32.0 | 1.50x (autocast) | 6.00x |" in page
    assert "wrn-10-1, batch 32, PGD-2" in page
    assert "| trades | bf16 | autocast | 1.500 | 21.3 | 4.00x |" in full


def random_images(count: int) -> Images:
    return Images(torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8), torch.arange(count) % 10)


def test_overhead_accounts_for_all_of_a_step(tmp_path):
    config = training.settings("wrn-10-1", 8, "mart", "fp32", "cpu", 1, log_every=2)
    found = overhead.run_for(config, random_images(64), tmp_path, warm_up=1, updates=4)
    parts = found["parts"]
    assert parts.keys() == {"attack", "forward, backward", "optimizer", "loader", "settle", "between", "rest"}
    assert sum(parts.values()) == pytest.approx(found["step_seconds"])
    assert min(parts.values()) > 0
    assert found["steps_per_epoch"] == 8
    assert (tmp_path / "last.pt").exists()
    assert found["epoch_seconds"] > 8 * found["step_seconds"] + found["epoch_parts"]["save"]
    assert 0 < found["head_seconds"] < found["step_seconds"]
    with pytest.raises(ValueError, match="no 2000 steps"):
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
    assert row in report.overhead(results)
    assert "m, batch 64, PGD-10, 640 images" in report.overhead(results)


def test_breakdown_accounts_for_a_call():
    torch.manual_seed(0)
    a, b = torch.randn(2, 300, 300), torch.randn(300, 300)
    found = breakdown.taken_apart(lambda: [(a @ b).relu_() for _ in range(4)], "cpu", steps=4, seconds=0.01)
    kernels = {k["name"]: (k["kind"], k["calls"]) for k in found["longest"]}
    assert kernels["aten::mm"] == ("matrix product", 1)
    assert kernels["aten::clamp_min_"] == ("pointwise", 1)
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


# --- files of results ---


def test_results_of_elsewhere_are_neither_continued_nor_overwritten(tmp_path, monkeypatch):
    monkeypatch.setenv("SPAT_COMMIT", "a")
    out, machine = tmp_path / "x.json", measure.describe("cpu")
    fresh = {"machine": machine, "batch": 2, "settings": {"steps": 3}, "cells": [], "rest": {}}
    assert measure.continued(None, fresh) is fresh
    assert measure.continued(out, fresh) is fresh
    measure.write(out, fresh | {"cells": [1]})
    again = fresh | {"machine": machine | {"date": "later", "command": "another"}, "cells": []}
    assert measure.continued(out, again)["cells"] == [1]
    assert measure.continued(out, again)["machine"] == machine
    before = out.read_bytes()
    others = [{"machine": machine | {key: "b"}} for key in measure.SAME] + [{"batch": 4}, {"settings": {"steps": 4}}]
    for other in others:
        with pytest.raises(SystemExit, match="x.json: it holds other results .* now .*: move the file away"):
            measure.continued(out, fresh | other)
    for wrong in ("{}", "[]", "{", '{"machine": 1}'):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(SystemExit, match="wrong.json: these are no such results"):
            measure.continued(tmp_path / "wrong.json", fresh)
    assert out.read_bytes() == before


def test_the_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)
    assert measure.driver() == "for CUDA 13.1"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert measure.driver() == "580.95.05"


def test_the_commit_names_the_changes(tmp_path, monkeypatch):
    monkeypatch.delenv("SPAT_COMMIT", raising=False)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert measure.commit() is None
    file = tmp_path / "file"
    file.write_text("a")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a commit -q -m a"):
        subprocess.run(["git", "-C", str(tmp_path), *words.split()], check=True)
    found = [measure.commit()]
    for text in ("b", "c", "a"):
        file.write_text(text)
        found.append(measure.commit())
    assert len(set(found)) == 3
    assert found[0] == found[3]
    assert all(name.startswith(f"{found[0]}+") for name in found[1:3])


def cut_attack(cut, out, measured, monkeypatch) -> None:
    def compete(chosen, judge, x, *rest):
        cut(len(x))
        record = {"provider": "loop", "precision": "fp32", "ours": False, "note": "", "status": "timed", "median": 1.0}
        return [record | {"at": len(measured)}]

    ceilings = {"copy_gbps": 1.0, "tflops": {"fp32": 1.0}}
    monkeypatch.setattr(measure, "ceilings", lambda *args, **options: cut("ceilings") or ceilings)
    monkeypatch.setattr(attack, "compete", compete)
    monkeypatch.setattr(attack, "prepare", lambda *args: (SimpleNamespace(model=None), [], torch.zeros(4), torch.zeros(4)))
    attack.main(attack.Options(["m"], [2, 3, 4], ["fp32"], ["loop"], "cpu", memory=False, out=out))


def cut_breakdown(cut, out, measured, monkeypatch) -> None:
    def parts(name, batch, options):
        cut((name, batch))
        return {"step_ms": 1.0, "launches": 1.0, "kinds": {}, "longest": [], "at": len(measured)}

    monkeypatch.setattr(breakdown, "start_profiler", lambda device: None)
    monkeypatch.setattr(breakdown, "attack_parts", parts)
    monkeypatch.setattr(breakdown, "update_parts", lambda name, batch, options: parts(name, "update", options))
    breakdown.main(breakdown.Options(["a", "b"], [4, 2], "fp32", device="cpu", out=out))


def cut_training(cut, out, measured, monkeypatch) -> None:
    record = {"provider": "spat_train", "precision": "fp32", "ours": True, "note": "", "status": "timed", "median": 1.0}
    monkeypatch.setattr(training.Options, "race", lambda self, method: cut(method) or [record | {"at": len(measured)}])
    training.Options("wrn-10-1", 4, ["mart", "madry", "trades"], ["fp32"], ["spat_train"], "cpu", out=out).main()


def cut_overhead(cut, out, measured, monkeypatch) -> None:
    loop = {"step_seconds": 1.0, "parts": dict.fromkeys(("attack", "forward, backward", "optimizer", "loader"), 0.1)}
    loop |= {"head_seconds": 0.1, "epoch_seconds": 10, "steps_per_epoch": 10}
    monkeypatch.setattr(overhead, "run_for", lambda config, *args: cut(config.method) or loop | {"at": len(measured)})
    overhead.main(overhead.Options("wrn-10-1", 4, device="cpu", images=8, out=out))


def cut_questions(cut, out, measured, monkeypatch) -> None:
    class Here:
        def Pool(self, processes):
            return nullcontext(self)

        def apply_async(self, call, arguments):
            result = call(*arguments)
            return SimpleNamespace(get=lambda seconds: result)

    def convolution(conv, precision, options):
        cut((precision, conv))
        return dataclasses.asdict(conv) | {"tflops": {"forward": float(len(measured))}}

    convs = [workmodel.Conv(outs, outs, 3, 1, 1, 1, 8) for outs in (1, 2, 3)]
    monkeypatch.setattr(questions, "shapes", lambda models: convs)
    monkeypatch.setattr(questions.multiprocessing, "get_context", lambda name: Here())
    monkeypatch.setattr(questions, "host_cost", lambda options: iter([cut("host") or {"add_": 1.0}]))
    monkeypatch.setattr(questions, "convolution", convolution)
    questions.main(questions.Options(["wrn-10-1"], 2, ["bf16", "fp32"], device="cpu", out=out))


@pytest.mark.parametrize("run", [cut_attack, cut_breakdown, cut_training, cut_overhead, cut_questions])
def test_a_cut_benchmark_goes_on_from_its_file(run, tmp_path, monkeypatch):
    """Cut at each of its measurements in turn, it makes each once, and keeps what it had to the bit."""
    out, measured = tmp_path / "out.json", []

    def cut(what) -> None:
        if what not in measured and what not in cuts:  # each is cut once, then made
            cuts.append(what)
            raise KeyboardInterrupt
        assert what not in measured
        measured.append(what)

    cuts, kept = [], ""
    while True:
        try:
            run(cut, out, measured, monkeypatch)
            break
        except KeyboardInterrupt:
            found = out.read_text() if out.exists() else ""
            assert found.count('"at"') >= kept.count('"at"')
            kept = found
    assert len(measured) == len(cuts) >= 3
    complete = out.read_bytes()
    run(cut, out, measured, monkeypatch)  # nothing is left
    assert out.read_bytes() == complete
    assert len(measured) == len(cuts)


def test_what_failed_of_ours_is_raced_again(tmp_path, monkeypatch):
    """A rival's failure is a result, ours an accident that must not stay."""
    failed, timed = (
        {"provider": "p", "ours": True, "note": "", **end} for end in ({"status": "failed"}, {"status": "timed", "median": 1.0})
    )
    rival = failed | {"ours": False}
    with_precision = lambda records: [r | {"precision": "fp32"} for r in records]  # noqa: E731
    monkeypatch.setattr(measure, "ceilings", lambda *args, **options: {"copy_gbps": 1.0, "tflops": {"fp32": 1.0}})
    monkeypatch.setattr(attack, "compete", lambda *args: with_precision(next(races)))
    monkeypatch.setattr(attack, "prepare", lambda *args: (SimpleNamespace(model=None), [], torch.zeros(4), torch.zeros(4)))
    options = attack.Options(["m"], [2], ["fp32"], ["loop"], "cpu", memory=False, out=tmp_path / "attack.json")
    updates = training.Options("wrn-10-1", 4, ["mart"], ["fp32"], ["spat_train"], "cpu", out=tmp_path / "training.json")
    monkeypatch.setattr(training.Options, "race", lambda self, method: with_precision(next(races)))
    for command, out, key in ((lambda: attack.main(options), options.out, "cells"), (updates.main, updates.out, "steps")):
        races = iter([[failed, rival], [timed, rival]])
        with pytest.raises(SystemExit, match="p, fp32: failed"):
            command()
        for _ in range(2):  # the second time nothing is left
            command()
        assert [(r["ours"], r["status"]) for r in json.loads(out.read_text())[key]] == [(True, "timed"), (False, "failed")]


# --- what some minutes on a GPU can tell ---


def fake(name: str, script: str, *arguments: str, **options) -> gpu.Step:
    words = " ".join([*("{python} -c", shlex.quote(textwrap.dedent(script))), *map(shlex.quote, arguments)])
    return gpu.Step(name, options.pop("cap", 60), "", words, **options)


def statuses(folder: Path) -> dict[str, str]:
    steps = json.loads((folder / "rehearsal" / "gpu.json").read_text())["steps"]
    return {name: step["status"] for name, step in steps.items()}


def has_ended(pid: int) -> bool:
    """Zombies have: nobody may be there to fetch them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


@pytest.fixture
def ready(tmp_path, monkeypatch) -> Path:
    """For benchmarks.gpu, time stands still until the step that runs has made this file."""
    path, now = tmp_path / "ready", [0.0]

    class Child(gpu.Child):
        def __init__(self, words):
            path.unlink(missing_ok=True)
            super().__init__(words)

    def sleep(seconds):
        time.sleep(seconds)
        now[0] += seconds * path.exists()

    monkeypatch.setattr(gpu, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu, "Child", Child)
    monkeypatch.setenv("SPAT_COMMIT", "a")  # a copy without .git has no other
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    return path


SLOW = "import pathlib, sys, time; print('so far', flush=True); pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
STUBBORN = """
    import os, pathlib, signal, subprocess, sys, time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path(sys.argv[2]).write_text("%s %s" % (os.getpid(), child.pid))
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(600)
"""


def test_statuses_of_steps(tmp_path, ready):
    pids = tmp_path / "pids"
    steps = [
        fake("ok", "import sys; open(sys.argv[1], 'w').write('1')", "{out}"),
        fake("failed", "print('why'); raise SystemExit(3)", beside=fake("beside", "print('along')")),
        fake("slow", SLOW, str(ready), cap=0.1, continues=False),
        fake("stubborn", STUBBORN, str(ready), str(pids), cap=0.1, continues=False),
        fake("modules", "", needs="no_such_module"),
        fake("data", "", "{data}"),
        gpu.Step("device", 60, "true"),
        fake("by name", "", default=False),
        fake("last", ""),
    ]
    with pytest.raises(SystemExit, match="^failed: failed$"):
        gpu.main(gpu.Options(tmp_path, 5.0, rehearse=True), steps)
    results = json.loads((tmp_path / "rehearsal" / "gpu.json").read_text())
    found = results["steps"]
    ended = {"ok": "ok", "failed": "failed", "beside": "ok", "slow": "cut", "stubborn": "cut"}
    assert statuses(tmp_path) == ended | dict.fromkeys(("modules", "data", "device"), "skipped") | {"last": "ok"}
    reasons = {name: step["reason"] for name, step in found.items() if "reason" in step}
    assert reasons.pop("modules").endswith("No module named 'no_such_module'")
    assert reasons == {
        "failed": "exit code 3", "slow": "after 1 s", "stubborn": "after 1 s", "data": "no --data", "device": "it needs a GPU"
    }  # fmt: skip
    assert (found["failed"]["tail"], found["beside"]["tail"]) == ("why\n", "along\n")
    assert found["slow"]["tail"].startswith("so far")
    assert shlex.split(found["ok"]["command"])[0::3] == [Path(sys.executable).name, "ok.json"]
    assert all({"status", "seconds", "command", "tail"} == step.keys() - {"reason"} for step in found.values())
    assert results["machine"]["commit"] == measure.commit()
    assert results["machine"]["driver"] is None
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: has_ended(pid))
    with pytest.raises(SystemExit, match="--only x: choose from ok, failed"):
        gpu.main(gpu.Options(tmp_path, 5.0, only=["x"], rehearse=True), steps)


def test_steps_are_run_again_only_where_that_helps(tmp_path, ready):
    """Not what is done or has failed, unless named; what was cut is, also in the minutes that are left."""
    ran, script = tmp_path / "ran", "import pathlib, sys, time; open(sys.argv[1], 'a').write(sys.argv[2]);"
    wait = "pathlib.Path(sys.argv[3]).touch(); time.sleep(600 * (open(sys.argv[1]).read().count('c') < 2))"
    steps = [
        fake("ok", script, str(ran), "o"),
        fake("failed", f"{script} raise SystemExit(1)", str(ran), "f"),
        fake("cut", f"{script} {wait}", str(ran), "c", str(ready), cap=0.1),
        fake("tests", f"{script} {wait}", str(ran), "t", str(ready), cap=0.1, continues=False),
    ]

    def run(minutes: float = 5.0, only: tuple = ()) -> str:
        ran.write_text("")
        try:
            gpu.main(gpu.Options(tmp_path, minutes, only=list(only), rehearse=True), steps)
        except SystemExit as error:
            return f"{ran.read_text()} {error}"
        return ran.read_text()

    assert run() == "ofctc failed: failed"
    assert list(statuses(tmp_path).values()) == ["ok", "failed", "ok", "cut"]
    steps[3] = fake("tests", script, str(ran), "t")
    assert run() == "t"
    assert list(statuses(tmp_path).values()) == ["ok", "failed", "ok", "ok"]
    assert run() == ""
    assert run(only=("failed", "ok")) == "f failed: failed"
    steps.append(fake("late", script, str(ran), "l"))
    assert run(minutes=0.0) == ""
    assert statuses(tmp_path)["late"] == "skipped"
    assert run(minutes=0.0, only=("failed",)) == " failed: failed"
    assert statuses(tmp_path)["failed"] == "failed"
    assert run() == "l"
    assert statuses(tmp_path)["late"] == "ok"


BENCHMARK = """
    import json, os, pathlib, sys, time
    out, log, go = map(pathlib.Path, sys.argv[1:])
    log.with_name("pid").write_text(str(os.getpid()))
    cells = json.loads(out.read_text()) if out.exists() else []
    for cell in range(len(cells), 4):
        while cell == 2 and not go.exists():
            time.sleep(0.02)
        cells.append(cell)
        log.open("a").write("%s " % cell)
        out.write_text(str(cells))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_command_goes_on(tmp_path, monkeypatch, capsys, number):
    """With SIGKILL too its children end, and what they had measured is not measured again: here, and by --have elsewhere."""
    log, go, one = tmp_path / "log", tmp_path / "go", tmp_path / "one" / "rehearsal"
    first = fake("first", "import sys; open(sys.argv[1], 'a').write('first ')", str(log))
    second = fake("second", BENCHMARK, "{out}", str(log), str(go))
    monkeypatch.setenv("SPAT_COMMIT", "a")

    def run(out: str, have: str | None = None) -> str:
        gpu.main(gpu.Options(tmp_path / out, 5.0, have=have and tmp_path / have, rehearse=True), [first, second])
        return capsys.readouterr().out

    command = multiprocessing.get_context("fork").Process(target=run, args=("one",))
    command.start()
    wait_for(lambda: (one / "second.json").exists() and (one / "second.json").read_text() == "[0, 1]")
    os.kill(command.pid, number)
    command.join()
    assert command.exitcode == (-9 if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: has_ended(int((tmp_path / "pid").read_text())))
    assert statuses(tmp_path / "one") == {"first": "ok", "second": "cut"}
    go.touch()
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    run("one")
    assert "first      ok       in --have" in run("two", "copy")
    assert run("two", "copy") == ""
    assert log.read_text() == "first 0 1 2 3 2 3 "
    for out in ("one", "two"):
        assert statuses(tmp_path / out) == {"first": "ok", "second": "ok"}
        assert (tmp_path / out / "rehearsal" / "second.json").read_text() == "[0, 1, 2, 3]"
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    monkeypatch.setenv("SPAT_COMMIT", "b")
    with pytest.raises(SystemExit, match=r"gpu.json: it holds other results \(commit: a, now b\): move the file away"):
        run("one")
    assert "--have: nothing is taken over. " in run("three", "copy")
    assert log.read_text().endswith(" 2 3 first 0 1 2 3 ")
    assert all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.parametrize("step", gpu.STEPS + [gpu.STEPS[1].beside], ids=lambda step: step.name)
def test_commands_of_the_steps_are_understood(step):
    """Those for a GPU too, as far as can be seen without one."""
    assert step.name != "warm-up" or "{out}" not in step.command
    for command, device in ((step.command, "cuda"), (step.tiny, "cpu")):
        words = dict.fromkeys(("python", "data", "out", "runs", "sanitizer"), "x") | {"device": device, "processes": 2}
        parts = shlex.split(command.format(**words))
        if parts[1:2] == ["-m"] and parts[2].startswith("benchmarks.") and step.name != "fused":
            benchmark = importlib.import_module(parts[2])
            options = tyro.cli(getattr(benchmark, "Options", None) or benchmark.Arguments, args=parts[3:])
            if benchmark in (attack, training):
                every = attack.providers(device) if benchmark is attack else training.providers(options)
                assert set(options.providers) <= {p.name for p in every if p.precision in options.precisions}
            if benchmark is table61:
                assert not set(options.rows) - set(table61.TABLE.runs)


def test_cards():
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100", "NVIDIA H200": "h200", "NVIDIA GH200 480GB": "gh200",
        "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA L40S": "l40s", "Tesla T4": "t4", "NVIDIA GeForce RTX 4090": "rtx-4090",
        "NVIDIA RTX A6000": "rtx-a6000", "Some Device": "some-device",
    }  # fmt: skip
    assert {name: gpu.card(name) for name in names} == names


@pytest.fixture
def tiny_npz(tmp_path) -> Path:
    path = tmp_path / "tiny.npz"
    images = random_images(120)
    np.savez(path, x_train=images.pixels, y_train=images.labels, x_test=images.pixels[:20], y_test=images.labels[:20])
    return path


@pytest.mark.slow
def test_rehearsal(tmp_path, tiny_npz):
    """All steps, in two commands; the second has what the first brought."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not this run's -n
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "20", "--data", str(tiny_npz)]
    default = [step.name for step in gpu.STEPS if step.default]
    first = [*default[:2], *(step.name for step in gpu.STEPS if not step.default)]
    for more in (["--out", str(tmp_path / "a"), "--only", *first], ["--out", str(tmp_path / "b"), "--have", str(tmp_path / "a")]):
        own = {"TMPDIR": str(tmp_path), "SPAT_COMMIT": "a"}
        subprocess.run([*command, *more], check=True, cwd=measure.ROOT, env=environment | own)
    skipped = {"triton", "fused", "sanitizer"}
    found = statuses(tmp_path / "b")
    assert found.keys() == {step.name for step in gpu.STEPS} | {"warm-up"}
    assert {name for name, status in found.items() if status != "ok"} == skipped, found
    assert {name for name, status in found.items() if status == "skipped"} == skipped
    files = {path.name for path in (tmp_path / "b").rglob("*") if path.is_file()}  # those of the first command are not copied
    assert files == {f"{name}.json" for name in ("attack", "breakdown", "training", "table61", "questions", "gpu")}
    keys = json.loads((tmp_path / "b" / "rehearsal" / "questions.json").read_text())
    assert {"machine", "batch", "host_us", "graph_nodes", "precisions"} <= keys.keys()
    assert keys["precisions"].keys() == {
        "bf16",
        "fp32",
    }
    assert all(len(found["convolutions, limit 10"]) == 8 for found in keys["precisions"].values())


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
    assert row["title"] == "MART+SPAT(.3)"
    assert "epochs 1 (90)" in row["differs"]
    assert len(row["validations"]) == 1
    assert {name: e["images"] for name, e in row["evaluation"].items()} == dict.fromkeys(row["thesis"], 20) | {"AutoAttack": 4}
    assert row["evaluation"]["PGD-20"]["accuracy"] <= row["evaluation"]["natural"]["accuracy"]
    assert row["thesis"]["natural"] == 81.93
    (tmp_path / "runs" / "small-cnn-mart+spat").rename(tmp_path / "runs" / "of others")
    config = tmp_path / "runs" / "of others" / "config.json"
    config.write_text(config.read_text().replace('"mart"', '"standard"'))
    assert run("mart+spat") == [row]
    assert len(list((tmp_path / "runs").iterdir())) == 1
    shutil.rmtree(tmp_path / "runs")
    saved = tmp_path / "runs" / "small-cnn-trades" / "last.pt"  # time is over when there is something to save
    monkeypatch.setattr(table61, "time", SimpleNamespace(sleep=time.sleep, monotonic=lambda: 100.0 * saved.exists()))
    with pytest.raises(SystemExit, match="not done yet: trades"):
        run("trades", epochs=1000, minutes=1)
    rows = json.loads(out.read_text())["thesis"]
    assert [r["row"] for r in rows] == ["trades", "mart+spat"]
    assert rows[1] == row
    assert not rows[0]["evaluation"]
    assert rows[0]["trained"] < 1000
    table = report.thesis(json.loads(out.read_text()))
    assert "| MART+SPAT(.3) | small-cnn | 1 |" in table
    assert " of 1000 |" in table
    assert "| thesis: WRN-34-10 | 90 | 81.93 | 61.87 | 59.59 | 51.57 |" in table
    for wrong, options in (("--rows spat: choose from madry", {}), ("--jobs 0", {"jobs": 0}), ("--epochs 0", {"epochs": 0})):
        with pytest.raises(SystemExit, match=wrong):
            run("spat" if not options else "madry", **options)
    out.write_text("{}")
    with pytest.raises(SystemExit, match="these are no such results"):
        run("madry")

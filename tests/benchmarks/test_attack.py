"""Whole attacks: what is wrong, raises or is missing is recorded, the rest is timed."""

import json
import multiprocessing

import pytest
import torch

from benchmarks import attack, measure, plots
from benchmarks.judge import Judge, calibrated, photographs
from benchmarks.rivals import Provider, plain_loop


@pytest.fixture(scope="module")
def judge() -> Judge:
    x = photographs(24, 32)
    model = calibrated("wrn-10-1", x)
    return Judge(model, x, model(x).argmax(1).detach(), steps=4)


def provider(build) -> Provider:
    return Provider("provider", "fp32", build)


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
    return json.loads(json.dumps(attack.run(options)))


def test_matrix(results):
    status = {(r["provider"], r["precision"]): r["status"] for r in results["cells"]}
    assert status["loop", "fp32"] == status["autocast loop", "bf16"] == "timed"
    assert "disagrees" not in status.values(), [r["note"] for r in results["cells"]]
    assert {"spat eager", "spat plan", "torchattacks", "foolbox", "ART"} <= {name for name, _ in status}
    assert results["machine"]["torch"] == torch.__version__


def test_plots(results, tmp_path):
    plots.throughput(results, tmp_path / "throughput.png")
    plots.roofline(results, tmp_path / "roofline.png")
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 10_000


def test_resident_growth_counts_what_a_call_holds():
    cell = "wrn-10-1", 32, 64, "loop", "fp32", 1, 1
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        growth = pool.apply(attack.resident_growth, cell)
    # autograd keeps every convolution's and BatchNorm's input: for the first group alone 9 of [64, 16, 32, 32] in fp32
    assert 9 * 4 < growth < 200

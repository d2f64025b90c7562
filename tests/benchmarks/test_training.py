"""Training steps do what the authors' loops do, and the parts of a trainer's step add up."""

import json

import pytest

from benchmarks import overhead, training
from benchmarks.data import random_images
from benchmarks.training import Authors


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


def test_training_race():
    options = training.Options("wrn-10-1", 32, ["trades"], ["fp32", "bf16"], ["spat_train", "authors", "autocast"], "cpu", 2, 0.0)
    *_, results = options.run()
    updates = json.loads(json.dumps(results))
    status = {(r["provider"], r["precision"]): (r["status"], r["note"]) for r in updates["steps"]}
    expected = {("spat_train", "fp32"), ("spat_train", "bf16"), ("authors", "fp32"), ("autocast", "bf16")}
    assert status.keys() == expected
    assert {s for s, _ in status.values()} == {"timed"}, status
    assert updates["settings"].items() >= {"model": "wrn-10-1", "batch": 32, "steps": 2}.items()
    table = training.full_table(updates)
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
    config = training.settings("wrn-10-1", 8, "mart", "fp32", "cpu", 1, epochs=1)
    with pytest.raises(ValueError, match="no 2000 steps"):
        overhead.run_for(config, random_images(8), tmp_path / "b", 1, 1999)

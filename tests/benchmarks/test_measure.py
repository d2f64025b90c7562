"""Files of results: whose they are, and how a benchmark that was cut goes on from its own."""

import dataclasses
import json
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attack, breakdown, measure, microbench, overhead, training, workmodel


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


def cut_microbench(cut, out, measured, monkeypatch) -> None:
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
    monkeypatch.setattr(microbench, "shapes", lambda models: convs)
    monkeypatch.setattr(microbench.multiprocessing, "get_context", lambda name: Here())
    monkeypatch.setattr(microbench, "host_cost", lambda options: iter([cut("host") or {"add_": 1.0}]))
    monkeypatch.setattr(microbench, "convolution", convolution)
    microbench.main(microbench.Options(["wrn-10-1"], 2, ["bf16", "fp32"], device="cpu", out=out))


@pytest.mark.parametrize("run", [cut_attack, cut_breakdown, cut_training, cut_overhead, cut_microbench])
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

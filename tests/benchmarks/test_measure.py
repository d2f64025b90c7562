"""Files of results: whose they are, and how a benchmark that was cut continues from its own."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attack, measure, training


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


def test_the_commit_names_the_changes(tmp_path, monkeypatch):
    monkeypatch.delenv("SPAT_COMMIT", raising=False)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert measure.commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    found = []
    for text in ("a", "b", "c", "a"):
        (tmp_path / "file").write_text(text)
        if not found:
            for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
                subprocess.run([*git, *words], check=True)
        found.append(measure.commit())
    assert len(set(found)) == 3
    assert found[0] == found[3]
    assert all(name.startswith(f"{found[0]}+") for name in found[1:3])


def test_cells_that_a_file_lacks_are_measured_and_written_one_by_one(tmp_path):
    out, cells = tmp_path / "x.json", [{"method": method} for method in ("mart", "madry", "trades")]

    def run(stops: bool) -> list[str]:
        def measured(cell: dict) -> dict:
            asked.append(cell["method"])
            if stops and len(asked) == 2:
                raise KeyboardInterrupt
            return {"seconds": 0.1 + len(asked)}

        asked = []
        results = measure.continued(out, measure.begun("overhead", "cpu", loops=[]))
        try:
            measure.complete(out, results, "loops", cells, measured)
        except KeyboardInterrupt:
            asked.append("cut")
        return asked

    assert [run(True), run(False), run(False)] == [["mart", "madry", "cut"], ["madry", "trades"], []]
    loops = json.loads(out.read_text())["loops"]
    assert [(loop["method"], loop["seconds"]) for loop in loops] == [("mart", 1.1), ("madry", 1.1), ("trades", 2.1)]


@pytest.mark.parametrize("module", [attack, training])
def test_what_failed_of_ours_is_raced_again(module, tmp_path, monkeypatch):
    """A rival's failure is a result, ours an accident that must not stay."""
    failed = {"provider": "p", "precision": "fp32", "ours": True, "note": "", "status": "failed"}
    timed, rival = failed | {"status": "timed", "median": 1.0}, failed | {"ours": False}
    races, out = iter([[failed, rival], [timed, rival]]), tmp_path / "out.json"
    monkeypatch.setattr(measure, "ceilings", lambda *args, **options: {"copy_gbps": 1.0, "tflops": {"fp32": 1.0}})
    monkeypatch.setattr(attack, "compete", lambda *args: next(races))
    monkeypatch.setattr(attack, "prepare", lambda *args: (SimpleNamespace(model=None), [], torch.zeros(4), torch.zeros(4)))
    monkeypatch.setattr(training.Options, "race", lambda self, method: next(races))
    options = attack.Options(["m"], [2], ["fp32"], ["loop"], "cpu", memory=False, out=out)
    updates = training.Options("wrn-10-1", 4, ["mart"], ["fp32"], ["spat_train"], "cpu", out=out)
    command = updates.main if module is training else lambda: attack.main(options)
    with pytest.raises(SystemExit, match="p, fp32: failed"):
        command()
    for _ in range(2):  # the second time nothing is left
        command()
    records = json.loads(out.read_text())["steps" if module is training else "cells"]
    assert [(r["ours"], r["status"]) for r in records] == [(True, "timed"), (False, "failed")]

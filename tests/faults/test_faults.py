"""Some of the faults of `python -m benchmarks.faults`, which has them all; and that the trials see what is lost."""

import shutil

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("tyro")

from benchmarks import faults
from spat_train.runtime import atomic_write
from spat_train.training.trainer import train
from tests.faults.commands import Commands, Ended
from tests.faults.subjects import COMMANDS, essence
from tests.faults.trials import LOST, RESUMED, Lab, judge, plan
from tests.training.helpers import settings

MAY_REFUSE = ("flip", "cut", "zeros", "nan in file")


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
    """One trial of each kind of fault, now of one command, now of another."""
    with Commands(tmp_path) as commands:
        lab = Lab(tmp_path / "lab", commands)
        trials = plan(lab)
        by_kind = {kind: [t for t in trials if t.fault == kind] for kind in faults.FAULTS}
        chosen = [some[i % 3 * len(some) // 3] for i, some in enumerate(by_kind.values()) if some]
        records = [lab.trial(trial) for trial in chosen]
        assert {trial.fault for trial in trials} >= by_kind.keys() - {"small disk"}
        assert not [r for r in records if r["outcome"] == LOST or (r["outcome"] != RESUMED and r["fault"] not in MAY_REFUSE)]
        assert "| SIGKILL at each call | " in faults.table(faults.measure.begun("faults", "cpu", trials=records))
        files_that_are_not_replaced_in_one_step_are_noticed(lab)


def write_in_place() -> None:
    atomic_write.write = lambda path, content, *_, **__: path.write_bytes(content) and None


def files_that_are_not_replaced_in_one_step_are_noticed(lab):
    """Killed in the middle of the last write of last.pt."""
    prepare = ("tests.faults.test_faults:write_in_place",)
    dry, out = lab.folder / "dry", lab.folder / "out"
    calls = lab.run(COMMANDS["train"](lab.pristine, dry), folder=dry, prepare=prepare).calls
    number = max(i for i, call in enumerate(calls, 1) if call.startswith("write") and call.endswith("last.pt"))
    shutil.rmtree(out, ignore_errors=True)
    found = lab.interrupted("train", [{"folder": out, "fault": ("torn", number), "prepare": prepare}])
    assert found.stopped
    assert found.outcome != RESUMED


def test_one_other_bit_in_a_result_is_noticed(tmp_path, one_thread):
    """Though the checksums in the file are those of the altered one."""
    train(settings(tmp_path / "run", epochs=1))
    expected, best = essence(tmp_path / "run"), tmp_path / "run" / "best.pt"
    assert {"best.pt", "config.json", "last.pt", "log.jsonl"} == expected.keys()
    done = Ended([0], [""], [], 0.0)
    assert judge(done, tmp_path / "run", expected).outcome == RESUMED
    state = torch.load(best, weights_only=True)
    next(iter(state["model"].values())).view(torch.int32).view(-1)[0] ^= 1
    torch.save(state, best)
    assert judge(done, tmp_path / "run", expected)[:2] == (LOST, "other content: best.pt")

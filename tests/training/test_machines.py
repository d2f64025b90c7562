"""Several machines: torchrun on each. Here two agents on one computer, which meet over TCP and share a file system."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from tests.training.helpers import TIMEOUT, assert_same_run, events, free_port, torchrun

pytestmark = pytest.mark.slow

OPTIONS = "--data digits --eps 51 --limit 150 --batch-size 32 --epochs 2 --steps 2 --device cpu --track none --no-test"


def on_machines(machines: int, processes: int, *arguments: str, **environment: str) -> list[subprocess.CompletedProcess]:
    """torchrun with `processes` on each machine, all at once."""
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(machines), "--nproc-per-node", str(processes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "run", "--local-addr", "127.0.0.1",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    agents = [
        subprocess.Popen([*launch, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(machines)
    ]
    outputs = [agent.communicate(timeout=TIMEOUT) for agent in agents]
    return [
        subprocess.CompletedProcess(agent.args, agent.returncode, *texts) for agent, texts in zip(agents, outputs, strict=True)
    ]


def test_two_machines_are_two_processes(tmp_path):
    """Bit by bit those of one machine: batches go by rank, and one process of all writes."""
    arguments = ["spat_train", "train", *OPTIONS.split(), "--model", "small-cnn"]
    one = torchrun("-m", *arguments, "--out", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two = on_machines(2, 1, *arguments, "--out", str(tmp_path / "two"))
    assert [done.returncode for done in two] == [0, 0], "".join(done.stderr for done in two)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert len(events(tmp_path / "two", "start")) == 1
    assert sum("2 x " in done.stderr and "2 epochs" in done.stderr for done in two) == 1
    again = on_machines(2, 1, *arguments, "--out", str(tmp_path / "two"), "--resume", "--epochs", "2")
    assert [done.returncode for done in again] == [0, 0]
    assert sum("is finished: nothing is done again" in done.stderr for done in again) == 1

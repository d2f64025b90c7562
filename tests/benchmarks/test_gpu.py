"""What some minutes on a GPU can tell: steps, signals, and a rehearsal of all of them."""

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
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro

from benchmarks import attack, gpu, measure, training


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
        fake("slow", SLOW, str(ready), cap=0.1),
        fake("stubborn", STUBBORN, str(ready), str(pids), cap=0.1),
        fake("modules", "", needs="no_such_module"),
        fake("data", "", "{data}"),
        gpu.Step("device", 60, "true"),
        fake("by name", "", default=False),
        fake("last", ""),
    ]
    with pytest.raises(SystemExit, match="^failed: failed$"):
        gpu.main(gpu.Options(tmp_path, 5.0, rehearse=True), steps)
    found = json.loads((tmp_path / "rehearsal" / "gpu.json").read_text())["steps"]
    ended = {"ok": "ok", "failed": "failed", "beside": "ok", "slow": "cut", "stubborn": "cut"}
    assert statuses(tmp_path) == ended | dict.fromkeys(("modules", "data", "device"), "skipped") | {"last": "ok"}
    reasons = {
        "failed": "exit code 3", "slow": "after 1 s", "stubborn": "after 1 s", "data": "no --data", "device": "it needs a GPU",
        "modules": "ModuleNotFoundError: No module named 'no_such_module'",
    }  # fmt: skip
    assert {name: step["reason"] for name, step in found.items() if "reason" in step} == reasons
    assert (found["failed"]["tail"], found["beside"]["tail"]) == ("why\n", "along\n")
    assert found["slow"]["tail"].startswith("so far")
    assert shlex.split(found["ok"]["command"])[0::3] == [Path(sys.executable).name, "ok.json"]
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
    ]

    def run(minutes: float = 5.0, only: tuple = ()) -> str:
        ran.write_text("")
        end = ""
        try:
            gpu.main(gpu.Options(tmp_path, minutes, only=list(only), rehearse=True), steps)
        except SystemExit as error:
            end = f" {error}"
        return ran.read_text() + end

    assert run() == "ofcc failed: failed"
    assert list(statuses(tmp_path).values()) == ["ok", "failed", "ok"]
    seconds = json.loads((tmp_path / "rehearsal" / "gpu.json").read_text())["steps"]["cut"]["seconds"]
    assert seconds > 1  # both attempts: the first was cut after a second, the second ended at once
    assert run() == ""
    assert run(only=("failed", "ok")) == "f failed: failed"
    steps.append(fake("late", script, str(ran), "l"))
    assert run(minutes=0.0) == ""
    assert run(minutes=0.0, only=("failed",)) == " failed: failed"
    assert (statuses(tmp_path)["late"], statuses(tmp_path)["failed"]) == ("skipped", "failed")
    assert run() == "l"


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
    for options in (("one",), ("three", "copy")):
        with pytest.raises(SystemExit, match=r"gpu.json: it holds other results \(commit: a, now b\): move the file away"):
            run(*options)
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


def test_cards():
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100", "NVIDIA H200": "h200", "NVIDIA GH200 480GB": "gh200",
        "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA L40S": "l40s", "Tesla T4": "t4", "NVIDIA GeForce RTX 4090": "rtx-4090",
        "NVIDIA RTX A6000": "rtx-a6000", "Some Device": "some-device",
    }  # fmt: skip
    assert {name: gpu.card(name) for name in names} == names


@pytest.mark.slow
def test_rehearsal(tmp_path, tiny_npz):
    """All steps but two, in two commands; the second has what the first brought. memory's command is that of smoke on a CPU, and
    test_cases.py has the kernels'."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not this run's -n
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "20", "--data", str(tiny_npz)]
    left_out = {"memory", "kernels"}
    default = [step.name for step in gpu.STEPS if step.default]
    first = [*default[:2], *(step.name for step in gpu.STEPS if not step.default and step.name not in left_out)]
    for more in (["--out", str(tmp_path / "a"), "--only", *first], ["--out", str(tmp_path / "b"), "--have", str(tmp_path / "a")]):
        own = {"TMPDIR": str(tmp_path), "SPAT_COMMIT": "a"}
        subprocess.run([*command, *more], check=True, cwd=measure.ROOT, env=environment | own)
    skipped = {"convolutions", "triton", "fused", "sanitizer"}
    found = statuses(tmp_path / "b")
    assert found.keys() == {step.name for step in gpu.STEPS} - left_out | {"warm-up"}
    assert {name for name, status in found.items() if status != "ok"} == skipped, found
    assert {name for name, status in found.items() if status == "skipped"} == skipped
    files = {path.name for path in (tmp_path / "b").rglob("*") if path.is_file()}  # those of the first command are not copied
    assert files == {f"{name}.json" for name in ("attack", "breakdown", "early_stop", "training", "table61", "microbench", "gpu")}
    keys = json.loads((tmp_path / "b" / "rehearsal" / "microbench.json").read_text())
    assert {"machine", "batch", "host_us", "graph_nodes"} <= keys.keys()
    assert {name: len(found["convolutions, limit 10"]) for name, found in keys["precisions"].items()} == {"bf16": 8, "fp32": 8}

"""Commands of spat-train in processes of their own, with a fault in them; and how they ended."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training.helpers import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT = 120.0  # seconds: only a command that hangs takes as long
GRACE = 10.0  # seconds until the other processes are stopped too


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        codes: the exit code of each process, -n for signal n, None where it hung.
        errors: what each wrote to stderr.
        calls: the calls that changed files below `folder`, in order, such as "rename /tmp/run/last.pt".
        seconds: it took.
    """

    codes: list[int | None]
    errors: list[str]
    calls: list[str]
    seconds: float

    @property
    def done(self) -> bool:
        return set(self.codes) == {0}

    @property
    def refused(self) -> bool:
        """Whether it ended by itself, with an error in a line that a person can read."""
        return {1, 2} >= {*self.codes} and self._clear

    @property
    def killed(self) -> bool:
        """Whether a process was killed, and the others ended too: with such a line, or by the signal that torchrun sends."""
        ends = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
        return -signal.SIGKILL in self.codes and {0, 1, 2, *ends} >= {*self.codes} and self._clear

    @property
    def _clear(self) -> bool:
        """No traceback; and an error, in the last line, where an exit code says that there was one."""
        last = [(text.splitlines() or [""])[-1] for code, text in zip(self.codes, self.errors, strict=True) if code in (1, 2)]
        said = any(line.startswith("spat-train: error: ") for line in last)
        return (said or not last) and not any("Traceback" in text for text in self.errors)

    def __str__(self) -> str:
        said = [line for text in self.errors for line in text.splitlines()[-1:]]
        return f"exit {self.codes}: {' | '.join(said)}"


class Commands:
    """Runs commands, one at a time. `work`: a folder for the shim and for what the commands print."""

    def __init__(self, work: Path):
        self.output = work / "command"
        library = work / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, Path(__file__).with_name("shim.c"), "-ldl"], check=True)
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.kill()
        self.server.communicate()

    def run(
        self, *arguments: object, folder: Path | None = None, fault: tuple[str, int] = ("nothing", 0), processes: int = 1,
        seconds: float | None = None, victim: int = 0, file_size: int | None = None, prepare: tuple[object, ...] = (),
    ) -> Ended:  # fmt: skip
        """Run spat-train with these arguments.

        Args:
            folder: calls that change files below it are numbered from 1, in each process.
            fault: what happens at which of these calls: "killed", "torn", "full" or "broken" (shim.c).
            processes: as many, as torchrun would start them.
            seconds: after which the process number `victim` is killed by SIGKILL.
            file_size: the most bytes that a file may have.
            prepare: the name of a function that is called before, in the process of the command, and its arguments.
        """
        job: dict[str, Any] = {
            "arguments": [*map(str, arguments)], "output": str(self.output), "folder": folder and str(folder), "fault": fault,
            "processes": processes, "port": free_port() if processes > 1 else 0, "seconds": seconds, "victim": victim,
            "timeout": TIMEOUT, "grace": GRACE, "file_size": file_size, "prepare": prepare,
        }  # fmt: skip
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        errors = [Path(f"{self.output}.{rank}.err").read_text(errors="replace") for rank in range(processes)]
        calls = Path(f"{self.output}.0.calls").read_text().splitlines() if folder else []
        return Ended(answer["codes"], errors, calls, answer["seconds"])

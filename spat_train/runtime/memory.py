"""How much memory a process can get."""

from collections.abc import Iterator
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can get: what the machine has free, and what the limit of its container leaves.

    Args:
        root: the folder that has /proc and /sys.
    """
    machine = next(line for line in (root / "proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return min(1024 * int(machine.split()[1]), *_left_in_groups(root))


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group around the process leaves, in version 2 or 1 (the kernel's cgroup-v2.rst and memory.rst)."""
    yield 1 << 62  # there may be none
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        limit, used, prefix = ("limit_in_bytes", "usage_in_bytes", "total_") if controllers else ("max", "current", "")
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")  # in a container perhaps its place on the host: then the limit is at the top
        for folder in (group, *group.parents):
            file = folder / f"memory.{limit}"
            if folder.is_relative_to(top) and file.is_file() and (most := file.read_text().strip()) != "max":
                yield int(most) - int((folder / f"memory.{used}").read_text()) + _of_files(folder / "memory.stat", prefix)


def _of_files(statistics: Path, prefix: str) -> int:
    """Bytes that hold what is in files too, and are given up when they are needed."""
    pairs = map(str.split, statistics.read_text().splitlines())
    return sum(int(size) for name, size in pairs if name in (f"{prefix}active_file", f"{prefix}inactive_file"))

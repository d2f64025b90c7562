"""The rooms of the two packages: imports run downwards, and no room imports one that imports it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A room is a folder, or a file beside the folders; rooms on one line import nothing from each other.
FLOORS = {
    "spat_kernels": """
        _library interrupts settings precision normalize
        rng
        ops cuda_graph
        fused_conv
        losses
        balls
        checks
        model_state
        predictions
        input_gradient
        cuda_graphs
        attacks
        compat
        __init__
    """,
    "spat_train": """
        __init__ command_line errors objectives
        config runtime
        plotting presets data
        models
        evaluation
        training
        papers
        demo sharing sweeps
        cli
        __main__
    """,
}


def imported(path: Path, package: str) -> set[str]:
    """The rooms of `package` that the file at `path` imports from, but for type checkers."""
    tree = ast.parse(path.read_text())
    for_types = {
        each
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for each in ast.walk(node)
    }
    here = path.relative_to(ROOT).with_suffix("").parts
    rooms = set()
    for node in ast.walk(tree):
        if node in for_types or not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), name]) for name in names]
        rooms |= {(name.split(".") + ["__init__"])[1] for name in names if name.split(".")[0] == package}
    return rooms


@pytest.mark.parametrize("package", FLOORS)
def test_imports_run_downwards(package):
    lines = [line.split() for line in FLOORS[package].split("\n") if line.split()]
    floor = {room: number for number, rooms in enumerate(lines) for room in rooms}
    files = {path: path.relative_to(ROOT / package).parts[0].removesuffix(".py") for path in (ROOT / package).rglob("*.py")}
    assert set(files.values()) == floor.keys(), "every room has its floor here"
    up = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path, room in files.items()
        for other in imported(path, package) - {room}
        if floor.get(other, 0) >= floor[room]
    ]
    assert not up

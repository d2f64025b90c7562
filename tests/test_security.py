"""What README.md says under Security: files are read as data, whatever is in them."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def unsafe(source: str) -> list[str]:
    """The calls in `source` that unpickle what a file holds. Ruff (pyproject.toml) finds exec, eval, pickle and yaml.load."""
    safe, found = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}, []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (wanted := safe.get(ast.unparse(node.func))):
            given = [ast.unparse(keyword) for keyword in node.keywords]
            default = wanted == "allow_pickle=False" and "allow_pickle" not in [k.arg for k in node.keywords]
            found += [] if wanted in given or default else [ast.unparse(node)]
    return found


def test_unsafe_calls_are_found():
    assert unsafe("torch.load(f); torch.load(f, weights_only=safe); np.load(f, allow_pickle=True)") == [
        "torch.load(f)", "torch.load(f, weights_only=safe)", "np.load(f, allow_pickle=True)",
    ]  # fmt: skip
    assert not unsafe("torch.load(f, weights_only=True); np.load(f); np.load(f, allow_pickle=False)")


def test_no_file_is_unpickled():
    files = [path for package in ("spat_kernels", "spat_train") for path in (ROOT / package).rglob("*.py")]
    found = {path.name: calls for path in files if (calls := unsafe(path.read_text()))}
    assert len(files) > 100
    assert not found

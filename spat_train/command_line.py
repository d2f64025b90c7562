"""A dataclass as the options of a command, in groups that --help shows.

A comment line `# ---- title` between the fields of the dataclass begins a group, and the string below a field is its help.
"""

import ast
import inspect
from collections.abc import Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from itertools import pairwise
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

T = TypeVar("T")
HEADING = "    # ---- "
DEFAULT_IN_HELP = tyro.conf.arg(help_behavior_hint="")  # for options whose help text says what None stands for


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, description: str | None, default: T | None = None) -> T:
    """The dataclass `kind` with the values that `arguments` give; `default` holds those of the others."""
    helps, hints = _documentation(kind), get_type_hints(kind, include_extras=True)
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    for f in fields(kind):  # type: ignore[arg-type]
        title, text = helps[f.name]
        value = f.default if default is None else getattr(default, f.name)
        said = value is None and text and "Default:" in text  # by the help text, which says what None stands for
        about = tyro.conf.arg(help=text, help_behavior_hint="" if said else None)
        groups.setdefault(title, []).append((f.name, Annotated[hints[f.name], about], field(default=value)))
    outer = []
    for number, (title, options) in enumerate(groups.items()):
        group: Any = make_dataclass("Group", options, frozen=True, kw_only=True)
        shown = Annotated[tyro.conf.OmitArgPrefixes[group], tyro.conf.arg(name=title, help="")]
        required = any(option.default is MISSING for _, _, option in options)
        outer.append((f"group{number}", shown, field(default=MISSING if required else group())))
    grouped: Any = make_dataclass("Options", outer, kw_only=True)
    values = tyro.cli(grouped, args=arguments, prog=prog, description=inspect.cleandoc(description or ""))
    return kind(**{name: value for group in vars(values).values() for name, value in vars(group).items()})


def _documentation(kind: type) -> dict[str, tuple[str, str | None]]:
    """By field of a dataclass, the title of its group, "" for none, and the string below it."""
    source = inspect.getsource(kind)
    titles = {n: line.removeprefix(HEADING) for n, line in enumerate(source.splitlines(), 1) if line.startswith(HEADING)}
    found: dict[str, tuple[str, str | None]] = {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node, after in pairwise([*definition.body, None]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            line = max((n for n in titles if n < node.lineno), default=0)
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            found[node.target.id] = titles.get(line, ""), " ".join(text.split()) if isinstance(text, str) else None
    return found

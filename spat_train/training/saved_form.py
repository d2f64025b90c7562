"""Whether a checkpoint to go on from has the form of those that runs write: a file of others may hold anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import InputError, first_line, is_out_of_memory
from ..models.matching import unusual_kind
from ..models.run_config import config_beside, is_a

STEP = {"model": dict[str, Any], "ema": dict[str, Any] | None, "averaged": int, "optimizer": dict[str, Any], "scaler": dict}
KINDS: dict[str, Any] = STEP | {
    "id": str, "progress": dict[str, Any], "best": dict[str, Any] | None, "data": dict[str, str],
    "file_sizes": dict[str, Tensor], "processes": list[dict[str, Any]],
}  # fmt: skip
LATER = {"arithmetic": dict[str, Any], "snapshot": dict[str, Any] | None}  # that older checkpoints lack
MOMENTS = {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}, set[str]()
BROKEN = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, RuntimeError, TypeError, ValueError)


@dataclass
class Progress:
    """Where a run is."""

    epoch: int = 0  # epochs that are trained and validated
    step: int = 0  # updates done in the current one
    best: dict[str, Any] | None = None  # a validation's record
    stale: int = 0  # validations since the best
    collapses: list[int] = field(default_factory=list)  # epochs, counted from 1, in which PGD accuracy collapsed (overfitting.py)
    left: list[int] = field(default_factory=list)  # those of them when no epoch had withstood PGD: nothing to go back to
    sums: dict[str, float] = field(default_factory=dict)  # of the loss and its terms, since the last line of the log
    count: int = 0  # steps in these sums
    log_bytes: int = 0
    log_crc: int | None = None  # of these bytes; older checkpoints have none


@contextmanager
def as_written(path: Path | None) -> Iterator[None]:
    """Within, what a checkpoint that no run wrote makes Python or torch raise becomes an InputError about the folder `path`."""
    try:
        yield
    except InputError:
        raise
    except BROKEN as error:
        if is_out_of_memory(error):
            raise
        what = f"{type(error).__name__}: {first_line(error)[:200]}"
        remedy = "restore it, or start again in another --out"
        raise InputError(f"--resume: the checkpoint in {path} is not as a run writes it ({what}): {remedy}") from error


def check_form(saved: dict[str, Any], path: Path | None) -> None:
    """Raise InputError, or one of BROKEN, where a part of the checkpoint is missing or of another kind."""
    for name, kind in (KINDS | {name: LATER[name] for name in LATER.keys() & saved.keys()}).items():
        _need(is_a(saved[name], kind), name)
    _need(config_beside(saved, f"--resume: the checkpoint in {path}") is not None, "config")
    if odd := next((kind for t in tree_leaves(saved) if isinstance(t, Tensor) and (kind := unusual_kind(t))), ""):
        raise TypeError(f"it holds {odd} tensors")
    progress, hints = Progress(**saved["progress"]), get_type_hints(Progress)
    for name, value in asdict(progress).items():
        _need(is_a(value, hints[name]) and not (isinstance(value, int) and value < 0), name)
    best = progress.best
    _need(best is None or (is_a(best, dict[str, float]) and best.keys() >= {"epoch", "clean", "pgd"}), "the best validation")
    _need((best is None) == (saved["best"] is None), "the best weights")
    for process in saved["processes"]:
        _need(is_a(process["sums"], dict[str, float]) and is_a(process.get("step", {}), dict[str, Tensor]), "a process")
    _need(bool(saved["processes"]), "processes")
    snapshot = saved.get("snapshot")
    _need(snapshot is None or all(is_a(snapshot[name], kind) for name, kind in STEP.items()), "snapshot")


def check_loaded(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Raise as `check_form` where what is read later does not fit the model, or where a moment does not fit its weight."""
    shapes = {name: t.shape for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    for name, state in {
        "ema": saved["ema"],
        "best": saved["best"],
        "snapshot": (saved.get("snapshot") or {}).get("model"),
    }.items():
        same = state is None or {n: t.shape for n, t in state.items() if isinstance(t, Tensor)} == shapes
        _need(same, f"the weights of {name}")
    for weight, moments in optimizer.state.items():
        _need(moments.keys() in MOMENTS, "the optimizer")
        fits = (t.shape in (weight.shape, torch.Size()) for t in moments.values())
        _need(all(fits), "the optimizer")
    for group in optimizer.param_groups:
        numbers = (value for name, value in group.items() if name not in ("params", "betas"))
        _need(all(value is None or isinstance(value, (bool, int, float)) for value in numbers), "the optimizer")
        _need(is_a(group.get("betas", ()), tuple[float, ...]), "the optimizer")


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise TypeError(f"{what} is of another kind")

"""Files that hold weights: read without running code from them, and searched for the entries that are the weights."""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..runtime import json_files
from ..runtime.atomic_write import check_sums

WEIGHTS = ("auto", "model", "ema")
# Names that code saves weights under, the usual ones first; averaged ones: ema, model_ema, state_dict_ema, swa_model, ...
KEYS = ["model", "state_dict", "model_state_dict", "model_state", "net", "network", "weights", "params"]
KEYS += ["module", "shadow", "last"]
AVERAGED = re.compile(r"(^|[._])(ema|swa)([._]|$)")
LEVELS = 3  # of dicts around a state dict
LISTED = 8
MOST = 10**5  # entries around a state dict that are looked at
METADATA = "spat_train"  # in a .safetensors file: its format, config and `digest` as JSON


class _Ignored:
    """Stands for harmless objects beside the weights, such as NumPy's scalars, whose content is dropped."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class _Number(_Ignored):
    """A scalar of NumPy."""


_IGNORED = ["argparse.Namespace", "numpy.dtype", "numpy.ndarray"]
_IGNORED += [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_IGNORED += [f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("", "Posix", "Windows")]


def read_weights(path: str | Path, weights: str = "auto") -> dict[str, Tensor]:
    """The state dict in `path`, on the CPU, with the names that it has there.

    Args:
        path: what `torch.save` wrote: a state dict, or dicts around one, under a usual name ("model", "state_dict", "net", ...)
            or as the only one; or a .safetensors file.
        weights: "model" and "ema" (averaged weights) insist, "auto" takes "ema" where there is one.

    Raises:
        InputError: it is no such file, or has no such weights.
        ValueError: `weights` is not one of the three.
    """
    return select(read_file(path), weights, path)


def read_file(path: str | Path) -> Any:
    """What `torch.save` wrote to `path`, its tensors on the CPU; or the tensors in a .safetensors file.

    An InputError where it is no such file, it is damaged, or it holds objects that could run code.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise _refused(path, "it is a folder: give a file that torch.save wrote")
    if not os.path.isfile(path):  # that of Path raises on names that are too long
        raise _refused(path, "there is no such file: give one that torch.save wrote")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        if what := _something_else(path, head):
            raise _refused(path, what)
        if path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size):
            return _safetensors(path)
        if head.startswith(b"PK"):
            check_sums(path)
        with torch.serialization.safe_globals([(_Number if "scalar" in name else _Ignored, name) for name in _IGNORED]):
            # Not mapped: a file that is cut short meanwhile would end the process.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise _refused(path, f"it is damaged ({error}): copy or download it again") from error
    except Exception as error:  # on files that are none, the unpickler fails in any way
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise _refused(
                path,
                f"it holds an object of {unsafe[1]}, which was refused: only weights are read, since other objects can run "
                "code. If you trust the file, load it with torch.load(weights_only=False) and save its state_dict",
            ) from error
        text = isinstance(error, (OSError, RuntimeError)) and str(error)  # those of others are about the unpickler
        reason = first_line(error).split(". ")[0][:200] if text else type(error).__name__
        remedy = "give a whole file that torch.save wrote, of weights or dicts of them"
        raise _refused(path, f"cannot be read ({reason}): {remedy}") from error


def _refused(path: str | Path, what: str) -> InputError:
    return InputError(f"checkpoint {path}: {what}")


def _something_else(path: Path, head: bytes) -> str:
    """Why the file cannot hold weights, and the remedy; "" where it may."""
    if not head:
        return "it is empty: copy or download it again"
    if re.match(rb"(\xef\xbb\xbf)?\s*<[!?a-zA-Z]", head):
        return "it is a web page, not the file behind it: open it in a browser to see why, and download the file again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: run git lfs pull"
    if not head.startswith(b"PK"):
        return ""
    if not zipfile.is_zipfile(path):
        return f"it is cut short or damaged (a zip without its end, {path.stat().st_size:,} bytes): copy or download it again"
    with zipfile.ZipFile(path) as parts:
        names = parts.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript archive: load it with torch.jit.load and save its state_dict"
    if not any(name.endswith("/data.pkl") for name in names):
        return f"it is a zip file of other things ({listed(names)}): give a file that torch.save wrote"
    return ""


def _safetensors(path: Path) -> dict[str, Any]:
    """Its tensors; where `spat-train export` wrote it, as "model" beside what its metadata say, as in a checkpoint of a run."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise _refused(path, "reading it needs safetensors, which is not installed: pip install safetensors") from error
    try:
        content = path.read_bytes()
        state = load(content)  # checks the header, too
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise _refused(path, f"it is cut short or damaged ({first_line(error)}): copy or download it again") from error
    if not isinstance(about, dict) or not about:
        return state
    about = json_files.checked(about, path)
    if "sha256" in about and about["sha256"] != digest(state):  # exports of earlier versions have none
        raise _refused(path, "it is damaged (its weights differ from their SHA-256): copy or download it again")
    return {**about, "model": state}


def digest(state: dict[str, Tensor]) -> str:
    """The SHA-256 of contiguous tensors on the CPU with their names, dtypes and shapes, in the order of the names."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def select(content: Any, weights: str, path: str | Path) -> dict[str, Tensor]:
    """The state dict in the content of a file; `weights` as in `read_weights`."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: give 'auto', 'model' or 'ema'")
    if len(entries := list(islice(_entries(content), MOST))) == MOST:  # such as a dict that holds itself in many places
        raise _refused(path, "it holds too many other entries: save model.state_dict() alone")
    found = {keys: value for keys, value in entries if _is_state_dict(value)}
    averaged = {keys: state for keys, state in found.items() if any(map(AVERAGED.search, keys))}
    unread = [keys[-1] for keys, value in entries if keys and AVERAGED.search(keys[-1]) and _are_weights(value)]
    if weights != "model" and unread and not averaged:
        what = f"its {unread[0]!r}, for averaged weights, has none with names"
        raise _refused(path, f"{what}: save the weights that you mean, or use weights='model'")
    if weights == "ema" and not averaged:
        raise _refused(path, "it holds no averaged weights: use weights='model' or 'auto'")
    candidates = averaged if averaged and weights != "model" else {k: s for k, s in found.items() if k not in averaged}
    if not candidates:
        kind = f"its entries: {listed(map(_name, content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise _refused(path, f"it holds no weights ({kind}): save model.state_dict(), alone or as 'state_dict'")

    def rank(keys: tuple[str, ...]) -> list[int]:
        return [KEYS.index(key) if key in KEYS else -1 if AVERAGED.search(key) else len(KEYS) for key in keys]

    best = min(candidates, key=rank)
    if len(candidates) > 1 and (len(KEYS) in rank(best) or [rank(keys) for keys in candidates].count(rank(best)) > 1):
        raise _refused(path, f"it holds several networks ({listed(map('.'.join, candidates))}): save the state_dict of one")
    if any(tensor.is_nested for tensor in candidates[best].values()):  # whose shape even cannot be asked for
        raise _refused(path, "it holds nested tensors: save dense ones")
    return candidates[best]


def _entries(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in nested dicts, down to state dicts, with the keys that lead to it."""
    yield keys, content
    if isinstance(content, dict) and not _is_state_dict(content) and len(keys) < LEVELS:
        for key, value in content.items():
            if isinstance(key, str):
                yield from _entries(value, (*keys, key))


def _is_state_dict(value: Any) -> bool:
    """Whether it maps names to tensors. A dict of single numbers holds metrics."""
    named = isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    return named and any(v.ndim for v in value.values())


def _are_weights(value: Any) -> bool:
    """Whether there are tensors in it, in any order, or what was not read. One alone is a curve or the like."""
    left, seen = [value], set[int]()  # lists may be deep, and hold themselves
    while left and len(seen) < MOST:
        each = left.pop()
        if isinstance(each, _Ignored) and not isinstance(each, _Number):
            return True
        if isinstance(each, (dict, list, tuple)) and id(each) not in seen:
            seen.add(id(each))
            values = each.values() if isinstance(each, dict) else each
            if any(isinstance(v, Tensor) and v.ndim > 0 for v in values):
                return True
            left += values
    return False


def _name(key: object) -> str:
    return key if isinstance(key, str) else f"a {type(key).__name__}"


def listed(names: Iterable[str]) -> str:
    """The first few."""
    names = list(names)
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")

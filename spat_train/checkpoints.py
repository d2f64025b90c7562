"""Weights from files: this package's own, and the public ones of TRADES, MART, RST, RobustBench and the like.

Files are read with `weights_only=True`: no code in them runs. A file cannot tell that its network was trained on images that were
normalised outside of it, as some public ones were: such a network needs a `Normalize` before it, with those numbers.
"""

import argparse
import dataclasses
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .images import Dataset, InputError
from .models import Normalize, create, try_on

WEIGHTS = ("auto", "model", "ema")
# Names that public code saves weights under, averaged ones apart.
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "weights", "params", "last")
EMA_KEYS = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict")
WRAPPERS = re.compile(r"^((module|model|_orig_mod)\.)+")  # DataParallel, nn.Sequential(normalize=..., model=...), torch.compile
LISTED = 8


def load_checkpoint(model: nn.Module, path: str | Path, *, weights: str = "auto") -> None:
    """Fill `model` with the weights in `path`, all of them or none: device, dtype, mode and requires_grad stay as they are.

    Names may differ by wrappers, "module.", "model." and "_orig_mod.", on either side. `sub_block1` in files of TRADES and MART
    is left out (no forward uses it), `num_batches_tracked` may be missing, and so may the numbers of a `Normalize`: the model's
    then stay.

    Args:
        path: a file of `read_weights`.
        weights: as for `read_weights`.

    Raises:
        InputError: the file cannot be read or does not fit; `model` is unchanged.
        ValueError: `weights` is not one of the three.
    """
    content = _read(path)
    file = _select(content, weights, path)
    own = model.state_dict(keep_vars=True)
    source, unexpected = _match(file, own)

    optional = {f"{at}.{name}" for at, m in model.named_modules() if isinstance(m, Normalize) for name in ("mean", "std")}
    missing = [name for name in own if name not in source and name not in optional and not name.endswith("num_batches_tracked")]
    misshaped = [(name, file[at].shape, own[name].shape) for name, at in source.items() if file[at].shape != own[name].shape]
    if missing or unexpected or misshaped:
        shapes = [f"{name} {list(theirs)} (the model has {list(ours)})" for name, theirs, ours in misshaped]
        lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        what = "; ".join(f"{kind}: {_listed(names)}" for kind, names in lists if names)
        raise InputError(f"checkpoint {path}: it does not fit the model: {what}: {_hint(missing, unexpected, misshaped, source)}")
    if not optional and content.get("normalize_input"):  # RST's files say so
        raise InputError(
            f"checkpoint {path}: its network normalises images itself (normalize_input), the model does not: "
            "put a spat_train.models.Normalize with the mean and std of its training before the model"
        )
    with torch.no_grad():
        for name, at in source.items():
            own[name].copy_(file[at])


def load_model(path: str | Path, dataset: Dataset, name: str | None = None) -> tuple[nn.Module, Config | None]:
    """The model in `path`, for the images and classes of `dataset`, in eval mode on the CPU; and the config of its run.

    Args:
        path: the folder of a run, of which best.pt is taken, else last.pt; or a file of `read_weights`.
        name: the architecture, as `spat_train.models.create` takes it. None is that of the run.

    Raises:
        InputError: there is no such checkpoint, no run tells the architecture, or weights and data do not fit it.
    """
    file, config = checkpoint_file(path), run_config(path)
    activation = config.activation if config and name in (None, config.model) else "relu"
    name = name or (config.model if config else None)
    if name is None:
        raise InputError(f"{path}: it does not say which architecture it is: give --model-name, such as wrn-34-10")
    where = f"{path} as {name} for {dataset.name} ({dataset.num_classes} classes, images {list(dataset.image_shape)})"
    try:
        with torch.random.fork_rng(devices=[]):  # initialising draws
            model = create(name, dataset.num_classes, dataset.image_shape, activation=activation).eval()
            try_on(model, dataset.image_shape, dataset.num_classes)  # lazy layers have no weights before
        load_checkpoint(model, file)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        if config and name == config.model:  # it fits what it was trained on
            reason = f"it was trained on {config.data}, and these images or classes are others: give other --data ({reason})"
        elif config:
            reason = f"the run is a {config.model}: leave out --model-name ({reason})"
        raise InputError(f"{where}: {reason}") from error
    return model, config


def with_classes_of(path: str | Path, dataset: Dataset) -> Dataset:
    """`dataset`; where it does not tell how many classes there are, with those of the last layer in the run or file `path`."""
    if dataset.all_classes:
        return dataset
    last = [len(tensor) for tensor in read_weights(checkpoint_file(path)).values() if tensor.ndim][-1:]
    return dataclasses.replace(dataset, classes=tuple(map(str, range(max([dataset.num_classes, *last])))))


def checkpoint_file(path: str | Path) -> Path:
    """`path`, or in the folder of a run its best checkpoint."""
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise InputError(
                f"{path}: there is no such run or checkpoint: give the folder of a run, or a file that torch.save wrote"
            )
        return path
    found = [path / name for name in ("best.pt", "last.pt") if (path / name).is_file()]
    if not found:
        raise InputError(f"{path}: no best.pt or last.pt there: give the folder of a run, or a checkpoint")
    return found[0]


def run_config(path: str | Path) -> Config | None:
    """The config of the run that wrote the folder or checkpoint `path`; None for checkpoints of others.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir() and (path / "config.json").is_file():
        try:
            content = json.loads((path / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{path / 'config.json'} cannot be read ({type(error).__name__}): restore it") from error
    else:
        content = _read(checkpoint_file(path))
        content = content.get("config") if isinstance(content, dict) and "format" in content else None
    if not isinstance(content, dict):
        return None
    known = {f.name for f in dataclasses.fields(Config)}
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items() if name in known}
    return Config(**values)


def read_weights(path: str | Path, weights: str = "auto") -> dict[str, Tensor]:
    """The state dict in `path`, on the CPU, with the names that it has there.

    Args:
        path: what `torch.save` wrote: a state dict, or a dict with one under a usual name ("model", "state_dict", "net", ...), at
            most two levels down.
        weights: "model" and "ema" (averaged weights) insist, "auto" takes "ema" where there is one.

    Raises:
        InputError: it is no such file, or has no such weights.
        ValueError: `weights` is not one of the three.
    """
    # Copied from the mapped file, which the caller may want to write to.
    return {name: tensor.clone() for name, tensor in _select(_read(path), weights, path).items()}


def _read(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: there is no such file: give one that torch.save wrote")
    try:
        # Namespace holds the command line in many files, and does nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # on files that are none, the unpickler fails in any way
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise InputError(
                f"checkpoint {path}: it holds an object of {refused[1]}, which was refused: only weights are read, since other "
                "objects can run code. If you trust the file, load it with torch.load(weights_only=False) and save its state_dict"
            ) from error
        told = isinstance(error, (OSError, RuntimeError)) and str(error)  # others tell about the unpickler
        reason = told.splitlines()[0].split(". ")[0][:200] if told else type(error).__name__
        raise InputError(
            f"checkpoint {path}: cannot be read ({reason}): give a whole file that torch.save wrote, of weights or dicts of them"
        ) from error


def _select(content: Any, weights: str, path: str | Path) -> dict[str, Tensor]:
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: give 'auto', 'model' or 'ema'")
    entries = content if isinstance(content, dict) else {}
    averaged = next((found for key in EMA_KEYS for found in _state_dicts(entries.get(key))), None)
    if weights == "ema" and averaged is None:
        raise InputError(f"checkpoint {path}: it holds no averaged weights: use weights='model' or 'auto'")
    found = averaged if averaged is not None and weights != "model" else next(_state_dicts(content), None)
    if found is None:
        kind = f"its entries: {_listed(list(map(str, content)))}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(f"checkpoint {path}: it holds no weights ({kind}): save model.state_dict(), alone or as 'state_dict'")
    return found


def _state_dicts(content: Any, levels: int = 2) -> Iterator[dict[str, Tensor]]:
    if not isinstance(content, dict):
        return
    if content and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        yield content
    elif levels:
        for key in MODEL_KEYS:
            yield from _state_dicts(content.get(key), levels - 1)


def _match(file: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """The model's names -> the file's, and what the file has besides."""
    source = {name: name for name in file if name in own}
    bare = {WRAPPERS.sub("", name): name for name in own}
    unexpected = []
    for name in file:
        if name in own:
            continue
        target = bare.get(WRAPPERS.sub("", name))
        if target is not None and target not in source:
            source[target] = name
        elif not WRAPPERS.sub("", name).startswith("sub_block1."):
            unexpected.append(name)
    return source, unexpected


def _hint(missing: list[str], unexpected: list[str], misshaped: list[tuple], fitting: dict[str, str]) -> str:
    """What the model probably should have been."""
    if any(re.search(r"(^|\.)(new_)?(mean|std|mu|sigma)$", name) for name in unexpected):
        return "the file's network normalises its images: put a spat_train.models.Normalize before the model"
    if missing or unexpected:
        kinds, others = (
            {re.sub(r"\d+", "#", WRAPPERS.sub("", name)) for name in names} for names in (fitting, missing + unexpected)
        )
        if not others <= kinds:
            return "the file looks like another architecture: create that one"
        return "the file looks like this architecture in another depth" + (" or width" if misshaped else "") + ": create that one"
    _, theirs, ours = misshaped[0]
    if len(misshaped) <= 2 and all(a and b and a[1:] == b[1:] and a[0] == theirs[0] for _, a, b in misshaped):
        return f"the file looks like {theirs[0]} classes, the model has {ours[0]}: create it with num_classes={theirs[0]}"
    if len(misshaped) == 1:
        return "the file looks like images of another shape or another stem: create the model for those"
    return "the file looks like this architecture in another width: create that one"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")

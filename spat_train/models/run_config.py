"""The checkpoint and the config of a trained run, and the name of the architecture in it."""

import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..config import Config
from ..errors import InputError
from ..runtime import json_files
from .external import is_code
from .weight_files import listed, read_file


def chosen_name(path: str | Path, config: Config | None, name: str | None, option: str) -> str:
    """The architecture of the run or checkpoint `path`: `name`, which `option` gave, else that of its config if it is no code."""
    if name is not None:
        return name
    if config is None:
        raise InputError(f"{path}: it does not say which architecture it is: give {option}, such as wrn-34-10")
    if is_code(config.model):
        raise InputError(f"{path}: it names code, {config.model}, which would run: if you trust it, give {option} {config.model}")
    return config.model


def checkpoint_file(path: str | Path) -> Path:
    """`path`; or in the folder of a run its best checkpoint, and in one of `spat-train export` its weights."""
    path = Path(path)
    if not os.path.isdir(path):
        if not os.path.isfile(path):  # those of Path raise on names that are too long
            remedy = "give the folder of a run, or a file that torch.save wrote"
            raise InputError(f"{path}: there is no such run or checkpoint: {remedy}")
        return path
    found = [path / name for name in ("best.pt", "last.pt", "model.safetensors") if (path / name).is_file()]
    if not found:
        raise InputError(f"{path}: no best.pt, last.pt or model.safetensors there: give the folder of a run, or a checkpoint")
    return found[0]


def run_config(path: str | Path, content: Any = None) -> Config | None:
    """The config of the run that wrote the folder or checkpoint `path`; None for checkpoints of others.

    Args:
        content: that of the checkpoint, where it has been read.
    """
    file = Path(path) / "config.json"
    if not os.path.isfile(file):
        return config_beside(content if content is not None else read_file(checkpoint_file(path)), path)
    return _config(json_files.read(file), file)


def config_beside(content: Any, path: str | Path) -> Config | None:
    """The config in a checkpoint that a run wrote; None for those of others."""
    ours = isinstance(content, dict) and str(content.get("format")).startswith("spat_train ")
    return _config(content.get("config"), path) if ours else None


def _config(content: Any, path: str | Path) -> Config | None:
    """`content`, read from JSON, as a config; None where no run and no export wrote it. Checked, as files may be edited."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), str):
        return None
    if not (content.keys() >= {"method", "epochs"} or str(content.get("format")).startswith("spat_train ")):
        return None
    kinds = get_type_hints(Config)
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items() if name in kinds}
    config = Config(**values)
    if odd := [f"{name}={values[name]!r}" for name in values if not is_a(getattr(config, name), kinds[name])]:
        raise InputError(f"{path}: no run writes such a config ({listed(odd)}): restore it")
    return config


def is_a(value: Any, kind: Any) -> bool:
    """Whether `value` is of the type `kind` of an option. Numbers are finite."""
    kinds, container = get_args(kind), get_origin(kind)
    if kind is Any:
        return True
    if container is Literal:
        return isinstance(value, (str, type(None))) and value in kinds
    if container in (tuple, list):
        return isinstance(value, container) and all(is_a(v, kinds[0]) for v in value)
    if container is dict:
        return isinstance(value, dict) and all(is_a(k, kinds[0]) and is_a(v, kinds[1]) for k, v in value.items())
    if kinds:
        return any(is_a(value, one) for one in kinds)
    if kind in (int, float) and isinstance(value, (int, float)) and not abs(value) < 2**63:  # infinite, or not a number
        return False
    if kind is bool:
        return isinstance(value, (bool, int)) and value in (0, 1)
    whole = kind is int and isinstance(value, float) and value.is_integer()
    return whole or (isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool))

"""Models in the layout of the Hugging Face Hub: `spat-train export` writes it, `from_folder` and `from_pretrained` read it.

    model.safetensors   the weights; its metadata repeat config.json, so that the file alone says what it holds
    config.json         a run's config without what is about the machine, the classes, and what `packed` adds
    model.pt            the same weights as a plain state dict, for torch.load(weights_only=True)
    README.md           the model card (spat_train/sharing/card.py)

Nothing in such a folder runs: an architecture that is code, package.module:factory, has to be repeated by the caller.
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FREE_ON_RESUME, Config
from ..errors import InputError, first_line
from ..runtime import json_files
from .checkpoints import check_size, fill, matched
from .networks import ImageShape
from .registry import create
from .run_config import chosen_name, config_beside, run_config
from .weight_files import METADATA, digest, listed, read_file, select
from .wrapping import normalizers

FORMAT = "spat_train model 1"
VERSION = "spat_kernels"  # that of the package, in config.json alone: equal weights are equal files in every version
NEEDED = ("config.json", "model.safetensors")
ARCHITECTURE = ("model", "activation", "classifier", "mean", "std", "data")  # all that is known of a checkpoint of others
PATHS = ("data", "extra", "init")  # only the names of these files are published
MOST = 4096  # pixels: of larger images the first two would take gigabytes
PRIVATE = set(FREE_ON_RESUME) - set(PATHS)


def from_folder(path: str | Path, model: str | None = None) -> nn.Module:
    """The model in a folder that `spat-train export` wrote: in eval mode, on the CPU, equal to the exported one to the bit.

    It takes images [B, C, H, W] in [0, 1], of the `image_shape` in config.json, to logits [B, num_classes]. Nothing is
    downloaded, and no code in the folder runs.

    Args:
        path: a folder with config.json and model.safetensors.
        model: the architecture, as `spat_train.models.create` takes it. Only where config.json names code, as
            package.module:factory, has it to be given: by repeating that name you allow it to run.

    Raises:
        InputError: a file is missing, damaged or written by something else, they do not fit each other, or a package is missing.
    """
    path = Path(path)
    content = _read_config(path)
    config = run_config(path)
    assert config is not None  # `_read_config` has checked that there is a model
    name = chosen_name(path, config, model, "model")
    classes, shape = content["num_classes"], tuple(content["image_shape"])
    file = path / "model.safetensors"
    saved = read_file(file)
    about = saved["config"] if config_beside(saved, file) else {}
    if differ := [key for key in about or content if content.get(key) != about.get(key)]:
        remedy = "export or download both again"
        raise InputError(f"{path}: model.safetensors and config.json do not belong together ({listed(differ)} differ): {remedy}")
    state = select(saved, "model", file)
    make = partial(create, name, activation=config.activation, classifier=config.last_layer)
    try:
        check_size(make, name, classes, shape, state)
        network, match = matched(partial(make, mean=config.mean, std=config.std), classes, shape, state)
    except (ValueError, RuntimeError) as error:  # torch raises the latter when memory runs out
        raise InputError(f"{path} as {name} for {classes} classes, images {list(shape)}: {first_line(error)}") from error
    fill(network, match, saved, file)
    return network


def from_pretrained(
    repo: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> nn.Module:
    """`from_folder` of a repository on the Hugging Face Hub, of which config.json and model.safetensors are downloaded.

    Args:
        repo: USER/NAME; or a folder, for which nothing is downloaded.
        model: as in `from_folder`.
        revision, cache_dir, local_files_only, token: as in `huggingface_hub.snapshot_download`: the branch, tag or commit; where
            downloads are kept; whether only those are used; what opens private repositories.

    Raises:
        InputError: it cannot be downloaded, huggingface_hub is missing, or as in `from_folder`.
    """
    if os.path.isdir(repo):
        for name, value in {"revision": revision, "cache_dir": cache_dir, "token": token}.items():
            if value is not None:
                raise InputError(f"{name}: {repo} is a folder, of which nothing is downloaded: leave {name} out")
        return from_folder(repo, model)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        needs = "downloading it needs huggingface_hub, which is not installed"
        raise InputError(f"{repo}: there is no such folder, and {needs}: pip install huggingface_hub") from error
    try:
        folder = snapshot_download(
            str(repo), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token,
            allow_patterns=list(NEEDED),
        )  # fmt: skip
    except Exception as error:  # those of the HTTP library too, which differs from version to version
        remedy = "give an existing folder, or USER/NAME of a repository that you can reach"
        raise InputError(f"{repo}: it cannot be downloaded ({type(error).__name__}: {first_line(error)}): {remedy}") from error
    return from_folder(folder, model)


def packed(
    network: nn.Module, config: Config, classes: Sequence[str], image_shape: ImageShape, *, trained: bool
) -> dict[str, bytes]:
    """The content of config.json, model.safetensors and model.pt for `network`; a function of the arguments.

    Args:
        network: as `load_model` gives it.
        config: that of its run, with the name of the architecture that `network` was created by; see `published`.
        trained: whether a run made the weights; else only ARCHITECTURE is taken from `config`.

    Raises:
        InputError: a weight is NaN, or safetensors is not installed.
    """
    options = {key: v for key, v in config.to_dict().items() if key in ARCHITECTURE or (trained and key not in PRIVATE)}
    # Whoever set them: the run, timm or the file. `mean` and `std` are the run's options.
    numbers = [{key: getattr(n, key).flatten().tolist() for key in ("mean", "std")} for n in normalizers(network).values()]
    content = {
        "format": FORMAT, "library_name": "spat_kernels", "num_classes": len(classes), "classes": list(classes),
        "image_shape": list(image_shape), "normalisation": next(iter(numbers), None),
    } | options  # fmt: skip
    state = {key: _portable(t) for key, t in network.state_dict().items() if isinstance(t, Tensor)}
    if bad := [name for name, t in state.items() if t.is_floating_point() and t.isnan().any()]:
        raise InputError(f"{config.model}: it has weights that are NaN ({listed(bad)}): take those of an earlier checkpoint")
    plain = io.BytesIO()
    torch.save(state, plain)
    return {
        "config.json": json_files.to_bytes(content | {VERSION: version(VERSION)}),
        "model.safetensors": _safetensors(state, {"format": FORMAT, "sha256": digest(state), "config": content}),
        "model.pt": plain.getvalue(),
    }


def published(config: Config) -> Config:
    """`config` without paths, which are private: only the names of the files stay."""
    given = {key: os.fspath(value) for key in PATHS if (value := getattr(config, key))}
    return replace(config, **{key: os.path.basename(path.rstrip("/")) for key, path in given.items()})


def _portable(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, in memory of its own though another may be tied to it, and in fp32 where it has fewer bits."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.detach().to("cpu", torch.float32 if half else tensor.dtype).clone(memory_format=torch.contiguous_format)


def _safetensors(state: dict[str, Tensor], about: dict) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise InputError(
            "model.safetensors: writing it needs safetensors, which is not installed: pip install safetensors"
        ) from error
    # One entry: of several, the order differs from call to call.
    return save(state, {METADATA: json.dumps(json_files.with_digest(about))})


def exported_config(path: Path) -> dict[str, Any] | None:
    """The content of config.json in a folder that `spat-train export` wrote; None where there is no such file, or another's."""
    if not os.path.isfile(path / "config.json"):
        return None
    content = json_files.read(path / "config.json")
    ours = isinstance(content, dict) and str(content.get("format")).startswith(FORMAT.rstrip("0123456789"))
    return content if ours else None


def _read_config(path: Path) -> dict[str, Any]:
    """The checked content of config.json. Raises InputError where a file is missing, or it is none of ours."""
    file = path / "config.json"
    for name in NEEDED:
        if not os.path.isfile(path / name):  # that of Path raises on names that are too long
            raise InputError(f"{path}: there is no {name}: give a folder that spat-train export wrote")
    content = exported_config(path)
    if content is None:
        raise InputError(f"{file}: spat-train export did not write it: load the folder with the library that did")
    if content["format"] != FORMAT:
        raise InputError(f"{file}: it is of another version ({content['format']}): install a newer spat_kernels")
    check_described(content, file)
    if not _whole(content.get("num_classes")) or content["num_classes"] != len(content["classes"]):
        raise _odd(content, "num_classes", file)
    if not isinstance(content.get("model"), str):
        raise _odd(content, "model", file)
    return content


def check_described(content: dict[str, Any], file: Path) -> None:
    """Raise InputError where `content` of `file` has no classes or no image shape as runs and exports write them."""
    names, shape = content.get("classes"), content.get("image_shape")
    if not (isinstance(names, list) and len(names) >= 2 and all(isinstance(name, str) for name in names)):
        raise _odd(content, "classes", file)
    if not (isinstance(shape, list) and len(shape) == 3 and all(_whole(side) and 0 < side <= MOST for side in shape)):
        raise _odd(content, "image_shape", file)


def _odd(content: dict[str, Any], name: str, file: Path) -> InputError:
    shown = f"{content.get(name)!r}"[:100]
    return InputError(f"{file}: no run or export writes {name}={shown}: restore it, or export or download it again")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

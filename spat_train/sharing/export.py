"""`spat-train export`: the model of a run, or a checkpoint, as a folder for the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from ..command_line import DEFAULT_IN_HELP
from ..config import Config
from ..data.images import Dataset, Images
from ..errors import InputError, first_line
from ..evaluation.command import EvaluateOptions, load_data
from ..models.checkpoints import load_model, with_classes_of
from ..models.external import is_code
from ..models.hub import FORMAT, check_described, exported_config, packed, published
from ..models.run_config import checkpoint_file, chosen_name, config_beside, run_config
from ..models.weight_files import read_file, select
from ..models.wrapping import normalisation
from ..objectives import ClassifierName
from ..runtime import atomic_write
from .card import Subject, card, edited
from .results import results_of, same_state

FILES = ("config.json", "model.safetensors", "model.pt", "README.md")


def export(
    run: str | Path,
    out: str | Path,
    *,
    evaluation: str | Path | None = None,
    dataset: Dataset | None = None,
    model_name: str | None = None,
    activation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classifier: str | None = None,
    license: str | None = None,
) -> Path:
    """Write the model of a run for others, in the layout of the Hugging Face Hub; `spat_train.from_folder` loads it.

    The folder gets model.safetensors, model.pt (a plain state dict), config.json and the model card README.md. The weights are
    those that a run is judged by: of best.pt where there is one, the averaged ones where there are such. Numbers go into the card
    only where their files show that they are about these very weights. The same arguments write the same bytes.

    Args:
        run: the folder of a run, or a checkpoint.
        out: an empty or new folder, or that of an earlier export of the same weights, whose card nobody has changed.
        evaluation: what `spat-train evaluate` wrote, an evaluation.json or its folder. None is that in its usual place, where
            there is one.
        dataset: with the classes and the image shape of the model, where its file does not say them, as those of runs do.
        model_name: the architecture, for checkpoints of others, and where the run names code, which would run.
        activation, mean, std, classifier: as `spat_train.create_model` takes them, for checkpoints of others alone.
        license: of the weights, as the Hub names it, such as "mit". None leaves it to you to add one.

    Returns:
        `out`.

    Raises:
        InputError: an argument does not fit, safetensors is missing, or `out` holds something else.
        SaveError: the disk is full.
    """
    run, out = Path(run), Path(out)
    content = read_file(file := checkpoint_file(run))
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise InputError(f"{run}: it is an export already: copy it, or export its run again")
    _check_out(out)
    config = run_config(run, content)
    name = chosen_name(run, config, model_name, "--model-name")
    own = _own_dataset(content, config, file)
    if own and dataset:
        raise InputError(f"--data {dataset.name}: {run} says its classes and the shape of its images: leave it out")
    dataset = own or dataset or load_data(EvaluateOptions(run), config)
    network, config = load_model(run, dataset, name, activation=activation, mean=mean, std=std, classifier=classifier)
    if config and (of_weights := config_beside(content, file)) and (changed := config.differences(of_weights.to_dict())):
        options = "; ".join(changed)
        raise InputError(f"{run / 'config.json'}: {file.name} was made with other options ({options}): restore it")
    dataset = with_classes_of(network, dataset)
    known: dict[str, Any] = {"activation": activation or "relu", "mean": mean and tuple(mean), "std": std and tuple(std)}
    known["classifier"] = classifier
    made = config or Config(data=dataset.name, **known)
    shared = published(replace(made, model=name))
    files = packed(network, shared, dataset.classes, dataset.image_shape, trained=config is not None)
    subject = Subject(
        name, is_code(name), shared if config else None, made.data, dataset.classes, dataset.image_shape,
        normalisation(network), version("spat_kernels"),
    )  # fmt: skip
    try:
        text = card(subject, results_of(run, network, Path(evaluation) if evaluation else None), license)
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:  # files that were edited
        what = f"last.pt, result.json or the evaluation is not as it was written ({type(error).__name__}: {first_line(error)})"
        raise InputError(f"{run}: {what}: restore or remove it") from error
    _write(out, files | {"README.md": text.encode()})
    return out


def export_command(
    model: Path,
    /,
    out: Path,
    evaluation: Annotated[Path | None, DEFAULT_IN_HELP] = None,
    license: Annotated[str | None, DEFAULT_IN_HELP] = None,
    model_name: Annotated[str | None, DEFAULT_IN_HELP] = None,
    activation: Annotated[Literal["relu", "silu", "gelu", "softplus"] | None, DEFAULT_IN_HELP] = None,
    mean: Annotated[tuple[float, ...] | None, DEFAULT_IN_HELP] = None,
    std: Annotated[tuple[float, ...] | None, DEFAULT_IN_HELP] = None,
    classifier: Annotated[ClassifierName | None, DEFAULT_IN_HELP] = None,
    data: Annotated[str | None, DEFAULT_IN_HELP] = None,
    root: Path = Path("data"),
    image_size: Annotated[int | None, DEFAULT_IN_HELP] = None,
) -> None:
    """Write a model with its card for the Hugging Face Hub, to be loaded by spat_train.from_folder.

    The card says how it was trained and how robust it is, by the run's own test and by `spat-train evaluate`. Numbers of other
    weights are left out. The folder can be given to `evaluate` and to `train --init`.

    Args:
        model: the folder of a run, or a checkpoint.
        out: a new folder for model.safetensors, model.pt, config.json and README.md, or that of an earlier export of the same.
        evaluation: what `spat-train evaluate` wrote: its folder, or the evaluation.json in it. Default: that of the run.
        license: of the weights, as the Hub names it, such as mit or cc-by-4.0. Default: none is said.
        model_name: the architecture, as --model in `spat-train train`. Default: that of the run. Where that is code, as
            package.module:factory, it has to be given again: it would run.
        activation: what replaces every ReLU of the model, where it is no run's. Default: they stay.
        mean: of the normalisation that a checkpoint of others was trained with. Default: that in the file.
        std: its standard deviation. Default: as --mean.
        classifier: centres for Max-Mahalanobis centres, where the model is no run's. Default: linear.
        data: data of the model, for the shape of its images and the names of its classes, where its file does not say them, as
            those of runs do.
        root: where torchvision's data sets are.
        image_size: side of the images of a folder or of shards. Default: that of the run.
    """
    if image_size and not data:
        raise InputError(f"--image-size {image_size}: it is of the pictures in --data: give both, or neither")
    options = EvaluateOptions(model, data=data, root=root, image_size=image_size)
    dataset = load_data(options, run_config(model)) if data else None
    export(
        model, out, evaluation=evaluation, dataset=dataset, model_name=model_name, activation=activation, mean=mean, std=std,
        classifier=classifier, license=license,
    )  # fmt: skip
    print(f"{out} written: {', '.join(FILES)}")


def _own_dataset(content: Any, config: Config | None, file: Path) -> Dataset | None:
    """The classes and the image shape that a run's checkpoint has, without images; None for those of others, and older ones."""
    if config is None or "classes" not in content:
        return None
    check_described(content, file)
    channels, height, width = content["image_shape"]
    none = Images(torch.empty(0, height, width, channels, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    return Dataset(config.data, none, none, tuple(content["classes"]))


def _check_out(out: Path, files: dict[str, bytes] | None = None) -> None:
    """Raise InputError where `out` holds something that `files`, or any, must not replace."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: it is a file: choose another folder")
    there = {path.name for path in out.iterdir() if path.name[0] != "."} if out.is_dir() else set()
    there -= {f"{name}.tmp" for name in FILES}  # of an export that was stopped
    others = [name for name in FILES if (out / name).is_dir()] or sorted(there if exported_config(out) is None else [])
    if others:
        raise InputError(f"--out {out}: it holds {others[0]}, and no model that spat-train export wrote: choose another folder")
    if "README.md" in there and edited((out / "README.md").read_text("utf-8", "replace")):
        raise InputError(f"--out {out}: its README.md was changed by hand: move it away, or choose another folder")
    weights = out / "model.safetensors"
    if files and weights.name in there and not _same_weights(weights, files[weights.name]):
        raise InputError(f"--out {out}: it holds another model: remove it, or choose another folder")


def _same_weights(file: Path, content: bytes) -> bool:
    from safetensors.torch import load

    return same_state(select(read_file(file), "model", file), load(content))


def _write(out: Path, files: dict[str, bytes]) -> None:
    """Each file in one step, config.json first: where that is, a stopped export may be finished by the same command."""
    _check_out(out, files)
    atomic_write.make_folder(out)
    for name in FILES:
        if not (out / name).is_file() or (out / name).read_bytes() != files[name]:
            atomic_write.write(out / name, files[name])

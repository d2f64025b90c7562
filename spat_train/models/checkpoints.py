"""Weights into models: from this package's own files, and the public ones of TRADES, MART, RST, RobustBench and the like.

No code in a file runs. No file holds everything that a function depends on: networks trained on images normalised outside need a
`Normalize` with those numbers, and activations, the stem of a ResNet ("/cifar" or "/stl10") and the shortcut of a PreActResNet
leave no trace in the weights either. The runs of this package record all of these in their config.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spat_kernels.checks import warn

from ..config import Config
from ..data.images import Dataset
from ..errors import InputError, first_line
from .external import is_code
from .matching import NORMALIZE, Match, misfit
from .networks import ImageShape
from .networks.deepmind import DMNetwork
from .networks.preact_resnet import PreActResNet18, RawPreActBlock
from .registry import create, full_name
from .robustbench_names import network_name
from .run_config import checkpoint_file, chosen_name, config_beside, run_config
from .try_on import try_on
from .weight_files import listed, read_file, select
from .wrapping import normalising, normalizers, numbers_text, wrap

MUCH = 10**8  # weights that are made before it is known whether those of a file fit
PREACT = "'preactresnet-18/activated' (as in robust_overfitting) or 'preactresnet-18/raw' (as in fast_adversarial)"


class Misfit(InputError):
    """Weights do not fit. `sizes`: only shapes differ, as for images of another shape or another number of classes."""

    def __init__(self, message: str, sizes: bool):
        super().__init__(message)
        self.sizes = sizes


def load_checkpoint(model: nn.Module, path: str | Path, *, weights: str = "auto") -> None:
    """Fill `model` with the weights in `path`, all of them or none: device, dtype, mode and requires_grad stay as they are.

    What wraps the network makes no difference, on either side: nn.Sequential, DataParallel, torch.compile, AveragedModel, the
    AttackerModel of "robustness". The mean and std of a normalisation, under any usual names, go into the `Normalize` of the
    model; where the file has none, the model's stay. `num_batches_tracked` may be missing. kuangliu's ResNets (MART's and
    robustness') fit those of torchvision.

    Args:
        path: a file of `read_weights`.
        weights: as for `read_weights`.

    Raises:
        InputError: the file cannot be read or does not fit; `model` is unchanged.
        ValueError: `weights` is not one of the three.
    """
    content = read_file(path)
    state = select(content, weights, path)
    if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        raise InputError(f"checkpoint {path}: the model has lazy layers, without weights as yet: give it images first")
    fill(model, Match(state, model), content, path)


def load_model(
    path: str | Path,
    dataset: Dataset,
    name: str | None = None,
    *,
    activation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classifier: str | None = None,
    option: str = "--model-name",
) -> tuple[nn.Module, Config | None]:
    """The model in `path`, for the images and classes of `dataset`, in eval mode on the CPU; and the config of its run.

    Where the file holds the mean and std of a normalisation, the model has a `Normalize` with them. Where `dataset` does not know
    how many classes there are, the file decides.

    Args:
        path: the folder of a run, of which best.pt is taken, else last.pt; or a file of `read_weights`.
        name: the architecture, as `spat_train.models.create` takes it. None is that of the run.
        activation, mean, std, classifier: as `create` takes them, where neither a run nor the file says.
        option: what gives `name` on the command line, for messages.

    Raises:
        InputError: there is no such checkpoint, the architecture is not known, the run names code and `name` does not repeat
            it, or weights and data do not fit.
    """
    file = checkpoint_file(path)
    content = read_file(file)
    config = run_config(path, content)
    name = chosen_name(path, config, name, option)
    if config is not None:
        if activation or mean or std or classifier:
            raise InputError(f"--activation, --classifier, --mean, --std: {path} has a config that says them: leave them out")
        activation, mean, std, classifier = config.activation, config.mean, config.std, config.last_layer
    classes = dataset.num_classes
    try:
        state = select(content, "auto", file)
        make = partial(create, name, activation=activation or "relu", mean=mean, std=std, classifier=classifier or "linear")
        check_size(make, name, classes, dataset.image_shape, state)
        model, match = matched(make, classes, dataset.image_shape, state)
        if mean and config is None and (numbers := match.values()):
            raise InputError(f"--mean, --std: {file} holds its own ({numbers_text(*numbers)}): leave them out")
        if not dataset.all_classes and match.classes > classes:
            classes = match.classes
            model, match = matched(make, classes, dataset.image_shape, state)
        fill(model, match, content, file)
    except ValueError as error:
        reason = _blame(error, config, name, dataset.image_shape, option)
        images = f"{classes} classes, images {list(dataset.image_shape)}"
        raise InputError(f"{path} as {name} for {dataset.name} ({images}): {reason}") from error
    return model, config


def check_size(make: Callable[..., nn.Module], name: str, classes: int, shape: ImageShape, state: dict[str, Tensor]) -> None:
    """Raise InputError where the network has far more weights than the file, before it takes memory for them."""
    if ":" in name:  # those of others have a size each
        return
    with torch.device("meta"):
        needed = sum(t.numel() for t in make(classes, shape).state_dict().values())
    if needed > max(MUCH, 2 * (held := sum(t.numel() for t in state.values()))):
        raise InputError(f"it has {needed:,} weights, the file {held:,}: give the network that they are of")


def matched(make: Callable[..., nn.Module], classes: int, shape: ImageShape, state: dict[str, Tensor]) -> tuple[nn.Module, Match]:
    """A new model, normalised where `state` has the numbers for it, and where each weight of `state` goes in it."""
    with torch.random.fork_rng(devices=[]):  # initialising draws
        model = make(classes, shape).eval()
        try_on(model, shape, classes)  # lazy layers have no weights before
    match = Match(state, model)
    if (numbers := match.values()) and not normalising(model):
        model = wrap(model, *numbers, channels=shape[0])
        match = Match(state, model)
    return model, match


def _blame(error: ValueError, config: Config | None, name: str, shape: ImageShape, option: str) -> str:
    """The reason why a model could not be loaded: another architecture or other data than those of its run, or the error's."""
    reason = first_line(error)
    if config is None:
        return reason
    if full_name(name, shape) != full_name(config.model, shape):
        return f"the run is a {config.model}: give that as {option} ({reason})"
    misshaped = error.sizes if isinstance(error, Misfit) else not isinstance(error, InputError) and not reason.startswith("name=")
    if misshaped:
        others = "these images or classes are others: give other --data or --image-size"
        return f"it was trained on {config.data}, and {others} ({reason})"
    return reason


def with_classes_of(model: nn.Module, dataset: Dataset) -> Dataset:
    """`dataset`, with the classes of `model`, which `load_model` gave for it, where it does not know how many there are."""
    if dataset.all_classes:
        return dataset
    return dataclasses.replace(dataset, classes=tuple(map(str, range(try_on(model, dataset.image_shape)[0]))))


def fill(model: nn.Module, match: Match, content: Any, path: str | Path) -> None:
    """Copy the weights of `match` into `model`, all or none. `content`: all that the file `path` holds."""
    if reason := misfit(match):
        sizes = bool(match.misshaped) and not match.missing and not match.unexpected
        raise Misfit(f"checkpoint {path}: it does not fit the model: {reason}", sizes)
    if isinstance(content, dict) and content.get("normalize_input") and not normalizers(model):  # RST's files say so
        raise InputError(f"checkpoint {path}: its network normalises images (normalize_input), the model does not: {NORMALIZE}")
    if config := config_beside(content, path):
        for what in _other_functions(model, config, match):
            run = f"it is a {config.model} with {config.activation}"
            raise InputError(f"checkpoint {path}: {run}, the model {what}: create it as the file's")
    else:
        _check_foreign(model, path, match)
    if bad := [at for at in match.source.values() if match.file[at].is_floating_point() and match.file[at].isnan().any()]:
        raise InputError(f"checkpoint {path}: it has weights that are NaN ({listed(bad)}): take those of an earlier one")
    with torch.inference_mode():  # else what was made in that mode could not be written
        for name, at in match.source.items():
            match.own[name].copy_(match.file[at].reshape(match.own[name].shape))


def _other_functions(model: nn.Module, config: Config, match: Match) -> Iterator[str]:
    """How the model, whose weights fit, differs from the function of the run, as far as both are known."""
    for m in model.modules():
        if made := getattr(m, "made_as", None):
            ours, activation, shape, classes = made
            theirs = full_name(network_name(config.model, classes), shape)
            alike = ours == theirs or is_code(ours) or is_code(theirs)  # code moves
            if not alike or activation != config.activation:
                yield f"a {ours} with {activation}"
            break  # what is inside is as its factory made it, activations too
        known = isinstance(m, PreActResNet18) and config.model.startswith("preactresnet-18")
        if known and (m.block is RawPreActBlock) != ("/raw" in config.model):
            yield "has other 1x1 shortcuts"
    else:
        if config.activation != "relu" and any(isinstance(m, nn.ReLU) for m in model.modules()):
            yield "has ReLUs"
    if any(f"{at}.mean".lstrip(".") not in match.source for at in normalizers(model)):
        yield "normalises images, with numbers that the file does not have"


def _check_foreign(model: nn.Module, path: str | Path, match: Match) -> None:
    """Raise where the weights fit several functions, unless the model's is known to be theirs."""
    if values := match.values():
        mean, std = values
        if not all(0 <= m <= 1 for m in mean) or not all(s > 0 for s in std):
            remedy = "save it with positive std, and both for images in [0, 1]"
            raise InputError(f"checkpoint {path}: its normalisation ({numbers_text(mean, std)}) is none: {remedy}")
    if match.numbers is None and not normalising(model) and any(isinstance(m, DMNetwork) for m in model.modules()):
        remedy = "give --mean and --std, or name the model robustbench:NAME"
        warn(f"checkpoint {path}: public networks of its kind normalise images, by numbers that no file holds: {remedy}")
    if any(isinstance(m, PreActResNet18) and m.block is None for m in model.modules()):
        # RobustBench's networks of this layout with a mean and std are all activated; fast_adversarial's files have none.
        where = f"checkpoint {path}: it does not say whether its 1x1 shortcuts read relu(bn1(x)) or x itself"
        if match.numbers is None:
            raise InputError(f"{where}: name the model {PREACT}")
        warn(f"{where}, and is taken as activated: to be sure, name the model {PREACT}")

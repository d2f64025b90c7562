"""Weights into models: from this package's own files, and the public ones of TRADES, MART, RST, RobustBench and the like.

No code in a file runs. And no file tells everything: networks that were trained on images normalised outside of them need a
`Normalize` with those numbers, and activations, the stem of a ResNet ("/cifar" or "/stl10") and the shortcut of a PreActResNet
leave no trace in the weights either. The runs of this package record all of these in their config.
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spat_kernels.checks import warn

from ..config import Config
from ..data.images import Dataset
from ..errors import InputError, first_line
from .registry import PREACTS, Normalize, PreActBlock, PreActResNet18, create, full_name, normalized, try_on
from .weight_files import listed, read_file, select

UNUSED = re.compile(r"(^|\.)(n_averaged$|sub_block1\.)")  # AveragedModel's counter; layers of TRADES that no forward uses
NUMBERS = re.compile(r"(?:^|\.)(?:new_)?(?:(mean|mu)|std|sigma)$")  # those of a normalisation; group 1: of the mean
TELLING = 8  # times that the end of a name may occur in a model: where thousands of names end alike, all pairs take minutes
NORMALIZE = (
    "put a spat_train.models.registry.Normalize with the mean and std of its training before the model, or give --mean and --std"
)
PREACT = "'preactresnet-18/activated' (as in robust_overfitting) or 'preactresnet-18/raw' (as in fast_adversarial)"


class Misfit(InputError):
    """Weights that do not fit. `sizes`: only shapes differ, as where images or classes are others."""

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
    _fill(model, _Match(state, model), content, path)


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
    # Copied from the mapped file, which the caller may want to write to.
    return {name: tensor.clone() for name, tensor in select(read_file(path), weights, path).items()}


# ---- models of runs and files


def load_model(
    path: str | Path,
    dataset: Dataset,
    name: str | None = None,
    *,
    activation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    option: str = "--model-name",
) -> tuple[nn.Module, Config | None]:
    """The model in `path`, for the images and classes of `dataset`, in eval mode on the CPU; and the config of its run.

    Where the file holds the mean and std of a normalisation, the model has a `Normalize` with them. Where `dataset` does not tell
    how many classes there are, the file does.

    Args:
        path: the folder of a run, of which best.pt is taken, else last.pt; or a file of `read_weights`.
        name: the architecture, as `spat_train.models.registry.create` takes it. None is that of the run.
        activation, mean, std: as `create` takes them, where neither a run nor the file tells.
        option: what gives `name` on the command line, for messages.

    Raises:
        InputError: there is no such checkpoint, nothing tells the architecture, the run names code and `name` does not repeat
            it, or weights and data do not fit.
    """
    file = checkpoint_file(path)
    content = read_file(file)
    config = run_config(path, content)
    name = chosen_name(path, config, name, option)
    shape, classes = dataset.image_shape, dataset.num_classes
    own = config is not None and full_name(name, shape) == full_name(config.model, shape)
    if config is not None:
        if activation or mean or std:
            raise InputError(f"--activation, --mean, --std: {path} is a run, whose config says them: leave them out")
        activation, mean, std = config.activation, config.mean, config.std

    numbers = None

    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # initialising draws
            model = create(name, classes, shape, activation=activation or "relu", mean=mean, std=std).eval()
            try_on(model, shape, classes)  # lazy layers have no weights before
        return normalized(model, *numbers, shape[0]).eval() if numbers and not _normalizes(model) else model

    tried = False
    try:
        model = made()
        tried = True
        state = select(content, "auto", file)
        match = _Match(state, model)
        numbers = match.values()
        if numbers and mean and config is None:
            raise InputError(f"--mean, --std: {file} holds its own ({_numbers(*numbers)}): leave them out")
        if numbers and not _normalizes(model):
            model = made()
            match = _Match(state, model)
        if not dataset.all_classes and match.classes > classes:
            classes = match.classes
            model = made()
            match = _Match(state, model)
        _fill(model, match, content, file)
    except ValueError as error:
        reason = first_line(error)
        if config is not None and not own:
            reason = f"the run is a {config.model}: give that as {option} ({reason})"
        elif config is not None and (error.sizes if isinstance(error, Misfit) else not tried and not reason.startswith("name=")):
            reason = f"it was trained on {config.data}, and these images or classes are others: give other --data ({reason})"
        raise InputError(f"{path} as {name} for {dataset.name} ({classes} classes, images {list(shape)}): {reason}") from error
    return model, config


def with_classes_of(model: nn.Module, dataset: Dataset) -> Dataset:
    """`dataset`; where it does not tell how many classes there are, with those of `model`, which `load_model` gave for it."""
    if dataset.all_classes:
        return dataset
    return dataclasses.replace(dataset, classes=tuple(map(str, range(try_on(model, dataset.image_shape)[0]))))


def chosen_name(path: str | Path, config: Config | None, name: str | None, option: str) -> str:
    """The architecture of the run or checkpoint `path`: `name`, which `option` gave, else that of its config.

    Raises:
        InputError: neither tells; or the config alone names code, which would run.
    """
    if name is not None:
        return name
    if config is None:
        raise InputError(f"{path}: it does not say which architecture it is: give {option}, such as wrn-34-10")
    if ":" in config.model and not config.model.startswith("timm:"):
        raise InputError(f"{path}: it names code, {config.model}, which would run: if you trust it, give {option} {config.model}")
    return config.model


def normalisation(model: nn.Module) -> str:
    """The numbers of its first `Normalize`; "" without."""
    return next((_numbers(n.mean.flatten().tolist(), n.std.flatten().tolist()) for n in _normalizes(model).values()), "")


def _numbers(mean: Sequence[float], std: Sequence[float]) -> str:
    mean_text, std_text = (" ".join(f"{number:.4g}" for number in numbers) for numbers in (mean, std))
    return f"mean {mean_text}, std {std_text}"


def _normalizes(model: nn.Module) -> dict[str, Normalize]:
    return {at: m for at, m in model.named_modules() if isinstance(m, Normalize)}


def checkpoint_file(path: str | Path) -> Path:
    """`path`, or in the folder of a run its best checkpoint."""
    path = Path(path)
    if not os.path.isdir(path):
        if not os.path.isfile(path):  # those of Path raise on names that are too long
            raise InputError(
                f"{path}: there is no such run or checkpoint: give the folder of a run, or a file that torch.save wrote"
            )
        return path
    found = [path / name for name in ("best.pt", "last.pt") if (path / name).is_file()]
    if not found:
        raise InputError(f"{path}: no best.pt or last.pt there: give the folder of a run, or a checkpoint")
    return found[0]


def run_config(path: str | Path, content: Any = None) -> Config | None:
    """The config of the run that wrote the folder or checkpoint `path`; None for checkpoints of others.

    Args:
        content: that of the checkpoint, where it has been read.

    Raises:
        InputError: it cannot be read.
    """
    file = Path(path) / "config.json"
    if not os.path.isfile(file):
        return _config_beside(content if content is not None else read_file(checkpoint_file(path)), path)
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__}): restore it") from error
    return _config(content, file)


def _config_beside(content: Any, path: str | Path) -> Config | None:
    """The config that a run put beside its weights."""
    ours = isinstance(content, dict) and str(content.get("format")).startswith("spat_train ")
    return _config(content.get("config"), path) if ours else None


def _config(content: Any, path: str | Path) -> Config | None:
    if not isinstance(content, dict) or not isinstance(content.get("model"), str):
        return None
    kinds = get_type_hints(Config)
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items() if name in kinds}
    config = Config(**values)
    if odd := [f"{name}={values[name]!r}" for name in values if not _is_a(getattr(config, name), kinds[name])]:
        raise InputError(f"{path}: no run writes such a config ({listed(odd)}): restore it")
    return config


def _is_a(value: Any, kind: Any) -> bool:
    """Whether `value` is of the type `kind` of an option."""
    kinds = get_args(kind)
    if get_origin(kind) is Literal:
        return value in kinds
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(v, kinds[0]) for v in value)
    if kinds:
        return any(_is_a(value, one) for one in kinds)
    if kind is bool:
        return value in (0, 1)
    whole = kind is int and isinstance(value, float) and value.is_integer()
    return whole or (isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool))


# ---- weights into a model


class _Match:
    """Where the weights of a file go in a model. What wraps the network on either side, a prefix, is found by matching."""

    def __init__(self, file: dict[str, Tensor], model: nn.Module):
        self.file = file
        self.own = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        self.theirs, self.ours = _prefixes(file, self.own)
        self.source: dict[str, str] = {}  # the model's names -> the file's
        left = [name for name in file if not self._placed(name, name)]
        left = [name for name in left if not self._placed(name, _as_torchvision(name))]
        self.unexpected = [name for name in left if not UNUSED.search(name) and not self._is_copy(name)]

        optional = {f"{at}.{name}".lstrip(".") for at in _normalizes(model) for name in ("mean", "std")}
        self.numbers = self._one_normalisation({*left, *(self.source[name] for name in optional & self.source.keys())})
        if optional and self.numbers:
            mean, std = self.numbers
            self.source |= {name: std if name.endswith("std") else mean for name in sorted(optional - self.source.keys())}
            self.unexpected = [name for name in self.unexpected if not NUMBERS.search(name)]
        may_lack = {name for name in self.own if name.endswith("num_batches_tracked")}
        may_lack |= set() if optional & self.source.keys() else optional  # a mean without its std, or the reverse, is none
        self.missing = [name for name in self.own if name not in self.source and name not in may_lack]
        shapes = [(name, file[at].shape, self.own[name].shape) for name, at in self.source.items()]
        # The numbers of a normalisation are [C, 1, 1] here and [1, C, 1, 1] elsewhere.
        self.misshaped = [(n, a, b) for n, a, b in shapes if (a.numel() != b.numel() if n in optional else a != b)]

    def _placed(self, name: str, alias: str) -> bool:
        target = self.ours + alias.removeprefix(self.theirs)
        fits = alias.startswith(self.theirs) and target in self.own and target not in self.source
        if fits:
            self.source[target] = name
        return fits

    def _is_copy(self, name: str) -> bool:
        """Whether it is another name for a weight that has its place, as in files of robustness, which hold each twice."""
        places = (self.source.get(self.ours + rest) for alias in (name, _as_torchvision(name)) for _, rest in _splits(alias))
        return any(at is not None and _same(self.file[at], self.file[name]) for at in places)

    def _one_normalisation(self, names: Iterable[str]) -> tuple[str, str] | None:
        """Among these names of the file, those of mean and std, where there is one normalisation, whatever its names."""
        found = [(name, kind) for name in sorted(names) if (kind := NUMBERS.search(name))]
        means, stds = ([name for name, kind in found if bool(kind[1]) is is_mean] for is_mean in (True, False))
        if not means or not stds:
            return None
        one = all(_same(self.file[group[0]], self.file[name]) for group in (means, stds) for name in group)
        return (means[0], stds[0]) if one else None

    @property
    def classes(self) -> int:
        """Those of the file, where the number of classes is all that differs, else 0."""
        if self.missing or self.unexpected:
            return 0
        counts = {(a[0], b[0]) if a and b and a[1:] == b[1:] else (0, 0) for _, a, b in self.misshaped}
        return counts.pop()[0] if len(counts) == 1 else 0

    def values(self) -> tuple[list[float], list[float]] | None:
        """Mean and std of the file's normalisation."""
        if self.numbers is None:
            return None
        mean, std = (self.file[name].flatten().tolist() for name in self.numbers)
        return mean, std


def _prefixes(file: Iterable[str], own: Iterable[str]) -> tuple[str, str]:
    """What stands before the names of the network in the file and in the model: the two without which most names agree."""
    file, own = list(file), list(own)
    places: dict[str, list[str]] = {}
    for name in own:
        for prefix, rest in _splits(name):
            places.setdefault(rest, []).append(prefix)
    telling = {rest: prefixes for rest, prefixes in places.items() if len(prefixes) <= TELLING}
    agree = Counter((theirs, ours) for name in file for theirs, rest in _splits(name) for ours in telling.get(rest, ()))
    best = max(agree, key=agree.__getitem__, default=("", ""))
    return best if 2 * agree[best] > min(len(file), len(own)) else ("", "")  # fewer agree by chance


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """ "a.b" into ("", "a.b") and ("a.", "b")."""
    at = 0
    while at <= len(name):
        yield name[:at], name[at:]
        at = name.find(".", at) + 1 or len(name) + 1


def _as_torchvision(name: str) -> str:
    """A name in kuangliu's ResNets as torchvision has it."""
    return re.sub(r"(^|\.)linear\.", r"\1fc.", re.sub(r"(^|\.)shortcut\.", r"\1downsample.", name))


def _fill(model: nn.Module, match: _Match, content: Any, path: str | Path) -> None:
    if reason := _misfit(match):
        sizes = bool(match.misshaped) and not match.missing and not match.unexpected
        raise Misfit(f"checkpoint {path}: it does not fit the model: {reason}", sizes)
    if isinstance(content, dict) and content.get("normalize_input") and not _normalizes(model):  # RST's files say so
        raise InputError(f"checkpoint {path}: its network normalises images (normalize_input), the model does not: {NORMALIZE}")
    if config := _config_beside(content, path):
        _check_run(model, config, path, match)
    else:
        _check_foreign(model, path, match)
    with torch.inference_mode():  # else what was made in that mode could not be written
        for name, at in match.source.items():
            match.own[name].copy_(match.file[at].reshape(match.own[name].shape))


def _check_run(model: nn.Module, config: Config, path: str | Path, match: _Match) -> None:
    """Raise where the weights fit the model, but its function is not that of the run, as far as both are known."""
    for what in _other_functions(model, config, match):
        run = f"it is a {config.model} with {config.activation}"
        raise InputError(f"checkpoint {path}: {run}, the model {what}: create it as the file's")


def _other_functions(model: nn.Module, config: Config, match: _Match) -> Iterator[str]:
    for m in model.modules():
        if made := getattr(m, "made_as", None):
            ours, activation, shape = made
            theirs = full_name(config.model, shape)
            alike = ours == theirs or ":" in ours + theirs  # code moves, and timm's models have several names
            if not alike or activation != config.activation:
                yield f"a {ours} with {activation}"
            break  # what is inside is as its factory made it, activations too
        known = isinstance(m, PreActResNet18) and config.model in PREACTS
        if known and (m.block or PreActBlock) is not (PREACTS[config.model] or PreActBlock):
            yield "has other 1x1 shortcuts"
    else:
        if config.activation != "relu" and any(isinstance(m, nn.ReLU) for m in model.modules()):
            yield "has ReLUs"
    if any(f"{at}.mean".lstrip(".") not in match.source for at in _normalizes(model)):
        yield "normalises images, with numbers that the file does not have"


def _check_foreign(model: nn.Module, path: str | Path, match: _Match) -> None:
    """Raise where the weights fit several functions, unless the model's is known to be theirs."""
    if values := match.values():
        mean, std = values
        if not all(0 <= m <= 1 for m in mean) or not all(s > 0 for s in std):
            remedy = "save it with positive std, and both for images in [0, 1]"
            raise InputError(f"checkpoint {path}: its normalisation ({_numbers(mean, std)}) is none: {remedy}")
    if any(isinstance(m, PreActResNet18) and m.block is None for m in model.modules()):
        # RobustBench's networks of this layout with a mean and std are all activated; fast_adversarial's files have none.
        where = f"checkpoint {path}: it does not say whether its 1x1 shortcuts read relu(bn1(x)) or x itself"
        if match.numbers is None:
            raise InputError(f"{where}: name the model {PREACT}")
        warn(f"{where}, and is taken as activated: to be sure, name the model {PREACT}")


# ---- what keeps weights out


def _misfit(match: _Match) -> str:
    """What does not fit, and the remedy; "" where all can be copied."""
    shapes = [f"{name} {list(theirs)} (the model has {list(ours)})" for name, theirs, ours in match.misshaped]
    pairs = [(name, match.file[at], match.own[name]) for name, at in match.source.items()]
    odd = [f"{name} ({why})" for name, theirs, ours in pairs if (why := _uncopied(name, theirs, ours))]
    fixed = [f"{name} ({why})" for name, _, ours in pairs if (why := _unwritable(ours))]
    lists = {"missing": match.missing, "unexpected": match.unexpected, "of another shape": shapes, "no such numbers": odd,
             "fixed in the model": fixed}  # fmt: skip
    what = "; ".join(f"{kind}: {listed(names)}" for kind, names in lists.items() if names)
    if match.missing or match.unexpected or shapes:
        return f"{what}: {_hint(match)}"
    remedy = "save dense tensors of the model's kind of numbers" if odd else "give each weight of the model memory of its own"
    return f"{what}: {remedy}" if what else ""


def _odd(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else ""


def _uncopied(name: str, theirs: Tensor, ours: Tensor) -> str:
    alike = name.endswith("num_batches_tracked")  # a float in files that average all they hold
    alike |= (theirs.is_floating_point(), theirs.is_complex()) == (ours.is_floating_point(), ours.is_complex())
    return _odd(theirs) or ("" if alike else f"{theirs.dtype}, the model has {ours.dtype}".replace("torch.", ""))


def _unwritable(ours: Tensor) -> str:
    expanded = not _odd(ours) and any(step == 0 and n > 1 for step, n in zip(ours.stride(), ours.shape, strict=True))
    return _odd(ours) or ("expanded" if expanded else "")


def _same(a: Tensor, b: Tensor) -> bool:
    return not _odd(a) and not _odd(b) and a.dtype == b.dtype and torch.equal(a, b)


def _hint(match: _Match) -> str:
    """What the model probably should have been."""
    missing = {name.removeprefix(match.ours) for name in match.missing}
    unexpected = {name.removeprefix(match.theirs) for name in match.unexpected}
    if unexpected and not missing and all(map(NUMBERS.search, unexpected)):
        return f"the file's network normalises its images: {NORMALIZE}"
    if missing and not unexpected and all(map(NUMBERS.search, missing)):
        if any(map(NUMBERS.search, match.file)):
            return "the file has a mean without its std, or the reverse: save both, or neither"
        return "the file has no normalisation: use a spat_train.models.registry.Normalize, which keeps its numbers"
    if {"init_conv.weight", "logits.weight"} <= unexpected:
        return (
            "the file looks like DeepMind's WRN, another function, which pads its convolutions of stride 2 on one side: give its "
            "own code, as package.module:factory"
        )
    if missing or unexpected:
        fitting = {name.removeprefix(match.ours) for name in match.source}
        kinds, others = ({re.sub(r"\d+", "#", name) for name in names} for names in (fitting, missing | unexpected))
        if not others <= kinds:
            return "the file looks like another architecture: create that one"
        depth = "the file looks like this architecture in another depth"
        return depth + (" or width" if match.misshaped else "") + ": create that one"
    if classes := match.classes:
        has = match.misshaped[0][2][0]
        return f"the file looks like {classes} classes, the model has {has}: create it with num_classes={classes}"
    if len(match.misshaped) == 1:
        return "the file looks like images of another shape or another stem: create the model for those"
    return "the file looks like this architecture in another width: create that one"

"""Checks of an evaluation's arguments, before any work: errors name argument, value and remedy."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spat_kernels.checks import check_auto_or_flag, check_range, check_reach
from spat_kernels.input_gradient.choose import check_path, check_precision, explain
from spat_kernels.settings import GradientPath, Graph, Precision

from ..data.images import Dataset, Floats, Folder, Images
from ..errors import InputError, as_input_error
from ..models.try_on import device_of, try_on
from ..models.weight_files import listed
from ..runtime.seeding import model_draws
from .attack_specs import Attack


def check_numbers(eps: float, eps_l2: float, eps_l1: float, seed: int, batch_size: int, budget: int | None = None) -> None:
    for name, value, most in (("eps", eps, 1), ("eps_l2", eps_l2, math.inf), ("eps_l1", eps_l1, math.inf)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= most or value == math.inf:
            remedy = f", for images in [0, 1]: {value:g}/255, not {value:g}" if number and value > 1 else ""
            raise InputError(f"{name}={value!r}: give a number above 0{remedy}")
    given = () if budget is None else (("budget", budget, 1),)
    for name, value, least in (("seed", seed, 0), ("batch_size", batch_size, 1), *given):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise InputError(f"{name}={value!r}: give an integer from {least} to 2**31 - 1")


def check_class_names(trained: Sequence[str], dataset: Dataset, data: str, path: Path) -> None:
    """Refuse images whose classes have other names, or another order, than those that the model in `path` was trained on.

    Labels are indices. Where either names its classes by numbers, only their count says whether they fit.
    """
    here = dataset.classes
    if tuple(trained) == here or any(all(name.isdecimal() for name in names) for names in (trained, here)):
        return
    lacks = [f"lacks {name}" for name in trained if name not in here]
    adds = [f"has {name}, which it was not trained on" for name in here if name not in trained]
    raise InputError(
        f"--data {data}: its classes are not those of {path} (it {listed([*lacks, *adds] or ['has another order'])}): give both "
        "the same names, and a class without pictures an empty folder"
    )


def check_images(images: object) -> Images | Folder | Floats:
    """`images` as one of these kinds. A tuple holds floating-point images and labels."""
    if isinstance(images, tuple) and len(images) == 2:
        x, labels = images
        images = Floats(x.detach() if isinstance(x, Tensor) else x, labels)
    if not isinstance(images, (Images, Folder, Floats)):
        raise InputError(f"images: give Images, a Folder or a tuple (x, y), not a {type(images).__name__}")
    labels = images.labels
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1 or labels.is_cuda:
        raise InputError("images: labels must be an int64 tensor [N] on the CPU")
    if not len(labels):
        raise InputError("images: there is none: give at least one")
    if isinstance(images, Images):
        _check_pixels(images.pixels, (torch.uint8,), "[N, H, W, C]", len(labels))
    if isinstance(images, Floats):
        _check_pixels(images.x, (torch.float32, torch.float64), "[N, C, H, W]", len(labels))
        low, high = (float(v) for v in images.x.aminmax())
        with as_input_error("images"):
            check_range(low, high, (0, 1), images.x.dtype, fixed=True)
    return images


def _check_pixels(pixels: object, dtypes: tuple[torch.dtype, ...], shape: str, count: int) -> None:
    if not isinstance(pixels, Tensor) or pixels.dtype not in dtypes or pixels.ndim != 4:
        found = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise InputError(f"images: they are {found}: give {' or '.join(map(str, dtypes))} {shape}")
    if len(pixels) != count:
        raise InputError(f"images: there are {len(pixels)} and {count} labels: give one label for each")


def check_rows(rows: Tensor | None, count: int) -> Tensor:
    if rows is None:
        return torch.arange(count)
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1 or not len(rows) or rows.is_cuda:
        raise InputError("rows: give an int64 tensor [N] on the CPU of at least one row, or None for all")
    if rows.min() < 0 or rows.max() >= count:
        raise InputError(f"rows: they go from {int(rows.min())} to {int(rows.max())}, there are {count} images")
    return rows


def check_models(
    model: nn.Module,
    source: nn.Module | None,
    images: Images | Folder | Floats,
    labels: Tensor,
    memory_format: torch.memory_format,
    attacks: dict[str, Attack],
) -> tuple[int, torch.memory_format]:
    """Check that the models are in eval mode, take the images, agree on the classes, and that `attacks` can follow them.

    Returns the number of classes, and the format of images that all of them take: `memory_format` where they do.
    """
    classes = 0
    dtype = images.x.dtype if isinstance(images, Floats) else torch.float32
    models = {"model": model} if source is None else {"model": model, "source": source}
    for name, each in models.items():
        if not isinstance(each, nn.Module):
            raise InputError(f"{name}: give a torch.nn.Module, not a {type(each).__name__}")
        if training := next((at or type(m).__name__ for at, m in each.named_modules() if m.training), None):
            raise InputError(
                f"{name}: {training} is in training mode, so that outputs depend on the batch or on chance: call {name}.eval()"
            )
        follow = each is (source or model) and any(attack.follows_gradients for attack in attacks.values())
        with as_input_error(name), model_draws(device_of(each), name):
            shape = images.image_shape
            classes, memory_format = try_on(each, shape, classes or None, memory_format, dtype, differentiate=follow)
    if source is not None and device_of(source) != device_of(model):
        raise InputError(f"source: it is on {device_of(source)}, the model on {device_of(model)}: move one by .to(device)")
    if wrong := [label for label in map(int, labels.aminmax()) if not 0 <= label < classes]:
        raise InputError(f"images: there is a label {wrong[0]}, and the model has classes 0 to {classes - 1}: give those labels")
    return classes, memory_format


def check_attacks(
    attacks: dict[str, Attack],
    classes: int,
    radii: tuple[float, float, float],
    image_shape: tuple[int, int, int],
    black_box: bool,
    budget: int | None = None,
) -> None:
    """Check that each of `attacks` fits the model and the images. `radii`: of the balls in L-infinity, L2 and L1."""
    for name, attack in attacks.items():
        if black_box and getattr(attack, "right_at", "last") == "every":  # it would stop at what the source gets wrong
            raise InputError(f"attack {name}: right_at=every asks the model that is attacked: leave it out, or the source")
        if black_box and (stop := getattr(attack, "stop", "none")) in ("success", "exact"):
            raise InputError(f"attack {name}: stop={stop} ends at what the source gets wrong: leave it out, or the source")
        if budget is not None:
            _check_budget(name, attack, classes, budget)
        if classes < attack.least_classes:
            remedy = "give fewer targets" if getattr(attack, "targets", None) and classes >= 4 else "leave it out"
            raise InputError(f"attack {name}: it needs {attack.least_classes} classes, the model has {classes}: {remedy}")
        if attack.norm != "linf":
            with as_input_error(f"attack {name}"):
                own = f"eps_{attack.norm}" if attack.eps is None else "eps"
                check_reach(own, attack.radius(*radii), (0, 1), math.prod(image_shape), attack.norm)


def _check_budget(name: str, attack: Attack, classes: int, budget: int) -> None:
    if attack.family == "pgd" and getattr(attack, "targeting", "confidence") == "malt":
        raise InputError(f"attack {name}: targeting=malt of PGD orders the classes again in every run: leave out the budget")
    if budget < (least := attack.least_passes(classes)):
        raise InputError(f"budget={budget}: attack {name} takes {least} passes for its first step: give at least {least}")


def check_arithmetic(
    model: nn.Module, x: Tensor, precision: Precision | None, input_gradient: GradientPath, graph: Graph
) -> None:
    """Check that attacks on `model` at images like `x` [B, C, H, W] can run with these settings."""
    if x.device.type != "cuda" and precision == "tf32":
        raise InputError("precision='tf32': TF32 is for GPUs: use fp32 or bf16")
    if x.device.type != "cuda" and graph is True:
        raise InputError(f"graph=True: CUDA graphs are for GPUs, the model is on {x.device}: use graph='auto'")
    try:
        check_path(precision, input_gradient)
        check_precision(precision, x)
        check_auto_or_flag("graph", graph)
        if input_gradient == "plan" and (reason := explain(model, x, precision=precision, fuse=False).reason):
            raise ValueError(f"input_gradient='plan', but {reason}: use 'auto' or 'autograd'")
    except (TypeError, ValueError) as error:
        raise InputError(str(error).splitlines()[0]) from error

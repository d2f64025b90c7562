"""What goes around or into a network: a normalisation before it, other activations in it."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spat_kernels.normalize import Normalize

from ..errors import lookup
from .try_on import device_of

# Smooth activations: arXiv 2006.14536 (softplus with beta 10, near ReLU) and arXiv 2010.00467.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": partial(nn.Softplus, beta=10),
}
NAMES_OF_NUMBERS = (("mean", "std"), ("mu", "sigma"), ("mu", "std"), ("new_mean", "new_std"), ("pixel_mean", "pixel_std"))


def wrap(
    model: nn.Module, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, *, channels: int | None = None
) -> nn.Sequential:
    """`model`, which expects images normalised by `mean` and `std`, as a model of images in [0, 1].

    It is for any network: torchvision's, timm's, your own. Attacks on the result work on pixels, so that their eps is in [0, 1].
    The network itself is `result.model`: its weights, mode and requires_grad stay as they are. The `Normalize` in front of it has
    its device, dtype and mode.

    Args:
        model: images [B, C, H, W], normalised -> logits [B, K].
        mean, std: C numbers each, for images in [0, 1], std positive. Tensors may have any shape of C entries.
        channels: C, where it is known: other counts of numbers are then refused.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: `mean` and `std` are no such numbers, or `model` normalises images itself.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.80}: give a torch.nn.Module, an instance and not its class")
    means, stds = _floats("mean", mean), _floats("std", std)
    numbers, count = f"mean={means}, std={stds}", "" if channels is None else f" ({channels})"
    sizes = means and len(means) == len(stds) and channels in (None, len(means))
    if not sizes or not all(0 <= m <= 1 for m in means) or not all(0 < s < math.inf for s in stds):
        raise ValueError(f"{numbers}: give both one number a channel{count}, for images in [0, 1], positive in std")
    if at := normalising(model):
        raise ValueError(f"{numbers}: the model normalises images already, in {at}: leave out mean and std")
    dtype = next((t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), torch.float32)
    normalize = Normalize(means, stds).to(device_of(model), dtype)
    result = nn.Sequential(OrderedDict(normalize=normalize, model=model))
    result.training = normalize.training = model.training  # not by .train(), which sets the modes inside the model too
    return result


def _floats(name: str, values: Sequence[float] | Tensor) -> list[float]:
    try:
        numbers = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64, device="cpu")
        return numbers.double().flatten().tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={values!r:.80}: give one number a channel, such as [0.5, 0.5, 0.5]") from error


def normalising(model: nn.Module) -> str:
    """The module of `model` that normalises images, as its name and class; "" where there is none to be seen.

    A module that does has numbers for mean and std, under usual names.
    """
    for name, m in model.named_modules():
        if any(_are_numbers(getattr(m, a, None)) and _are_numbers(getattr(m, b, None)) for a, b in NAMES_OF_NUMBERS):
            return f"{name or 'itself'} ({type(m).__name__})"
    return ""


def _are_numbers(value: object) -> bool:
    """Whether it may be one number for each of a few channels, or for all."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and 1 <= value.numel() <= 16
    values = value if isinstance(value, (list, tuple)) else [value]
    return bool(values) and all(isinstance(v, (int, float)) for v in values)


def normalizers(model: nn.Module) -> dict[str, Normalize]:
    """Its `Normalize` modules, by their names in it."""
    return {at: m for at, m in model.named_modules() if isinstance(m, Normalize)}


def normalisation(model: nn.Module) -> str:
    """The numbers of its first `Normalize` as text; "" without one."""
    return next((numbers_text(n.mean.flatten().tolist(), n.std.flatten().tolist()) for n in normalizers(model).values()), "")


def numbers_text(mean: Sequence[float], std: Sequence[float]) -> str:
    """ "mean 0.5 0.5 0.5, std 0.25 0.25 0.25" """
    mean_text, std_text = (" ".join(f"{number:.4g}" for number in numbers) for numbers in (mean, std))
    return f"mean {mean_text}, std {std_text}"


def replace_relus(model: nn.Module, name: str, activation: str) -> None:
    """Put the `activation` of that name in the place of every `nn.ReLU` module of `model`, which messages call `name`."""
    make = lookup("activation", activation, ACTIVATIONS)
    # Not named_children(), which leaves out the second of two names for one module.
    places = [(m, at) for m in model.modules() for at, child in m._modules.items() if isinstance(child, nn.ReLU)]
    if not places:
        raise ValueError(
            f"activation={activation!r}: {name} has no nn.ReLU module to replace: give 'relu', which keeps it as it is"
        )
    for m, at in places:
        setattr(m, at, make())

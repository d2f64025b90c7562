"""What goes around or into a network: a normalisation before it, other activations in it."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from spat_kernels.normalize import Normalize

from ..errors import lookup

# Smooth activations: arXiv 2006.14536 (softplus with beta 10, near ReLU) and arXiv 2010.00467.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": partial(nn.Softplus, beta=10),
}


def normalized(model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> nn.Module:
    """`model` with a `Normalize` before it."""
    if mean is None or std is None or len(mean) != channels or not all(0 <= m <= 1 for m in mean):
        raise ValueError(f"mean={mean}, std={std}: give both one number a channel ({channels}), for images in [0, 1]")
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=model))


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

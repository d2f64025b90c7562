"""Whether a model takes given images, and what comes out of it."""

import contextlib
import re

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from spat_kernels.input_gradient.autograd import InputGradient
from spat_kernels.model_state.borrow import borrowed

from ..errors import first_line, is_out_of_memory


def try_on(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float32,
    *,
    differentiate: bool = False,
) -> tuple[int, torch.memory_format]:
    """Run two black images of `dtype` through `model`, in its mode and on its device.

    Returns:
        tuple: the number of classes, and the format of the images that the model takes: `memory_format`, or contiguous where
            it fails on that one, as code with `x.view(B, -1)` on a feature map does.

    Raises:
        ValueError: it does not take such images, or does not return logits of `num_classes` (None: of two or more); or
            `differentiate` is set and autograd fails on it.
    """
    x = torch.zeros(2, *image_shape, device=device_of(model), dtype=dtype)
    try:
        return _classes(model, x.to(memory_format=memory_format), num_classes, differentiate), memory_format
    except ValueError:
        if memory_format == torch.contiguous_format:
            raise
    return _classes(model, x, num_classes, differentiate), torch.contiguous_format


def _classes(model: nn.Module, x: Tensor, num_classes: int | None, differentiate: bool) -> int:
    """One attempt of `try_on`."""
    lazy = any(map(is_lazy, [*model.parameters(), *model.buffers()]))  # then this makes its weights
    activation = next((made[1] for m in model.modules() if (made := m.__dict__.get("made_as"))), "relu")
    try:
        with torch.no_grad(), contextlib.nullcontext() if lazy else borrowed(model, "keep"), _ReLUs() as relus:
            logits = model(x)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:  # the last: timm's and torchvision's ViT
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        small = re.search("kernel size can't be greater|output size is too small", str(error), re.IGNORECASE)
        hint = " (too small for it: give larger ones, or another network)" if small else _its_size(model, x)
        raise ValueError(f"it does not take images {list(x.shape[1:])}{hint}: {first_line(error)}") from error
    if activation != "relu" and relus.calls:
        raise ValueError(f"activation={activation!r}: {relus.calls} of its ReLUs are functions, which stay: give 'relu'")
    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if isinstance(found, str) or len(found) != 2 or found[0] != 2 or found[1] < 2 or found[1] != (num_classes or found[1]):
        raise ValueError(f"two images give {found}: it must return logits [2, {num_classes or 'K'}]")
    if differentiate:
        try:
            with torch.inference_mode(False), torch.no_grad(), borrowed(model, "keep"):
                gradient = InputGradient(model)
                gradient.backward(gradient.forward(x))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"autograd fails on it: {first_line(error)}") from error
    return found[1]


def _its_size(model: nn.Module, x: Tensor) -> str:
    """What to do where `model` says that it is for images of another size than `x` has; "" where it says nothing of it."""
    modules = list(model.modules())
    if any(getattr(m, "dynamic_img_size", False) for m in modules):  # timm's: any size that its patches divide
        return ""
    size = next((getattr(m, name) for m in modules for name in ("img_size", "image_size") if hasattr(m, name)), None)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if not isinstance(height, int) or (height, width) == tuple(x.shape[2:]):
        return ""
    return f" (it is made for {height}x{width}: give such images, or a network that takes any size)"


class _ReLUs(TorchFunctionMode):
    """Counts the calls of ReLU, as a module or a function."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += getattr(func, "__name__", "") in ("relu", "relu_")
        return func(*args, **kwargs or {})


def device_of(model: nn.Module) -> torch.device:
    """The device of its first parameter or buffer; the CPU where it has none."""
    return next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))

"""Which attacks may share a capture: those with equal keys."""

from types import CellType, FunctionType, MethodType

import torch
from torch import Tensor

from ..input_gradient.choose import compile_auto
from ..losses import OURS, Custom, Loss
from ..model_state.structure import freeze
from ..precision import backends
from .run import Batch


def attack_key(settings, batch: Batch) -> tuple:
    """All that a captured attack takes for granted, apart from the model and the number of samples. Hashable."""
    x, cuda, cudnn = batch.x, backends.cuda.matmul, backends.cudnn
    return (
        (x.shape[1:], x.dtype, x.device, x.is_contiguous()),
        (*(t is None for t in (batch.y, batch.start, batch.targets, batch.clean_logits)),),
        (*(isinstance(v, Tensor) and v.numel() > 1 for v in (batch.eps, batch.step_size)),),
        (settings.run_class, settings.kind(), loss_key(settings.loss), settings.norm, tuple(settings.bounds)),
        (settings.bn_mode, settings.precision, settings.input_gradient, settings.fuse, compile_auto()),
        (torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)),
        (cuda.fp32_precision, cuda.allow_fp16_accumulation, cuda.allow_fp16_reduced_precision_reduction),
        (cuda.allow_bf16_reduced_precision_reduction, cudnn.conv.fp32_precision, cudnn.enabled, cudnn.benchmark),
        (cudnn.deterministic, torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled()),
    )


def loss_key(loss: Loss):
    """Losses of ours by value; others by their class and attributes, and callables as below. Nothing is kept alive."""
    if type(loss) in OURS:
        return loss
    if type(loss) is Custom:
        return _function_key(loss.function)
    return freeze(type(loss)), freeze(vars(loss) if hasattr(loss, "__dict__") else loss)


def _function_key(function):
    """A function by its code and what it closes over, since each attack may make another one; other callables by identity."""
    if isinstance(function, MethodType):
        return freeze(function.__self__), _function_key(function.__func__)
    if not isinstance(function, FunctionType):
        return freeze(function)
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # an empty one raises
    return freeze((function.__code__, function.__defaults__, function.__kwdefaults__, cells))

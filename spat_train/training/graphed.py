"""Forward and backward of an update, replayed by CUDA graphs, which frees small networks from the time that launches take."""

import warnings

import torch
from torch import Tensor, nn

from ..errors import first_line, is_out_of_memory
from .optim import restored


def graphed(objective: nn.Module, x: Tensor, y: Tensor, half: torch.dtype | None) -> nn.Module | None:
    """Capture objective(x, x_adv, y), whose gradients reach its parameters and x_adv, for batches shaped like `x` [B, C, H, W].

    What it returns lies in memory that the next call overwrites. Statistics and generators stay as they are, though the capture
    runs the model a few times. Later calls replay the kernels of the capture: the model's Python does not run again.

    Args:
        objective: in the mode to capture, without hooks of its own. It becomes what is returned: eager code needs another one.
        half: the dtype of autocast, or None without.

    Returns:
        nn.Module: `objective`, or None where it cannot be captured, which a warning explains.
    """
    images = x.clone().requires_grad_()
    precision = torch.autocast(x.device.type, half, enabled=half is not None, cache_enabled=False)
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        with restored(list(objective.buffers())), torch.random.fork_rng(devices), precision:
            torch.cuda.make_graphed_callables(objective, (x.clone(), images, y.clone()), allow_unused_input=True)
        return objective
    except (RuntimeError, AssertionError) as error:  # the latter for hooks and buffers that torch does not allow
        if is_out_of_memory(error):
            raise
        reason = f"the update cannot be captured in a CUDA graph ({first_line(error)[:120]}) and runs without"
        warnings.warn(f"{reason}: give --graph never", RuntimeWarning, stacklevel=2)
        return None

"""Short hashes that tell whether an evaluation on disk is of the same model and images."""

import hashlib
import re

import torch
from torch import Tensor, nn


def weights_hash(model: nn.Module) -> str:
    """A short hash of all parameters and buffers with their names, and of the modules with the settings that they print: an
    activation, a stride or a dilation leaves no trace in the weights."""
    kinds = " ".join(f"{name} {type(m).__name__}({m.extra_repr()})" for name, m in model.named_modules())
    # Without the addresses of functions and the devices of parameters in lists, which are not alike everywhere.
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+| \((cuda|xpu|mps)[^)]*\)", "", kinds).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def tensor_hash(tensor: Tensor) -> str:
    """A short hash of the values."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]

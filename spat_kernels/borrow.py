"""Borrow a model for an attack and give it back as it was."""

from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

BN_MODES = ("eval", "train", "keep")


@contextmanager
def borrowed(model, bn_mode: str):
    """Within: `model` in the asked mode, its parameters frozen, its buffers copies, and DDP's synchronisation off.

    Parameters are frozen so that compiled models (which differentiate every parameter that asks for it) and re-entrant
    checkpoints compute no weight gradient. Buffers are swapped, not saved and copied back: the originals are never written, so
    autograd graphs that hold them stay valid. Afterwards all is as before, also when the body raises. A model that is a plain
    callable is used as it is.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modules = list(model.modules())
    modes = [(m, m.training) for m in modules]
    frozen = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
    ddp = [
        (m, m.require_backward_grad_sync, m.require_forward_param_sync) for m in modules if isinstance(m, DistributedDataParallel)
    ]
    swapped = []
    try:
        if bn_mode != "keep":
            model.train(bn_mode == "train")
        if any(m.training for m in modules):  # then a forward may write statistics
            swapped = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
            for buffers, name, buffer in swapped:
                buffers[name] = buffer.clone()
        for p in frozen:
            p.requires_grad_(False)
        for m, *_ in ddp:
            m.require_backward_grad_sync = m.require_forward_param_sync = False
        yield
    finally:
        for m, backward_sync, forward_sync in ddp:
            m.require_backward_grad_sync, m.require_forward_param_sync = backward_sync, forward_sync
        for p in frozen:
            p.requires_grad_(True)
        for buffers, name, buffer in swapped:
            buffers[name] = buffer
        for m, training in modes:
            m.training = training

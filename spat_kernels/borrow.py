"""Borrow a model for an attack and give it back as it was."""

import threading
import weakref
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_locks: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def borrowed(model, bn_mode: str):
    """Within: `model` in the asked mode, its parameters frozen, its buffers copies, and DDP's synchronisation off.

    Parameters are frozen so that compiled models (which differentiate every parameter that asks for it) and re-entrant
    checkpoints compute no weight gradient. Buffers are swapped, not saved and copied back: the originals are never written, so
    autograd graphs that hold them stay valid. Afterwards all is as before, also when the body raises. A model that is a plain
    callable is used as it is. Threads borrow a model one after another; models that share modules are theirs to keep apart.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with _lock:
        lock = _locks.setdefault(model, threading.RLock())
    modules = list(model.modules())
    with lock, ExitStack() as give_back:  # runs every callback, also after one that raises
        for m in modules:
            give_back.callback(setattr, m, "training", m.training)
            if isinstance(m, DistributedDataParallel):
                for flag in ("require_backward_grad_sync", "require_forward_param_sync"):
                    give_back.callback(setattr, m, flag, getattr(m, flag))
                    setattr(m, flag, False)
        if bn_mode != "keep":
            model.train(bn_mode == "train")
        if any(m.training for m in modules):  # then a forward may write statistics
            for m in modules:
                for name, buffer in m._buffers.items():
                    if buffer is not None:
                        give_back.callback(m._buffers.__setitem__, name, buffer)
                        m._buffers[name] = buffer.clone()
        for p in model.parameters():
            if p.requires_grad and p.is_leaf:
                give_back.callback(p.requires_grad_, True)
                p.requires_grad_(False)
        yield

"""Borrow a model for an attack and give it back as it was."""

import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .structure import PLAIN, UNREAD

_locks: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()
OBJECTS = 2  # how deep objects within objects are looked into for modules


@contextmanager
def borrowed(model, bn_mode: str):
    """Within: `model` in the asked mode, its parameters frozen, its buffers copies, and DDP's synchronisation off.

    Parameters are frozen so that compiled models (which differentiate every parameter that asks for it) and re-entrant
    checkpoints compute no weight gradient. Buffers are swapped, not saved and copied back: the originals are never written, so
    autograd graphs that hold them stay valid. All this goes for modules that are not registered too: see `parts`.

    Afterwards all is as before, also when the body raises. What `train()` does beside setting flags (LoRA layers merge their
    weights) is undone by `train()`. A model that is a plain callable is used as it is. Threads borrow a model one after another;
    models that share modules are theirs to keep apart.

    Raises:
        ValueError: a module refuses the mode, as those of torch.export do.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with _lock:
        lock = _locks.setdefault(model, threading.RLock())
    modules, roots = parts(model)
    with lock, ExitStack() as give_back:  # runs every callback, also after one that raises
        modes = [(m, m.training) for m in modules]
        give_back.callback(_set_flags, modes)
        give_back.callback(_undo_train, modes)
        for m in modules:
            if isinstance(m, DistributedDataParallel):
                for flag in ("require_backward_grad_sync", "require_forward_param_sync"):
                    give_back.callback(setattr, m, flag, getattr(m, flag))
                    setattr(m, flag, False)
            if m._forward_pre_hooks:  # they may compute tensors: `weight` of torch.nn.utils.weight_norm, which has a graph
                give_back.callback(vars(m).update, {name: t for name, t in vars(m).items() if isinstance(t, Tensor)})
        if bn_mode != "keep" and any(m.training != (bn_mode == "train") for m in modules):
            for root in roots:
                _train(root, bn_mode)
        if any(m.training for m in modules):  # then a forward may write statistics
            for m in modules:
                for name, buffer in m._buffers.items():
                    if buffer is not None:
                        give_back.callback(m._buffers.__setitem__, name, buffer)
                        m._buffers[name] = buffer.clone()
        for m in modules:
            for p in m._parameters.values():
                if p is not None and p.requires_grad and p.is_leaf:
                    give_back.callback(p.requires_grad_, True)
                    p.requires_grad_(False)
        yield


def _train(root: nn.Module, bn_mode: str) -> None:
    try:
        root.train(bn_mode == "train")
    except Exception as error:
        raise ValueError(
            f"bn_mode={bn_mode!r}, but {type(root).__name__} refuses to change its mode ({error}): use bn_mode='keep', which "
            "attacks it in the mode that it is in"
        ) from error


def _undo_train(modes: list[tuple[nn.Module, bool]]) -> None:
    for m, training in modes:  # parents first: their train() is their children's too
        if m.training != training:
            m.train(training)


def _set_flags(modes: list[tuple[nn.Module, bool]]) -> None:
    for m, training in modes:
        if m.training != training:
            m.training = training


# ---- what a model consists of


def parts(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """All modules of `model`, parents first, and the roots of their trees.

    Roots are `model`, and what its modules hold in lists, dicts, other objects and bound methods: `model.train()` and
    `model.parameters()` know nothing of these, but a forward calls them.
    """
    found: dict[int, nn.Module] = {}
    roots, candidates, seen = list[nn.Module](), deque([model]), set[int]()
    while candidates:
        root = candidates.popleft()
        if id(root) not in found:
            roots.append(root)
            stack = [root]
            while stack:
                m = stack.pop()
                if id(m) not in found:
                    found[id(m)] = m
                    stack += [child for child in m._modules.values() if child is not None]
                    if not type(m).__module__.startswith("torch.nn.modules"):  # their forwards use nothing else
                        for name, value in vars(m).items():
                            if type(value) not in PLAIN and name not in UNREAD:
                                candidates.extend(_held(value, seen, OBJECTS))
    return list(found.values()), roots


def _held(value, seen: set[int], depth: int) -> Iterator[nn.Module]:
    """Modules in `value`. `seen` are the ids of what has been looked into, all of it alive."""
    if isinstance(value, nn.Module):
        yield value
        return
    if id(value) in seen:
        return
    inner: Collection[object] = ()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        inner = value
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, MethodType):
        inner = (value.__self__,)
    elif depth and hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in ("builtins", "torch", "numpy"):
        inner, depth = vars(value).values(), depth - 1
    if inner:
        seen.add(id(value))
        for v in inner:
            if type(v) not in PLAIN:
                yield from _held(v, seen, depth)

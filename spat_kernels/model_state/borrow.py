"""Borrow a model for an attack and give it back as it was."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checks import warn
from ..interrupts import check, deferred
from .structure import PLAIN, UNREAD

_locks: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_lent: "dict[_Loan, int]" = {}  # by thread
# How deep objects in objects are looked into for modules that are not registered, and the size of the largest container that is.
OBJECTS, LARGEST = 2, 1000


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
    with deferred, _Loan(model) as give_back:
        registered, *others = parts(model)
        modules = [m for tree in (registered, *others) for m in tree]
        modes = [(m, m.training) for m in modules]

        def undo_train(kind, error, trace) -> None:
            if (failure := _undo_train(modes)) and error is None:
                warn(f"{type(model).__name__} changed its mode for the attack, but train() fails on the way back: {failure}")

        give_back.callback(_set_flags, modes)
        give_back.push(undo_train)
        for m in modules:
            if isinstance(m, DistributedDataParallel):
                for flag in ("require_backward_grad_sync", "require_forward_param_sync"):
                    give_back.callback(setattr, m, flag, getattr(m, flag))
                    setattr(m, flag, False)
            if m._forward_pre_hooks:  # they may compute tensors: `weight` of torch.nn.utils.weight_norm, which has a graph
                give_back.callback(vars(m).update, {name: t for name, t in vars(m).items() if isinstance(t, Tensor)})
        if bn_mode != "keep":
            _switch(registered, bn_mode)
        if bn_mode == "eval":
            _eval(others)
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


class _Loan(ExitStack):
    """What gives `model` back: every callback runs, also after one that raises. No other thread has the model meanwhile."""

    def __init__(self, model: nn.Module):
        super().__init__()
        with _lock:
            self.lock = _locks.setdefault(model, threading.RLock())

    def __enter__(self):
        while not self.lock.acquire(timeout=0.05):
            check()
        _lent[self] = threading.get_ident()
        return self

    def __exit__(self, *error):
        try:
            return super().__exit__(*error)
        finally:
            del _lent[self]
            self.lock.release()


def _give_back_in_child() -> None:
    """In a forked process: what other threads had borrowed, since they did not come along."""
    _locks.clear()
    for loan in [loan for loan, thread in reversed(_lent.items()) if thread != threading.get_ident()]:
        del _lent[loan]
        ExitStack.__exit__(loan, None, None, None)


os.register_at_fork(after_in_child=_give_back_in_child)


def _switch(tree: list[nn.Module], bn_mode: str) -> None:
    """Put the modules of a tree, the root first, into a mode."""
    root, training = tree[0], bn_mode == "train"
    if all(m.training == training for m in tree):
        return
    try:
        root.train(training)
    except Exception as error:
        raise ValueError(
            f"bn_mode={bn_mode!r}, but {type(root).__name__} refuses to change its mode ({error}): use bn_mode='keep', which "
            "attacks it in the mode that it is in"
        ) from error


def _eval(trees: list[list[nn.Module]]) -> None:
    """Put modules into eval mode that the model does not know of. (Into training mode its `train()` does not put them either.)"""
    for tree in trees:
        modes = [(m, m.training) for m in tree]
        try:
            _switch(tree, "eval")
        except ValueError as refusal:  # as of those of torch.export, whose mode is fixed
            _set_flags(modes)
            name = type(tree[0]).__name__
            warn(f"{name}, which the model holds without registering it, is attacked in its own mode: {refusal.__cause__}")


def _undo_train(modes: list[tuple[nn.Module, bool]]) -> Exception | None:
    """Undo what `train(other)` did besides setting flags, by `train(as_it_was)`; what that raised, if it did."""
    failure = None
    for _ in range(2):  # what two modules share is set wrong by the second one
        for m, training in modes:  # parents first: their train() is their children's too
            if m.training != training:
                try:
                    m.train(training)
                except Exception as error:
                    failure = error
    return failure


def _set_flags(modes: list[tuple[nn.Module, bool]]) -> None:
    for m, training in modes:
        if m.training != training:
            m.training = training


# ---- what a model consists of


def parts(model: nn.Module) -> list[list[nn.Module]]:
    """All modules of `model`, as trees, each with the parents first: those that are registered; then what these hold in lists,
    dicts, bound methods, partials and other objects: a forward may call them, but `model.train()` and `model.parameters()` know
    nothing of them. What closures, slots and containers of more than `LARGEST` elements hold is not seen."""
    found: set[int] = set()
    trees, roots = [], deque([model])
    seen: dict[int, int] = {}
    while roots:
        root = roots.popleft()
        if id(root) in found:
            continue
        tree, stack = [], [root]
        while stack:
            m = stack.pop()
            if id(m) not in found:
                found.add(id(m))
                tree.append(m)
                stack += [child for child in m._modules.values() if child is not None]
                if not type(m).__module__.startswith("torch.nn.modules"):  # their forwards use nothing else
                    roots.extend(_held([v for name, v in vars(m).items() if type(v) not in PLAIN and name not in UNREAD], seen))
        trees.append(tree)
    return trees


def _held(values: Iterable, seen: dict[int, int]) -> Iterator[nn.Module]:
    """Modules in `values`. `seen`: how deep objects inside of what has been looked into were looked into, by id."""
    queue = deque((value, OBJECTS) for value in values)
    while queue:
        value, depth = queue.popleft()
        if isinstance(value, nn.Module):
            yield value
        elif seen.get(id(value), -1) < depth:
            inner, below = _inside(value, depth)
            if 0 < len(inner) <= LARGEST:
                seen[id(value)] = depth
                queue.extend((v, below) for v in inner if type(v) not in PLAIN)


def _inside(value, depth: int) -> tuple[Collection, int]:
    """What `value` holds, and how deep objects in that are looked into."""
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value, depth
    if isinstance(value, dict):
        return value.values(), depth
    if isinstance(value, MethodType):
        return (value.__self__,), depth
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values()), depth
    if depth and hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in ("builtins", "torch", "numpy"):
        return vars(value).values(), depth - 1
    return (), depth

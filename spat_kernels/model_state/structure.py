"""Whether a model is still what it was when it was traced or captured, found out in a fraction of a millisecond.

A trace or a capture keeps what Python code did once. So all that this code can have looked at is compared: the tree of modules,
their classes, hooks, modes and attributes, and the shapes, layouts and (for a capture, whose kernels know nothing else) addresses
of their tensors. What is *in* parameters and buffers is free to change: an optimiser's update in place leaves a model the same.

Nothing is kept alive: modules, tensors and other objects are held weakly and compared by identity; plain values (numbers,
strings, dtypes, tuples of these) by value; lists, dicts and sets by content. What other objects hold inside, globals and closures
are out of sight.
"""

import weakref
from collections import deque
from collections.abc import Callable
from itertools import chain
from numbers import Number
from operator import attrgetter, is_, itemgetter

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
OWN = ("training", "_modules", "_parameters", "_buffers", *HOOKS)
UNREAD = {*OWN, *(name for name in vars(nn.Module()) if name.startswith("_"))}  # nn.Module's own bookkeeping
PLAIN = {bool, int, float, complex, str, bytes, type(None), slice, range, torch.dtype, torch.device, torch.memory_format}


class Structure:
    """The structure of a model at one time: `Structure(model)`, later `matches(model)`.

    Args:
        training: whether the modes of the modules belong to it; False where they are set before the model is used.
        addresses: whether the addresses of parameters, buffers and other tensors do; without, parameters and buffers may be
            replaced by others of the same kind.

    Attributes:
        hooked: the name of a module with hooks that would run in a forward or backward, or None.
        devices: where its tensors are, attributes included.

    Raises:
        TypeError: the model cannot be looked into (TorchScript, tensors without storage).
    """

    def __init__(self, model: nn.Module, *, training: bool = True, addresses: bool = True):
        self._training, self._addresses, self.devices = training, addresses, set[torch.device]()
        self._names, modules, queue, known = list[str](), list[nn.Module](), deque([(type(model).__name__, model)]), set[int]()
        self._read_plain: list[Callable[[dict], tuple]] = []
        self._plain: list[tuple] = []  # what these read
        self._others: list[tuple[int, str, tuple | None, object]] = []
        while queue:  # an attribute may lead to modules that are not registered; they count as well
            name, module = queue.popleft()
            if id(module) not in known:
                known.add(id(module))
                modules.append(module)
                self._names.append(name)
                self._add(name, module, queue)
        self._modules = list(map(weakref.ref, modules))
        self._picture = self._take(modules)
        self.devices |= {t.device for m in modules for d in (m._parameters, m._buffers) for t in d.values() if t is not None}
        self._tensor_names = [
            f"{name}.{n}"
            for tensors in ("_parameters", "_buffers")
            for name, module in zip(self._names, modules, strict=True)
            for n, t in getattr(module, tensors).items()
            if t is not None
        ]
        hooked = (name for name, m in zip(self._names, modules, strict=True) if any(getattr(m, hooks) for hooks in HOOKS))
        self.hooked = "every module" if _has_any_global_hook() else next(hooked, None)

    def _add(self, name: str, module: nn.Module, queue: deque) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name} is a TorchScript module, whose state cannot be compared")
        queue.extend((f"{name}.{n}", child) for n, child in module._modules.items() if child is not None)
        own = {n: value for n, value in vars(module).items() if n not in UNREAD}
        plain = [n for n, value in own.items() if _is_plain(value)]
        # Of two names or more, itemgetter makes a tuple.
        self._read_plain.append(itemgetter("_is_full_backward_hook", "_is_full_backward_hook", *plain))
        self._plain.append(self._read_plain[-1](vars(module)))
        for n, value in own.items():
            if n not in plain:
                flat = tuple(value) if type(value) is list and all(map(_is_plain, value)) else None
                frozen = _freeze(value, self._signature, queue, f"{name}.{n}")
                self._others.append((len(self._names) - 1, n, flat, frozen))

    def matches(self, model: nn.Module) -> bool:
        return self.difference(model) is None

    def difference(self, model: nn.Module) -> str | None:
        """What is no longer as it was, in words, or None."""
        modules = [ref() for ref in self._modules]
        if modules[0] is not model:
            return "it is another model"
        if None in modules:
            return f"{self._names[modules.index(None)]} is gone"
        try:
            picture = self._take(modules)
            plain = [read(attributes) for read, attributes in zip(self._read_plain, map(vars, modules), strict=True)]
            others = [vars(modules[i])[name] for i, name, *_ in self._others]
        except KeyError as error:
            return f"attribute {error} was removed"
        except TypeError as error:
            return str(error)
        owners = self._names[:1], self._names, self._tensor_names
        for names, now, before in zip(owners, picture, self._picture, strict=True):
            for what in before:
                if now[what] != before[what]:
                    changed = (name for name, a, b in zip(names, now[what], before[what], strict=False) if a != b)
                    return f"{next(changed, self._names[0])}: its {what} changed"
        # The very same objects nearly always; and no two are asked whether they are equal before their types are (one may be a
        # tensor by now).
        if not all(map(is_, chain.from_iterable(plain), chain.from_iterable(self._plain))):
            for name, values, known in zip(self._names, plain, self._plain, strict=True):
                if freeze(values) != freeze(known):
                    return f"{name}: an attribute changed"
        for value, (i, name, flat, frozen) in zip(others, self._others, strict=True):
            same = flat is not None and type(value) is list and len(value) == len(flat) and all(map(is_, value, flat))
            if not same and _freeze(value, self._signature) != frozen:
                return f"{self._names[i]}: attribute '{name}' changed"
        return "every module: its hooks changed" if _has_any_global_hook() and self.hooked != "every module" else None

    def _take(self, modules: list) -> tuple[dict[str, list], ...]:
        """Aspects that each module has, those of each tensor, and those of all together. Ids are of objects that are alive."""
        attributes = list(map(vars, modules))
        modes, children, parameters, buffers, *hooks = zip(*map(itemgetter(*OWN), attributes), strict=True)
        slots = [t for d in chain(parameters, buffers) if d for t in d.values()]
        tensors = [t for t in slots if t is not None]
        classes: list[type[nn.Module]] = list(map(type, modules))
        first: dict[int, int] = {}  # where in the list each tensor comes first
        of_modules: dict[str, list] = {
            "class": list(map(id, classes)),
            "mode (train, eval)": list(modes) if self._training else [],
            "number of attributes": list(map(len, attributes)),
            "children": list(map(tuple, children)),
            "parameters": list(map(tuple, parameters)),
            "buffers": list(map(tuple, buffers)),
        }
        of_tensors: dict[str, list] = {
            "address": self._addresses_of(tensors),
            "shape, dtype or device": list(map(attrgetter("shape", "dtype", "device"), tensors)),
            "strides": list(map(Tensor.stride, tensors)),
        }
        of_model: dict[str, list] = {
            "forwards of classes": [_Same(kind.forward) for kind in dict.fromkeys(classes)],
            "modules": [id(child) for d in children if d for child in d.values()],
            "hooks": list(map(tuple, chain(*hooks))) if any(map(any, hooks)) else [],  # by ids, which are never used again
            "parameters or buffers that are None": [i for i, t in enumerate(slots) if t is None],
            "shared tensors": [first.setdefault(id(t), i) for i, t in enumerate(tensors)],
        }
        return of_model, of_modules, of_tensors

    def _addresses_of(self, tensors: list[Tensor]) -> list[int]:
        try:
            return list(map(Tensor.data_ptr, tensors)) if self._addresses else []
        except RuntimeError as error:
            raise TypeError(f"a tensor of the model has no address: {error}") from error

    def _signature(self, t: Tensor):
        """What is compared of a tensor that is an attribute: which one it is, and where its data is."""
        self.devices.add(t.device)
        return _Same(t), self._addresses_of([t]), t.dtype, t.shape, t.stride()


class _Same:
    """An object, held weakly, to compare by identity. What knows no weak references goes by its id, so its type as well."""

    __slots__ = ("_id", "_ref")

    def __init__(self, value):
        self._id = id(value), type(value)
        try:
            self._ref: weakref.ref | None = weakref.ref(value)
        except TypeError:
            self._ref = None

    def __eq__(self, other):
        if type(other) is not _Same or self._id != other._id:
            return False
        if self._ref is None or other._ref is None:
            return self._ref is other._ref
        return self._ref() is not None and self._ref() is other._ref()

    def __hash__(self):
        return hash(self._id)


def freeze(value):
    """A picture of `value` that can be compared and hashed and keeps nothing alive but plain values."""
    return _freeze(value, lambda t: (t.data_ptr(), t.dtype, t.shape, t.stride()))


def _freeze(value, signature, queue: deque | None = None, name: str = ""):
    """As `freeze`; modules on the way are put into `queue`, to be looked at by themselves."""
    if type(value) in PLAIN or isinstance(value, (Number, str, bytes)):
        return type(value), str(value) if type(value) is slice else value
    if isinstance(value, (list, tuple, deque)):
        return type(value), tuple(_freeze(v, signature, queue, name) for v in value)
    if isinstance(value, dict):
        items = tuple((_freeze(k, signature, queue, name), _freeze(v, signature, queue, name)) for k, v in value.items())
        return type(value), items
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_freeze(v, signature, queue, name) for v in value)
    if isinstance(value, Tensor):
        return _Same(value), signature(value)
    if isinstance(value, nn.Module) and queue is not None:
        queue.append((name, value))
    return _Same(value)


def _is_plain(value) -> bool:
    """Whether `value` never changes and holds on to nothing, so that the same object means the same value."""
    return type(value) in PLAIN or (isinstance(value, tuple) and all(map(_is_plain, value)))

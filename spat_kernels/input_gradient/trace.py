"""From a model to a list of nodes: torch.fx traces it, and each operation of the graph is read by its rule (rules.py).

What does not fit raises `CannotPlan` with the reason.
"""

import copy
import inspect
import operator
import threading
from functools import partial, partialmethod
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .nodes import CannotPlan, Network, Node
from .rules import find_function, find_rule
from .shapes import Shapes
from .token_rules import TUPLES

PROBES = 5  # samples that a model is traced with; an unusual size, so that a batch differs from other dimensions
BATCHES = PROBES, 11  # with which its shapes are found
ALIASING = {
    "flatten", "view", "reshape", "contiguous", "dropout", "dropout2d", "squeeze", "unsqueeze", "permute", "transpose", "to",
    "float", "unflatten", "movedim", "swapaxes", "getitem", "unbind", "chunk", "split", "select", "narrow", "type_as",
    "reshape_as", "view_as",
}  # fmt: skip
ASKING = {getattr, torch.is_tensor, "size", "dim", "ndimension", "stride", "is_contiguous", "is_floating_point"}  # not for values
KNOWN = ("device", "dtype")  # of a buffer, while the model is traced
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def trace(model: nn.Module, x: Tensor) -> list[Node]:
    """The nodes of `model` (in the modes that it is in) for images like `x` [B >= 1, ...]; the last one gives the logits.

    Raises:
        CannotPlan: with the reason.
    """
    check_hooks(model)
    if nn.modules.module._has_any_global_hook():
        raise CannotPlan("global module hooks are registered, which the plan would not call")
    before = _State(model)
    tracer, reason = _Tracer(model, x), None
    reader: _Reader | None = None
    try:
        with torch.enable_grad(), _NoLooking():  # a no_grad inside is then seen
            reader = _Reader(model, tracer.trace(model, concrete_args=_defaults(model)))
    except CannotPlan as error:
        reason = str(error)
    except Exception as error:  # whatever a model's own code raises when it is run on symbols
        reason = f"torch.fx cannot trace it: {first_line(error)}"
    if changed := before.restore():
        reason = f"its forward changes {changed}, which the plan would not do"
    try:
        if reason:
            raise CannotPlan(reason)
        assert reader is not None
        return reader.read(x[torch.arange(PROBES, device=x.device) % len(x)])
    finally:  # fx's objects are full of cycles: they are not to keep the model alive until the next garbage collection
        for holder in (tracer, *([reader.module, reader] if reader else [])):
            vars(holder).clear()


def check_hooks(model: nn.Module) -> None:
    for path, m in model.named_modules():
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            raise CannotPlan(f"{path or 'the model'} has hooks, which the plan would not call")


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The plain defaults of forward's arguments after the images: an attack gives no others."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if type(p.default) in (bool, int, float, str, type(None))}


class _NoLooking(TorchFunctionMode):
    """Within: Python code that looks at a tensor's values fails, since a plan would keep what it saw for good."""

    names = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__")
    functions = {getattr(Tensor, name) for name in names}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.functions:
            raise CannotPlan(f"its forward looks at the values of a tensor ({function.__name__}), which may change")
        return function(*args, **(kwargs or {}))


class _State:
    """What running a model's code may change: attributes, the lists and dicts among them, and values of buffers."""

    def __init__(self, model: nn.Module):
        self._attributes = [(path, vars(m), dict(vars(m))) for path, m in model.named_modules()]
        self._containers = [
            (f"{path}.{name}".lstrip("."), v, copy.copy(v))
            for path, _, attributes in self._attributes
            for name, v in attributes.items()
            if type(v) in (list, dict, set)
        ]
        self._buffers = [(name, b, b._version, b.clone()) for name, b in model.named_buffers()]

    def restore(self) -> str | None:
        """Undo all changes; returns the name of one."""
        changed = None
        for path, now, before in self._attributes:
            for name in set(now) | set(before):
                if name.startswith("_tensor_constant") and name not in before:
                    del now[name]  # left by fx itself, for a tensor that the model makes
                elif now.get(name, self) is not before.get(name, self):
                    changed = f"{path}.{name}".lstrip(".")
            if changed:
                now.clear()
                now.update(before)
        for name, now, before in self._containers:
            if len(now) != len(before) or any(map(operator.is_not, _items(now), _items(before))):
                changed = name
                now.clear()
                now.extend(before) if isinstance(now, list) else now.update(before)
        for name, buffer, version, values in self._buffers:
            if buffer._version != version:
                changed = name
                buffer.copy_(values)
        return changed


def _items(container) -> list:
    if isinstance(container, dict):
        return [*container, *container.values()]
    return container if isinstance(container, list) else sorted(container, key=id)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


class _Tracer(torch.fx.Tracer):
    """Stops at the modules that are read as they are. fx patches nn.Module for every thread: other threads pass through."""

    def __init__(self, model: nn.Module, x: Tensor):
        super().__init__(autowrap_functions=())
        self._thread: int | None = threading.get_ident()
        self._shapes = Shapes(model, x, BATCHES)

    def is_leaf_module(self, m, path):
        if find_rule(m):
            return True
        return super().is_leaf_module(m, path) and not isinstance(m, nn.Sequential)

    def proxy(self, node):
        return _Proxy(node, self)

    def create_proxy(self, *args, **kwargs):
        if not torch.is_grad_enabled() or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            raise CannotPlan(
                "a part of its forward runs without gradients, with its own backward or under an autocast of its own"
            )
        proxy = super().create_proxy(*args, **kwargs)
        if proxy.node.target in TUPLES and (count := self._ask(Shapes.parts, proxy.node)):
            return tuple(proxy[i] for i in range(count))
        return proxy

    def size_of(self, proxy: "_Proxy") -> tuple | None:
        """Its shape: numbers, and symbols for what depends on the batch. None: it is no tensor."""
        shape = self._ask(Shapes.of, proxy.node)
        if shape is None:
            return None
        symbol = partial(self.create_proxy, "call_method", "size", kwargs={})
        return tuple(symbol(args=(proxy, i)) if length is None else length for i, length in enumerate(shape))

    def _ask(self, question, node):
        """Shapes are found by the model's own modules, which fx is to let pass meanwhile."""
        thread, self._thread = self._thread, None
        try:
            return question(self._shapes, node)
        finally:
            self._thread = thread

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        # What is computed of buffers is a part of the graph, but counters and flags are read by Python code.
        self.proxy_buffer_attributes = isinstance(attr_val, Tensor) and attr_val.ndim > 0
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Proxy(torch.fx.Proxy):
    """torch.fx takes a += b for a = a + b, and what is known of shapes and buffers for symbols."""

    def __getattr__(self, name):
        if name in KNOWN and self.node.op == "get_attr":
            path, _, own = str(self.node.target).rpartition(".")
            buffers = self.tracer.root.get_submodule(path)._buffers
            if own in buffers:
                return getattr(buffers[own], name)
        return super().__getattr__(name)

    def _in_place(self, function, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    __iadd__ = partialmethod(_in_place, operator.iadd)
    __isub__ = partialmethod(_in_place, operator.isub)
    __imul__ = partialmethod(_in_place, operator.imul)
    __itruediv__ = partialmethod(_in_place, operator.itruediv)

    tracer: "_Tracer"

    @property
    def shape(self):
        size = self.tracer.size_of(self)
        return torch.fx.proxy.Attribute(self, "shape") if size is None else size

    @property
    def ndim(self):
        size = self.tracer.size_of(self)
        return torch.fx.proxy.Attribute(self, "ndim") if size is None else len(size)

    def size(self, dim=None):
        size = self.tracer.size_of(self)
        if size is None or isinstance(dim, torch.fx.Proxy):
            return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})
        return size if dim is None else size[dim]

    def dim(self):
        return self.ndim


class _Uncompiled(torch.fx.GraphModule):
    """Has no code: what fx writes of each graph stays in `linecache` for good, and nobody calls it here."""

    def recompile(self):
        pass


class _Reader(torch.fx.Interpreter, Network):  # type: ignore[misc]
    """Runs the traced graph on a few samples and writes down each operation as a `Node`."""

    def __init__(self, model: nn.Module, graph: torch.fx.Graph):
        torch.fx.Interpreter.__init__(self, _Uncompiled(model, graph, class_name="traced"), garbage_collect_values=False)
        Network.__init__(self, model)
        self.root: dict[torch.fx.Node, torch.fx.Node] = {}  # fx node -> whose memory it may share
        self.order = {n: i for i, n in enumerate(graph.nodes)}

    def read(self, probe: Tensor) -> list[Node]:
        self.probe = probe
        with torch.no_grad():
            reason = None
            try:
                self.run(probe.clone())
            except CannotPlan as error:
                reason = str(error).splitlines()[0]  # without fx's account of where
            except Exception as error:
                reason = f"{first_line(error)} on a batch of {len(probe)}"
        if reason:
            raise CannotPlan(reason)  # outside of `except`: a context would keep frames, and so the model, alive
        return self.nodes

    def run_node(self, n: torch.fx.Node) -> Any:
        target: Any = n.args[0] if n.args else None
        if _in_place(n, self.module) and self.is_tensor(target) and not self._is_read_by(n, target):
            raise CannotPlan(f"{n.name} changes a tensor of the model")
        if n.op == "call_method" and n.target in _NoLooking.names:
            raise CannotPlan(f"its forward looks at the values of a tensor ({n.target}), which may change")
        result = super().run_node(n)
        if n.op == "placeholder":
            if self.nodes and n.args:
                return result  # a default
            if self.nodes:
                raise CannotPlan(f"forward takes a second input, {n.target}")
            self._check_batch(n, result)
            self.add(n, "input")
            self.root[n] = n
        elif n.op == "output":
            (answer,) = n.args
            if not isinstance(answer, torch.fx.Node) or answer not in self.index or answer in self.form:
                raise CannotPlan("it does not return one tensor that depends on the images")
            self.nodes = self._needed_for(self.index[answer])
        elif any(a in self.index or a in self.parts for a in n.all_input_nodes):
            if isinstance(result, Tensor):
                self._read(n, result)
            elif n.target in TUPLES:
                self._check_in_place(n)
                TUPLES[n.target](self, n, *n.args, **n.kwargs)
            elif n.target in ASKING:
                self.asked.add(n)
            else:
                raise CannotPlan(f"{n.name} gives no tensor, but {type(result).__name__}")
        elif not isinstance(result, Tensor) and not self.asked.isdisjoint(n.all_input_nodes):
            self.asked.add(n)
        return result

    def _is_read_by(self, n: torch.fx.Node, constant: torch.fx.Node) -> bool:
        """Whether a computed constant is memory that `n` alone reads."""
        memory = self.env[constant].untyped_storage().data_ptr()
        alike = [k for k, v in self.env.items() if isinstance(v, Tensor) and v.untyped_storage().data_ptr() == memory]
        return constant.op != "get_attr" and alike == [constant] and list(constant.users) == [n]

    def _needed_for(self, last: int) -> list[Node]:
        """The nodes that node `last` needs, in order: dead code has no gradient."""
        needed = {0, last}
        for i in range(last, -1, -1):
            if i in needed:
                needed.update(self.nodes[i].inputs)
        new = {old: i for i, old in enumerate(sorted(needed))}
        kept = [self.nodes[i] for i in sorted(needed)]
        for node in kept:
            node.inputs = tuple(new[i] for i in node.inputs)
        return kept

    def _check_batch(self, n, result):
        if result.ndim < 2 or result.shape[0] != len(self.probe):
            raise CannotPlan(f"{n.name} has shape {tuple(result.shape)} for a batch of {len(self.probe)}: samples may mix")
        self.shape = tuple(result.shape[1:])

    def _check_dtype(self, n, result):
        if result.dtype != self.probe.dtype:
            raise CannotPlan(f"{n.name} changes the dtype from {self.probe.dtype} to {result.dtype}")

    def _check_forms(self, n):
        for a in n.all_input_nodes:
            if a in self.form:
                where = "is merged with other dimensions" if self.form[a].merged else f"is dimension {self.form[a].at}"
                raise CannotPlan(f"{n.name} reads {a.name}, whose batch {where}")

    def _check_in_place(self, n):
        """An operation in place is the same as one out of place while nobody reads the old value later."""
        values = [a for a in n.all_input_nodes if a in self.root]
        self.root[n] = self.root[values[0]] if _aliases(n, self.module) else n
        if not _in_place(n, self.module):
            return
        target = self.root[values[0]]
        if target.op == "placeholder":
            raise CannotPlan(f"{n.name} changes the images in place")
        for other in self.root:
            if other is not n and self.root[other] is target:
                late = [u for u in other.users if self.order[u] > self.order[n]]
                if late:
                    raise CannotPlan(f"{n.name} works in place on a value that {late[0].name} reads later")

    def _read(self, n: torch.fx.Node, result: Tensor) -> None:
        rule, args, kwargs = self._rule(n)
        self.result = result
        if not getattr(rule, "form_aware", False):
            self._check_forms(n)
            self._check_batch(n, result)
        self._check_dtype(n, result)
        self._check_in_place(n)
        rule(self, n, *args, **kwargs)

    def _rule(self, n: torch.fx.Node) -> tuple[Any, tuple, dict]:
        """The rule for `n`, and what it is given besides the network and `n`."""
        if n.op == "call_module" and isinstance(n.target, str):
            m = self.fetch_attr(n.target)
            rule = find_rule(m)
            if rule is None:
                raise CannotPlan(f"no rule for {type(m).__module__}.{type(m).__qualname__} ({n.target})")
            if len(n.args) != 1 or n.kwargs:
                raise CannotPlan(f"{n.target} is called with more than one argument")
            if "forward" in vars(m):
                raise CannotPlan(f"{n.target} has a forward of its own")
            return rule, (n.args[0], m), {}
        rule = find_function(n.target)
        if rule is None:
            name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", n.target)
            raise CannotPlan(f"no rule for {name} ({n.name})")
        return rule, n.args, n.kwargs


def _aliases(n, root) -> bool:
    """May the result share its argument's memory?"""
    if n.op == "call_module":
        m = root.get_submodule(n.target)
        return isinstance(m, (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)) or _in_place(n, root)
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    return name in ALIASING or _in_place(n, root)


def _in_place(n, root) -> bool:
    if n.op == "call_module":
        return bool(getattr(root.get_submodule(n.target), "inplace", False))
    if n.kwargs.get("inplace"):
        return True
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or n.target in IN_PLACE

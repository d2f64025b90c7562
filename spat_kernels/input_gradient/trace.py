"""From a model to a list of nodes that the input-gradient plan knows: torch.fx, read as a small language.

    input · conv · linear · affine (BatchNorm, normalisation) · relu · add · mean (global average pooling) · reshape
    local (any other function of a sample's values without parameters of its own: differentiated by autograd, alone)

What does not fit raises `CannotPlan` with the reason. Nodes name parameters and never hold them, so that a list of nodes keeps no
model alive, and stays right when the weights change.
"""

import copy
import inspect
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PROBES = 5  # samples that a model is traced with; no usual size, so that a batch is told from other dimensions


class CannotPlan(Exception):
    """Why a model does not take the plan."""


@dataclass(frozen=True)
class Ref:
    """A parameter or buffer, as the path of its module and its name there."""

    path: str
    name: str

    def of(self, modules: dict[str, nn.Module]) -> Tensor:
        return getattr(modules[self.path], self.name)


@dataclass(frozen=True)
class Norm:
    """BatchNorm by its running statistics; `weight` and `bias` may be None."""

    weight: Ref | None
    bias: Ref | None
    mean: Ref
    var: Ref
    eps: float


@dataclass(frozen=True)
class Term:
    """One operation with a constant: "mul", "add", "sub", "div", "rsub" (constant - x)."""

    kind: str
    constant: "Ref | float | tuple[float, ...]"


@dataclass
class Node:
    """One value of the network. `shape` is that of one sample; `inputs` are indices of earlier nodes."""

    kind: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    name: str
    weight: Ref | None = None  # conv, linear
    bias: Ref | None = None
    conv: dict | None = None  # stride, padding, dilation, groups
    norm: "Norm | Term | None" = None  # affine
    function: Callable | None = None  # local: the values of `inputs` -> this value


def trace(model: nn.Module, x: Tensor) -> list[Node]:
    """The nodes of `model` (in the modes that it is in) for images like `x` [B >= 1, ...]; the last one gives the logits.

    Raises:
        CannotPlan: with the reason.
    """
    check_hooks(model)
    if nn.modules.module._has_any_global_hook():
        raise CannotPlan("global module hooks are registered, which the plan would not call")
    before = _State(model)
    tracer, reason = _Tracer(), None
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

    def __init__(self):
        super().__init__(autowrap_functions=())
        self._thread = threading.get_ident()

    def is_leaf_module(self, m, path):
        if _is_normalize(m) or type(m) in MODULES:
            return True
        return super().is_leaf_module(m, path) and not isinstance(m, nn.Sequential)

    def proxy(self, node):
        return _Proxy(node, self)

    def create_proxy(self, *args, **kwargs):
        if not torch.is_grad_enabled() or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            raise CannotPlan(
                "a part of its forward runs without gradients, with its own backward or under an autocast of its own"
            )
        return super().create_proxy(*args, **kwargs)

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Proxy(torch.fx.Proxy):
    """torch.fx takes a += b for a = a + b."""

    def _in_place(self, function, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other):
        return self._in_place(operator.iadd, other)

    def __isub__(self, other):
        return self._in_place(operator.isub, other)

    def __imul__(self, other):
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other):
        return self._in_place(operator.itruediv, other)


def _is_normalize(m: nn.Module) -> bool:
    return type(m).__name__ == "Normalize" and type(m).__module__.startswith("torchvision.transforms")


# ---- reading ------------------------------------------------------------------------------------------------------------------


class _Reader(torch.fx.Interpreter):
    """Runs the traced graph on a few samples and writes down each operation as a `Node`.

    A value in the graph is a `_Value` (an index of a node) where it depends on the images and plain data where it does not.
    """

    def __init__(self, model: nn.Module, graph: torch.fx.Graph):
        super().__init__(torch.fx.GraphModule(model, graph, class_name="traced"), garbage_collect_values=False)
        self.nodes: list[Node] = []
        self.model = model
        self.index: dict[torch.fx.Node, int] = {}  # fx node -> the node that holds its value
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
        if _in_place(n, self.module) and not self.is_value(target) and isinstance(self.env.get(target), Tensor):
            raise CannotPlan(f"{n.name} changes a tensor of the model")
        if n.op == "call_method" and n.target in _NoLooking.names:
            raise CannotPlan(f"its forward looks at the values of a tensor ({n.target}), which may change")
        result = super().run_node(n)
        if n.op == "placeholder":
            if self.nodes and n.args:
                return result  # a default
            if self.nodes:
                raise CannotPlan(f"forward takes a second input, {n.target}")
            self._add(n, "input", ())
            self.root[n] = n
            self._check_batch(n, result)
        elif n.op == "output":
            (answer,) = n.args
            if not isinstance(answer, torch.fx.Node) or answer not in self.index:
                raise CannotPlan("it does not return one tensor that depends on the images")
            self.nodes = self._needed_for(self.index[answer])
        elif any(a in self.index for a in n.all_input_nodes):
            if isinstance(result, Tensor):
                self._check_batch(n, result)
                self._check_in_place(n)
                self._read(n)
            elif n.target not in ASKING:
                raise CannotPlan(f"{n.name} gives no tensor, but {type(result).__name__}")
        return result

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
        if result.dtype != self.probe.dtype:
            raise CannotPlan(f"{n.name} changes the dtype from {self.probe.dtype} to {result.dtype}")
        self._shape = tuple(result.shape[1:])

    def _check_in_place(self, n):
        """An operation in place is the same as one out of place while nobody reads the old value later."""
        values = [a for a in n.all_input_nodes if a in self.index]
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

    def _add(self, n, kind, inputs, **fields) -> None:
        shape = fields.pop("shape", None) or (self._shape if self.nodes else tuple(self.probe.shape[1:]))
        self.nodes.append(Node(kind, tuple(inputs), shape, n.name, **fields))
        self.index[n] = len(self.nodes) - 1

    def _same(self, n, source) -> None:
        """`n` is the value of `source`."""
        self.index[n] = self.index[source]

    def _read(self, n: torch.fx.Node) -> None:
        if n.op == "call_module" and isinstance(n.target, str):
            m = self.fetch_attr(n.target)
            rule = _normalize if _is_normalize(m) else MODULES.get(type(m))
            if rule is None:
                raise CannotPlan(f"no rule for {type(m).__module__}.{type(m).__qualname__} ({n.target})")
            if len(n.args) != 1 or n.kwargs:
                raise CannotPlan(f"{n.target} is called with more than one argument")
            if "forward" in vars(m):
                raise CannotPlan(f"{n.target} has a forward of its own")
            return rule(self, n, n.args[0], m)
        rule = FUNCTIONS.get(n.target)
        if rule is None:
            name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", n.target)
            raise CannotPlan(f"no rule for {name} ({n.name})")
        return rule(self, n, *n.args, **n.kwargs)

    # -- what rules ask --

    def is_value(self, a) -> bool:
        return isinstance(a, torch.fx.Node) and a in self.index

    def plain(self, a) -> Any:
        """The data of an argument that does not depend on the images (sizes included)."""
        return torch.fx.node.map_arg(a, lambda node: self._plain_node(node))

    def _plain_node(self, node):
        if node in self.index:
            raise CannotPlan(f"{node.name} is used as an argument that should be constant")
        return self.env[node]

    def ref(self, a) -> Ref | None:
        """The parameter that an argument names."""
        if a is None:
            return None
        if not isinstance(a, torch.fx.Node) or a.op != "get_attr" or not isinstance(a.target, str):
            raise CannotPlan(f"{a} is computed and no parameter or buffer of the model")
        path, _, name = a.target.rpartition(".")
        if name.startswith("_tensor_constant") and not hasattr(self._original(path), name):
            raise CannotPlan("a tensor that is no parameter, buffer or attribute of the model takes part")
        return Ref(path, name)

    def _original(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def path(self, n) -> str:
        return str(n.target)


def _aliases(n, root) -> bool:
    """May the result share its argument's memory?"""
    if n.op == "call_module":
        m = root.get_submodule(n.target)
        return isinstance(m, (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)) or _in_place(n, root)
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    return name in ALIASING or _in_place(n, root)


ALIASING = {"flatten", "view", "reshape", "contiguous", "dropout", "dropout2d", "squeeze", "unsqueeze", "permute", "transpose"}
ASKING = {getattr, torch.is_tensor, "size", "dim", "ndimension", "stride", "is_contiguous", "is_floating_point"}  # not for values
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def _in_place(n, root) -> bool:
    if n.op == "call_module":
        return bool(getattr(root.get_submodule(n.target), "inplace", False))
    if n.kwargs.get("inplace"):
        return True
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or n.target in IN_PLACE


# ---- rules: modules ---------------------------------------------------------------------------------------------------------


def _conv(r: _Reader, n, x, m: nn.Conv2d):
    if m.padding_mode != "zeros":
        raise CannotPlan(f"{n.target} pads by {m.padding_mode!r}")
    bias = None if m.bias is None else Ref(r.path(n), "bias")
    _add_conv(r, n, x, Ref(r.path(n), "weight"), bias, m.stride, m.padding, m.dilation, m.groups)


def _add_conv(r, n, x, weight, bias, stride, padding, dilation, groups):
    if len(r.nodes[r.index[x]].shape) != 3:
        raise CannotPlan(f"{n.name} convolves images without a batch")
    if isinstance(padding, str):
        kernel = weight.of({weight.path: r._original(weight.path)}).shape[2:]
        extents = [d * (k - 1) for d, k in zip(_pair(dilation), kernel, strict=True)]
        if padding == "same" and any(e % 2 for e in extents):
            raise CannotPlan(f"{n.name} pads unevenly")
        padding = [e // 2 if padding == "same" else 0 for e in extents]
    conv = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
    r._add(n, "conv", (r.index[x],), weight=weight, bias=bias, conv=conv)


def _pair(v) -> list[int]:
    return [v, v] if isinstance(v, int) else list(v)


def _batch_norm(r: _Reader, n, x, m):
    if m.training or m.running_mean is None:
        raise CannotPlan(f"{n.target} normalises by the statistics of the batch, which couples the samples")
    at = {name: None if getattr(m, name) is None else Ref(r.path(n), name) for name in ("weight", "bias")}
    _add_norm(r, n, x, Norm(at["weight"], at["bias"], Ref(r.path(n), "running_mean"), Ref(r.path(n), "running_var"), m.eps))


def _add_norm(r, n, x, norm):
    if len(r.nodes[r.index[x]].shape) not in (1, 3):
        raise CannotPlan(f"{n.name} normalises values that are neither [B, C] nor [B, C, H, W]")
    r._add(n, "affine", (r.index[x],), norm=norm)


def _linear(r: _Reader, n, x, m: nn.Linear):
    _add_linear(r, n, x, Ref(r.path(n), "weight"), None if m.bias is None else Ref(r.path(n), "bias"))


def _add_linear(r, n, x, weight, bias):
    if len(r.nodes[r.index[x]].shape) != 1:
        raise CannotPlan(f"{n.name} applies a linear layer to values that are not [B, C]")
    r._add(n, "linear", (r.index[x],), weight=weight, bias=bias)


def _relu(r: _Reader, n, x, *_, **__):
    r._add(n, "relu", (r.index[x],))


def _identity(r: _Reader, n, x, *_, **__):
    r._same(n, x)


def _dropout(r: _Reader, n, x, m):
    if m.training and m.p > 0:
        raise CannotPlan(f"{n.target} is dropout in training mode, which draws random numbers")
    r._same(n, x)


def _reshape(r: _Reader, n, x, *_, **__):
    r._add(n, "reshape", (r.index[x],))


def _average(r: _Reader, n, x, m: nn.AvgPool2d | nn.AdaptiveAvgPool2d):
    shape = r.nodes[r.index[x]].shape
    if len(shape) == 3 and r._shape == (shape[0], 1, 1) and _covers(m, shape):
        r._add(n, "mean", (r.index[x],))
    else:
        _local_module(r, n, x, m)


def _local_module(r: _Reader, n, x, m):
    m = copy.deepcopy(m)  # it has no parameters
    if getattr(m, "inplace", False):
        m.inplace = False  # the plan may still need what it reads
    r._add(n, "local", (r.index[x],), function=m)


def _covers(pool, shape) -> bool:
    return isinstance(pool, nn.AdaptiveAvgPool2d) or (
        _pair(pool.kernel_size) == list(shape[1:]) and _pair(pool.padding) == [0, 0] and pool.divisor_override is None
    )


def _normalize(r: _Reader, n, x, m):
    middle = _constant(r, n, "sub", x, tuple(float(v) for v in m.mean))
    r.nodes.append(Node("affine", (middle,), r._shape, n.name + "_std", norm=Term("div", tuple(float(v) for v in m.std))))
    r.index[n] = len(r.nodes) - 1


def _constant(r: _Reader, n, kind, x, constant) -> int:
    r._add(n, "affine", (r.index[x],), norm=Term(kind, constant))
    return r.index[n]


LOCAL_MODULES = (
    nn.SiLU, nn.GELU, nn.Softplus, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d,
    nn.LocalResponseNorm, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
    nn.PixelShuffle, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.Softmax2d,
)  # fmt: skip
MODULES: dict[type, Callable] = dict.fromkeys(LOCAL_MODULES, _local_module) | {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,
    nn.AvgPool2d: _average,
    nn.AdaptiveAvgPool2d: _average,
    nn.Linear: _linear,
    nn.ReLU: _relu,
    nn.Identity: _identity,
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
    nn.AlphaDropout: _dropout,
    nn.Flatten: _reshape,
    nn.Unflatten: _reshape,
}

# ---- rules: functions and methods -------------------------------------------------------------------------------------------


def _add_f(r: _Reader, n, a, b, alpha=1):
    if r.is_value(a) and r.is_value(b) and alpha == 1:
        shapes = {r.nodes[r.index[v]].shape for v in (a, b)}
        if len(shapes) == 1 and len(r._shape) in (1, 3):
            return r._add(n, "add", (r.index[a], r.index[b]))
    return _arithmetic("add", torch.add)(r, n, a, b, **({} if alpha == 1 else {"alpha": alpha}))


def _arithmetic(kind: str, function):
    """x op constant is an affine map where the constant is one number or one for each channel; else autograd does it."""

    def rule(r: _Reader, n, a, b, **kwargs):
        if not kwargs and r.is_value(a) != r.is_value(b):
            x, constant, name = (a, b, kind) if r.is_value(a) else (b, a, {"sub": "rsub"}.get(kind, kind))
            constant = _as_constant(r, constant, r.nodes[r.index[x]].shape)
            if constant is not None and not (kind == "div" and x is b):
                return _constant(r, n, name, x, constant)
        return _local(function)(r, n, a, b, **kwargs)

    return rule


def _as_constant(r: _Reader, constant, shape) -> "Ref | float | None":
    if isinstance(constant, (int, float)):
        return float(constant)
    value = r.plain(constant)
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Tensor) and len(shape) in (1, 3):
        per_channel = (shape[0], *[1] * (len(shape) - 1))
        if value.numel() == 1 or tuple(value.shape) in (per_channel, (1, *per_channel)):
            return r.ref(constant)
    return None


def _local(function):
    """A rule that leaves `function` to autograd, with every argument but the values as it is now."""

    def rule(r: _Reader, n, *args, **kwargs):
        kwargs.pop("inplace", None)
        values: list[torch.fx.Node] = []

        def slot(a):
            if r.is_value(a):
                values.append(a)
                return _Slot(len(values) - 1)
            if isinstance(constant := r.plain(a), Tensor):
                raise CannotPlan(f"{n.name} combines values with a tensor that is neither one number nor one for each channel")
            return _Constant(constant)

        template = torch.fx.node.map_arg((args, kwargs), slot)

        def call(*tensors):
            real_args, real_kwargs = _fill(template, tensors)
            return function(*real_args, **real_kwargs)

        r._add(n, "local", [r.index[v] for v in values], function=call)

    return rule


@dataclass(frozen=True)
class _Slot:
    index: int


@dataclass(frozen=True)
class _Constant:
    value: Any


def _fill(template, tensors):
    if isinstance(template, _Slot):
        return tensors[template.index]
    if isinstance(template, _Constant):
        return template.value
    if isinstance(template, (tuple, list)):
        return type(template)(_fill(t, tensors) for t in template)
    if isinstance(template, dict):
        return {k: _fill(v, tensors) for k, v in template.items()}
    return template


def _pool_f(module, names):
    """A rule for the function form of a pooling module."""

    def rule(r: _Reader, n, x, *args, **kwargs):
        settings = dict(zip(names, args, strict=False)) | kwargs
        settings.pop("inplace", None)
        return _average(r, n, x, module(**{k: r.plain(v) for k, v in settings.items() if v is not None}))

    return rule


def _mean_f(r: _Reader, n, x, dim=None, keepdim=False, **kwargs):
    shape, dims = r.nodes[r.index[x]].shape, r.plain(dim)
    if dims is None or 0 in [d % (len(shape) + 1) for d in ([dims] if isinstance(dims, int) else dims)]:
        raise CannotPlan(f"{n.name} averages over the batch")
    spatial = isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims) == [2, 3]
    if len(shape) == 3 and spatial and not kwargs:
        return r._add(n, "mean", (r.index[x],))
    return _local(torch.mean)(r, n, x, dim, keepdim, **kwargs)


def _dropout_f(r: _Reader, n, x, p=0.5, training=True, inplace=False):
    if training and p > 0:
        raise CannotPlan(f"{n.name} is dropout in training mode, which draws random numbers")
    r._same(n, x)


def _batch_norm_f(r, n, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if r.plain(training) or running_mean is None:
        raise CannotPlan(f"{n.name} normalises by the statistics of the batch, which couples the samples")
    _add_norm(r, n, x, Norm(r.ref(weight), r.ref(bias), r.ref(running_mean), r.ref(running_var), r.plain(eps)))


def _conv_f(r, n, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    _add_conv(r, n, x, r.ref(weight), r.ref(bias), *map(r.plain, (stride, padding, dilation, groups)))


def _linear_f(r, n, x, weight, bias=None):
    _add_linear(r, n, x, r.ref(weight), r.ref(bias))


LOCAL_FUNCTIONS = (
    F.silu, F.gelu, F.softplus, F.leaky_relu, F.elu, F.celu, F.selu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh, F.relu6,
    F.sigmoid, F.tanh, F.softsign, F.logsigmoid, F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d, F.lp_pool2d, F.pad,
    F.interpolate, F.pixel_shuffle, torch.sigmoid, torch.tanh, torch.exp, torch.sqrt, torch.abs, torch.pow, torch.clamp,
    torch.maximum, torch.minimum, operator.pow, operator.neg, torch.neg,
)  # fmt: skip
LOCAL_METHODS = ("sigmoid", "tanh", "exp", "sqrt", "abs", "pow", "clamp", "neg", "square", "permute", "transpose")
FUNCTIONS: dict[Any, Callable] = {f: _local(f) for f in LOCAL_FUNCTIONS}
FUNCTIONS |= {name: _local(getattr(Tensor, name)) for name in LOCAL_METHODS}
FUNCTIONS |= dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _relu)
FUNCTIONS |= dict.fromkeys((torch.add, operator.add, operator.iadd, "add", "add_"), _add_f)
for _kind, _targets in {
    "mul": (torch.mul, operator.mul, operator.imul, "mul", "mul_"),
    "sub": (torch.sub, operator.sub, operator.isub, "sub", "sub_"),
    "div": (torch.div, operator.truediv, operator.itruediv, "div", "div_"),
}.items():
    FUNCTIONS |= dict.fromkeys(_targets, _arithmetic(_kind, getattr(torch, _kind)))
FUNCTIONS |= dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze), _reshape)
FUNCTIONS |= dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze"), _reshape)
FUNCTIONS |= dict.fromkeys(("contiguous", "clone", torch.clone), _identity)
FUNCTIONS |= dict.fromkeys((F.dropout, F.dropout2d, torch.dropout), _dropout_f)
FUNCTIONS |= {
    torch.mean: _mean_f,
    "mean": _mean_f,
    torch.cat: lambda r, n, tensors, dim=0: _cat(r, n, tensors, dim),
    F.avg_pool2d: _pool_f(
        nn.AvgPool2d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    ),
    F.adaptive_avg_pool2d: _pool_f(nn.AdaptiveAvgPool2d, ("output_size",)),
    F.batch_norm: _batch_norm_f,
    F.conv2d: _conv_f,
    torch.conv2d: _conv_f,
    F.linear: _linear_f,
}


def _cat(r: _Reader, n, tensors, dim):
    if r.plain(dim) % (len(r._shape) + 1) == 0:
        raise CannotPlan(f"{n.name} joins along the batch")
    return _local(lambda *parts: torch.cat(parts, dim))(r, n, *tensors)

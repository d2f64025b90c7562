"""What each module and function of PyTorch is in a plan: one rule for each kind, which adds its nodes to the network.

A rule takes (network, fx node, arguments of the call) for a function, and (network, fx node, x, module) for a module. What is in
neither table has no rule, and its model no plan.
"""

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from . import token_rules
from .nodes import CannotPlan, Network, Node, Norm, Ref, Term
from .token_rules import form_aware


def find_rule(module: nn.Module) -> Callable | None:
    return _normalize if is_normalize(module) else MODULES.get(type(module))


def is_normalize(module: nn.Module) -> bool:
    """torchvision need not be installed."""
    return type(module).__name__ == "Normalize" and type(module).__module__.startswith("torchvision.transforms")


def _called(n: torch.fx.Node) -> str:
    """What a user knows the call by."""
    return str(n.target) if n.op == "call_module" else n.name


def _own(n: torch.fx.Node, module: nn.Module, name: str) -> Ref | None:
    """The parameter or buffer `name` of the module that `n` calls."""
    return None if getattr(module, name) is None else Ref(str(n.target), name)


# ---- convolutions, linear layers and BatchNorm ------------------------------------------------------------------------------


def _conv2d(net: Network, n, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    settings = map(net.plain, (stride, padding, dilation, groups))
    _conv(net, n, x, net.ref(weight), net.ref(bias), *settings)


def _conv_module(net: Network, n, x, m: nn.Conv2d):
    if m.padding_mode != "zeros":
        raise CannotPlan(f"{n.target} pads by {m.padding_mode!r}")
    _conv(net, n, x, _own(n, m, "weight"), _own(n, m, "bias"), m.stride, m.padding, m.dilation, m.groups)


def _conv(net: Network, n, x, weight, bias, stride, padding, dilation, groups):
    if len(net.shape_of(x)) != 3:
        raise CannotPlan(f"{n.name} convolves images without a batch")
    if isinstance(padding, str):
        kernel = weight.of(dict(net.model.named_modules(remove_duplicate=False))).shape[2:]
        extents = [d * (k - 1) for d, k in zip(_pair(dilation), kernel, strict=True)]
        if padding == "same" and any(e % 2 for e in extents):
            raise CannotPlan(f"{n.name} pads unevenly")
        padding = [e // 2 if padding == "same" else 0 for e in extents]
    conv = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
    net.add(n, "conv", x, weight=weight, bias=bias, conv=conv, channels=0)


def _pair(v) -> list[int]:
    return [v, v] if isinstance(v, int) else list(v)


def _batch_norm(net: Network, n, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    _affine(net, n, x, net.plain(training), net.plain(eps), *map(net.ref, (weight, bias, running_mean, running_var)))


def _batch_norm_module(net: Network, n, x, m):
    _affine(net, n, x, m.training, m.eps, *(_own(n, m, name) for name in ("weight", "bias", "running_mean", "running_var")))


def _affine(net: Network, n, x, training, eps, weight=None, bias=None, mean=None, var=None):
    if training or mean is None:
        raise CannotPlan(f"{_called(n)} normalises by the statistics of the batch, which couples the samples")
    if len(net.shape_of(x)) not in (1, 3):
        raise CannotPlan(f"{n.name} normalises values that are neither [B, C] nor [B, C, H, W]")
    net.add(n, "affine", x, norm=Norm(weight, bias, mean, var, eps), channels=0)


def _normalize(net: Network, n, x, m):
    mean, std = (tuple(float(v) for v in values) for values in (m.mean, m.std))
    net.add(n, "affine", x, norm=Term("sub", mean), channels=0)
    net.nodes.append(Node("affine", (net.index[n],), net.shape, n.name + "_std", norm=Term("div", std)))
    net.index[n] = len(net.nodes) - 1


# ---- what changes no value, or the shape alone ------------------------------------------------------------------------------


def _kind(kind: str):
    """A rule that adds a node of this kind."""
    return lambda net, n, x, *_, **__: net.add(n, kind, x)


@form_aware
def _dropout(net: Network, n, x, p=0.5, training=True, inplace=False):
    if training and p > 0:
        raise CannotPlan(f"{_called(n)} is dropout in training mode, which draws random numbers")
    net.same(n, x)


@form_aware
def _dropout_module(net: Network, n, x, m):
    _dropout(net, n, x, m.p, m.training)


# ---- pooling ----------------------------------------------------------------------------------------------------------------


def _average(net: Network, n, x, m: nn.AvgPool2d | nn.AdaptiveAvgPool2d):
    shape = net.shape_of(x)
    if len(shape) == 3 and net.shape == (shape[0], 1, 1) and _covers(m, shape):
        net.add(n, "mean", x)
    else:
        _local_module(net, n, x, m)


def _covers(pool, shape) -> bool:
    return isinstance(pool, nn.AdaptiveAvgPool2d) or (
        _pair(pool.kernel_size) == list(shape[1:]) and _pair(pool.padding) == [0, 0] and pool.divisor_override is None
    )


def _average_by(module: type, *names: str):
    """A rule for the function form of a pooling module, whose arguments are these."""

    def rule(net: Network, n, x, *args, **kwargs):
        settings = dict(zip(names, args, strict=False)) | kwargs
        settings.pop("inplace", None)
        return _average(net, n, x, module(**{k: net.plain(v) for k, v in settings.items() if v is not None}))

    return rule


def _check_samples_apart(net: Network, n, shape, dims) -> None:
    if dims is None or 0 in [d % (len(shape) + 1) for d in ([dims] if isinstance(dims, int) else dims)]:
        raise CannotPlan(f"{n.name} reduces the batch")


def _mean(net: Network, n, x, dim=None, keepdim=False, **kwargs):
    shape, dims = net.shape_of(x), net.plain(dim)
    _check_samples_apart(net, n, shape, dims)
    dims = tuple(sorted(d % (len(shape) + 1) for d in ([dims] if isinstance(dims, int) else dims)))
    pixels = tuple(d for d in range(1, len(shape) + 1) if d != net.channels_of(x) + 1)
    if not kwargs and ((len(shape) == 3 and dims == (2, 3)) or (len(shape) > 1 and dims == pixels)):
        return net.add(n, "mean", x, dims=dims)
    return _local(torch.mean)(net, n, x, dim, keepdim, **kwargs)


def _sum(net: Network, n, x, dim=None, keepdim=False, **kwargs):
    _check_samples_apart(net, n, net.shape_of(x), net.plain(dim))
    return _local(torch.sum)(net, n, x, dim, keepdim, **kwargs)


# ---- arithmetic -------------------------------------------------------------------------------------------------------------


@form_aware
def _add(net: Network, n, a, b, alpha=1):
    if net.is_value(a) and net.is_value(b) and alpha == 1 and net.shape_of(a) == net.shape_of(b):
        net.shape = net.shape_of(a)
        if net.form_of(a) == net.form_of(b):
            return net.add(n, "add", a, b)
    return _arithmetic("add")(net, n, a, b, **({} if alpha == 1 else {"alpha": alpha}))


def _arithmetic(kind: str):
    """x op constant is an affine map where the constant is one number or one for each channel; else a step of its own."""

    @form_aware
    def rule(net: Network, n, a, b, **kwargs):
        if not kwargs and net.is_value(a) != net.is_value(b):
            x, constant, name = (a, b, kind) if net.is_value(a) else (b, a, {"sub": "rsub"}.get(kind, kind))
            if not (kind == "div" and x is b):
                value = constant if isinstance(constant, (int, float)) else net.plain(constant)
                if isinstance(value, (int, float)):
                    net.shape = net.shape_of(x)
                    return net.add(n, "affine", x, norm=Term(name, float(value)), channels=net.channels_of(x))
                if isinstance(value, Tensor) and token_rules.combine(net, n, x, name, constant):
                    return None
        token_rules.check_usual(net, n, *filter(net.is_value, (a, b)))
        net.shape = tuple(net.result.shape[1:])
        return _local(getattr(torch, kind))(net, n, a, b, **kwargs)

    return rule


# ---- what is left to autograd -----------------------------------------------------------------------------------------------


def _local_module(net: Network, n, x, m):
    m = copy.deepcopy(m)  # it has no parameters
    if getattr(m, "inplace", False):
        m.inplace = False  # the plan may still need what it reads
    net.add(n, "local", x, function=m)


def _local(function):
    """A rule that leaves `function` to autograd, with every argument but the values as it is now."""

    def rule(net: Network, n, *args, **kwargs):
        kwargs.pop("inplace", None)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        places = [i for i, a in enumerate(leaves) if net.is_value(a)]
        values = [leaves[i] for i in places]
        tensors = [i for i, a in enumerate(leaves) if net.is_tensor(a)]
        for i in tensors:
            if len(net.plain(leaves[i]).shape) > net.result.ndim:
                raise CannotPlan(f"{n.name} combines values with a tensor of more dimensions")
        given = [None if i in places + tensors else net.plain(a) for i, a in enumerate(leaves)]
        if len(net.result) != len(net.probe):
            raise CannotPlan(f"{n.name} has shape {tuple(net.result.shape)} for a batch of {len(net.probe)}: samples may mix")

        def call(*values_and_constants):
            full = given.copy()
            for i, t in zip(places + tensors, values_and_constants, strict=True):
                full[i] = t
            real_args, real_kwargs = pytree.tree_unflatten(full, tree)
            return function(*real_args, **real_kwargs)

        net.add(n, "local", *values, function=call, constants=tuple(net.ref(leaves[i]) for i in tensors))

    return rule


@form_aware
def _cat(net: Network, n, tensors, dim=0):
    if any(net.is_tensor(t) for t in tensors):
        return token_rules.join(net, n, tensors, dim)
    token_rules.check_usual(net, n, *tensors)
    net.shape = tuple(net.result.shape[1:])
    if net.plain(dim) % (len(net.shape) + 1) == 0:
        raise CannotPlan(f"{n.name} joins along the batch")
    return _local(lambda *parts: torch.cat(parts, dim))(net, n, *tensors)


# ---- the tables -------------------------------------------------------------------------------------------------------------

LOCAL_MODULES = (
    nn.SiLU, nn.GELU, nn.Softplus, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d,
    nn.LocalResponseNorm, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
    nn.PixelShuffle, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.Softmax2d,
)  # fmt: skip
MODULES: dict[type, Callable] = {
    nn.Conv2d: _conv_module,
    nn.ReLU: _kind("relu"),
    nn.Identity: token_rules.identity,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm), _batch_norm_module),
    **dict.fromkeys((nn.AvgPool2d, nn.AdaptiveAvgPool2d), _average),
    **dict.fromkeys((nn.Dropout, nn.Dropout2d, nn.AlphaDropout), _dropout_module),
    **dict.fromkeys(LOCAL_MODULES, _local_module),
    **token_rules.MODULES,
}

LOCAL_FUNCTIONS = (
    F.silu, F.gelu, F.softplus, F.leaky_relu, F.elu, F.celu, F.selu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh, F.relu6,
    F.sigmoid, F.tanh, F.softsign, F.logsigmoid, F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d, F.lp_pool2d,
    F.interpolate, F.pixel_shuffle, torch.sigmoid, torch.tanh, torch.exp, torch.sqrt, torch.abs, torch.pow, torch.clamp,
    torch.maximum, torch.minimum, operator.pow, operator.neg, torch.neg, torch.addcmul, torch.rsqrt,
    torch.square,
)  # fmt: skip
LOCAL_METHODS = ("sigmoid", "tanh", "exp", "sqrt", "abs", "pow", "clamp", "neg", "square", "norm", "amax")
FUNCTIONS: dict[Any, Callable] = {  # functions, and the names of methods
    **{f: _local(f) for f in LOCAL_FUNCTIONS},
    **{name: _local(getattr(Tensor, name)) for name in LOCAL_METHODS},
    **dict.fromkeys((F.conv2d, torch.conv2d), _conv2d),
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _kind("relu")),
    **dict.fromkeys(("contiguous", "clone", torch.clone), token_rules.identity),
    **dict.fromkeys(("to", "float"), _kind("cast")),  # others than to the dtype that it has have been refused
    **dict.fromkeys((F.dropout, F.dropout2d, torch.dropout), _dropout),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((torch.sum, "sum"), _sum),
    F.avg_pool2d: _average_by(
        nn.AvgPool2d, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    F.adaptive_avg_pool2d: _average_by(nn.AdaptiveAvgPool2d, "output_size"),
    **dict.fromkeys((torch.add, operator.add, operator.iadd, "add", "add_"), _add),
    **dict.fromkeys((torch.mul, operator.mul, operator.imul, "mul", "mul_"), _arithmetic("mul")),
    **dict.fromkeys((torch.sub, operator.sub, operator.isub, "sub", "sub_"), _arithmetic("sub")),
    **dict.fromkeys((torch.div, operator.truediv, operator.itruediv, "div", "div_"), _arithmetic("div")),
    torch.cat: _cat,
    **token_rules.FUNCTIONS,
}

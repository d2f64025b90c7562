"""What each module and function of PyTorch is in a plan: one rule for each kind, which adds its nodes to the network.

A rule takes (network, fx node, arguments of the call) for a function, and (network, fx node, x, module) for a module. What is in
neither table has no rule, and its model no plan.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from . import cnn_rules, token_rules
from .cnn_rules import multiply, of_timm
from .cnn_rules import pair as _pair
from .local_rules import local as _local
from .local_rules import local_module as _local_module
from .nodes import CannotPlan, Network, Node, Norm, Ref, Term
from .token_rules import form_aware


def find_rule(module: nn.Module) -> Callable | None:
    return _normalize if is_normalize(module) else MODULES.get(type(module)) or of_timm(module)


def find_function(target) -> Callable | None:
    return _stochastic_depth if getattr(target, "__name__", "") == "stochastic_depth" else FUNCTIONS.get(target)


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


@form_aware
def _batch_norm(net: Network, n, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    _affine(net, n, x, net.plain(training), net.plain(eps), *map(net.ref, (weight, bias, running_mean, running_var)))


@form_aware
def _batch_norm_module(net: Network, n, x, m):
    _affine(net, n, x, m.training, m.eps, *(_own(n, m, name) for name in ("weight", "bias", "running_mean", "running_var")))


@form_aware
def _affine(net: Network, n, x, training, eps, weight=None, bias=None, mean=None, var=None):
    if training or mean is None:
        raise CannotPlan(f"{_called(n)} normalises by the statistics of the batch, which couples the samples")
    token_rules.check_first(net, n, x)
    net.shape = net.shape_of(x)
    channels = token_rules.axis(net, n, x, 1) - 1
    net.add(n, "affine", x, norm=Norm(weight, bias, mean, var, eps), channels=channels)


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
def _stochastic_depth(net: Network, n, x, p, mode, training=True):
    """torchvision need not be installed."""
    _dropout(net, n, x, p, net.plain(training))


@form_aware
def _dropout_module(net: Network, n, x, m):
    _dropout(net, n, x, m.p, m.training)


# ---- pooling ----------------------------------------------------------------------------------------------------------------


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


def _amax(net: Network, n, x, dim=(), keepdim=False):
    _check_samples_apart(net, n, net.shape_of(x), net.plain(dim))
    return _local(torch.amax)(net, n, x, dim, keepdim)


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
        if kind == "mul" and not kwargs and net.is_value(a) and net.is_value(b):
            return multiply(net, n, a, b)
        return _local(getattr(torch, kind))(net, n, a, b, **kwargs)

    return rule


# ---- the tables -------------------------------------------------------------------------------------------------------------

LOCAL_MODULES = (
    nn.CELU, nn.SELU, nn.Softsign, nn.LogSigmoid, nn.LPPool2d, nn.LocalResponseNorm, nn.ReflectionPad2d,
    nn.ReplicationPad2d, nn.PixelShuffle, nn.Softmax2d,
)  # fmt: skip
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
MODULES: dict[type, Callable] = {
    nn.Conv2d: _conv_module,
    nn.ReLU: _kind("relu"),
    nn.Identity: token_rules.identity,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm), _batch_norm_module),
    **dict.fromkeys(DROPOUTS, _dropout_module),
    **dict.fromkeys(LOCAL_MODULES, _local_module),
    **cnn_rules.MODULES,
    **token_rules.MODULES,
}

LOCAL_FUNCTIONS = (
    F.celu, F.selu, F.softsign, F.logsigmoid, F.lp_pool2d, F.pixel_shuffle, torch.exp, torch.sqrt, torch.abs,
    torch.pow, torch.maximum, torch.minimum, operator.pow, operator.neg, torch.neg, torch.addcmul,
    torch.rsqrt, torch.square,
)  # fmt: skip
LOCAL_METHODS = ("exp", "sqrt", "abs", "pow", "neg", "square", "norm")
FUNCTIONS: dict[Any, Callable] = {  # functions, and the names of methods
    **{f: _local(f) for f in LOCAL_FUNCTIONS},
    **{name: _local(getattr(Tensor, name)) for name in LOCAL_METHODS},
    **dict.fromkeys((F.conv2d, torch.conv2d), _conv2d),
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _kind("relu")),
    **dict.fromkeys(("contiguous", "clone", torch.clone), token_rules.identity),
    **dict.fromkeys(("to", "float"), _kind("cast")),  # others than to the dtype that it has have been refused
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, torch.dropout), _dropout),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((torch.sum, "sum"), _sum),
    **dict.fromkeys((torch.amax, "amax"), _amax),
    **dict.fromkeys((torch.add, operator.add, operator.iadd, "add", "add_"), _add),
    **dict.fromkeys((torch.mul, operator.mul, operator.imul, "mul", "mul_"), _arithmetic("mul")),
    **dict.fromkeys((torch.sub, operator.sub, operator.isub, "sub", "sub_"), _arithmetic("sub")),
    **dict.fromkeys((torch.div, operator.truediv, operator.itruediv, "div", "div_"), _arithmetic("div")),
    **cnn_rules.FUNCTIONS,
    **token_rules.FUNCTIONS,
}

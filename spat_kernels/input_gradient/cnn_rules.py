"""The rules for what today's convolutional networks are made of: activations, gates, padding, pooling and group norms."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .local_rules import local, local_module
from .nodes import Act, CannotPlan, Constant, Network, Node, Norm, Ref, Term

# ---- activations ------------------------------------------------------------------------------------------------------------


def _act_module(name: str):
    return lambda net, n, x, m: _act(net, n, x, Act(name), m)


def _gelu_module(net: Network, n, x, m: nn.GELU):
    _act(net, n, x, _gelu_act(m.approximate), m)


def _hardtanh_module(net: Network, n, x, m: nn.Hardtanh):
    _act(net, n, x, Act("relu6") if (m.min_val, m.max_val) == (0, 6) else None, m)


def _leaky_module(net: Network, n, x, m: nn.LeakyReLU):
    _act(net, n, x, Act("leaky_relu", float(m.negative_slope)), m)


def _elu_module(net: Network, n, x, m: nn.ELU):
    _act(net, n, x, Act("elu") if m.alpha == 1 else None, m)


def _softplus_module(net: Network, n, x, m: nn.Softplus):
    _act(net, n, x, Act("softplus") if (m.beta, m.threshold) == (1, 20) else None, m)


def _prelu_module(net: Network, n, x, m: nn.PReLU):
    _prelu_act(net, n, x, Ref(str(n.target), "weight"))


def _prelu(net: Network, n, x, weight):
    _prelu_act(net, n, x, net.ref(weight))


def _prelu_act(net: Network, n, x, negative: Constant | None):
    net.add(n, "act", x, act=Act("leaky_relu", negative), channels=0)


def _act(net: Network, n, x, act: Act | None, m: nn.Module):
    if act is None:
        local_module(net, n, x, m)
    else:
        net.add(n, "act", x, act=act)


def _act_function(function: Callable, find: Callable[..., Act | None]):
    """A rule for a function whose other arguments `find` makes an `Act` of; None: left to autograd."""

    def rule(net: Network, n, x, *args, **kwargs):
        kwargs.pop("inplace", None)
        if any(map(net.is_tensor, (*args, *kwargs.values()))):
            return local(function)(net, n, x, *args, **kwargs)  # bounds may be trained, so they are read each time
        act = find(*map(net.plain, args), **{k: net.plain(v) for k, v in kwargs.items()})
        if act is None:
            return local(function)(net, n, x, *args, **kwargs)
        return net.add(n, "act", x, act=act)

    return rule


def _named(name: str):
    return lambda inplace=False: Act(name)


def _gelu_act(approximate: str = "none") -> Act:
    return Act("gelu" if approximate == "none" else "gelu_tanh")


def _leaky_act(negative_slope: float = 0.01, inplace: bool = False) -> Act:
    return Act("leaky_relu", float(negative_slope))


def _hardtanh_act(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Act | None:
    return Act("relu6") if (min_val, max_val) == (0, 6) else None


def _elu_act(alpha: float = 1.0, inplace: bool = False) -> Act | None:
    return Act("elu") if alpha == 1 else None


def _softplus_act(beta: float = 1.0, threshold: float = 20.0) -> Act | None:
    return Act("softplus") if (beta, threshold) == (1, 20) else None


def _clamp_act(min=None, max=None) -> Act | None:
    return Act("relu6") if (min, max) == (0, 6) else None


# ---- products ---------------------------------------------------------------------------------------------------------------


def multiply(net: Network, n, a, b) -> None:
    """The product of two values."""
    shapes = net.shape_of(a), net.shape_of(b)
    if len(shapes[0]) != len(shapes[1]) or net.shape not in shapes:
        return local(torch.mul)(net, n, a, b)
    if gated := _swish_of(net, a, b) or _swish_of(net, b, a):
        return net.add(n, "act", gated, act=Act("silu"))
    wide, narrow = (a, b) if shapes[0] == net.shape else (b, a)
    return net.add(n, "multiply", wide, narrow)


def _swish_of(net: Network, x, gate):
    """x, where the other factor is sigmoid(x)."""
    node = net.nodes[net.index[gate]]
    return x if node.act == Act("sigmoid") and node.inputs == (net.index[x],) else None


# ---- padding ----------------------------------------------------------------------------------------------------------------


def _pad(net: Network, n, x, pad, mode="constant", value=None):
    sides, mode, value = tuple(net.plain(pad)), net.plain(mode), net.plain(value)
    if not any(sides):
        return net.same(n, x)
    if mode != "constant" or len(sides) // 2 > len(net.shape):
        return local(F.pad)(net, n, x, sides, mode, value)
    return net.add(n, "pad", x, options={"sides": sides, "value": float(value or 0)})


def _pad_module(net: Network, n, x, m):
    _pad(net, n, x, m.padding, value=getattr(m, "value", 0.0))


# ---- pooling ----------------------------------------------------------------------------------------------------------------


def average(net: Network, n, x, m: nn.AvgPool2d | nn.AdaptiveAvgPool2d):
    shape = net.shape_of(x)
    if len(shape) == 3 and net.shape == (shape[0], 1, 1) and _covers(m, shape):
        net.add(n, "mean", x, channels=0)
    else:
        _pool(net, n, x, m)


def _covers(pool, shape) -> bool:
    return isinstance(pool, nn.AdaptiveAvgPool2d) or (
        pair(pool.kernel_size) == list(shape[1:]) and pair(pool.padding) == [0, 0] and pool.divisor_override is None
    )


def pair(v) -> list[int]:
    return [v, v] if isinstance(v, int) else list(v)


def _pool(net: Network, n, x, m):
    if len(net.shape_of(x)) != 3 or getattr(m, "return_indices", False):
        return local_module(net, n, x, m)
    if net.shape == net.shape_of(x) and type(m) in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d):
        return net.same(n, x)
    return net.add(n, "pool", x, function=m, channels=0)


def _pool_by(module: type, rule: Callable, *names: str):
    """A rule for the function form of a pooling module, whose arguments are these."""

    def of(net: Network, n, x, *args, **kwargs):
        settings = dict(zip(names, args, strict=False)) | kwargs
        settings.pop("inplace", None)
        return rule(net, n, x, module(**{k: net.plain(v) for k, v in settings.items() if v is not None}))

    return of


def _upsample(net: Network, n, x, m: nn.Upsample):
    whole = m.size is not None or all(float(f).is_integer() for f in _factors(m.scale_factor))
    if len(net.shape) == 3 and m.mode in ("nearest", "bilinear") and whole and not m.recompute_scale_factor:
        net.add(n, "pool", x, function=m, channels=0)
    else:
        local_module(net, n, x, m)


def _factors(scale_factor) -> tuple:
    return scale_factor if isinstance(scale_factor, tuple) else (scale_factor,)


def _interpolate(net: Network, n, x, size=None, scale_factor=None, mode="nearest", align_corners=None, **kwargs):
    size, scale_factor, mode, align_corners = map(net.plain, (size, scale_factor, mode, align_corners))
    if any(map(net.plain, kwargs.values())):
        return local(F.interpolate)(net, n, x, size, scale_factor, mode, align_corners, **kwargs)
    return _upsample(net, n, x, nn.Upsample(size, scale_factor, mode, align_corners))


# ---- norms of groups and of responses ---------------------------------------------------------------------------------------


def _group_norm(net: Network, n, x, num_groups, weight=None, bias=None, eps=1e-5):
    _normalise_groups(net, n, x, net.plain(num_groups), net.ref(weight), net.ref(bias), net.plain(eps))


def _group_norm_module(net: Network, n, x, m: nn.GroupNorm):
    _normalise_groups(net, n, x, m.num_groups, _own(n, m, "weight"), _own(n, m, "bias"), m.eps)


def _instance_norm_module(net: Network, n, x, m: nn.InstanceNorm2d):
    weight, bias = _own(n, m, "weight"), _own(n, m, "bias")
    if m.running_mean is not None and not m.training:
        mean, var = Ref(str(n.target), "running_mean"), Ref(str(n.target), "running_var")
        return net.add(n, "affine", x, norm=Norm(weight, bias, mean, var, m.eps), channels=0)
    if m.running_mean is not None:
        raise CannotPlan(f"{n.target} updates its statistics")
    return _normalise_groups(net, n, x, m.num_features, weight, bias, m.eps)


def _normalise_groups(net: Network, n, x, groups: int, weight: Constant | None, bias: Constant | None, eps: float):
    """Its weights are an affine map behind it, which passes fuse."""
    net.add(n, "group_norm", x, options={"groups": groups, "eps": eps}, channels=0)
    for kind, ref in (("mul", weight), ("add", bias)):
        if ref is not None:
            net.nodes.append(Node("affine", (net.index[n],), net.shape, f"{n.name}_{kind}", norm=Term(kind, ref)))
            net.index[n] = len(net.nodes) - 1


def _response_norm_module(net: Network, n, x, m):
    channels = range(len(net.shape) + 1)[m.channel_dim] - 1
    net.add(n, "response_norm", x, weight=_own(n, m, "weight"), bias=_own(n, m, "bias"), eps=m.eps, channels=channels)


def _own(n, module: nn.Module, name: str) -> Ref | None:
    return None if getattr(module, name) is None else Ref(str(n.target), name)


# ---- the tables -------------------------------------------------------------------------------------------------------------

MODULES: dict[type, Callable] = {
    nn.SiLU: _act_module("silu"), nn.Sigmoid: _act_module("sigmoid"), nn.Hardswish: _act_module("hardswish"),
    nn.Hardsigmoid: _act_module("hardsigmoid"), nn.ReLU6: _act_module("relu6"), nn.Tanh: _act_module("tanh"),
    nn.Mish: _act_module("mish"), nn.GELU: _gelu_module, nn.Hardtanh: _hardtanh_module, nn.LeakyReLU: _leaky_module,
    nn.PReLU: _prelu_module, nn.ELU: _elu_module, nn.Softplus: _softplus_module,
    nn.ZeroPad2d: _pad_module, nn.ConstantPad2d: _pad_module,
    nn.MaxPool2d: _pool, nn.AdaptiveMaxPool2d: _pool, nn.AvgPool2d: average, nn.AdaptiveAvgPool2d: average,
    nn.Upsample: _upsample, nn.UpsamplingNearest2d: _upsample, nn.UpsamplingBilinear2d: _upsample,
    nn.GroupNorm: _group_norm_module, nn.InstanceNorm2d: _instance_norm_module,
}  # fmt: skip
TIMM: dict[str, Callable] = {  # classes of timm.layers.activations and activations_me, by name: timm need not be installed
    **{name: _act_module("silu") for name in ("Swish", "SwishMe")},
    **{name: _act_module("mish") for name in ("Mish", "MishMe")},
    **{name: _act_module("hardswish") for name in ("HardSwish", "HardSwishMe")},
    **{name: _act_module("hardsigmoid") for name in ("HardSigmoid", "HardSigmoidMe")},
    "Sigmoid": _act_module("sigmoid"), "Tanh": _act_module("tanh"), "GELU": _act_module("gelu"),
    "GELUTanh": _act_module("gelu_tanh"), "PReLU": _prelu_module,
}  # fmt: skip


def of_timm(module: nn.Module) -> Callable | None:
    room = type(module).__module__
    if room == "timm.layers.grn" and type(module).__name__ == "GlobalResponseNorm":
        return _response_norm_module
    return TIMM.get(type(module).__name__) if room.startswith("timm.layers.activations") else None


_SIMPLE = {
    "silu": (F.silu,), "hardswish": (F.hardswish,), "hardsigmoid": (F.hardsigmoid,), "relu6": (F.relu6,), "mish": (F.mish,),
    "sigmoid": (F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"),
    "tanh": (F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"),
}  # fmt: skip
FUNCTIONS: dict[Any, Callable] = {
    **{f: _act_function(getattr(F, name), _named(name)) for name, functions in _SIMPLE.items() for f in functions},
    F.gelu: _act_function(F.gelu, _gelu_act),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _act_function(F.leaky_relu, _leaky_act)),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _act_function(F.hardtanh, _hardtanh_act)),
    **dict.fromkeys((F.elu, F.elu_), _act_function(F.elu, _elu_act)),
    F.softplus: _act_function(F.softplus, _softplus_act),
    **dict.fromkeys((torch.clamp, "clamp", "clamp_"), _act_function(torch.clamp, _clamp_act)),
    **dict.fromkeys((F.prelu, torch.prelu), _prelu),
    F.pad: _pad,
    F.avg_pool2d: _pool_by(
        nn.AvgPool2d, average, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    **dict.fromkeys(
        (F.max_pool2d, torch.max_pool2d),
        _pool_by(nn.MaxPool2d, _pool, "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    ),
    F.adaptive_avg_pool2d: _pool_by(nn.AdaptiveAvgPool2d, average, "output_size"),
    F.adaptive_max_pool2d: _pool_by(nn.AdaptiveMaxPool2d, _pool, "output_size", "return_indices"),
    F.interpolate: _interpolate,
    F.group_norm: _group_norm,
}

"""What the functions of transformers and of networks with their channels last are in a plan: rules as in rules.py.

A plan keeps samples apart and first. Where a model moves the batch (qkv.permute(2, 0, 3, 1, 4)) or merges it with other
dimensions (Swin's windows), the value stays as it is, and a `Form` says how the model sees it. Rules that are `form_aware` know
of that. All others refuse such values.
"""

import operator
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.layer_norm import MAX_CHANNELS
from .attention import Attend
from .constants import Call, Slot
from .nodes import CannotPlan, Computed, Constant, Form, Network, Ref, Term

AXES = "{} works along the batch"


def form_aware(rule: Callable) -> Callable:
    """Marks a rule that finds out the shape and form of its result itself."""
    rule.form_aware = True  # type: ignore[attr-defined]
    return rule


def first_axis(form: Form) -> int:
    """Of what comes behind the batch: in a plan's value of this form, merged or not."""
    return 2 if form.merged else 1


def axes(net: Network, n, x) -> list[int]:
    """The plan's dimension for each dimension that the model sees, 0 for the batch."""
    form, rank = net.form_of(x), len(net.shape_of(x)) + 1
    found = list(range(first_axis(form), rank))
    found.insert(form.at, 0)
    return found


def axis(net: Network, n, x, dim) -> int:
    """The plan's dimension for one that the model names. It is not the batch."""
    found = axes(net, n, x)
    dim = net.plain(dim)
    if not isinstance(dim, int) or not -len(found) <= dim < len(found) or found[dim] == 0:
        raise CannotPlan(AXES.format(n.name))
    return found[dim]


def check_first(net: Network, n, x) -> None:
    """That the batch, merged or not, is what the model sees first."""
    if net.form_of(x).at != 0:
        raise CannotPlan(f"{n.name} reads {x.name}, whose batch is dimension {net.form_of(x).at}")


# ---- views ------------------------------------------------------------------------------------------------------------------


@form_aware
def reshape(net: Network, n, x, *_, **__):
    """Memory order is kept, so samples stay apart where the first dimension is the batch, or merged with what comes behind it."""
    check_first(net, n, x)
    probes, shape = len(net.probe), tuple(net.result.shape)
    if len(shape) < 2 or shape[0] % probes or prod(shape) != probes * prod(net.shape_of(x)):
        raise CannotPlan(f"{n.name} has shape {shape} for a batch of {probes}: samples may mix")
    merged = shape[0] // probes
    form = Form(merged=merged > 1)
    net.shape = (merged, *shape[1:]) if merged > 1 else shape[1:]
    old, keeps = net.shape_of(x), net.channels_of(x) == 0
    first = keeps and len(net.shape) > 1 and not form.merged and old[0] == net.shape[0]
    net.add(n, "reshape", x, form=form, channels=0 if first else len(net.shape) - 1)


@form_aware
def permute(net: Network, n, x, *dims, **kwargs):
    order = kwargs.get("dims", dims[0] if len(dims) == 1 else dims)
    _permute(net, n, x, list(net.plain(order)))


@form_aware
def transpose(net: Network, n, x, dim0, dim1):
    order = list(range(len(axes(net, n, x))))
    a, b = net.plain(dim0), net.plain(dim1)
    order[a], order[b] = order[b], order[a]
    _permute(net, n, x, order)


def _permute(net: Network, n, x, order: list[int]):
    form, old = net.form_of(x), axes(net, n, x)
    order = [d % len(old) for d in order]
    dims = (*range(first_axis(form)), *(old[d] for d in order if old[d] != 0))
    net.shape = tuple(net.shape_of(x)[d - 1] for d in dims[1:])
    channels = dims.index(net.channels_of(x) + 1) - 1
    net.add(n, "permute", x, form=Form(order.index(form.at), form.merged), channels=channels, dims=dims)


@form_aware
def identity(net: Network, n, x, *_, **__):
    net.same(n, x)


@form_aware
def index(net: Network, n, x, item):
    """x[item] without tensors in `item`, and the parts of a tuple."""
    if x in net.parts:
        source, parts, form = net.parts[x]
        _index(net, n, source, parts[item], form)
        return
    if not net.is_value(x):
        raise CannotPlan(f"{n.name} indexes {x}")
    items = net.plain(item if isinstance(item, tuple) else (item,))
    form, old = net.form_of(x), axes(net, n, x)
    if any(not isinstance(i, (int, slice, type(None), type(Ellipsis))) for i in items):
        raise CannotPlan(f"{n.name} indexes by tensors or lists")
    rest = len(old) - sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis not in items:
        items = (*items, Ellipsis)
    at = items.index(Ellipsis)
    items = [*items[:at], *[slice(None)] * rest, *items[at + 1 :]]
    taken: list[slice | int | None] = [slice(None)] * first_axis(form)
    new_at, d, position = None, 0, 0
    for i in items:
        if i is None:
            if new_at is None:
                raise CannotPlan(AXES.format(n.name))
            taken.append(None)
            position += 1
            continue
        if d == form.at:
            if i != slice(None):
                raise CannotPlan(AXES.format(n.name))
            new_at, position = position, position + 1
        else:
            taken.append(i)
            position += not isinstance(i, int)
        d += 1
    assert new_at is not None
    _index(net, n, x, tuple(taken), Form(new_at, form.merged))


def _index(net: Network, n, x, items: tuple, form: Form):
    net.shape = tuple(torch.empty(1, *net.shape_of(x), device="meta")[items].shape[1:])
    if net.shape == net.shape_of(x) and all(isinstance(i, slice) for i in items):
        return net.same(n, x)
    return net.add(n, "index", x, form=form, dims=items)


@form_aware
def select(net: Network, n, x, dim, position):
    taken = axis(net, n, x, dim)
    form, seen = net.form_of(x), net.plain(dim) % len(axes(net, n, x))
    items = (*[slice(None)] * taken, net.plain(position))
    _index(net, n, x, items, Form(form.at - (seen < form.at), form.merged))


@form_aware
def narrow(net: Network, n, x, dim, start, length):
    taken, start, length = axis(net, n, x, dim), net.plain(start), net.plain(length)
    start %= net.shape_of(x)[taken - 1]
    _index(net, n, x, (*[slice(None)] * taken, slice(start, start + length)), net.form_of(x))


def _tuple(net: Network, n, x, items: list[tuple], form: Form | None = None):
    net.parts[n] = x, items, form or net.form_of(x)


def unbind(net: Network, n, x, dim=0):
    taken, form = axis(net, n, x, dim), net.form_of(x)
    seen = net.plain(dim) % len(axes(net, n, x))
    items = [(*[slice(None)] * taken, i) for i in range(net.shape_of(x)[taken - 1])]
    _tuple(net, n, x, items, Form(form.at - (seen < form.at), form.merged))


def split(net: Network, n, x, sizes, dim=0):
    taken, sizes = axis(net, n, x, dim), net.plain(sizes)
    length = net.shape_of(x)[taken - 1]
    if isinstance(sizes, int):
        sizes = [sizes] * (length // sizes) + [length % sizes] * (length % sizes > 0)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    _tuple(net, n, x, [(*[slice(None)] * taken, slice(e - s, e)) for s, e in zip(sizes, ends, strict=True)])


def chunk(net: Network, n, x, chunks, dim=0):
    length = net.shape_of(x)[axis(net, n, x, dim) - 1]
    split(net, n, x, -(-length // net.plain(chunks)), dim)


@form_aware
def roll(net: Network, n, x, shifts, dims):
    shifts, dims = ([v] if isinstance(v, int) else list(v) for v in (net.plain(shifts), net.plain(dims)))
    dims = [axis(net, n, x, d) for d in dims]
    net.shape = net.shape_of(x)
    back = partial(torch.roll, shifts=[-s for s in shifts], dims=dims)
    net.add(n, "moved", x, function=partial(torch.roll, shifts=shifts, dims=dims), back=back)


def check_usual(net: Network, n, *values) -> None:
    for x in values:
        if net.form_of(x) != Form():
            raise CannotPlan(f"{n.name} reads {x.name}, whose batch is moved or merged with other dimensions")


@form_aware
def cat(net: Network, n, tensors, dim=0):
    """Of values and of constants, such as a class token."""
    values = [t for t in tensors if net.is_value(t)]
    check_usual(net, n, *values)
    dim = axis(net, n, values[0], dim)
    parts, i = [], 0
    for t in tensors:
        parts.append(i if net.is_value(t) else net.ref(t))
        i += net.is_value(t)
        if not net.is_value(t) and len(net.tensor(t)) != 1:
            raise CannotPlan(f"{n.name} joins with {t.name}, which differs between samples")
    net.shape = tuple(net.result.shape[1:])
    net.add(n, "cat", *values, dims=(dim, *parts))


# ---- layers -----------------------------------------------------------------------------------------------------------------


@form_aware
def layer_norm(net: Network, n, x, normalized_shape, weight=None, bias=None, eps=1e-5):
    _layer_norm(net, n, x, net.plain(normalized_shape), net.ref(weight), net.ref(bias), net.plain(eps))


@form_aware
def layer_norm_module(net: Network, n, x, m: nn.LayerNorm):
    weight, bias = (None if getattr(m, name) is None else Ref(str(n.target), name) for name in ("weight", "bias"))
    _layer_norm(net, n, x, m.normalized_shape, weight, bias, m.eps)


def _layer_norm(net: Network, n, x, normalized, weight, bias, eps):
    last = axis(net, n, x, -1)
    net.shape = net.shape_of(x)
    if tuple(normalized) != net.shape[last - 1 :]:
        raise CannotPlan(f"{n.name} normalises over several dimensions: {tuple(normalized)}")
    if normalized[0] > MAX_CHANNELS:
        raise CannotPlan(f"{n.name} normalises over {normalized[0]} channels, more than {MAX_CHANNELS}")
    net.add(n, "layer_norm", x, weight=weight, bias=bias, eps=eps, channels=last - 1)


@form_aware
def linear(net: Network, n, x, weight, bias=None):
    dense(net, n, x, net.ref(weight), net.ref(bias))


@form_aware
def linear_module(net: Network, n, x, m: nn.Linear):
    dense(net, n, x, Ref(str(n.target), "weight"), None if m.bias is None else Ref(str(n.target), "bias"))


def dense(net: Network, n, x, weight, bias):
    axis(net, n, x, -1)
    net.shape = (*net.shape_of(x)[:-1], net.result.shape[-1])
    net.add(n, "linear", x, weight=weight, bias=bias, channels=len(net.shape) - 1)


@form_aware
def attention(net: Network, n, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Of three values. The mask is a constant: [..., N, N], for each sample the same."""
    if net.plain(dropout_p):
        raise CannotPlan(f"{n.name} is dropout in training mode, which draws random numbers")
    if net.is_tensor(scale):
        raise CannotPlan(f"{n.name} has a tensor as its scale, whose value may change")
    form = net.form_of(query)
    if not all(net.is_value(t) for t in (query, key, value)):
        raise CannotPlan(f"{n.name} attends to constants")
    if any(net.form_of(t) != form for t in (key, value)) or form.at != 0:
        raise CannotPlan(f"{n.name} reads values whose batch is moved")
    if net.is_value(attn_mask):
        raise CannotPlan(f"{n.name} has a mask that depends on the images")
    mask = () if attn_mask is None else (constant(net, n, query, attn_mask),)
    net.shape = (*net.shape_of(query)[:-1], net.shape_of(value)[-1])
    settings = {"is_causal": net.plain(is_causal), "scale": net.plain(scale), "enable_gqa": net.plain(enable_gqa)}
    function = Attend(form.merged, {k: v for k, v in settings.items() if v})
    net.add(n, "attention", query, key, value, function=function, constants=mask, channels=len(net.shape) - 1)


@form_aware
def softmax(net: Network, n, x, dim=None, dtype=None, **_):
    if dim is None or net.plain(dtype) is not None:
        raise CannotPlan(f"{n.name} gives no dimension, or another dtype")
    _softmax(net, n, x, net.plain(dim))


@form_aware
def softmax_module(net: Network, n, x, m: nn.Softmax):
    _softmax(net, n, x, m.dim)


def _softmax(net: Network, n, x, dim):
    dim = axis(net, n, x, dim)
    net.shape = net.shape_of(x)
    net.add(n, "softmax", x, dims=(dim,))


@form_aware
def matmul(net: Network, n, a, b):
    """Of two values, sample by sample, as in attention that is written out."""
    if not (net.is_value(a) and net.is_value(b)):
        raise CannotPlan(f"{n.name} multiplies values by a matrix that depends on no image")
    form, shapes = net.form_of(a), (net.shape_of(a), net.shape_of(b))
    if form.at != 0 or net.form_of(b) != form or len(shapes[0]) != len(shapes[1]) or len(shapes[0]) < 2 + form.merged:
        raise CannotPlan(f"{n.name} multiplies values whose samples lie differently")
    if shapes[0][:-2] != shapes[1][:-2]:
        raise CannotPlan(f"{n.name} broadcasts one of two values")
    net.shape = (*shapes[0][:-1], shapes[1][-1])
    net.add(n, "matmul", a, b, channels=len(net.shape) - 1)


@form_aware
def normalize(net: Network, n, x, p=2.0, dim=1, eps=1e-12, out=None):
    dim = axis(net, n, x, dim)
    net.shape = net.shape_of(x)
    if net.plain(p) == 2:
        net.add(n, "normalize", x, dims=(dim,), eps=net.plain(eps))
    else:
        net.add(n, "local", x, function=partial(F.normalize, p=net.plain(p), dim=dim, eps=net.plain(eps)))


# ---- constants --------------------------------------------------------------------------------------------------------------


def constant(net: Network, n, x, a) -> Constant:
    """The constant `a` as it broadcasts with the plan's value of x: the same for all samples."""
    ref, form, given = net.ref(a), net.form_of(x), net.tensor(a)
    assert ref is not None
    rank = len(axes(net, n, x))
    if given.ndim > rank or form.at != 0:
        raise CannotPlan(f"{n.name} broadcasts values along the batch")
    if given.ndim < rank:
        return ref
    groups = net.shape_of(x)[0] if form.merged else 1
    if len(given) not in (1, groups) or (len(net.env[a]) == len(given) and len(given) != 1):
        raise CannotPlan(f"{n.name} combines values with {a.name}, which differs between samples")
    return Computed((ref, Call("call_method", "unsqueeze", (Slot(0), 0), {}))) if form.merged else ref


def combine(net: Network, n, x, kind: str, a) -> bool:
    """Add the node for x op a tensor, one number for a channel or of any shape that broadcasts. False: it makes x larger."""
    given, shape = net.tensor(a) if net.ref(a) is not None else None, net.shape_of(x)
    assert given is not None
    values = constant(net, n, x, a)
    seen = (0,) * (len(axes(net, n, x)) - given.ndim) + tuple(given.shape)
    sizes = [s for s, at in zip(seen, axes(net, n, x), strict=True) if at >= first_axis(net.form_of(x))]
    wide = [i for i, s in enumerate(sizes, len(shape) - len(sizes)) if s > 1]
    if any(sizes[i - len(shape)] != shape[i] for i in wide):
        return False
    net.shape = shape
    alike = given.ndim < len(axes(net, n, x)) or len(given) == 1
    if given.numel() == 1 or (alike and len(wide) == 1 and (wide[0] == net.channels_of(x) or (wide[0] == 0 and len(shape) == 3))):
        net.add(n, "affine", x, norm=Term(kind, values), channels=wide[0] if wide else net.channels_of(x))
        return True
    net.add(n, "combine", x, norm=Term(kind, values))
    return True


# ---- the tables -------------------------------------------------------------------------------------------------------------

RESHAPES = (
    torch.flatten, torch.reshape, torch.unflatten, torch.squeeze, torch.unsqueeze, "flatten", "view", "reshape", "unflatten",
    "squeeze", "unsqueeze", "reshape_as", "view_as",
)  # fmt: skip
MODULES: dict[type, Callable] = {
    nn.LayerNorm: layer_norm_module,
    nn.Linear: linear_module,
    nn.Softmax: softmax_module,
    **dict.fromkeys((nn.Flatten, nn.Unflatten), reshape),
}
FUNCTIONS: dict[Any, Callable] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.linear: linear,
    F.scaled_dot_product_attention: attention,
    F.normalize: normalize,
    **dict.fromkeys((torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm"), matmul),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), softmax),
    operator.getitem: index,
    **dict.fromkeys(RESHAPES, reshape),
    **dict.fromkeys((torch.permute, "permute"), permute),
    **dict.fromkeys((torch.transpose, torch.swapaxes, "transpose", "swapaxes"), transpose),
    **dict.fromkeys((torch.select, "select"), select),
    **dict.fromkeys((torch.narrow, "narrow"), narrow),
    **dict.fromkeys((torch.cat, torch.concat), cat),
    **dict.fromkeys((torch.roll, "roll"), roll),
}
TUPLES: dict[Any, Callable] = {
    **dict.fromkeys((torch.unbind, "unbind"), unbind),
    **dict.fromkeys((torch.chunk, "chunk"), chunk),
    **dict.fromkeys((torch.split, "split"), split),
}

"""The ops, called directly: the C++ and the reference give the same, or both refuse by an error that names an argument."""

import functools
import math
import re

import torch
from hypothesis import strategies as st
from torch import Tensor

from spat_kernels.ops.scale_shift_act import LEAKY
from tests.fuzz.campaign import Target
from tests.ops.helpers import ELSEWHERE, acc

# What an op's arguments are like. Kinds of tensors are in `_tensor`; a "?" may be left out. Others are numbers of their type.
ARGUMENTS = {
    "linf_random_start_": "x_adv:image x:image eps:radius seed:pair lo hi",
    "linf_step_": "x_adv:image x:image grad:gradient eps:radius step_size:radius lo hi nan_seen:?seen hash:?int64",
    "l2_step_": "x_adv:image x:image grad:gradient eps:radius step_size:radius lo hi nan_seen:?seen",
    "adt_sample_": "x_adv:image mu:wide rho:wide x:image eps:radius seed:pair draw lo hi",
    "adt_step_": "x_adv:image mu:wide rho:wide x:image grad:gradient eps:radius factor:radius seed:pair draw lr entropy lo hi "
    "nan_seen:?seen sum_mu:?wide sum_rho:?wide last",
    "lsce_grad": "logits:rows labels:labels dlogits:rows loss:?each alpha targeted scale normalize",
    "kl_grad": "logits:rows probs:probs dlogits:rows loss:?each scale",
    "margin_grad": "logits:rows labels:labels dlogits:rows loss:?each kappa targeted scale",
    "pma_grad": "logits:rows labels:labels dlogits:rows loss:?each targeted scale normalize",
    "dlr_grad": "logits:rows labels:labels targets:?labels dlogits:rows loss:?each scale",
    "keep_best_": "best:image best_loss:each best_success:?flags x_adv:image loss:each success:?flags",
    "scale_shift_relu": "a:map b:?map scale:?vector shift:?vector total:?map out:map mask:?mask relu",
    "scale_shift_relu_grad": "grad:map grad2:?map mask:?mask scale:?vector residual:?map dx:map",
    "scale_shift_act": "a:map b:?map scale:?vector shift:?vector negative:?vector total:?map out:map slope:?map act",
    "scale_shift_act_grad": "grad:map grad2:?map slope:map residual:?map dx:map",
    "layer_norm": "a:normed b:?normed weight:?normed_vector bias:?normed_vector total:?normed out:normed mean:?normed_rows "
    "rstd:?normed_rows eps channels",
    "layer_norm_grad": "grad:normed grad2:?normed t:normed mean:normed_rows rstd:normed_rows weight:?normed_vector "
    "residual:?normed dx:normed channels",
    "split_image": "x:map32 scale:?vector32 shift:?vector32 out:split",
    "pool_linear": "x:map weight:head bias:?classes logits:head_rows",
    "pool_linear_grad": "dlogits:head_rows weight:head mask:?mask scale:?vector factor:?each dx:map",
    "crop_flip": "images:pixels rows:picks ids:int64 seed:pair out:crops pad flip",
}
EXACT = ("linf", "adt", "keep_best", "scale_shift_relu", "scale_shift_act_grad", "split_image", "crop_flip")
TOLERANCES = {torch.float64: 1e-7, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DTYPES = tuple(TOLERANCES)
EXTREMES = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 6e-8, -6e-8, 3e38, -3e38, 1.0])
DOCUMENTED = (RuntimeError, TypeError, ValueError)  # NotImplementedError is a RuntimeError

FLOATS = st.sampled_from([0.0, 1.0, 0.1, -1.0, 1e-3, 8 / 255, 1e30, -0.0]) | st.floats()
USUAL = {
    "lo": 0.0,
    "hi": 1.0,
    "eps": 1e-5,
    "alpha": 0.1,
    "scale": 1.0,
    "kappa": 0.0,
    "lr": 0.3,
    "entropy": 0.01,
    "draw": 3,
    "pad": 2,
    "act": 0,
    "channels": -1,
    "targeted": False,
    "normalize": False,
    "relu": True,
    "flip": True,
    "last": True,
}
WRONG = (None, "1", 1.5, 2**63, -1, [1], 1j)  # in the place of a number
MUTATIONS = {
    "int32": lambda t: t.int(),
    "float64": lambda t: t.double(),
    "float32": lambda t: t.float(),
    "half": lambda t: t.half(),
    "bool": lambda t: t.bool(),
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.byte(),
    "uint16": lambda t: t.to(torch.uint16),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: t.to(torch.complex64),
    "shorter": lambda t: t[:-1],
    "empty": lambda t: t[:0],
    "reversed": lambda t: t.flip(0),
    "one more": lambda t: torch.cat((t, t[:1])),
    "[None]": lambda t: t[None],
    "flat": lambda t: t.reshape(-1),
    "scalar": lambda t: t.reshape(-1)[:1].sum().to(t.dtype),
    "column": lambda t: t.reshape(-1, 1),
    "strided": lambda t: torch.stack((t, t), -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "wide strides": lambda t: torch.as_strided(t, t.shape, [2**40] * t.ndim),
    "odd strides": lambda t: torch.as_strided(t, t.shape, [s + (n == 1) * 97 for n, s in zip(t.shape, t.stride(), strict=True)]),
    "offset": lambda t: torch.cat((t.reshape(-1)[:1], t.reshape(-1)))[1:].view(t.shape),
    "negative bit": torch._neg_view,
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 1, 0, torch.quint8),
    "mkldnn": lambda t: t.contiguous().to_mkldnn(),
    "inference": lambda t: _inference(t),
    "zero": lambda t: t.zero_(),
    "none": lambda t: None,
    "number": lambda t: 1.0,
    "text": lambda t: "x",
    "lazy zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


def _inference(t):
    with torch.inference_mode():
        return t.clone()


@st.composite
def inputs(draw):
    op = draw(st.sampled_from(sorted(ARGUMENTS)))
    names = [word.split(":")[0] for word in ARGUMENTS[op].split()]
    tensors = [word.split(":")[0] for word in ARGUMENTS[op].split() if ":" in word]
    optional = [word.split(":")[0] for word in ARGUMENTS[op].split() if ":?" in word]
    size = st.sampled_from([1, 2, 3, 4, 0]) | st.integers(0, 20)
    return {
        "op": op,
        "seed": draw(st.integers(0, 999)),
        "dtype": draw(st.sampled_from(range(4))),
        "grad_dtype": draw(st.sampled_from(range(3))),
        "batch": draw(size),
        "channels": draw(size | st.sampled_from([64, 100, 130])),
        "sizes": draw(st.lists(size, max_size=3)),
        "classes": draw(size | st.sampled_from([3, 10, 100, 1000, 1025])),
        "last": draw(st.booleans()),
        "each": draw(st.booleans()),
        "extreme": draw(st.booleans()),
        "without": draw(st.lists(st.sampled_from(optional), unique=True)) if optional else [],
        "numbers": draw(
            st.dictionaries(
                st.sampled_from(numbers), FLOATS | st.sampled_from(WRONG) | st.integers(-3, 13) | st.booleans(), max_size=2
            )
        )
        if (numbers := [n for n in names if n not in tensors])
        else {},
        "mutations": draw(st.lists(st.tuples(st.sampled_from(tensors), st.sampled_from(sorted(MUTATIONS))), max_size=2)),
        "same": draw(st.lists(st.lists(st.sampled_from(tensors), min_size=2, max_size=2, unique=True).map(tuple), max_size=1))
        if len(tensors) > 1
        else [],
    }


def arguments(given: dict) -> dict:
    """The arguments by name, the same each time."""
    generator = torch.Generator().manual_seed(given["seed"])
    made: dict = {}
    for word in ARGUMENTS[given["op"]].split():
        name, _, kind = word.partition(":")
        if not kind:
            usual = LEAKY if name == "act" and "negative" in made and made["negative"] is not None else USUAL[name]
            usual = 1 if name == "channels" and given["last"] else usual
            made[name] = given["numbers"].get(name, usual)
        else:
            made[name] = None if kind[0] == "?" and name in given["without"] else _tensor(kind.strip("?"), given, generator)
    for name, kind in given["mutations"]:
        if isinstance(made[name], Tensor):
            made[name] = MUTATIONS[kind](made[name])
    for name, other in given["same"]:
        if isinstance(made[other], Tensor):
            made[name] = made[other]
    return made


def _tensor(kind: str, given: dict, generator) -> Tensor:
    dtype, batch, channels, sizes, classes = (
        DTYPES[given["dtype"]],
        *(given[k] for k in ("batch", "channels", "sizes", "classes")),
    )
    grad_dtype = torch.float64 if dtype == torch.float64 else DTYPES[1:][given["grad_dtype"]]
    rows = batch * math.prod(sizes)
    last = given["last"] and given["op"].startswith("layer_norm")
    normed, norms = ((batch, channels, *sizes), channels) if last else ((batch, *sizes, channels), channels)
    spatial = (*sizes, 2, 3)[:2]
    shapes = {
        "image": ((batch, channels, *sizes), dtype),
        "gradient": ((batch, channels, *sizes), grad_dtype),
        "wide": ((batch, channels, *sizes), acc(dtype)),
        "radius": ((batch if given["each"] else 1,), acc(dtype)),
        "pair": ((2,), torch.int64),
        "seen": ((batch,), torch.uint8),
        "int64": ((batch,), torch.int64),
        "flags": ((batch,), torch.bool),
        "each": ((batch,), acc(dtype)),
        "rows": ((batch, classes), dtype),
        "probs": ((batch, classes), acc(dtype)),
        "labels": ((batch,), torch.int64),
        "map": ((batch, channels, *sizes), dtype),
        "vector": ((channels,), acc(dtype)),
        "mask": ((rows, -(-channels // 8)), torch.uint8),
        "normed": (normed, dtype),
        "normed_vector": ((norms,), acc(dtype)),
        "normed_rows": ((rows,), acc(dtype)),
        "map32": ((batch, channels, *spatial), torch.float32),
        "vector32": ((channels,), torch.float32),
        "split": ((batch, 2 * channels + 1, *spatial), DTYPES[2 + given["dtype"] % 2]),
        "head": ((classes, channels), acc(dtype)),
        "classes": ((classes,), acc(dtype)),
        "head_rows": ((batch, classes), acc(dtype)),
        "pixels": ((5, *spatial, channels), torch.uint8),
        "picks": ((batch,), torch.int64),
        "crops": ((batch, channels, *spatial), dtype),
    }
    shape, dtype = shapes[kind]
    numel = math.prod(shape)
    if kind in ("labels", "picks"):
        t = torch.randint(-1, (classes if kind == "labels" else 5) + 1, shape, generator=generator)
    elif not dtype.is_floating_point:
        t = torch.randint(2 if kind in ("flags", "seen") else 256, shape, generator=generator).to(dtype)
    else:
        t = torch.randn(numel, generator=generator)
        if kind == "probs" and classes:
            t = t.view(shape).softmax(1).flatten()
        if kind == "radius":
            t = t.abs()
        elif given["extreme"]:
            t[::7] = EXTREMES[torch.randint(len(EXTREMES), t[::7].shape, generator=generator)]
        t = t.view(shape).to(dtype)
    images = kind in ("image", "gradient", "wide", "crops") and given["last"]
    if (images or kind in ("map", "map32", "split") or (kind == "normed" and last)) and t.ndim > 2:
        t = t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t


def trial(given: dict) -> str:
    op = given["op"]
    try:
        ours, theirs, before = (arguments(given) for _ in range(3))
    except (*DOCUMENTED, IndexError):
        return "no input"  # the change does not apply to such a tensor
    overload = getattr(torch.ops.spat, op).default
    found = _refusal(overload, ours)
    expected = _refusal(functools.partial(overload.redispatch, ELSEWHERE), theirs)
    if "inference tensor" in f"{found} {expected}":
        return "refused"  # by torch, after it is written
    assert bool(found) == bool(expected), f"{op}: compiled {found or 'takes it'}, reference {expected or 'takes it'}"
    if found:
        same(op, ours, before)
        return "refused"
    same(op, ours, theirs, moderate=not given["extreme"] and not given["numbers"] and not given["same"])
    return "held"


def _refusal(call, args: dict) -> str | None:
    """What an error says, which names an argument."""
    try:
        call(*args.values())
    except DOCUMENTED as error:
        message = str(error)
        named = any(re.search(rf"\b{name}\b", message) for name in args)
        assert named or "spat::" in message or "inference" in message, f"no argument is named: {message}"
        return message
    return None


def _is_ordinary(t: Tensor) -> bool:
    """Whether torch compares it."""
    if t.dtype not in (*DTYPES, torch.int64, torch.uint8, torch.bool):
        return False
    return t.layout == torch.strided and not (t.is_nested or t.is_meta or t.is_neg() or t.is_conj() or torch._is_zerotensor(t))


def same(op: str, ours: dict, theirs: dict, moderate: bool = True) -> None:
    """What the op wrote is what the reference wrote; the rest is as it was."""
    schema = {a.name: a for a in getattr(torch.ops.spat, op).default._schema.arguments}
    written = {name for name, a in schema.items() if a.alias_info and a.alias_info.is_write}
    for name, found in ours.items():
        if not isinstance(found, Tensor) or not _is_ordinary(found):
            continue
        expected = theirs[name]
        shared = any(found is other for key, other in ours.items() if key in written)
        exact = not shared or op.startswith(EXACT) or not found.is_floating_point()
        if exact and not (op.startswith("adt") and found.dtype == torch.float64):
            equal = (found == expected) | (found != found) & (expected != expected)  # which zero a clamp gives is the processor's
            assert equal.all() or (name == "hash" and not moderate), f"{op} gives another {name}"
        elif moderate:
            tolerance = TOLERANCES[found.dtype]
            torch.testing.assert_close(
                found.detach(),
                expected.detach(),
                rtol=tolerance,
                atol=tolerance,
                equal_nan=True,
                msg=lambda text, name=name: f"{op} gives another {name}: {text}",
            )


OPS = Target(inputs(), trial)

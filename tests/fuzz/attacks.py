"""The attacks and their functions: an image in ball and box, or a TypeError or ValueError that names an argument; no trace."""

import inspect
import re
import warnings
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

import spat_kernels
from tests.fuzz.campaign import Target
from tests.helpers import assert_inside, assert_same, snapshot

CLASSES = 5
FUNCTIONS = {"pgd", "pgd_ls", "pgd_kl", "fgsm", "cw_linf"}
KINDS = (*sorted(FUNCTIONS), "PGD", "APGD", "FAB", "Square", "AutoAttack", "ADT")
FAST = {"steps": 2, "queries": 3}  # where nothing else is drawn
VALUES: dict[str, tuple] = {  # settings that are right by themselves; some do not go together
    "eps": (8 / 255, 0.5, 0.0, 1e-8, 1, np.float64(0.1), Fraction(1, 9), "tensor", "per sample"),
    "norm": ("linf", "l2", "l1", "L2"),
    "bounds": ((0.0, 1.0), (-1, 2), [0, 1]),
    "bn_mode": ("eval", "train", "keep"),
    "precision": (None, "fp32", "tf32", "bf16", "fp16", "half"),
    "input_gradient": ("auto", "plan", "autograd"),
    "fuse": ("auto", True, False),
    "graph": ("auto", False),
    "budget": (None, 1, 3, 10, "per sample"),
    "generator": ("generator",),
    "restarts": (1, 2, 3),
    "targeted": (False, True),
    "select": ("success", "loss"),
    "stop": (None, "success", "cycle", "exact"),
    "steps": (0, 1, 2, 4),
    "step_size": (None, 0.01, 0.0, 5.0, "per sample"),
    "random_start": (True, False),
    "loss": ("ce", "kl", "margin", "dlr", "pma", "mmc", "own"),
    "rho": (0.75, 0, 1),
    "eot": (1, 2),
    "targets": (None, 1, 9),
    "targeting": ("confidence", "malt"),
    "multi_eps": (None, True, False),
    "alpha_max": (0.1, 0.0, 1.0),
    "eta": (1.05, 1, 3.0),
    "beta": (0.9, 1.0),
    "queries": (0, 1, 5),
    "p_init": (0.8, 1.0, 1e-3),
    "rescale": (True, False),
    "version": ("standard", "fast", "plus", "rand", ("apgd-ce",), ("square", "fab-t")),
    "exhaustive": (False, True),
    "seed": (0, 1, 2**31),
    "batch_size": (None, 1, 2),
    "lr": (0.3, 0, 1e6),
    "entropy": (0.01, 0, 1e6),
    "samples": (1, 2),
    "alpha": (0.2, 0.0, 0.5),
    "kappa": (0.0, 50.0, np.float32(1)),
    "start": (None, "start"),
}
ENDLESS = 2**70
WRONG = (
    None,
    "x",
    "",
    -1,
    0,
    3,
    True,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e300,
    5e-324,
    ENDLESS,
    -0.0,
    (),
    [1],
    (1, 2, 3),
    (1, 0),
    ("x", 1),
    b"x",
    1j,
    {},
    np.ones(3),
    "nan tensor",
    "integer tensor",
    "wrong tensor",
    "complex tensor",
    "bool tensor",
    "empty tensor",
    (0.0, float("nan")),
    (-1e300, 1e300),
    (0.0, 1e-300),
    ("apgd-ce", 3),
    [[]],
    "negative tensor",
)
DRAWING = ("train", "keep")  # modes in which dropout draws
COUNTS = ("steps", "restarts", "queries", "eot", "samples", "targets")
MODELS = ("linear", "cnn", "train mode", "mixed", "function", "constant", "huge", "nan", "two classes", "random")
IMAGES = {
    "right": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "none": lambda x: x[:0],
    "one": lambda x: x[:1],
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
    "edges": lambda x: x.round(),
    "needs grad": lambda x: x.clone().requires_grad_(),
    "negative bit": lambda x: torch._neg_view(-x),
    "outside": lambda x: x + 0.7,
    "nan": lambda x: x.masked_fill(x > 0.9, float("nan")),
    "inf": lambda x: x / 0,
    "uint8": lambda x: (x * 255).byte(),
    "no batch": lambda x: x[0, 0, 0],
    "scalar": lambda x: x.sum(),
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "missing": lambda x: None,
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "parameter": lambda x: nn.Parameter(x),
}
LABELS = {
    "right": lambda y: y,
    "missing": lambda y: None,
    "int32": lambda y: y.int(),
    "float": lambda y: y.float(),
    "shorter": lambda y: y[:-1],
    "column": lambda y: y[:, None],
    "one-hot": lambda y: nn.functional.one_hot(y, CLASSES),
    "too high": lambda y: y + CLASSES,
    "ignored": lambda y: y - CLASSES,
    "list": lambda y: y.tolist(),
    "number": lambda y: 1,
    "strided": lambda y: torch.stack((y, y), -1)[:, 0],
    "negative bit": lambda y: torch._neg_view(-y),
    "expanded": lambda y: y[:1].expand(y.shape),
    "huge": lambda y: y + 2**62,
    "sparse": lambda y: y.to_sparse(),
    "meta": lambda y: y.to("meta"),
}


class Noisy(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :CLASSES] + torch.rand(len(x), CLASSES, dtype=x.dtype)


class Undefined(nn.Module):
    def forward(self, z):
        return z.masked_fill(z > 0, float("nan"))


def _model(kind: str) -> nn.Module:
    def net(classes=CLASSES):
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, classes)
        )

    model = {
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES)),
        "two classes": lambda: net(2),
        "random": Noisy,
    }.get(kind, net)()
    model.train(kind == "train mode")
    if kind == "mixed":
        model[1].train()
        model[0].bias.requires_grad_(False)
        model[-1].weight.grad = torch.ones_like(model[-1].weight)
    with torch.no_grad():
        if kind in ("constant", "huge"):
            model[-1].weight.mul_({"constant": 0.0, "huge": 1e30}[kind])
    return nn.Sequential(model, Undefined()).train(model.training) if kind == "nan" else model


def _parameters(kind: str) -> list[str]:
    call = getattr(spat_kernels, kind)
    return [name for name in inspect.signature(call).parameters if name not in ("model", "x", "y", "settings")]


@st.composite
def inputs(draw):
    kind = draw(st.sampled_from(KINDS))
    names = sorted(
        {*_parameters(kind), *(["steps", "norm", "bounds", "generator", "restarts"] if kind in FUNCTIONS else [])} & VALUES.keys()
    )
    right = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), st.sampled_from(VALUES[name])))
    settings = dict(draw(st.lists(right, max_size=6)))
    if draw(st.integers(0, 2)) == 0:
        settings[draw(st.sampled_from(names))] = draw(st.sampled_from(WRONG))
    usual = st.just("right")
    return {
        "kind": kind,
        "model": draw(st.sampled_from(MODELS)),
        "images": draw(usual | st.sampled_from(sorted(IMAGES))),
        "labels": draw(usual | usual | st.sampled_from(sorted(LABELS))),
        "seed": draw(st.integers(0, 999)),
        "settings": settings,
    }


def _setting(value, name: str, x, batch: int):
    """What a drawn word stands for; other values are themselves."""
    if not isinstance(value, str):
        return value
    tensors = {
        "tensor": lambda: torch.tensor(0.1),
        "per sample": lambda: torch.tensor([1, 2, 3, 4]) if name == "budget" else torch.rand(batch) / 9,
        "nan tensor": lambda: torch.full((batch,), float("nan")),
        "integer tensor": lambda: torch.ones(batch, dtype=torch.int64),
        "wrong tensor": lambda: torch.rand(7, 2),
        "complex tensor": lambda: torch.rand(batch).to(torch.complex64),
        "bool tensor": lambda: torch.ones(batch, dtype=torch.bool),
        "empty tensor": lambda: torch.ones(0),
        "negative tensor": lambda: -torch.ones(batch),
        "generator": lambda: torch.Generator().manual_seed(3),
        "start": lambda: x,
        "own": lambda: lambda z, y: -z.gather(1, y[:, None])[:, 0],
    }
    return tensors[value]() if value in tensors else value


def trial(given: dict) -> str:
    torch.manual_seed(given["seed"])
    model = _model(given["model"])
    called = (lambda x: model(x)) if given["model"] == "function" else model
    clean, right = torch.rand(4, 3, 6, 6), torch.randint(2 if given["model"] == "two classes" else CLASSES, (4,))
    try:
        x, y = IMAGES[given["images"]](clean), LABELS[given["labels"]](right)
        if given["images"] in ("none", "one") and isinstance(y, torch.Tensor):
            y = y[: len(x)]
    except (RuntimeError, TypeError):  # NotImplementedError too: sparse labels have no part
        return "no input"
    if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
        model.double()
    if any(given["settings"].get(name) is ENDLESS for name in COUNTS):
        return "no input"
    settings = {name: _setting(v, name, clean, 4) for name, v in given["settings"].items()}
    before, state = _state(model, clean, right), torch.get_rng_state()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x_adv = _attack(given["kind"], called, x, y, settings)
    except (TypeError, ValueError) as error:
        _check_message(str(error), given)
        x_adv = None
    except RuntimeError as error:
        assert _models_own(error), f"{given['kind']}: RuntimeError {str(error).splitlines()[0]}"
        x_adv = None
    assert_same(before, _state(model, clean, right))
    assert (threads, grad) == (torch.get_num_threads(), torch.is_grad_enabled())
    drawn = given["model"] in ("random", "train mode", "mixed") or str(settings.get("bn_mode")) in DRAWING  # by the model
    if x_adv is None:
        assert torch.equal(torch.get_rng_state(), state) or drawn, f"{given['kind']} draws numbers before it refuses"
        return "refused"
    assert torch.equal(torch.get_rng_state(), state) or drawn or settings.get("generator") is None, "draws beside the generator"
    if len(x):
        norm = {"L2": "l2"}.get(settings.get("norm", "linf"), settings.get("norm", "linf"))
        eps = settings.get("eps", 8 / 255)
        eps = eps if isinstance(eps, torch.Tensor) else float(eps)
        eps = eps[: len(x)] if isinstance(eps, torch.Tensor) and eps.numel() > 1 else eps
        assert_inside(x_adv, x.detach(), eps, norm, tuple(settings.get("bounds", (0.0, 1.0))))
    assert x_adv.shape == x.shape
    return "held"


def _attack(kind: str, model, x, y, settings: dict):
    taken = inspect.signature(getattr(spat_kernels, kind)).parameters
    settings = {"eps": 8 / 255} | {name: v for name, v in FAST.items() if name in taken} | settings
    if kind not in FUNCTIONS:
        return getattr(spat_kernels, kind)(**settings)(model, x, y)
    if kind == "pgd_ls":
        settings = {"alpha": 0.2} | settings
    return getattr(spat_kernels, kind)(model, x, y, **settings)


def _state(model, x, y) -> dict:
    return snapshot(model, x.detach(), y)


def _check_message(message: str, given: dict) -> None:
    kind = given["kind"]
    assert "\n" not in message, f"{kind}: more than one line: {message[:200]}"
    names = {"model", "x", "y", *VALUES, "settings"}
    assert any(re.search(rf"\b{name}\b", message) for name in names), f"{kind} names no argument: {message[:200]}"


def _models_own(error: RuntimeError) -> bool:
    """Whether the model raised it, as on images of a dtype that it does not take."""
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_name in ("_conv_forward", "forward"):
            return True
        trace = trace.tb_next
    return False


ATTACKS = Target(inputs(), trial)
